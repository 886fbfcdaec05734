"""One table over densities of all families, and what their draws are like. Imports ``programs`` and ``weights``."""

from pplvi.evaluation.draws import (
    ModeCoverage,
    Neighbours,
    mode_coverage,
    nearest_neighbours,
)
from pplvi.evaluation.estimates import DensityEstimate, Unnormalised, data_hash, log_density
from pplvi.evaluation.table import compare_densities

__all__ = [
    "DensityEstimate",
    "ModeCoverage",
    "Neighbours",
    "Unnormalised",
    "compare_densities",
    "data_hash",
    "log_density",
    "mode_coverage",
    "nearest_neighbours",
]
