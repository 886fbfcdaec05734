"""Updates of blocks that have no closed form: damped natural gradients, Laplace's method, points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pplvi.guides.conjugate.ascent import UPDATES, BlockMeanField
from pplvi.guides.conjugate.lognormal import is_point
from pplvi.guides.conjugate.normal import NormalFamily, solved

_HALVINGS = 12
_NEWTON_STEPS = 50
_LEAST = 1e-8  # precision where a density is flat


def natural_gradient(field: BlockMeanField, block: str, rate: float) -> None:
    r"""A step of conjugate-computation variational inference (Khan & Lin 2017), halved until the bound rises.

    .. math:: \eta \leftarrow (1 - \rho) \eta + \rho \nabla_\mu E_q[\log p(x, z)]

    with the gradient in the block's mean parameters: for ``rho=1`` and a conjugate model the exact update.
    """
    family: Any = field.families[block]
    old = dict(family.canonical)
    before = field.objective(block)
    target = _target(field, block)
    for _ in range(_HALVINGS):
        family.step(target, rate)
        if _is_proper(family) and field.objective(block) >= before:
            return
        family.canonical = dict(old)
        rate *= 0.5
    family.refresh()


def _target(field: BlockMeanField, block: str) -> tuple[Tensor, Tensor]:
    """Where the block goes, with its precision made positive where the density is not concave."""
    family: Any = field.families[block]
    slope, precision = family.slopes(field.gradients(block), field.weight(block))
    if family.size == 1:
        precision = precision.abs().clamp(min=_LEAST)
    else:
        values, vectors = torch.linalg.eigh(precision)
        if not bool((values > _LEAST).all()):
            precision = (vectors * values.abs().clamp(min=_LEAST).unsqueeze(-2)) @ vectors.mT
    return family.canonical["loc"] + solved(precision, slope, family.size), precision


def _is_proper(family: NormalFamily) -> bool:
    return all(bool(value.isfinite().all()) for value in family.canonical.values())


def to_mode(field: BlockMeanField, block: str, rate: float = 1.0) -> None:
    """Newton's method to the mode of the expected log joint, with the block at a point."""
    family: Any = field.families[block]
    for _ in range(_NEWTON_STEPS):
        loc, value = family.canonical["loc"], _value_at(field, block)
        step = _target_at(field, block)[0] - loc
        for _ in range(_HALVINGS):
            family.canonical["loc"] = loc + step
            if _value_at(field, block) >= value:
                break
            step = 0.5 * step
        else:
            family.canonical["loc"] = loc
            break
        if bool((step.abs() <= 1e-10 * (1 + loc.abs())).all()):
            break
    family.refresh()


def laplace(field: BlockMeanField, block: str, rate: float = 1.0) -> None:
    """Go to the mode, with the curvature there as the precision."""
    to_mode(field, block)
    family: Any = field.families[block]
    family.canonical["precision"] = _target_at(field, block)[1]
    family.refresh()


def _as_point(family: Any) -> None:
    loc, spread = family.canonical["loc"], torch.zeros_like(family.leaves[1])
    family.leaves = (loc.detach().clone().requires_grad_(), spread.requires_grad_())


def _target_at(field: BlockMeanField, block: str) -> tuple[Tensor, Tensor]:
    _as_point(field.families[block])
    return _target(field, block)


def _value_at(field: BlockMeanField, block: str) -> float:
    """The log joint at the point, with the Jacobian of a logarithm unless the block stays a point."""
    family: Any = field.families[block]
    _as_point(family)
    jacobian = 0.0 if is_point(family) or family.kind == "normal" else float(family.canonical["loc"].sum())
    value = field.expected(block) + jacobian
    return value if value == value else -float("inf")


UPDATES |= {"cvi": natural_gradient, "laplace": laplace, "delta": to_mode}
