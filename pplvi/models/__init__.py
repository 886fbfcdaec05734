"""Directed models of the literature, and how they learn. Imports ``losses``, ``guides`` and what stands below."""

from pplvi.models.autoregressive.masked import MADE, FullyVisibleBeliefNetwork
from pplvi.models.autoregressive.nade import NADE, RNADE
from pplvi.models.autoregressive.orderless import OrderlessNADE
from pplvi.models.binary_sparse_coding import BinaryMeanField, BinarySparseCoding, learn_binary_coding
from pplvi.models.implicit.generator import Generator
from pplvi.models.implicit.losses import Adversarial, MomentMatching, maximum_mean_discrepancy
from pplvi.models.latent.deep_gaussian import DeepLatentGaussian
from pplvi.models.latent.linear_gaussian import FactorAnalysis, GaussianBeliefNetwork, ProbabilisticPCA
from pplvi.models.latent.sigmoid import SigmoidBeliefNetwork
from pplvi.models.lista import LISTA
from pplvi.models.sparse_coding import SparseCoding, learn_dictionary

__all__ = [
    "LISTA",
    "MADE",
    "NADE",
    "RNADE",
    "Adversarial",
    "BinaryMeanField",
    "BinarySparseCoding",
    "DeepLatentGaussian",
    "FactorAnalysis",
    "FullyVisibleBeliefNetwork",
    "GaussianBeliefNetwork",
    "Generator",
    "MomentMatching",
    "OrderlessNADE",
    "ProbabilisticPCA",
    "SigmoidBeliefNetwork",
    "SparseCoding",
    "learn_binary_coding",
    "learn_dictionary",
    "maximum_mean_discrepancy",
]
