"""Samplers run programs and yield weighted steps. Imports ``kernels``, ``objectives`` and ``programs``."""
