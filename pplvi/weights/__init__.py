"""Log-weights: algebra, Pareto smoothing, resampling and rejection. Imports torch alone."""

from pplvi.weights.algebra import effective_sample_size, expectation, log_evidence, logmeanexp
from pplvi.weights.pareto import pareto_k_threshold, pareto_smooth
from pplvi.weights.rejection import Rejection, rejection_control
from pplvi.weights.resampling import Resampling, resample

__all__ = [
    "Rejection",
    "Resampling",
    "effective_sample_size",
    "expectation",
    "log_evidence",
    "logmeanexp",
    "pareto_k_threshold",
    "pareto_smooth",
    "rejection_control",
    "resample",
]
