"""Log densities of whole batches whose gradient is worked out from sufficient statistics, with one product a weight.

The gradient of a pairwise machine's log density is its statistics, ``d(-E)/dW = phi(s_a) phi(s_b)^T``, and that of a
density with layers summed out is the same at their conditional means. Positive and negative phase are therefore one
weighted sum of statistics, which is one matrix product for each weight where automatic differentiation has two, and a
sum of their results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pplvi.energies.live import centered_biases
from pplvi.energies.machine import BoltzmannMachine
from pplvi.energies.program import Values


def has_statistics(machine: Any) -> bool:
    """Whether all that a machine learns are weights and biases."""
    return isinstance(machine, BoltzmannMachine) and not any(
        True for units in machine.layers.values() for _ in units.parameters()
    )


def log_densities(machine: BoltzmannMachine, batches: Sequence[Values]) -> list[Tensor]:
    """``log_marginal`` of several batches of values, each ``(*batch,)``, with a common gradient.

    :param batches: values of all layers, or of so many that the others are independent.
    """
    with torch.no_grad():
        densities = [machine.log_marginal(values) for values in batches]
        full = [_with_means(machine, values) for values in batches]
    parameters: dict[Any, Tensor] = {**machine.edges(), **machine.biases()}
    if not (torch.is_grad_enabled() and any(p.requires_grad for p in parameters.values())):
        return densities
    flat = [{n: _flat(values[n]) for n in machine.layers} for values in full]
    offsets = {n: machine.offset(n) for n in machine.layers} if machine.centered else None
    joint = torch.cat([d.reshape(-1) for d in densities])
    joint = _Densities.apply(joint, flat, offsets, tuple(parameters), *parameters.values())
    parts = joint.split([d.numel() for d in densities])
    return [part.reshape(d.shape) for part, d in zip(parts, densities, strict=True)]


def _flat(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])


def _with_means(machine: BoltzmannMachine, values: Values) -> dict[str, Tensor]:
    missing = [layer for layer in machine.layers if layer not in values]
    return {**values, **{n: machine.layers[n].mean(machine.field(n, values)) for n in missing}}


class _Densities(torch.autograd.Function):
    """Known log densities of batches, with the gradient in weights and biases that their statistics give."""

    @staticmethod
    def forward(
        ctx: Any,
        densities: Tensor,
        batches: Sequence[Values],
        offsets: Values | None,
        keys: tuple[Any, ...],
        *parameters: Tensor,
    ) -> Tensor:
        ctx.keys, ctx.needed = keys, dict(zip(keys, ctx.needs_input_grad[4:], strict=True))
        ctx.offsets = None if offsets is None else {n: offset.clone() for n, offset in offsets.items()}
        ctx.batches = [v if offsets is None else {n: v[n] - offsets[n] for n in v} for v in batches]
        return densities.view_as(densities)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> Any:
        found: dict[Any, Tensor] = {}
        start = 0
        for values in ctx.batches:
            size = len(next(iter(values.values())))
            _add_statistics(found, ctx.keys, values, weight[start : start + size])
            start += size
        for edge in (key for key in ctx.keys if isinstance(key, tuple) and key[0] == key[1]):
            found[edge] = (found[edge] + found[edge].T).triu(1) / 2
        if ctx.offsets is not None:
            centered_biases(found, ctx.offsets)
        return None, None, None, None, *(found[key] if ctx.needed[key] else None for key in ctx.keys)


def _add_statistics(found: dict[Any, Tensor], keys: Sequence[Any], values: Values, weight: Tensor) -> None:
    """Add a batch's weighted statistics to those of others."""
    weighted: dict[str, Tensor] = {}
    for key in keys:
        if isinstance(key, str):
            found[key] = values[key].T @ weight if key not in found else found[key].addmv_(values[key].T, weight)
            continue
        first, second = key
        if second not in weighted:
            weighted[second] = values[second] * weight.unsqueeze(-1)
        left, right = values[first].T, weighted[second]
        found[key] = left @ right if key not in found else found[key].addmm_(left, right)
