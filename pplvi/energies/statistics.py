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

from pplvi.energies.live import active_step
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
    parameters = _parameters(machine)
    if not (torch.is_grad_enabled() and any(p.requires_grad for p in parameters.values())):
        return densities
    joint = torch.cat([d.reshape(-1) for d in densities])
    joint = _Densities.apply(joint, Statistics(machine, batches), tuple(parameters), *parameters.values())
    parts = joint.split([d.numel() for d in densities])
    return [part.reshape(d.shape) for part, d in zip(parts, densities, strict=True)]


def _parameters(machine: BoltzmannMachine) -> dict[Any, Tensor]:
    return {**machine.edges(), **machine.biases()}


class Statistics:
    """Sufficient statistics of batches of values, around the offsets of a centered machine.

    The gradients of weights are ``sum_i w_i (s_i - c) (t_i - d)^T``, those of biases ``sum_i w_i r_i (s_i - c)`` with
    ``r_i = 1 - sum_t d . (t_i - d)`` over the neighbours ``t``: the centered gradient of :mod:`pplvi.energies.live`,
    and without offsets the plain one.
    """

    def __init__(self, machine: BoltzmannMachine, batches: Sequence[Values]) -> None:
        self.machine = machine
        self.offsets = {n: machine.offset(n).clone() for n in machine.layers} if machine.centered else None
        with torch.no_grad():
            self.batches = [self._around(_with_means(machine, values)) for values in batches]

    def _around(self, values: Values) -> dict[str, Tensor]:
        flat = {n: v.reshape(-1, v.shape[-1]) for n, v in values.items()}
        return flat if self.offsets is None else {n: v - self.offsets[n] for n, v in flat.items()}

    def add_to(self, gradients: dict[Any, Tensor], weight: Tensor) -> None:
        """Add the gradients for these weights of the data, ``(total size,)``, in place where there are some."""
        sizes = [len(values[self.machine.visible]) for values in self.batches]
        for values, part in zip(self.batches, weight.split(sizes), strict=True):
            self._add_weights(gradients, values, part)
            for layer, value in values.items():
                own = part if self.offsets is None else part - part * self._reach(layer, values)
                _add(gradients, layer, own @ value)

    def _add_weights(self, gradients: dict[Any, Tensor], values: Values, weight: Tensor) -> None:
        weighted = {b: values[b] * weight.unsqueeze(-1) for _, b in self.machine.connections}
        for a, b in self.machine.connections:
            if a != b:
                _add_product(gradients, (a, b), values[a].T, weighted[b])
                continue
            product = (values[a].T @ weighted[a]).triu(1)
            _add(gradients, (a, a), product)
            if self.offsets is not None:
                _add(gradients, a, -((product + product.T) @ self.offsets[a]))

    def _reach(self, layer: str, values: Values) -> Tensor:
        """``sum_m (t - d)^T d`` over a layer's neighbours but itself, ``(size,)``."""
        assert self.offsets is not None
        parts = [values[m] @ self.offsets[m] for m in self.machine.neighbours(layer) if m != layer]
        return sum(parts, values[layer].new_zeros(()))


def _add(gradients: dict[Any, Tensor], key: Any, term: Tensor) -> None:
    gradients[key] = gradients[key].add_(term) if key in gradients else term


def _add_product(gradients: dict[Any, Tensor], key: Any, left: Tensor, right: Tensor) -> None:
    gradients[key] = gradients[key].addmm_(left, right) if key in gradients else left @ right


def _with_means(machine: BoltzmannMachine, values: Values) -> dict[str, Tensor]:
    missing = [layer for layer in machine.layers if layer not in values]
    return {**values, **{n: machine.layers[n].mean(machine.field(n, values)) for n in missing}}


class _Densities(torch.autograd.Function):
    """Known log densities of batches, with the gradient in weights and biases that their statistics give."""

    @staticmethod
    def forward(
        ctx: Any, densities: Tensor, statistics: Statistics, keys: Sequence[Any], *parameters: Tensor
    ) -> Tensor:
        step = active_step()
        ctx.statistics, ctx.keys = statistics, keys
        ctx.leaves = dict(zip(keys, parameters, strict=True)) if step is not None and step.in_place else None
        return densities.view_as(densities)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> Any:
        needed = dict(zip(ctx.keys, ctx.needs_input_grad[3:], strict=True))
        if ctx.leaves is not None:
            _add_in_place(ctx.statistics, {key: p for key, p in ctx.leaves.items() if needed[key]}, weight)
            return None, None, None, *(None for _ in needed)
        found: dict[Any, Tensor] = {}
        ctx.statistics.add_to(found, weight)
        return None, None, None, *(found[key] if wanted else None for key, wanted in needed.items())


def _add_in_place(statistics: Statistics, leaves: dict[Any, Tensor], weight: Tensor) -> None:
    """Add gradients to the ``grad`` of parameters without a copy of them in between."""
    found = {key: p.grad for key, p in leaves.items() if p.grad is not None}
    statistics.add_to(found, weight)
    for key, p in leaves.items():
        p.grad = found[key]
