"""Many points climb a log density at once: L-BFGS over rows, each with a history and a step length of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pplvi.programs.deadline import is_time_over

_HISTORY, _BACKTRACKS = 8, 8
_ARMIJO, _SHRINK = 1e-4, 0.25
_GAIN = 1e-3  # nats; a point that gains less, twice in a row, stays where it is
_PATIENCE = 2

ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]


class KnownEnds(Protocol):
    """What is known of the ends of climbs, more and more as they go on.

    :ivar metric: a covariance ``(dim, dim)``, in whose units the others go on; ``None`` while there is none.
    """

    metric: Tensor | None

    def __call__(self, at: Climb, rows: Tensor, ends: Tensor) -> Tensor:
        """Whether rows that have made a step, some of them to their ends, lead to where others have ended."""


@dataclass
class Climb:
    """Where points are on their way up.

    :ivar position: rows ``(S, dim)``.
    :ivar value: log densities ``(S,)``, nats.
    :ivar gradient: of it, ``(S, dim)``.
    """

    position: Tensor
    value: Tensor
    gradient: Tensor


def ascend(function: ValueAndGradient, starts: Tensor, iterations: int, known: KnownEnds | None = None) -> Climb:
    """Climb from several starts at once.

    One call of the function answers all rows that still climb, wherever each is in its own line search. Where no step
    along the quasi-Newton direction goes up, a row tries the gradient; where that does not either, it stays.

    Source: Nocedal and Wright (2006), Numerical optimization, chapter 7.

    :param function: rows ``(S, dim)`` to values ``(S,)`` and gradients ``(S, dim)``, in float64; what is not finite is
        a wall.
    :param starts: rows; those where the function is not finite are left out.
    :param iterations: the most steps of a row.
    :param known: asked after each step: rows that lead to where others have ended climb no further.
    :returns: the ends, one row for each start that is left.

    >>> def hill(x):
    ...     return -(x - 3.0).square().sum(1), -2 * (x - 3.0)
    >>> ascend(hill, torch.zeros(2, 2, dtype=torch.float64), 20).position
    tensor([[3., 3.],
            [3., 3.]], dtype=torch.float64)
    """
    value, gradient = function(starts)
    kept = value.isfinite() & gradient.isfinite().all(1)
    at = Climb(starts[kept].double(), value[kept], gradient[kept])
    search, rows = _Search(at), torch.arange(len(at.value))
    ready = rows
    while True:
        going = (search.steps < iterations) & (search.idle < _PATIENCE)
        if known is not None:
            going[ready] &= ~known(at, ready, ~going[ready])
            search.memory.metric = known.metric
        search.aim(ready[going[ready]])
        rows = rows[going[rows]]
        if not len(rows) or is_time_over():
            return at
        ready = search.take(function, rows)


class _Search:
    """The line search that each row is in.

    :ivar direction: ``(S, dim)``; a row tries ``position + length * direction``.
    :ivar slope: of the function along it, at a length of 0.
    :ivar tries: lengths that were tried.
    :ivar steps: line searches that have ended.
    :ivar idle: how many of them, the last ones, have gained nothing.
    """

    def __init__(self, at: Climb) -> None:
        self.at, self.memory = at, _Memory(at.position)
        self.direction, self.slope = torch.empty_like(at.position), torch.empty_like(at.value)
        self.length = torch.empty_like(at.value)
        self.tries, self.steps, self.idle = (torch.zeros(len(at.value), dtype=torch.long) for _ in range(3))

    def aim(self, rows: Tensor) -> None:
        """Begin a line search of these rows."""
        gradient = self.at.gradient[rows]
        direction = self.memory.direction(self.at.gradient, rows)
        astray = (direction * gradient).sum(1) <= 0
        direction[astray] = self.memory.scaled(gradient[astray])
        new, slope = self.memory.empty[rows] | astray, (direction * gradient).sum(1)
        self.direction[rows], self.slope[rows], self.tries[rows] = direction, slope, 0
        self.length[rows] = torch.where(new, slope.clamp(min=1.0).rsqrt(), 1.0)

    def take(self, function: ValueAndGradient, rows: Tensor) -> Tensor:
        """Try the length of each of these rows, and return those whose line search has ended."""
        at, length = self.at, self.length[rows]
        trial = at.position[rows] + length[:, None] * self.direction[rows]
        value, gradient = function(trial)
        gain = value - at.value[rows]
        good = value.isfinite() & gradient.isfinite().all(1) & (gain >= _ARMIJO * length * self.slope[rows])
        own = rows[good]
        self.memory.learn(own, trial[good] - at.position[own], at.gradient[own] - gradient[good])
        for part, found in ((at.position, trial), (at.value, value), (at.gradient, gradient)):
            part[own] = found[good]
        self.tries[rows] += 1
        self.length[rows] *= _SHRINK
        in_vain = ~good & (self.tries[rows] == _BACKTRACKS)
        self.memory.forget(rows[in_vain])
        ended = rows[good | in_vain]
        self.steps[ended] += 1
        gained = (good & (gain > _GAIN))[good | in_vain]
        self.idle[ended] = torch.where(gained, 0, self.idle[ended] + 1)
        return ended


class _Memory:
    """The last steps of each row and how the gradient fell along them.

    :ivar metric: in whose units they are, a covariance ``(dim, dim)``; ``None`` for the identity.
    """

    def __init__(self, like: Tensor) -> None:
        shape = (_HISTORY, *like.shape)
        self.steps, self.falls = like.new_zeros(shape), like.new_zeros(shape)
        self.inverse = like.new_zeros(_HISTORY, len(like))  # 1 / (step . fall), 0 for none
        self.empty = torch.ones(len(like), dtype=torch.bool)
        self.metric: Tensor | None = None

    def learn(self, rows: Tensor, step: Tensor, fall: Tensor) -> None:
        curvature = (step * fall).sum(1)
        curved = (curvature > 0) & (fall.square().sum(1) <= 1e12 * curvature)
        rows, step, fall = rows[curved], step[curved], fall[curved]
        for part, new in ((self.steps, step), (self.falls, fall), (self.inverse, 1 / curvature[curved])):
            part[:, rows] = torch.cat([part[1:, rows], new[None]])
        self.empty[rows] = False

    def forget(self, rows: Tensor) -> None:
        self.inverse[:, rows], self.empty[rows] = 0.0, True

    def scaled(self, gradient: Tensor) -> Tensor:
        """The direction of steepest ascent ``(S, dim)``, in units of the metric."""
        return gradient if self.metric is None else gradient @ self.metric

    def direction(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """The two-loop recursion, from the scaled metric."""
        steps, falls, inverse = self.steps[:, rows], self.falls[:, rows], self.inverse[:, rows]
        result, shares = gradient[rows].clone(), []
        for step, fall, rho in zip(steps.flip(0), falls.flip(0), inverse.flip(0), strict=True):
            shares.append(rho * (step * result).sum(1))
            result -= shares[-1][:, None] * fall
        square = (falls[-1] * self.scaled(falls[-1])).sum(1)
        result = self.scaled(result) * torch.where(inverse[-1] > 0, 1 / (inverse[-1] * square), 1.0)[:, None]
        for step, fall, rho, share in zip(steps, falls, inverse, reversed(shares), strict=True):
            result += (share - rho * (fall * result).sum(1))[:, None] * step
        return result
