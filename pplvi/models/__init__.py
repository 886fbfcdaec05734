"""Directed models of the literature as Pyro programs, and how they learn. Imports ``guides`` and what stands below."""

from pplvi.models.binary_sparse_coding import BinaryMeanField, BinarySparseCoding, learn_binary_coding
from pplvi.models.lista import LISTA
from pplvi.models.sparse_coding import SparseCoding, learn_dictionary

__all__ = ["LISTA", "BinaryMeanField", "BinarySparseCoding", "SparseCoding", "learn_binary_coding", "learn_dictionary"]
