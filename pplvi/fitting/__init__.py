"""One call from a model to a posterior. Imports ``training`` and what stands below."""

from pplvi.fitting.calibration import Calibration, calibrate
from pplvi.fitting.clock import Timing
from pplvi.fitting.entry import fit
from pplvi.fitting.loading import load
from pplvi.fitting.options import Checkpoint, Compile, DataParallel, Minibatches
from pplvi.fitting.recipes import flow_recipe, search_learning_rate
from pplvi.fitting.result import Fit

__all__ = [
    "Calibration",
    "Checkpoint",
    "Compile",
    "DataParallel",
    "Fit",
    "Minibatches",
    "Timing",
    "calibrate",
    "fit",
    "flow_recipe",
    "load",
    "search_learning_rate",
]
