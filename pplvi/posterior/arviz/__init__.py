"""Posteriors as ArviZ data: every group of its schema."""
