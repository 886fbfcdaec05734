"""Markov kernels with tractable densities there and back. Imports ``programs`` and what stands below."""

from pplvi.kernels.base import Kernel
from pplvi.kernels.coordinates import Coordinates
from pplvi.kernels.flow import FlowKernel
from pplvi.kernels.gibbs import GibbsKernel
from pplvi.kernels.hamiltonian import HamiltonianKernel
from pplvi.kernels.langevin import ControlledLangevinKernel, LangevinKernel
from pplvi.kernels.residual import ResidualKernel
from pplvi.kernels.uncorrected import UncorrectedHamiltonianKernel

__all__ = [
    "ControlledLangevinKernel",
    "Coordinates",
    "FlowKernel",
    "GibbsKernel",
    "HamiltonianKernel",
    "Kernel",
    "LangevinKernel",
    "ResidualKernel",
    "UncorrectedHamiltonianKernel",
]
