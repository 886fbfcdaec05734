"""Models that have draws and no density, and what they learn from."""
