"""Directed models of the literature as Pyro programs, and how they learn. Imports ``guides`` and what stands below."""

from pplvi.models.sparse_coding import SparseCoding, learn_dictionary

__all__ = ["SparseCoding", "learn_dictionary"]
