"""Samplers run programs and yield weighted steps. Imports ``kernels``, ``objectives`` and what stands below."""

from pplvi.samplers.annealed import Annealed
from pplvi.samplers.base import Request
from pplvi.samplers.importance import Importance
from pplvi.samplers.mixture import DefensiveMixture
from pplvi.samplers.paths import DataPath, GeometricPath, ProgramPath
from pplvi.samplers.state_space import StateSpace
from pplvi.samplers.tempered import TemperedSMC

__all__ = [
    "Annealed",
    "DataPath",
    "DefensiveMixture",
    "GeometricPath",
    "Importance",
    "ProgramPath",
    "Request",
    "StateSpace",
    "TemperedSMC",
]
