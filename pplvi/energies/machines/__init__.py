"""Energies, their units and couplings, and the machines made of them."""

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.classification import ClassificationBoltzmannMachine
from pplvi.energies.machines.convolutional import ConvolutionalBoltzmannMachine, ConvolutionalCoupling, PooledUnits
from pplvi.energies.machines.copies import CopiedUnits
from pplvi.energies.machines.couplings import Coupling, DenseCoupling
from pplvi.energies.machines.dbm import DeepBoltzmannMachine
from pplvi.energies.machines.dbn import DeepBeliefGuide, DeepBeliefNetwork
from pplvi.energies.machines.energy import EnergyModel
from pplvi.energies.machines.exact_posterior import ConditionalGuide, Factorised, FactorisedGuide
from pplvi.energies.machines.gated import FactoredCoupling, GatedBoltzmannMachine
from pplvi.energies.machines.mean_covariance import MeanCovarianceMachine, MeanProductOfStudents
from pplvi.energies.machines.measures import BaseMeasure, PartlyObserved
from pplvi.energies.machines.rbm import BoltzmannDistribution, RestrictedBoltzmannMachine
from pplvi.energies.machines.recurrent import RecurrentTemporalMachine, RNNBoltzmannMachine
from pplvi.energies.machines.spike_slab import SpikeSlabUnits
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
    "ClassificationBoltzmannMachine",
    "ConditionalGuide",
    "ConvolutionalBoltzmannMachine",
    "ConvolutionalCoupling",
    "CopiedUnits",
    "Coupling",
    "DeepBeliefGuide",
    "DeepBeliefNetwork",
    "DeepBoltzmannMachine",
    "DenseCoupling",
    "EnergyModel",
    "FactoredCoupling",
    "Factorised",
    "FactorisedGuide",
    "GatedBoltzmannMachine",
    "GaussianUnits",
    "MeanCovarianceMachine",
    "MeanProductOfStudents",
    "PartlyObserved",
    "PooledUnits",
    "RNNBoltzmannMachine",
    "RecurrentTemporalMachine",
    "RestrictedBoltzmannMachine",
    "SpikeSlabUnits",
    "Units",
]
