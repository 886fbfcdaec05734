"""Data-parallel training: one plate over the ranks of a process group. Imports what ``training`` may import."""
