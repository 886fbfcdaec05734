"""Benchmarks: one module for each, all of them run by ``python -m benchmarks``."""
