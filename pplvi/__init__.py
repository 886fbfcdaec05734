"""pplvi: variational inference for Pyro. Objectives, guides and samplers that combine freely; posteriors in ArviZ.

Names are imported when they are first used, so that ``import pplvi`` is light and changes nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pplvi.compile import CompiledSVI as CompiledSVI
    from pplvi.energies import BoltzmannELBO as BoltzmannELBO
    from pplvi.energies import BoltzmannMachine as BoltzmannMachine
    from pplvi.energies import ClassificationBoltzmannMachine as ClassificationBoltzmannMachine
    from pplvi.energies import ConvolutionalBoltzmannMachine as ConvolutionalBoltzmannMachine
    from pplvi.energies import DeepBeliefNetwork as DeepBeliefNetwork
    from pplvi.energies import DeepBoltzmannMachine as DeepBoltzmannMachine
    from pplvi.energies import GatedBoltzmannMachine as GatedBoltzmannMachine
    from pplvi.energies import GibbsGuide as GibbsGuide
    from pplvi.energies import MeanCovarianceMachine as MeanCovarianceMachine
    from pplvi.energies import MeanFieldGuide as MeanFieldGuide
    from pplvi.energies import MeanProductOfStudents as MeanProductOfStudents
    from pplvi.energies import MultiPrediction as MultiPrediction
    from pplvi.energies import RecognitionGuide as RecognitionGuide
    from pplvi.energies import RecurrentTemporalMachine as RecurrentTemporalMachine
    from pplvi.energies import RestrictedBoltzmannMachine as RestrictedBoltzmannMachine
    from pplvi.energies import RNNBoltzmannMachine as RNNBoltzmannMachine
    from pplvi.energies import SparsityPenalty as SparsityPenalty
    from pplvi.energies import TAPGuide as TAPGuide
    from pplvi.energies import UpDown as UpDown
    from pplvi.energies import annealed_importance_sampling as annealed_importance_sampling
    from pplvi.energies import pretrain as pretrain
    from pplvi.energies import raise_bound as raise_bound
    from pplvi.energies import to_classifier as to_classifier
    from pplvi.evaluation import compare_densities as compare_densities
    from pplvi.fitting import Calibration as Calibration
    from pplvi.fitting import Fit as Fit
    from pplvi.fitting import calibrate as calibrate
    from pplvi.fitting import fit as fit
    from pplvi.fitting import flow_recipe as flow_recipe
    from pplvi.fitting import load as load
    from pplvi.fitting import search_learning_rate as search_learning_rate
    from pplvi.guides import AnnealedGuide as AnnealedGuide
    from pplvi.guides import AutoAmortized as AutoAmortized
    from pplvi.guides import AutoBatchAndMatch as AutoBatchAndMatch
    from pplvi.guides import AutoConjugate as AutoConjugate
    from pplvi.guides import AutoDeterministicNormal as AutoDeterministicNormal
    from pplvi.guides import AutoFlow as AutoFlow
    from pplvi.guides import AutoHierarchical as AutoHierarchical
    from pplvi.guides import AutoMixture as AutoMixture
    from pplvi.guides import AutoPathfinder as AutoPathfinder
    from pplvi.guides import AutoProximal as AutoProximal
    from pplvi.guides import AutoSemiDAIS as AutoSemiDAIS
    from pplvi.guides import AutoStudentMixture as AutoStudentMixture
    from pplvi.guides import FilteredGuide as FilteredGuide
    from pplvi.guides import NestedGuide as NestedGuide
    from pplvi.guides import PredictionPenalty as PredictionPenalty
    from pplvi.guides import RobbinsMonro as RobbinsMonro
    from pplvi.guides import amortization_gap as amortization_gap
    from pplvi.guides import init_to_pathfinder as init_to_pathfinder
    from pplvi.guides import refine as refine
    from pplvi.guides import start_at_pathfinder as start_at_pathfinder
    from pplvi.kernels import ControlledLangevinKernel as ControlledLangevinKernel
    from pplvi.kernels import HamiltonianKernel as HamiltonianKernel
    from pplvi.kernels import LangevinKernel as LangevinKernel
    from pplvi.kernels import ResidualKernel as ResidualKernel
    from pplvi.losses import ELBO as ELBO
    from pplvi.losses import BetaELBO as BetaELBO
    from pplvi.losses import ChiELBO as ChiELBO
    from pplvi.losses import FilteringELBO as FilteringELBO
    from pplvi.losses import ForwardKL as ForwardKL
    from pplvi.losses import ImportanceWeightedELBO as ImportanceWeightedELBO
    from pplvi.losses import NestedELBO as NestedELBO
    from pplvi.losses import RecognitionLoss as RecognitionLoss
    from pplvi.losses import RenyiELBO as RenyiELBO
    from pplvi.losses import ReweightedWakeSleep as ReweightedWakeSleep
    from pplvi.losses import ThermodynamicELBO as ThermodynamicELBO
    from pplvi.losses import WakeSleep as WakeSleep
    from pplvi.losses import WeightedELBO as WeightedELBO
    from pplvi.models import LISTA as LISTA
    from pplvi.models import MADE as MADE
    from pplvi.models import NADE as NADE
    from pplvi.models import RNADE as RNADE
    from pplvi.models import Adversarial as Adversarial
    from pplvi.models import BinaryMeanField as BinaryMeanField
    from pplvi.models import BinarySparseCoding as BinarySparseCoding
    from pplvi.models import DeepLatentGaussian as DeepLatentGaussian
    from pplvi.models import FactorAnalysis as FactorAnalysis
    from pplvi.models import FullyVisibleBeliefNetwork as FullyVisibleBeliefNetwork
    from pplvi.models import GaussianBeliefNetwork as GaussianBeliefNetwork
    from pplvi.models import Generator as Generator
    from pplvi.models import MomentMatching as MomentMatching
    from pplvi.models import OrderlessNADE as OrderlessNADE
    from pplvi.models import ProbabilisticPCA as ProbabilisticPCA
    from pplvi.models import SigmoidBeliefNetwork as SigmoidBeliefNetwork
    from pplvi.models import SparseCoding as SparseCoding
    from pplvi.models import learn_binary_coding as learn_binary_coding
    from pplvi.models import learn_dictionary as learn_dictionary
    from pplvi.posterior import Posterior as Posterior
    from pplvi.posterior import Verdict as Verdict
    from pplvi.posterior import compare as compare
    from pplvi.posterior import plot_against_reference as plot_against_reference
    from pplvi.posterior import plot_compare as plot_compare
    from pplvi.posterior import plot_objective as plot_objective
    from pplvi.posterior import plot_predictive as plot_predictive
    from pplvi.posterior import plot_weights as plot_weights
    from pplvi.posterior import to_arviz as to_arviz
    from pplvi.programs import noncentered as noncentered
    from pplvi.samplers import Annealed as Annealed
    from pplvi.samplers import GeometricPath as GeometricPath
    from pplvi.samplers import ProgramPath as ProgramPath
    from pplvi.samplers import StateSpace as StateSpace
    from pplvi.samplers import TemperedSMC as TemperedSMC
    from pplvi.training import ExpectationMaximization as ExpectationMaximization
    from pplvi.training import PerProgram as PerProgram
    from pplvi.weights import Rejection as Rejection
    from pplvi.weights import Resampling as Resampling

__version__ = "0.1.0"

_HOMES = {
    "CompiledSVI": "compile",
    "BoltzmannELBO": "energies",
    "BoltzmannMachine": "energies",
    "RNNBoltzmannMachine": "energies",
    "RecurrentTemporalMachine": "energies",
    "MeanProductOfStudents": "energies",
    "MeanCovarianceMachine": "energies",
    "GatedBoltzmannMachine": "energies",
    "ConvolutionalBoltzmannMachine": "energies",
    "ClassificationBoltzmannMachine": "energies",
    "DeepBeliefNetwork": "energies",
    "DeepBoltzmannMachine": "energies",
    "GibbsGuide": "energies",
    "MeanFieldGuide": "energies",
    "MultiPrediction": "energies",
    "RecognitionGuide": "energies",
    "RestrictedBoltzmannMachine": "energies",
    "SparsityPenalty": "energies",
    "TAPGuide": "energies",
    "UpDown": "energies",
    "annealed_importance_sampling": "energies",
    "pretrain": "energies",
    "raise_bound": "energies",
    "to_classifier": "energies",
    "Calibration": "fitting",
    "compare_densities": "evaluation",
    "Fit": "fitting",
    "calibrate": "fitting",
    "fit": "fitting",
    "flow_recipe": "fitting",
    "load": "fitting",
    "search_learning_rate": "fitting",
    "AnnealedGuide": "guides",
    "AutoAmortized": "guides",
    "AutoBatchAndMatch": "guides",
    "AutoConjugate": "guides",
    "AutoDeterministicNormal": "guides",
    "AutoFlow": "guides",
    "AutoHierarchical": "guides",
    "AutoMixture": "guides",
    "AutoPathfinder": "guides",
    "AutoProximal": "guides",
    "AutoSemiDAIS": "guides",
    "AutoStudentMixture": "guides",
    "FilteredGuide": "guides",
    "NestedGuide": "guides",
    "PredictionPenalty": "guides",
    "RobbinsMonro": "guides",
    "amortization_gap": "guides",
    "init_to_pathfinder": "guides",
    "refine": "guides",
    "start_at_pathfinder": "guides",
    "ControlledLangevinKernel": "kernels",
    "HamiltonianKernel": "kernels",
    "LangevinKernel": "kernels",
    "ResidualKernel": "kernels",
    "ELBO": "losses",
    "BetaELBO": "losses",
    "ChiELBO": "losses",
    "FilteringELBO": "losses",
    "ForwardKL": "losses",
    "ImportanceWeightedELBO": "losses",
    "NestedELBO": "losses",
    "RecognitionLoss": "losses",
    "RenyiELBO": "losses",
    "ReweightedWakeSleep": "losses",
    "ThermodynamicELBO": "losses",
    "WakeSleep": "losses",
    "WeightedELBO": "losses",
    "LISTA": "models",
    "BinaryMeanField": "models",
    "BinarySparseCoding": "models",
    "SparseCoding": "models",
    "learn_binary_coding": "models",
    "learn_dictionary": "models",
    "MADE": "models",
    "NADE": "models",
    "RNADE": "models",
    "Adversarial": "models",
    "DeepLatentGaussian": "models",
    "FactorAnalysis": "models",
    "FullyVisibleBeliefNetwork": "models",
    "GaussianBeliefNetwork": "models",
    "Generator": "models",
    "MomentMatching": "models",
    "OrderlessNADE": "models",
    "ProbabilisticPCA": "models",
    "SigmoidBeliefNetwork": "models",
    "Posterior": "posterior",
    "Verdict": "posterior",
    "compare": "posterior",
    "plot_against_reference": "posterior",
    "plot_compare": "posterior",
    "plot_objective": "posterior",
    "plot_predictive": "posterior",
    "plot_weights": "posterior",
    "to_arviz": "posterior",
    "noncentered": "programs",
    "Annealed": "samplers",
    "GeometricPath": "samplers",
    "ProgramPath": "samplers",
    "StateSpace": "samplers",
    "TemperedSMC": "samplers",
    "ExpectationMaximization": "training",
    "PerProgram": "training",
    "Rejection": "weights",
    "Resampling": "weights",
}

__all__ = [*_HOMES, "__version__"]


if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'pplvi' has no attribute {name!r}")
        return getattr(import_module(f"pplvi.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
