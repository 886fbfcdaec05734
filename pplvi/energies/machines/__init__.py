"""Energies, their units and couplings, and the machines made of them."""

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.copies import CopiedUnits
from pplvi.energies.machines.couplings import DenseCoupling
from pplvi.energies.machines.dbm import DeepBoltzmannMachine
from pplvi.energies.machines.dbn import DeepBeliefGuide, DeepBeliefNetwork
from pplvi.energies.machines.energy import EnergyModel
from pplvi.energies.machines.exact_posterior import ConditionalGuide, Factorised, FactorisedGuide
from pplvi.energies.machines.measures import BaseMeasure, PartlyObserved
from pplvi.energies.machines.rbm import BoltzmannDistribution, RestrictedBoltzmannMachine
from pplvi.energies.machines.units import (
    BernoulliUnits,
    CategoricalUnits,
    GaussianUnits,
    Units,
)

__all__ = [
    "BaseMeasure",
    "BernoulliUnits",
    "BoltzmannDistribution",
    "BoltzmannMachine",
    "CategoricalUnits",
    "ConditionalGuide",
    "CopiedUnits",
    "DeepBeliefGuide",
    "DeepBeliefNetwork",
    "DeepBoltzmannMachine",
    "DenseCoupling",
    "EnergyModel",
    "Factorised",
    "FactorisedGuide",
    "GaussianUnits",
    "PartlyObserved",
    "RestrictedBoltzmannMachine",
    "Units",
]
