"""Expectations without a closed form: Gauss-Hermite quadrature over scalar predictors, with exact gradients.

Densities of vectors, such as a softmax, are integrated by :mod:`pplvi.guides.conjugate.rows`.

For ``f ~ Normal(m, v)``, ``d E[g(f)] / d m = E[g'(f)]`` and ``d E[g(f)] / d v = E[g''(f)] / 2`` (Bonnet 1964; Price
1958), which hold at ``v = 0`` too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pplvi.guides.conjugate.expectations import Blocks, Distributions, Expected, NotConjugate, combined
from pplvi.guides.conjugate.expressions import Expression, Function, Symbolic, substituted
from pplvi.guides.conjugate.hermite import product_rule
from pplvi.guides.conjugate.parameters import parameters
from pplvi.guides.conjugate.rows import integrated_rows

_NODES = 32
_MOST_INPUTS = 2


@dataclass(frozen=True)
class Input:
    """A scalar predictor: a normal polynomial, or a positive one whose logarithm is normal.

    :ivar mean: of it, or of its logarithm.
    :ivar variance: likewise.
    :ivar positive: whether it is the exponential.
    """

    expression: Expression
    mean: Expected
    variance: Expected
    positive: bool


def integrated(blocks: Blocks, fn: Any, value: Any) -> Expected:
    """The expected log density of a distribution that the table has no closed form for.

    :raises NotConjugate: for sites that are not named for it, and densities that depend on several predictors at once.
    """
    symbolic: dict[str, Any] = {**{n: v for n, v in parameters(fn).items() if isinstance(v, Symbolic)}}
    if isinstance(value, Symbolic):
        symbolic["value"] = value
    found = {id(e): e for v in symbolic.values() for e in (v.inputs if isinstance(v, Function) else (v,))}
    inputs = [_input(blocks, e) for e in found.values()]
    if len(inputs) > _MOST_INPUTS:
        raise NotConjugate(f"a density that depends on {len(inputs)} predictors", _sites(inputs))
    for i, a in enumerate(inputs):
        for b in inputs[:i]:
            blocks.independent(a.mean.sites | a.variance.sites, b.mean.sites | b.variance.sites)
    density = _density(fn, value, symbolic, [x.expression for x in inputs])
    if _is_elementwise(density, inputs, fn.batch_shape):
        parts = [part for x in inputs for part in (x.mean, x.variance)]
        positive = [x.positive for x in inputs]
        return combined(lambda *numbers: _gauss_hermite(density, numbers, positive, fn.batch_shape), *parts)
    if len(inputs) == 1 and not inputs[0].positive and _is_rowwise(density, inputs[0].expression, fn.batch_shape):
        return integrated_rows(blocks, density, inputs[0].expression, fn.batch_shape)
    raise NotConjugate("a density whose elements depend on several predictors at once, or all on one", _sites(inputs))


def _sites(inputs: Sequence[Input]) -> set[str]:
    return set().union(*(x.expression.sites for x in inputs))


def _input(blocks: Blocks, e: Expression) -> Input:
    families = {blocks.families[site] for site in e.sites}
    if families == {"normal"}:
        return Input(e, blocks.mean(e), blocks.covariance(e, e), False)
    if families == {"lognormal"} and len(e.terms) == 1 and len(e.terms[0].atoms) == 1:
        return Input(e, blocks.log(e), blocks.log_variance(e), True)
    raise NotConjugate(f"a predictor of {sorted(e.sites)}, which have {sorted(families)} distributions", e.sites)


def _density(fn: Any, value: Any, symbolic: dict[str, Any], inputs: Sequence[Expression]) -> Callable[..., Tensor]:
    """The log density as a function of the inputs' values."""
    names = [name for name in symbolic if name != "value"]

    def density(*numbers: Tensor) -> Tensor:
        known = {id(e): number for e, number in zip(inputs, numbers, strict=True)}
        filled = {name: substituted(v, known) for name, v in parameters(fn).items()}
        made = type(fn)(**filled, validate_args=False) if names else fn
        found: Tensor = made.log_prob(substituted(value, known) if isinstance(value, Symbolic) else value)
        return found

    return density


