"""Posteriors: draws, weights, verdict, leave-one-out and pictures. Imports ``programs`` and ``weights``."""

from pplvi.posterior.arviz.export import to_arviz
from pplvi.posterior.comparison import compare
from pplvi.posterior.draws import Draws
from pplvi.posterior.pictures import plot_compare, plot_predictive
from pplvi.posterior.plots import plot_against_reference, plot_objective, plot_weights
from pplvi.posterior.posterior import Posterior
from pplvi.posterior.verdict import Verdict
from pplvi.posterior.weighted import WeightedDraws

__all__ = [
    "Draws",
    "Posterior",
    "Verdict",
    "WeightedDraws",
    "compare",
    "plot_against_reference",
    "plot_compare",
    "plot_objective",
    "plot_predictive",
    "plot_weights",
    "to_arviz",
]
