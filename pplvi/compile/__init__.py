"""Training steps recorded once and compiled. Imports ``losses`` and what stands below."""

from pplvi.compile.flat_optimizers import FlatParameters
from pplvi.compile.svi import CompiledSVI, CompileMode
from pplvi.compile.tracing import record

__all__ = ["CompileMode", "CompiledSVI", "FlatParameters", "record"]
