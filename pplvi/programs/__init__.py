"""Running Pyro programs and knowing what they do. Imports ``kinds``."""

from pplvi.programs import supports  # noqa: F401  what it registers
from pplvi.programs.handlers import parameters_of
from pplvi.programs.joint import execute
from pplvi.programs.reparam import noncentered
from pplvi.programs.sites import Plate
from pplvi.programs.traces import Run

__all__ = ["Plate", "Run", "execute", "noncentered", "parameters_of"]
