"""Undirected models, their posteriors and training. Imports ``fitting``, ``evaluation`` and what stands below."""

from pplvi.energies import evaluation, learning, machines, posteriors
from pplvi.energies.evaluation import *
from pplvi.energies.learning import *
from pplvi.energies.machines import *
from pplvi.energies.posteriors import *

__all__: list[str] = []
__all__ += evaluation.__all__
__all__ += learning.__all__
__all__ += machines.__all__
__all__ += posteriors.__all__
