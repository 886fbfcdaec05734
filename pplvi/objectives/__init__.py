"""Objectives as pure functions of weighted steps. Imports ``weights``."""

from pplvi.objectives.bounds import RenyiBound
from pplvi.objectives.f_divergences import NestedDivergence
from pplvi.objectives.forward_kl import ForwardKLDivergence, LogPartition
from pplvi.objectives.nested import FilteringBound, NestedForwardKL, log_normalizer_ratio
from pplvi.objectives.step import Objective, Routing, Step, Terms

__all__ = [
    "FilteringBound",
    "ForwardKLDivergence",
    "LogPartition",
    "NestedDivergence",
    "NestedForwardKL",
    "Objective",
    "RenyiBound",
    "Routing",
    "Step",
    "Terms",
    "log_normalizer_ratio",
]
