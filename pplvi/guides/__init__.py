"""Guide families on Pyro's ``AutoGuide`` contract, one a file. Any Pyro guide works with every objective as well."""

from pplvi.guides._starts import start_at_pathfinder
from pplvi.guides.annealed import AnnealedGuide
from pplvi.guides.deterministic import AutoDeterministicNormal
from pplvi.guides.flow import AutoFlow
from pplvi.guides.pathfinder import AutoPathfinder, init_to_pathfinder

__all__ = [
    "AnnealedGuide",
    "AutoDeterministicNormal",
    "AutoFlow",
    "AutoPathfinder",
    "init_to_pathfinder",
    "start_at_pathfinder",
]
