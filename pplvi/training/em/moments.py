"""M-steps with continuous latents in closed form: least squares for loadings and means, second moments for spreads.

``Q`` is a quadratic in parameters of the means of normal sites, and ``-n_i log s_i - r_i / (2 s_i^2)`` in each element
of a standard deviation; variances, precisions and rates of Gamma sites are of that form with other powers. Which
parameters are of which kind, and the numbers, are read off from gradients at a few points: a quadratic takes as many as
a row of parameters is long, where rows do not interact, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pplvi.training.em.complete import ParameterLeaves
from pplvi.training.em.families import CollapseError

_MOST = 200  # parameters of a row
_PASSES = 50
_STILL = 1e-9  # norm of the gradient, relative to Q
_POWERS = (-2.0, -1.0, 1.0, 2.0)  # of standard deviations, variances, precisions and rates, roots of precisions


class _Gradients:
    """Gradients of minus ``Q`` for fixed counts, by parameter."""

    def __init__(self, problem: ParameterLeaves, counts: Mapping[str, Tensor]) -> None:
        self.problem, self.counts, self.leaves = problem, counts, problem.leaves

    def here(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus ``Q``, and its gradient."""
        leaves = list(self.leaves.values())
        value, flat = self.problem.value_and_gradient(self.counts, leaves)
        parts = flat.split([leaf.numel() for leaf in leaves])
        return value, {n: p.reshape(x.shape) for (n, x), p in zip(self.leaves.items(), parts, strict=True)}

    @torch.no_grad()
    def at(self, shifts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradient where parameters are shifted."""
        before = {name: self.leaves[name].detach().clone() for name in shifts}
        for name, shift in shifts.items():
            self.leaves[name].add_(shift)
        try:
            return self.here()[1]
        finally:
            for name, value in before.items():
                self.leaves[name].copy_(value)


@dataclass(frozen=True)
class _Quadratic:
    """Parameters in which ``Q`` is a concave quadratic.

    :ivar names: of the parameters.
    :ivar rows: how many rows of them do not interact.
    """

    names: tuple[str, ...]
    rows: int

    def packed(self, values: Mapping[str, Tensor]) -> Tensor:
        """Side by side, ``(rows, k)``."""
        return torch.cat([values[name].reshape(self.rows, -1) for name in self.names], 1)

    def unpacked(self, packed: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`packed`."""
        parts = packed.split([like[name].numel() // self.rows for name in self.names], 1)
        return {name: part.reshape(like[name].shape) for name, part in zip(self.names, parts, strict=True)}

    def curvature(self, gradients: _Gradients, first: Tensor) -> Tensor:
        """The Hessian of minus ``Q`` of every row, ``(rows, k, k)``.

        :param first: the gradient here.
        """
        columns = []
        for unit in torch.eye(first.shape[1]).to(first):
            there = gradients.at(self.unpacked(unit.expand_as(first), gradients.leaves))
            columns.append(self.packed(there) - first)
        return torch.stack(columns, -1)

    def holds(self, gradients: _Gradients, generator: torch.Generator) -> bool:
        """Whether that is what ``Q`` is in these parameters."""
        first = self.packed(gradients.here()[1])
        found = self.curvature(gradients, first)
        away = torch.randn(first.shape, generator=generator, dtype=first.dtype).to(first)
        there = self.packed(gradients.at(self.unpacked(away, gradients.leaves)))
        concave = not bool(torch.linalg.cholesky_ex(found)[1].any())
        return concave and _close(there - first, (found @ away.unsqueeze(-1)).squeeze(-1))

    @torch.no_grad()
    def maximise(self, gradients: _Gradients) -> None:
        """Go to the maximum: Newton's step, and another one for its rounding errors."""
        first = self.packed(gradients.here()[1])
        tril = torch.linalg.cholesky(self.curvature(gradients, first))
        for _ in range(2):
            slope = self.packed(gradients.here()[1])
            step = torch.cholesky_solve(slope.unsqueeze(-1), tril).squeeze(-1)
            for name, part in self.unpacked(step, gradients.leaves).items():
                gradients.leaves[name].sub_(part)


@dataclass(frozen=True)
class _Spread:
    """A positive parameter ``s`` in whose elements ``Q = -n log s - r s^power / power``.

    :ivar name: of the parameter.
    :ivar power: -2 for a standard deviation.
    """

    name: str
    power: float

    def numbers(self, gradients: _Gradients) -> tuple[Tensor, Tensor]:
        """``n`` and ``r``: the gradient in the logarithm is ``n + r s^power``."""
        leaf = gradients.leaves[self.name].detach().clone()
        here = gradients.here()[1][self.name]
        there = gradients.at({self.name: torch.ones_like(leaf)})[self.name]
        size = (self.power * leaf).exp()
        r = (there - here) / (size * torch.expm1(torch.tensor(self.power)).to(leaf))
        return here - r * size, r

    def holds(self, gradients: _Gradients, generator: torch.Generator) -> bool:
        """Whether that is what ``Q`` is in this parameter."""
        leaf = gradients.leaves[self.name].detach().clone()
        n, r = self.numbers(gradients)
        away = torch.rand(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf) - 0.5
        there = gradients.at({self.name: away})[self.name]
        return bool((n * r < 0).all()) and _close(there, n + r * (self.power * (leaf + away)).exp())

    @torch.no_grad()
    def maximise(self, gradients: _Gradients) -> None:
        """Go to the maximum.

        :raises CollapseError: where there is none.
        """
        n, r = self.numbers(gradients)
        found = (-n / r).log() / self.power
        if not bool(found.isfinite().all()):
            raise CollapseError(
                f"the likelihood has no maximum: a spread in {self.name!r} went to zero. Expected a bound, such as "
                "constraint=constraints.greater_than(0.01), or fewer factors."
            )
        gradients.leaves[self.name].copy_(found)


@dataclass(frozen=True)
class ClosedMoments:
    """An M-step that goes through groups of parameters, each at its maximum given the others, until all are."""

    groups: tuple[Any, ...]

    def __call__(self, problem: ParameterLeaves, counts: Mapping[str, Tensor]) -> None:
        """One M-step."""
        gradients = _Gradients(problem, counts)
        for _ in range(_PASSES):
            for group in self.groups:
                group.maximise(gradients)
            value, slopes = gradients.here()
            if max(float(slope.abs().max()) for slope in slopes.values()) <= _STILL * (1 + abs(float(value))):
                return


def closed_moments(problem: ParameterLeaves, counts: Mapping[str, Tensor]) -> ClosedMoments | None:
    """The M-step in closed form, if all parameters of a problem have one.

    :param counts: what the M-step needs of the posterior.
    """
    gradients, generator = _Gradients(problem, counts), torch.Generator().manual_seed(0)
    real = tuple(name for name in problem.leaves if _is_real(problem.constraint(name)))
    groups: list[Any] = []
    if real:
        made = next((q for q in _partitions(real, problem.leaves) if q.holds(gradients, generator)), None)
        if made is None:
            return None
        groups.append(made)
    for name in problem.leaves:
        if name not in real:
            spreads = [_Spread(name, power) for power in _POWERS] if _is_positive(problem.constraint(name)) else []
            found = next((spread for spread in spreads if spread.holds(gradients, generator)), None)
            if found is None:
                return None
            groups.append(found)
    return ClosedMoments(tuple(groups))


def _partitions(names: Sequence[str], leaves: Mapping[str, Tensor]) -> list[_Quadratic]:
    """By rows, where all parameters have as many, or all in one."""
    rows = {leaves[name].shape[0] if leaves[name].dim() else 1 for name in names}
    total = sum(leaves[name].numel() for name in names)
    sizes = [*rows, 1] if len(rows) == 1 else [1]
    return [_Quadratic(tuple(names), size) for size in dict.fromkeys(sizes) if total // size <= _MOST]


def _is_real(constraint: Any) -> bool:
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return type(constraint).__name__ == "_Real"


def _is_positive(constraint: Any) -> bool:
    """Whether the leaf is the logarithm."""
    return type(constraint).__name__ in ("_GreaterThan", "_GreaterThanEq") and float(constraint.lower_bound) == 0.0


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(b.abs().max())
    return bool(a.isfinite().all()) and bool((a - b).abs().max() <= 1e-7 * (1 + scale))
