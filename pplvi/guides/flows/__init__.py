"""Normalizing flows as guides, on zuko."""
