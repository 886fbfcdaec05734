"""pplvi: variational inference for Pyro. Objectives, guides and samplers that combine freely; posteriors in ArviZ.

Names are imported when they are first used, so that ``import pplvi`` is light and changes nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ELBO": "losses.elbo",
    "ChiELBO": "losses.elbo",
    "ForwardKL": "losses.elbo",
    "ImportanceWeightedELBO": "losses.elbo",
    "RenyiELBO": "losses.elbo",
    "ThermodynamicELBO": "losses.elbo",
    "WeightedELBO": "losses.base",
    "ReweightedWakeSleep": "losses.wake_sleep",
    "WakeSleep": "losses.wake_sleep",
    "PerProgram": "training.per_program",
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
    "NestedELBO": "losses.nested",
    "Annealed": "samplers.annealed",
    "Resampling": "samplers.annealed",
    "GeometricPath": "samplers.paths",
    "ProgramPath": "samplers.paths",
    "ResidualKernel": "kernels.residual",
    "LangevinKernel": "kernels.langevin",
    "HamiltonianKernel": "kernels.hamiltonian",
    "ControlledLangevinKernel": "kernels.langevin",
    "BoltzmannELBO": "energies.learning.boltzmann_elbo",
    "BoltzmannMachine": "energies",
    "DeepBeliefNetwork": "energies",
    "DeepBoltzmannMachine": "energies",
    "GibbsGuide": "energies",
    "MeanFieldGuide": "energies",
    "MultiPrediction": "energies.learning.multi_prediction",
    "RecognitionGuide": "energies",
    "TAPGuide": "energies",
    "UpDown": "energies.learning.up_down",
    "pretrain": "energies.learning.pretraining",
    "to_classifier": "energies",
    "RestrictedBoltzmannMachine": "energies",
    "SparsityPenalty": "energies.learning.sparsity",
    "FilteredGuide": "guides",
    "FilteringELBO": "losses.filtering",
    "StateSpace": "samplers.state_space",
    "CompiledSVI": "compile.svi",
    "Fit": "fitting.entry",
    "fit": "fitting.entry",
    "flow_recipe": "fitting.flow_recipe",
    "search_learning_rate": "fitting.flow_recipe",
    "noncentered": "programs.reparam",
    "Posterior": "posterior.posterior",
    "compare": "posterior.comparison",
    "plot_against_reference": "posterior.plots",
    "plot_objective": "posterior.plots",
    "plot_weights": "posterior.plots",
    "to_arviz": "posterior.arviz.export",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pplvi' has no attribute {name!r}")
    return getattr(import_module(f"pplvi.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
