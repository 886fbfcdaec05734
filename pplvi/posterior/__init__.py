"""Posteriors: draws, weights, verdict, leave-one-out and pictures. Imports ``programs`` and ``weights``."""
