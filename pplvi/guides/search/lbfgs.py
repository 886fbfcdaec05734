"""L-BFGS from several starts at once: each path is a coroutine that asks for function values; one call answers all.

Source: Nocedal and Wright (2006), Numerical optimization, chapters 3 and 7; the stopping rules and their defaults are
those of Stan.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float64).eps
FURTHEST = 1e20  # beyond are only densities that rise for ever; theirs are no numbers to compute with
LINE_SEARCH_STEPS = 25
ARMIJO, WOLFE = 1e-4, 0.9
_VISIBLE = 100.0  # rounding errors of the function


class Point(NamedTuple):
    """A point of shape ``(dim,)``, the function there and its gradient, in float64."""

    position: Tensor
    value: float
    gradient: Tensor

    @property
    def is_finite(self) -> bool:
        """Whether value and gradient are finite."""
        return math.isfinite(self.value) and bool(self.gradient.isfinite().all())


Asking = Generator[Tensor, Point, "Trail"]


@dataclass(frozen=True)
class Options:
    """Stan's settings of L-BFGS.

    :ivar history: how many pairs of steps and gradient differences are kept.
    :ivar max_iterations: the most iterations.
    :ivar tol_obj: absolute change of the function to stop at.
    :ivar tol_rel_obj: relative change, in units of the machine precision.
    :ivar tol_grad: norm of the gradient.
    :ivar tol_rel_grad: squared norm of the gradient in the metric of the inverse Hessian, relative to the function, in
        units of the machine precision.
    :ivar tol_param: norm of the step.
    :ivar init_alpha: first step along the gradient, in units of it; its length is at most one, which starts far from
        the posterior want.
    :ivar precision: machine precision of the function, where it is coarser than float64's.
    """

    history: int = 6
    max_iterations: int = 1000
    tol_obj: float = 1e-12
    tol_rel_obj: float = 1e4
    tol_grad: float = 1e-8
    tol_rel_grad: float = 1e7
    tol_param: float = 1e-8
    init_alpha: float = 1e-3
    precision: float = EPSILON

    def relative(self, tolerance: float) -> float:
        """A relative tolerance that the precision of the function allows."""
        return max(tolerance * EPSILON, 10 * self.precision)


@dataclass
class Trail:
    """The points of one path, in order, and why it ended.

    :ivar reason: ``"converged"``, ``"max_iterations"``, ``"line search"`` (no step improves the function) or
        ``"stopped"``.
    """

    points: list[Point] = field(default_factory=list)
    reason: str = ""


def minimise(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    starts: Sequence[Tensor],
    options: Options,
    stops: Sequence[Callable[[Trail], str]] = (),
) -> list[Trail]:
    """Minimise a function from several starts.

    :param function: rows ``(S, dim)`` to values ``(S,)`` and gradients ``(S, dim)``; a value that is not finite is a
        wall.
    :param starts: vectors ``(dim,)`` at which the function is finite.
    :param options: settings.
    :param stops: for each start, why to end its path, asked after every iteration; empty to go on. It may add points.
    :returns: one trail for each start.

    >>> def bowl(x):
    ...     return (x - 3.0).square().sum(1), 2 * (x - 3.0)
    >>> minimise(bowl, [torch.zeros(2, dtype=torch.float64)], Options())[0].points[-1].position
    tensor([3., 3.], dtype=torch.float64)
    """
    asks = stops or [lambda trail: ""] * len(starts)
    walks = [_walk(start.double(), options, stop) for start, stop in zip(starts, asks, strict=True)]
    asked = {i: next(walk) for i, walk in enumerate(walks)}
    trails: dict[int, Trail] = {}
    while asked:
        answers = _evaluate(function, asked)
        asked = {}
        for i, point in answers.items():
            try:
                asked[i] = walks[i].send(point)
            except StopIteration as end:
                trails[i] = end.value
    return [trails[i] for i in range(len(walks))]


def _evaluate(function: Callable[[Tensor], tuple[Tensor, Tensor]], asked: dict[int, Tensor]) -> dict[int, Point]:
    positions = torch.stack(list(asked.values()))
    values, gradients = function(positions)
    rows = zip(positions, values.tolist(), gradients.to(positions.device), strict=True)
    return {i: Point(*row) for i, row in zip(asked, rows, strict=True)}


def _walk(start: Tensor, options: Options, stop: Callable[[Trail], str]) -> Asking:
    point = yield start
    trail, pairs = Trail([point]), deque[tuple[Tensor, Tensor]](maxlen=options.history)
    while not trail.reason:
        if len(trail.points) > options.max_iterations:
            trail.reason = "max_iterations"
            break
        direction = -times_inverse_hessian(point.gradient, pairs)
        first = 1.0 if pairs else min(options.init_alpha, 1 / max(float(point.gradient.norm()), 1.0))
        found = yield from _line_search(point, direction, first)
        if found is None and not pairs:
            found = yield from _line_search(point, direction, _visible_step(point, options))
        if found is None and pairs:
            pairs.clear()  # once more, along the gradient
        elif found is None:
            trail.reason = "line search"
        else:
            step, change = found.position - point.position, found.gradient - point.gradient
            if is_curved(step, change):
                pairs.append((step, change))
            trail.points.append(found)
            converged = _converged(point, found, pairs, options)
            trail.reason = "converged" if converged else stop(trail)
            point = found
    return trail


def _visible_step(point: Point, options: Options) -> float:
    """A step along the gradient that promises more than rounding hides: in coordinates of large scales, where
    gradients are small, shorter ones leave the value as it is."""
    square = max(float(point.gradient.square().sum()), torch.finfo(torch.float64).tiny)
    return _VISIBLE * options.precision * max(abs(point.value), 1.0) / square


def is_curved(step: Tensor, change: Tensor) -> bool:
    """Whether a pair shows positive curvature: else it is of no use for an inverse Hessian."""
    curvature = float(step @ change)
    return curvature > 0 and float(change @ change) <= 1e12 * curvature


def times_inverse_hessian(vector: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The two-loop recursion, from the scaled identity."""
    pairs, weights, result = list(pairs), [], vector
    for step, change in reversed(pairs):
        weights.append((step @ result) / (step @ change))
        result = result - weights[-1] * change
    if pairs:
        step, change = pairs[-1]
        result = result * (step @ change) / (change @ change)
    for (step, change), weight in zip(pairs, reversed(weights), strict=True):
        result = result + (weight - (change @ result) / (step @ change)) * step
    return result


