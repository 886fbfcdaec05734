"""Coordinate ascent on unchanged programs: latent sites as symbols, expectations of log densities as einsums."""
