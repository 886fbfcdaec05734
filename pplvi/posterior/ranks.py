"""Ranks of true values among posterior draws: how far they are from uniform, and what that says of the posterior."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas

SiteRanks = Mapping[str, NDArray[np.int64]]
"""``(num_simulations, *shape)`` by site, from 0 to the number of draws."""

_TRIALS = 4_000
_CLEAR = 2.0  # standard errors
COLUMNS = ["mean", "spread", "in 50%", "in 90%", "p_value", "verdict"]
CALIBRATED = "calibrated"


def rank_among(truth: NDArray[Any], draws: NDArray[Any], rng: np.random.Generator) -> NDArray[np.int64]:
    """How many draws are smaller than the truth; those that equal it, as of discrete sites, are split at random.

    :param truth: of shape ``shape``, up to dimensions of size 1.
    :param draws: ``(num_draws, *shape)``.
    :param rng: for the ties.

    >>> rank_among(np.array(0.5), np.array([0.0, 0.2, 0.7]), np.random.default_rng(0))
    array(2)
    """
    truth = truth.reshape(draws.shape[1:])
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    return np.asarray(below + rng.integers(0, equal + 1), dtype=np.int64)


class UniformBand:
    r"""The band in which the empirical distribution function of uniform ranks lies, at all points at once.

    Of ``num_simulations`` uniform ranks from 0 to ``num_draws``, the number up to ``j`` is binomial with probability
    :math:`z_j = (j + 1) / (\text{num\_draws} + 1)`. The depth of ranks is the smallest two-sided tail over the points,

    .. math:: \gamma = \min_j \, 2 \min\{P(C_j \le c_j), P(C_j \ge c_j)\},

    whose distribution is simulated.

    Source: Säilynoja, Bürkner and Vehtari 2022, Graphical test for discrete uniformity and its applications in
    goodness-of-fit evaluation and multiple sample comparison.

    :param num_simulations: how many ranks.
    :param num_draws: the largest rank.
    :param trials: how many sets of ranks are simulated for the distribution of the depth.

    >>> band = UniformBand(100, 99)
    >>> low, high = band.limits(0.95)
    >>> int(low[49]), int(high[49])  # of 100 ranks, how many are among the first half
    (36, 64)
    """

    def __init__(self, num_simulations: int, num_draws: int, trials: int = _TRIALS) -> None:
        self.num_simulations, self.num_draws = num_simulations, num_draws
        self.points = np.arange(1, num_draws + 1) / (num_draws + 1)
        from scipy.special import bdtr

        counts = np.arange(num_simulations + 1)
        self._below = bdtr(counts, num_simulations, self.points[:, None])
        above = 1 - np.pad(self._below, ((0, 0), (1, 0)))[:, :-1]
        self._tails = np.minimum(1.0, 2 * np.minimum(self._below, above))
        rng = np.random.default_rng(0)
        cells = rng.multinomial(num_simulations, np.full(num_draws + 1, 1 / (num_draws + 1)), size=trials)
        self._null = np.sort(self._depth(cells.cumsum(1)[:, :-1]))

    def _depth(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self._tails[np.arange(self.num_draws), counts].min(-1)
        return found

    def counts(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of the ranks, ``(num_simulations,)``, are at most 0, 1, ..., ``num_draws - 1``."""
        return np.bincount(ranks, minlength=self.num_draws + 1).cumsum()[:-1]

    def p_value(self, ranks: NDArray[np.int64]) -> float:
        """The probability that uniform ranks leave a wider band than these."""
        depth = self._depth(self.counts(ranks))
        return float((1 + np.searchsorted(self._null, depth + 1e-12)) / (1 + len(self._null)))

    def limits(self, prob: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper counts at the points, between which all counts lie with this probability."""
        gamma = float(np.quantile(self._null, 1 - prob))
        low, high = ((self._below < tail).sum(1).astype(np.float64) for tail in (gamma / 2, 1 - gamma / 2))
        return low, high


def scalars(ranks: SiteRanks) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """The ranks of each element of the sites, with its name.

    >>> [name for name, _ in scalars({"a": np.zeros((5, 2), int), "b": np.zeros(5, int)})]
    ['a[0]', 'a[1]', 'b']
    """
    for name, values in ranks.items():
        columns = values.reshape(len(values), -1).T
        for index, column in zip(product(*map(range, values.shape[1:])), columns, strict=True):
            yield f"{name}[{', '.join(map(str, index))}]" if index else name, column


def frame_of_ranks(ranks: SiteRanks, num_draws: int, prob: float) -> pandas.DataFrame:
    """A row for each element: mean and spread of the ranks, how often intervals hold the truth, and the verdict.

    ``mean`` is that of the ranks in units of the largest, 0.5 if calibrated; ``spread`` their standard deviation in
    units of the uniform's, above 1 where the posterior is too narrow; ``in 50%`` and ``in 90%`` how often the truth is
    in these central intervals; ``p_value`` that of :class:`UniformBand`, multiplied by the number of rows.

    >>> print(frame_of_ranks({"z": np.arange(100)}, 99, 0.95).round(2).to_string())
       mean  spread  in 50%  in 90%  p_value     verdict
    z   0.5     1.0     0.5     0.9      1.0  calibrated
    """
    import pandas

    each = dict(scalars(ranks))
    number = len(next(iter(each.values())))
    enough = max(_TRIALS, math.ceil(4 * len(each) / (1 - prob)))
    band = UniformBand(number, num_draws, enough)
    rows = [_row(values, band, len(each), prob) for values in each.values()]
    return pandas.DataFrame(rows, index=list(each), columns=COLUMNS)


def _row(ranks: NDArray[np.int64], band: UniformBand, several: int, prob: float) -> list[Any]:
    place = (ranks + 0.5) / (band.num_draws + 1)
    apart = np.abs(place - 0.5)
    p_value = min(1.0, several * band.p_value(ranks))
    spread = math.sqrt(float(np.square(place - 0.5).mean()) * 12)
    word = CALIBRATED if p_value > 1 - prob else miscalibration(float(place.mean()), spread, len(ranks))
    return [float(place.mean()), spread, float((apart < 0.25).mean()), float((apart < 0.45).mean()), p_value, word]


def miscalibration(mean: float, spread: float, number: int) -> str:
    """What ranks that are not uniform say of the posterior.

    >>> miscalibration(0.5, 1.4, 100), miscalibration(0.8, 1.0, 100)
    ('too narrow', 'too low')
    """
    shift = (mean - 0.5) * math.sqrt(12 * number)
    stretch = (spread**2 - 1) / 12 * math.sqrt(180 * number)
    if max(abs(shift), abs(stretch)) < _CLEAR:
        return "of another shape"
    if abs(shift) > abs(stretch):
        return "too low" if shift > 0 else "too high"
    return "too narrow" if stretch > 0 else "too wide"
