"""Undirected models: machines, their posteriors, learning, evaluation. Imports ``fitting`` and below."""

from pplvi.energies import evaluation, learning, machines, posteriors
from pplvi.energies.evaluation import *
from pplvi.energies.learning import *
from pplvi.energies.machines import *
from pplvi.energies.posteriors import *

__all__ = [*evaluation.__all__, *learning.__all__, *machines.__all__, *posteriors.__all__]
