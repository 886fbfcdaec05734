"""Many points climb a log density at once: L-BFGS over rows, each with a history and a step length of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_HISTORY, _BACKTRACKS = 8, 8
_ARMIJO, _SHRINK = 1e-4, 0.25
_GAIN = 1e-3  # nats; a point that gains less, twice in a row, stays where it is
_PATIENCE = 2

ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]


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


def ascend(function: ValueAndGradient, starts: Tensor, iterations: int) -> Climb:
    """Climb from several starts in lockstep.

    A row is evaluated only while it still climbs. Where no step along the quasi-Newton direction goes up, a row tries
    the gradient; where that does not either, it stays.

    Source: Nocedal and Wright (2006), Numerical optimization, chapter 7.

    :param function: rows ``(S, dim)`` to values ``(S,)`` and gradients ``(S, dim)``, in float64; what is not finite is
        a wall.
    :param starts: rows; those where the function is not finite are left out.
    :param iterations: the most of them.
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
    memory, idle = _Memory(at.position), torch.zeros(len(at.value), dtype=torch.long)
    for _ in range(iterations):
        active = torch.where(idle < _PATIENCE)[0]
        if not len(active):
            break
        gain = _step(function, at, memory, active)
        idle[active] = torch.where(gain > _GAIN, 0, idle[active] + 1)
    return at


def _step(function: ValueAndGradient, at: Climb, memory: _Memory, rows: Tensor) -> Tensor:
    """One step of these rows; what each gained."""
    before = at.value[rows]
    direction = memory.direction(at.gradient, rows)
    slope = (direction * at.gradient[rows]).sum(1)
    astray = slope <= 0
    direction[astray] = at.gradient[rows][astray]
    slope = (direction * at.gradient[rows]).sum(1)
    new = memory.empty[rows] | astray
    length = torch.where(new, 1 / direction.norm(dim=1).clamp(min=1.0), 1.0)
    waiting = torch.arange(len(rows))
    for _ in range(_BACKTRACKS):
        own = rows[waiting]
        trial = at.position[own] + length[waiting, None] * direction[waiting]
        value, gradient = function(trial)
        good = value.isfinite() & gradient.isfinite().all(1)
        good &= value >= at.value[own] + _ARMIJO * length[waiting] * slope[waiting]
        memory.learn(own[good], trial[good] - at.position[own[good]], at.gradient[own[good]] - gradient[good])
        for part, found in ((at.position, trial), (at.value, value), (at.gradient, gradient)):
            part[own[good]] = found[good]
        waiting = waiting[~good]
        if not len(waiting):
            break
        length[waiting] *= _SHRINK
    memory.forget(rows[waiting])
    return at.value[rows] - before


class _Memory:
    """The last steps of each row and how the gradient fell along them."""

    def __init__(self, like: Tensor) -> None:
        shape = (_HISTORY, *like.shape)
        self.steps, self.falls = like.new_zeros(shape), like.new_zeros(shape)
        self.inverse = like.new_zeros(_HISTORY, len(like))  # 1 / (step . fall), 0 for none
        self.empty = torch.ones(len(like), dtype=torch.bool)

    def learn(self, rows: Tensor, step: Tensor, fall: Tensor) -> None:
        curvature = (step * fall).sum(1)
        curved = (curvature > 0) & (fall.square().sum(1) <= 1e12 * curvature)
        rows, step, fall = rows[curved], step[curved], fall[curved]
        for part, new in ((self.steps, step), (self.falls, fall), (self.inverse, 1 / curvature[curved])):
            part[:, rows] = torch.cat([part[1:, rows], new[None]])
        self.empty[rows] = False

    def forget(self, rows: Tensor) -> None:
        self.inverse[:, rows], self.empty[rows] = 0.0, True

    def direction(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """The two-loop recursion, from the scaled identity."""
        steps, falls, inverse = self.steps[:, rows], self.falls[:, rows], self.inverse[:, rows]
        result, shares = gradient[rows].clone(), []
        for step, fall, rho in zip(steps.flip(0), falls.flip(0), inverse.flip(0), strict=True):
            shares.append(rho * (step * result).sum(1))
            result -= shares[-1][:, None] * fall
        square = falls[-1].square().sum(1)
        result *= torch.where(inverse[-1] > 0, 1 / (inverse[-1] * square), 1.0)[:, None]
        for step, fall, rho, share in zip(steps, falls, inverse, reversed(shares), strict=True):
            result += (share - rho * (fall * result).sum(1))[:, None] * step
        return result
