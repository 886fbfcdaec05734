"""Directed models with layers of latent variables."""
