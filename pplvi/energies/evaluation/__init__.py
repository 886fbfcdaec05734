"""Judging machines: partition functions, monitors and pictures."""
