"""Guide families on Pyro's ``AutoGuide`` contract, one a file. Any Pyro guide works with every objective as well."""

from pplvi.guides._starts import start_at_pathfinder
from pplvi.guides.amortized import AutoAmortized
from pplvi.guides.annealed import AnnealedGuide, NestedGuide
from pplvi.guides.deterministic import AutoDeterministicNormal
from pplvi.guides.filtered import FilteredGuide
from pplvi.guides.flow import AutoFlow
from pplvi.guides.hierarchical import AutoHierarchical
from pplvi.guides.mixture import AutoMixture
from pplvi.guides.pathfinder import AutoPathfinder, init_to_pathfinder
from pplvi.guides.refinement import amortization_gap, refine
from pplvi.guides.score_matching import AutoBatchAndMatch
from pplvi.guides.semi_annealed import AutoSemiDAIS

__all__ = [
    "AnnealedGuide",
    "AutoAmortized",
    "AutoBatchAndMatch",
    "AutoDeterministicNormal",
    "AutoFlow",
    "AutoHierarchical",
    "AutoMixture",
    "AutoPathfinder",
    "AutoSemiDAIS",
    "FilteredGuide",
    "NestedGuide",
    "amortization_gap",
    "init_to_pathfinder",
    "refine",
    "start_at_pathfinder",
]
