"""Training steps recorded once and compiled. Imports ``losses`` and what stands below."""

from pplvi.compile.flat_optimizers import FlatParameters
from pplvi.compile.svi import CompiledSVI, Mode
from pplvi.compile.tracing import record

__all__ = ["CompiledSVI", "FlatParameters", "Mode", "record"]
