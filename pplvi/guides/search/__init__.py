"""Guides that find themselves: Pathfinder, batch and match, deterministic ADVI."""
