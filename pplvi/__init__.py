"""pplvi: variational inference for Pyro. Objectives, guides and samplers that combine freely; posteriors in ArviZ.

Names are imported when they are first used, so that ``import pplvi`` is light and changes nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ELBO": "elbo",
    "ChiELBO": "elbo",
    "ForwardKL": "elbo",
    "ImportanceWeightedELBO": "elbo",
    "RenyiELBO": "elbo",
    "ThermodynamicELBO": "elbo",
    "WeightedELBO": "elbo",
    "ReweightedWakeSleep": "wake_sleep",
    "WakeSleep": "wake_sleep",
    "PerProgram": "roles",
    "AutoAmortized": "guides",
    "amortization_gap": "guides",
    "refine": "guides",
    "AutoBatchAndMatch": "guides",
    "AutoDeterministicNormal": "guides",
    "AutoFlow": "guides",
    "AutoHierarchical": "guides",
    "annealed_importance_sampling": "energies",
    "raise_bound": "energies",
    "AutoMixture": "guides",
    "AutoPathfinder": "guides",
    "AutoSemiDAIS": "guides",
    "init_to_pathfinder": "guides",
    "start_at_pathfinder": "guides",
    "AnnealedGuide": "guides",
    "NestedGuide": "guides",
    "NestedELBO": "nested_elbo",
    "Annealed": "annealing",
    "Resampling": "annealing",
    "GeometricPath": "paths",
    "ProgramPath": "paths",
    "ResidualKernel": "kernels",
    "LangevinKernel": "kernels",
    "HamiltonianKernel": "invariant",
    "ControlledLangevinKernel": "controlled",
    "BoltzmannELBO": "boltzmann_elbo",
    "BoltzmannMachine": "energies",
    "DeepBeliefNetwork": "energies",
    "DeepBoltzmannMachine": "energies",
    "GibbsGuide": "energies",
    "MeanFieldGuide": "energies",
    "MultiPrediction": "multi_prediction",
    "RecognitionGuide": "energies",
    "TAPGuide": "energies",
    "UpDown": "up_down",
    "pretrain": "pretraining",
    "to_classifier": "energies",
    "RestrictedBoltzmannMachine": "energies",
    "SparsityPenalty": "sparsity",
    "FilteredGuide": "guides",
    "FilteringELBO": "filtering_elbo",
    "StateSpace": "timesteps",
    "CompiledSVI": "compile",
    "Fit": "fitting",
    "fit": "fitting",
    "flow_recipe": "flow_training",
    "search_learning_rate": "flow_training",
    "noncentered": "programs.reparam",
    "Posterior": "posterior",
    "compare": "comparison",
    "plot_against_reference": "plots",
    "plot_objective": "plots",
    "plot_weights": "plots",
    "to_arviz": "export",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pplvi' has no attribute {name!r}")
    return getattr(import_module(f"pplvi.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
