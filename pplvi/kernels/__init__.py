"""Markov kernels with tractable densities there and back. Imports ``objectives`` and ``programs``."""
