"""Undirected models: energies as Pyro programs, their chains, guides and partition functions."""

from pplvi.energies.chains import (
    Chains,
    ContrastiveDivergence,
    EveryState,
    FastPersistentChains,
    MeanFieldContrastiveDivergence,
    PersistentChains,
    TemperedChains,
)
from pplvi.energies.factorised import ConditionalGuide, Factorised, FactorisedGuide
from pplvi.energies.machine import BoltzmannMachine
from pplvi.energies.measures import BaseMeasure
from pplvi.energies.rbm import BoltzmannDistribution, RestrictedBoltzmannMachine
from pplvi.energies.units import BernoulliUnits, CategoricalUnits, GaussianUnits, Units

__all__ = [
    "BaseMeasure",
    "BernoulliUnits",
    "BoltzmannDistribution",
    "BoltzmannMachine",
    "CategoricalUnits",
    "Chains",
    "ConditionalGuide",
    "ContrastiveDivergence",
    "EveryState",
    "Factorised",
    "FactorisedGuide",
    "FastPersistentChains",
    "GaussianUnits",
    "MeanFieldContrastiveDivergence",
    "PersistentChains",
    "RestrictedBoltzmannMachine",
    "TemperedChains",
    "Units",
]
