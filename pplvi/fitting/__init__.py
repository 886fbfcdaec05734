"""One call from a model to a posterior. Imports ``training`` and what stands below."""

from pplvi.fitting.clock import Timing
from pplvi.fitting.entry import fit
from pplvi.fitting.loading import load
from pplvi.fitting.options import Checkpoint, Compile, Minibatches
from pplvi.fitting.recipes import flow_recipe, search_learning_rate
from pplvi.fitting.result import Fit

__all__ = [
    "Checkpoint",
    "Compile",
    "Fit",
    "Minibatches",
    "Timing",
    "fit",
    "flow_recipe",
    "load",
    "search_learning_rate",
]
