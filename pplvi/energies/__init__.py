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
from pplvi.energies.classifier import BoltzmannClassifier, to_classifier
from pplvi.energies.copies import CopiedUnits
from pplvi.energies.dbm import DeepBoltzmannMachine
from pplvi.energies.dbn import DeepBeliefGuide, DeepBeliefNetwork
from pplvi.energies.factorised import ConditionalGuide, Factorised, FactorisedGuide
from pplvi.energies.gibbs_guide import GibbsGuide
from pplvi.energies.machine import BoltzmannMachine
from pplvi.energies.mean_field import FactorisedInference, MeanFieldGuide
from pplvi.energies.measures import BaseMeasure
from pplvi.energies.monitors import chain_mixing, free_energy_gap, inpaint, nearest_neighbours
from pplvi.energies.partition import PartitionEstimate, annealed_importance_sampling, raise_bound
from pplvi.energies.program import EnergyModel
from pplvi.energies.rbm import BoltzmannDistribution, RestrictedBoltzmannMachine
from pplvi.energies.recognition import RecognitionGuide, RecognitionNetwork
from pplvi.energies.stacking import Stage, stages
from pplvi.energies.sweeps import MeanField
from pplvi.energies.tap import TAPGuide
from pplvi.energies.units import BernoulliUnits, CategoricalUnits, GaussianUnits, Units

__all__ = [
    "BaseMeasure",
    "BernoulliUnits",
    "BoltzmannClassifier",
    "BoltzmannDistribution",
    "BoltzmannMachine",
    "CategoricalUnits",
    "Chains",
    "ConditionalGuide",
    "ContrastiveDivergence",
    "CopiedUnits",
    "DeepBeliefGuide",
    "DeepBeliefNetwork",
    "DeepBoltzmannMachine",
    "EnergyModel",
    "EveryState",
    "Factorised",
    "FactorisedGuide",
    "FactorisedInference",
    "FastPersistentChains",
    "GaussianUnits",
    "GibbsGuide",
    "MeanField",
    "MeanFieldContrastiveDivergence",
    "MeanFieldGuide",
    "PartitionEstimate",
    "PersistentChains",
    "RecognitionGuide",
    "RecognitionNetwork",
    "RestrictedBoltzmannMachine",
    "Stage",
    "TAPGuide",
    "TemperedChains",
    "Units",
    "annealed_importance_sampling",
    "chain_mixing",
    "free_energy_gap",
    "inpaint",
    "nearest_neighbours",
    "raise_bound",
    "stages",
    "to_classifier",
]