def _is_elementwise(density: Callable[..., Tensor], inputs: Sequence[Input], shape: Any) -> bool:
    """Whether each element of the density depends on one element of each input."""
    values = [x.expression.shown.double() for x in inputs]
    if not all(_fits(v.shape, shape) for v in values):
        return False

    def along(v: Tensor, i: int) -> Tensor:
        return density(*(v if j == i else y for j, y in enumerate(values))).expand(shape)

    try:
        return all(_is_local(partial(along, i=i), x.expand(shape), 0) for i, x in enumerate(values))
    except RuntimeError:  # shapes that the program has fixed
        return False


def _is_rowwise(density: Callable[..., Tensor], e: Expression, shape: Any) -> bool:
    """Whether each element of the density depends on one row of an input."""
    value = e.shown.double()
    if value.dim() == 0 or not _fits(value.shape[:-1], shape):
        return False
    try:
        return _is_local(lambda v: density(v).expand(shape), value.expand(*shape, value.shape[-1]), 1)
    except RuntimeError:  # shapes that the program has fixed
        return False


def _is_local(function: Callable[[Tensor], Tensor], at: Tensor, events: int) -> bool:
    """Whether an element of a function depends on the values of one place alone: its last ``events`` dimensions."""
    whole, generator = at.clone(), torch.Generator().manual_seed(0)
    moved = torch.rand(whole.shape, generator=generator, dtype=whole.dtype).to(whole) * 0.1
    tangent = torch.func.jvp(function, (whole,), (moved,))[1]
    change = torch.func.grad(lambda v: function(v).sum())(whole) * moved
    change = change.sum(-1) if events else change
    return torch.allclose(tangent, change, rtol=1e-6, atol=1e-9, equal_nan=True)


def _fits(small: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether one shape broadcasts to another."""
    pairs = zip(reversed(small), reversed(shape), strict=False)
    return len(small) <= len(shape) and all(a in (1, b) for a, b in pairs)


def _gauss_hermite(
    density: Callable[..., Tensor], numbers: Sequence[Tensor], positive: Sequence[bool], shape: Any
) -> Tensor:
    """``E[density]``, whose gradient is that of the means and variances."""
    means = [m.expand(torch.broadcast_shapes(m.shape, shape)) for m in numbers[::2]]
    variances = [v.expand(m.shape) for v, m in zip(numbers[1::2], means, strict=True)]
    grid, weight = (part.to(means[0]) for part in product_rule(_NODES, len(means)))
    weight = weight.reshape(-1, *(1,) * len(shape))
    with torch.enable_grad():
        places = [
            (m + v.clamp(min=0).sqrt() * x.reshape(weight.shape)).detach().requires_grad_()
            for m, v, x in zip(means, variances, grid.unbind(-1), strict=True)
        ]
        values = torch.vmap(density)(*(z.exp() if p else z for z, p in zip(places, positive, strict=True)))
        values = values.expand(len(weight), *shape)
        found = (weight * values).sum(0).detach()
        if not any(m.requires_grad or v.requires_grad for m, v in zip(means, variances, strict=True)):
            return found
        slopes = torch.autograd.grad(values.sum(), places, create_graph=True, allow_unused=True)
    for m, v, z, slope in zip(means, variances, places, slopes, strict=True):
        if slope is not None:
            curvature = _second(slope, z)
            found = found + (weight * slope.detach()).sum(0) * (m - m.detach())
            found = found + 0.5 * (weight * curvature).sum(0) * (v - v.detach())
    return found


def _second(slope: Tensor, places: Tensor) -> Tensor:
    if not slope.requires_grad:
        return torch.zeros_like(slope)
    (found,) = torch.autograd.grad(slope.sum(), places, retain_graph=True, allow_unused=True)
    return torch.zeros_like(slope) if found is None else found


__all__ = ["Distributions", "integrated"]
