"""Posteriors of the hidden layers: mean field, TAP, recognition networks, Gibbs chains. Imports ``machines``."""

from pplvi.energies.posteriors.gibbs import GibbsGuide
from pplvi.energies.posteriors.mean_field import FactorisedInference, MeanFieldGuide
from pplvi.energies.posteriors.problem import MeanField
from pplvi.energies.posteriors.recognition import RecognitionGuide, RecognitionNetwork
from pplvi.energies.posteriors.tap import TAPGuide

__all__ = [
    "FactorisedInference",
    "GibbsGuide",
    "MeanField",
    "MeanFieldGuide",
    "RecognitionGuide",
    "RecognitionNetwork",
    "TAPGuide",
]
