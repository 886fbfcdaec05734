"""Guide families on Pyro's ``AutoGuide`` contract, one a file. Imports ``samplers`` and what stands below."""

from pplvi.guides.amortized.amortized import AutoAmortized
from pplvi.guides.amortized.hierarchical import AutoHierarchical
from pplvi.guides.amortized.prediction import PredictionPenalty
from pplvi.guides.amortized.refinement import amortization_gap, refine
from pplvi.guides.amortized.semi_dais import AutoSemiDAIS
from pplvi.guides.annealed import AnnealedGuide, NestedGuide
from pplvi.guides.conjugate.auto import AutoConjugate
from pplvi.guides.conjugate.rates import RobbinsMonro
from pplvi.guides.filtered import FilteredGuide
from pplvi.guides.flows.flow import AutoFlow
from pplvi.guides.mixture import AutoMixture
from pplvi.guides.search.batch_and_match import AutoBatchAndMatch
from pplvi.guides.search.deterministic import AutoDeterministicNormal
from pplvi.guides.search.pathfinder import AutoPathfinder, init_to_pathfinder
from pplvi.guides.search.proximal import AutoProximal
from pplvi.guides.search.start import start_at_pathfinder
from pplvi.guides.search.students import AutoStudentMixture

__all__ = [
    "AnnealedGuide",
    "AutoAmortized",
    "AutoBatchAndMatch",
    "AutoConjugate",
    "AutoDeterministicNormal",
    "AutoFlow",
    "AutoHierarchical",
    "AutoMixture",
    "AutoPathfinder",
    "AutoProximal",
    "AutoSemiDAIS",
    "AutoStudentMixture",
    "FilteredGuide",
    "NestedGuide",
    "PredictionPenalty",
    "RobbinsMonro",
    "amortization_gap",
    "init_to_pathfinder",
    "refine",
    "start_at_pathfinder",
]