def _converged(old: Point, new: Point, pairs: Iterable[tuple[Tensor, Tensor]], options: Options) -> bool:
    change, scale = abs(new.value - old.value), max(abs(new.value), abs(old.value), 1.0)
    metric = float(new.gradient @ times_inverse_hessian(new.gradient, pairs))
    return (
        change < options.tol_obj
        or change / scale < options.relative(options.tol_rel_obj)
        or float(new.gradient.norm()) < options.tol_grad
        or metric / max(abs(new.value), 1.0) < options.relative(options.tol_rel_grad)
        or float((new.position - old.position).norm()) < options.tol_param
    )


class _Trial(NamedTuple):
    step: float
    value: float
    slope: float


def _line_search(start: Point, direction: Tensor, step: float) -> Generator[Tensor, Point, Point | None]:
    """A point that satisfies the weak Wolfe conditions, by bracketing and cubic interpolation; ``None`` for none."""
    slope = float(direction @ start.gradient)
    if not slope < 0:
        return None
    low, high = _Trial(0.0, start.value, slope), _Trial(math.inf, math.nan, math.nan)
    for _ in range(LINE_SEARCH_STEPS):
        position = start.position + step * direction
        if not bool((position.abs() < FURTHEST).all()):
            return None
        point = yield position
        trial = _Trial(step, point.value, float(direction @ point.gradient)) if point.is_finite else None
        if trial is None or trial.value > start.value + ARMIJO * step * slope:
            high = trial or _Trial(step, math.nan, math.nan)
        elif trial.slope < WOLFE * slope:
            low = trial
        else:
            return point
        step = _next_step(low, high)
    return None


def _next_step(low: _Trial, high: _Trial) -> float:
    if math.isinf(high.step):
        return 10 * low.step if low.step else 1.0
    width = high.step - low.step
    if math.isnan(high.value):
        return low.step + (0.1 if low.step == 0 else 0.5) * width
    cubic = _cubic_minimum(low, high)
    return min(max(cubic, low.step + 0.1 * width), high.step - 0.1 * width)


def _cubic_minimum(a: _Trial, b: _Trial) -> float:
    """Minimum of the cubic through two values and slopes; the middle where there is none."""
    width = b.step - a.step
    d1 = a.slope + b.slope - 3 * (b.value - a.value) / width
    square = d1 * d1 - a.slope * b.slope
    if square < 0:
        return a.step + 0.5 * width
    d2 = math.sqrt(square)
    denominator = b.slope - a.slope + 2 * d2
    return b.step - width * (b.slope + d2 - d1) / denominator if denominator != 0 else a.step + 0.5 * width
