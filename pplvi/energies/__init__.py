"""Undirected models: machines, their posteriors, training and judging. Imports ``fitting`` and what stands below."""

from pplvi.energies.evaluation.monitors import chain_mixing, free_energy_gap, inpaint, nearest_neighbours
from pplvi.energies.evaluation.partition import PartitionEstimate, annealed_importance_sampling, raise_bound
from pplvi.energies.learning.boltzmann_elbo import BoltzmannELBO
from pplvi.energies.learning.chains import (
    Chains,
    ContrastiveDivergence,
    EveryState,
    FastPersistentChains,
    MeanFieldContrastiveDivergence,
    PersistentChains,
    TemperedChains,
)
from pplvi.energies.learning.classifier import BoltzmannClassifier, to_classifier
from pplvi.energies.learning.multi_prediction import MultiPrediction
from pplvi.energies.learning.pretraining import pretrain
from pplvi.energies.learning.sparsity import SparsityPenalty
from pplvi.energies.learning.stacking import Stage, stages
from pplvi.energies.learning.up_down import UpDown
from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.copies import CopiedUnits
from pplvi.energies.machines.couplings import DenseCoupling
from pplvi.energies.machines.dbm import DeepBoltzmannMachine
from pplvi.energies.machines.dbn import DeepBeliefGuide, DeepBeliefNetwork
from pplvi.energies.machines.energy import EnergyModel
from pplvi.energies.machines.exact_posterior import ConditionalGuide, Factorised, FactorisedGuide
from pplvi.energies.machines.measures import BaseMeasure
from pplvi.energies.machines.rbm import BoltzmannDistribution, RestrictedBoltzmannMachine
from pplvi.energies.machines.units import BernoulliUnits, CategoricalUnits, GaussianUnits, Units
from pplvi.energies.posteriors.gibbs import GibbsGuide
from pplvi.energies.posteriors.mean_field import FactorisedInference, MeanFieldGuide
from pplvi.energies.posteriors.problem import MeanField
from pplvi.energies.posteriors.recognition import RecognitionGuide, RecognitionNetwork
from pplvi.energies.posteriors.tap import TAPGuide

__all__ = [
    "BaseMeasure",
    "BernoulliUnits",
    "BoltzmannClassifier",
    "BoltzmannDistribution",
    "BoltzmannELBO",
    "BoltzmannMachine",
    "CategoricalUnits",
    "Chains",
    "ConditionalGuide",
    "ContrastiveDivergence",
    "CopiedUnits",
    "DeepBeliefGuide",
    "DeepBeliefNetwork",
    "DeepBoltzmannMachine",
    "DenseCoupling",
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
    "MultiPrediction",
    "PartitionEstimate",
    "PersistentChains",
    "RecognitionGuide",
    "RecognitionNetwork",
    "RestrictedBoltzmannMachine",
    "SparsityPenalty",
    "Stage",
    "TAPGuide",
    "TemperedChains",
    "Units",
    "UpDown",
    "annealed_importance_sampling",
    "chain_mixing",
    "free_energy_gap",
    "inpaint",
    "nearest_neighbours",
    "pretrain",
    "raise_bound",
    "stages",
    "to_classifier",
]
