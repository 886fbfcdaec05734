"""Judging machines: partition functions, monitors and pictures. Imports ``posteriors`` and ``machines``."""

from pplvi.energies.evaluation import densities as densities  # machines take part in pplvi.compare_densities
from pplvi.energies.evaluation.monitors import (
    FreeEnergyGap,
    Mixing,
    chain_mixing,
    free_energy_gap,
    inpaint,
)
from pplvi.energies.evaluation.partition import PartitionEstimate, annealed_importance_sampling, raise_bound
from pplvi.energies.evaluation.pictures import plot_filters, plot_images
from pplvi.evaluation.draws import Neighbours, nearest_neighbours

__all__ = [
    "FreeEnergyGap",
    "Mixing",
    "Neighbours",
    "PartitionEstimate",
    "annealed_importance_sampling",
    "chain_mixing",
    "free_energy_gap",
    "inpaint",
    "nearest_neighbours",
    "plot_filters",
    "plot_images",
    "raise_bound",
]
