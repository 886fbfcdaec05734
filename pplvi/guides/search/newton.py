"""Newton's method with exact Hessians, where they are cheap: the end of ill-conditioned paths in a few steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pplvi.guides.search.lbfgs import ARMIJO, EPSILON, Point

STEPS, HALVINGS = 20, 12
_TOLERANCE = 1e-9  # nats, of what a step promises


def newton(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    hessian: Callable[[Tensor], Tensor | None],
    start: Point,
    precision: float = EPSILON,
) -> list[Point]:
    """Points on the way from a point to a minimum, the last of which is one; none if there is no minimum close by.

    Negative curvatures count by their size (saddle-free Newton), steps are halved until they go down.

    Source: Nocedal and Wright (2006), Numerical optimization, section 3.4; Dauphin et al. (2014).

    :param function: rows ``(S, dim)`` to values ``(S,)`` and gradients ``(S, dim)``.
    :param hessian: a vector ``(dim,)`` to the Hessian there, ``(dim, dim)``, or to ``None`` where it has none.
    :param start: where to begin.
    :param precision: machine precision of the function.

    >>> def steep(x):
    ...     bowl = torch.tensor([1.0, 1e8], dtype=torch.float64)
    ...     return 0.5 * (bowl * x.square()).sum(1), bowl * x
    >>> at = torch.ones(1, 2, dtype=torch.float64)
    >>> start = Point(at[0], float(steep(at)[0]), steep(at)[1][0])
    >>> newton(steep, lambda x: torch.diag(torch.tensor([1.0, 1e8], dtype=torch.float64)), start)[-1].position
    tensor([0., 0.], dtype=torch.float64)
    """
    trail = [start]
    for _ in range(STEPS):
        direction, promised, convex = _direction(trail[-1], hessian(trail[-1].position))
        if direction is None:
            return []
        if convex and promised < max(_TOLERANCE, 100 * precision * abs(trail[-1].value)):
            return trail[1:] or trail
        found = _downhill(function, trail[-1], direction, promised)
        if found is None:
            return []
        trail.append(found)
    return []


def _direction(point: Point, hessian: Tensor | None) -> tuple[Tensor | None, float, bool]:
    """The step, the fall that it promises to first order, and whether the function is convex here."""
    if hessian is None or not bool(hessian.isfinite().all()):
        return None, 0.0, False
    values, vectors = torch.linalg.eigh(hessian)
    sizes = values.abs()
    floor = EPSILON * float(sizes.max())
    inside = vectors.T @ point.gradient
    step = inside / sizes.clamp(min=floor or 1.0)
    return -vectors @ step, float(inside @ step), float(values.min()) > floor


def _downhill(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], start: Point, direction: Tensor, promised: float
) -> Point | None:
    step = 1.0
    for _ in range(HALVINGS):
        position = start.position + step * direction
        values, gradients = function(position[None])
        found = Point(position, float(values[0]), gradients[0])
        if found.is_finite and found.value <= start.value - ARMIJO * step * promised:
            return found
        step *= 0.5
    return None
