"""The training loop: steps, restarts, stopping, checkpoints. Imports ``compile`` and what stands below."""

from pplvi.training.em.algorithm import ExpectationMaximization
from pplvi.training.optimizers import Update
from pplvi.training.per_program import PerProgram
from pplvi.training.restart import Restart
from pplvi.training.schedules import AdaptiveClip, Cosine, Schedule
from pplvi.training.steps import Stepper
from pplvi.training.stopping import Plateau, has_settled
from pplvi.training.watch import Monitor, Watch

__all__ = [
    "AdaptiveClip",
    "Cosine",
    "ExpectationMaximization",
    "Monitor",
    "PerProgram",
    "Plateau",
    "Restart",
    "Schedule",
    "Stepper",
    "Update",
    "Watch",
    "has_settled",
]
