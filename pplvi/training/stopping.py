"""When to stop: the objective no longer improves by more than its own Monte Carlo error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Positive

_OUTLYING = 3.0  # interquartile ranges, four standard deviations of a normal


def mean_with_error(values: NDArray[np.float64]) -> tuple[float, float]:
    r"""Mean of a correlated series and its standard error, by non-overlapping batch means.

    The series is cut into batches of :math:`\lfloor\sqrt n\rfloor` values; the standard deviation of the batch means
    over the square root of their number is the error, which counts autocorrelation within a batch.

    Source: Flegal & Jones (2010), "Batch means and spectral variance estimators in Markov chain Monte Carlo".

    :param values: shape ``(n,)`` with ``n >= 4``, in any unit.
    :returns: mean and standard error in the same unit.

    >>> mean, error = mean_with_error(np.random.default_rng(0).normal(size=10_000))
    >>> round(error, 3)
    0.01
    """
    size = math.isqrt(len(values))
    batches = values[-(len(values) // size) * size :].reshape(-1, size).mean(1)
    return float(values.mean()), float(batches.std(ddof=1) / math.sqrt(len(batches)))


def improvement(losses: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """By how much the mean loss of the last quarter is below that of the quarter before, and the standard error.

    :param losses: at least 16 values in nats, shape ``(steps,)``.
    :returns: gain and standard error, in nats.

    >>> improvement([4.0] * 48 + [3.0] * 16)
    (1.0, 0.0)
    """
    quarter = len(losses) // 4
    early = mean_with_error(np.asarray(losses[-2 * quarter : -quarter], float))
    late = mean_with_error(np.asarray(losses[-quarter:], float))
    return early[0] - late[0], math.hypot(early[1], late[1])


_SHORTEST = 16


@checked
def has_settled(losses: Sequence[float] | NDArray[np.float64]) -> bool:
    """A verdict on a finished trace: the last gain is below three standard errors, or below a tenth of a nat.

    A falling learning rate improves the objective a little to the very end, at no gain in the posterior to speak of.
    It holds of the trace with its outliers pulled in as well: the huge losses that a learning rate too large throws up
    make an error in which any improvement would be lost.

    >>> falling = 1000.0 - np.arange(400.0)
    >>> spikes = falling + 1e6 * (np.arange(400) % 90 == 89)
    >>> has_settled(falling), has_settled(spikes), has_settled(np.zeros(400))
    (False, False, True)
    """
    if len(losses) < _SHORTEST:
        raise ValueError(f"a trace of {len(losses)} losses: expected at least {_SHORTEST}.")
    return _is_small(*improvement(losses)) and _is_small(*improvement(_without_outliers(losses)))


def _is_small(gain: float, error: float) -> bool:
    return gain < max(0.1, 3.0 * error)


def _without_outliers(losses: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """A trace moved to within three interquartile ranges of the median of its last half (Tukey's outer fences)."""
    trace = np.asarray(losses, float)
    low, middle, high = np.quantile(trace[-2 * (len(trace) // 4) :], [0.25, 0.5, 0.75])
    reach = _OUTLYING * (high - low)
    return trace.clip(middle - reach, middle + reach)


@checked
@dataclass(frozen=True)
class Plateau:
    r"""Stop when the mean objective of the last quarter of all steps is no longer below that of the quarter before.

    Every ``every`` steps the last half of the trace is split into an early and a late window (so both grow with the
    run, and the start of training drops out of them). With :math:`\bar\ell` a window's mean and :math:`s` its
    batch-means standard error, the objective has levelled off if

    .. math:: \bar\ell_\text{early} - \bar\ell_\text{late} < c \sqrt{s_\text{early}^2 + s_\text{late}^2},

    and training stops if that holds at ``patience`` checks in a row at which the trace with its outliers pulled in has
    settled too. The rule is a pure function of the trace.

    Source: Geweke (1992), "Evaluating the accuracy of sampling-based approaches to the calculation of posterior
    moments", whose statistic compares two windows of a chain, one-sided, with the errors of
    :func:`mean_with_error`; Dhaka et al. (2020), "Robust, accurate stochastic optimization for variational inference",
    on stopping by Monte Carlo error instead of a fixed tolerance.

    :param min_steps: steps before the first check.
    :param every: steps between checks.
    :param patience: checks in a row that have to agree.
    :param threshold: :math:`c`, in standard errors.
    :raises ValueError: if a number is not positive, or ``min_steps`` is below 32.

    >>> noise = np.random.default_rng(1).normal(size=2000)
    >>> Plateau().reached(noise), Plateau().reached(noise - 0.01 * np.arange(2000))
    (True, False)
    """

    min_steps: Count = 1000
    every: Count = 100
    patience: Count = 3
    threshold: Positive = 1.0

    def __post_init__(self) -> None:
        if self.min_steps < 32:
            raise ValueError(f"min_steps={self.min_steps}: expected at least 32, to have quarters to compare.")

    def thinned(self, by: int) -> Plateau:
        """The same rule for a trace that has one value for every ``by`` steps."""
        counts = {"min_steps": max(32, self.min_steps // by), "every": max(1, self.every // by)}
        return replace(self, **counts)

    def is_due(self, step: int) -> bool:
        """Whether the trace is to be looked at after this many steps."""
        return step >= self.min_steps and step % self.every == 0

    def is_flat(self, losses: Sequence[float] | NDArray[np.float64]) -> bool:
        """Whether the improvement over the last half of this trace is within its error."""
        gain, error = improvement(losses)
        return gain < self.threshold * error and _is_small(*improvement(_without_outliers(losses)))

    def reached(self, losses: Sequence[float] | NDArray[np.float64]) -> bool:
        """Whether training on this trace (nats, to be minimised; shape ``(steps,)``) should stop now."""
        checks = [len(losses) - i * self.every for i in range(self.patience)]
        return checks[-1] >= self.min_steps and all(self.is_flat(losses[:n]) for n in checks)
