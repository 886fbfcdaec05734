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

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.couplings import GIVEN
from pplvi.energies.machines.training_step import active_step
from pplvi.types import Values

_PRODUCTS = ("log_density", "field", "contributions", "log_marginal", "energy", "bias", "weight", "coupling")


def has_statistics(machine: Any) -> bool:
    """Whether all that a machine learns are weights and biases that it uses as :class:`BoltzmannMachine` does.

    Not of a subclass with products or parameters of its own: its gradient is that of automatic differentiation.
    """
    if not isinstance(machine, BoltzmannMachine):
        return False
    own = all(getattr(type(machine), name) is getattr(BoltzmannMachine, name) for name in _PRODUCTS)
    declared = own and all(coupling.has_statistics for coupling in machine.couplings.values())
    learned = {id(p) for p in (*machine.edges().values(), *machine.biases().values())}
    return declared and all(id(p) in learned for p in machine.parameters())


def joint_log_densities(machine: BoltzmannMachine, batches: Sequence[Values]) -> list[Tensor]:
    """``log_marginal`` of several batches of values, each ``(*batch,)``, with a common gradient.

    :param batches: values of all layers, or of so many that the others are independent given them.
    """
    with torch.no_grad():
        found = [_completed(machine, values) for values in batches]
    densities = [density for density, _ in found]
    parameters = _parameters(machine)
    if not (torch.is_grad_enabled() and any(p.requires_grad for p in parameters.values())):
        return densities
    joint, statistics = torch.cat([d.reshape(-1) for d in densities]), Statistics(machine, found)
    joint = _Densities.apply(joint, statistics, tuple(parameters), *parameters.values())
    parts = joint.split([d.numel() for d in densities])
    return [part.reshape(d.shape) for part, d in zip(parts, densities, strict=True)]


def _completed(machine: BoltzmannMachine, values: Values) -> tuple[Tensor, dict[str, Tensor]]:
    """``log_marginal`` of values, and the values with the conditional means of what they lack."""
    density = machine.log_density(values)
    fields = {n: machine.field(n, values) for n in machine.layers if n not in values}
    for layer, field in fields.items():
        density = density + machine.layers[layer].log_partition(field)
    return density, {**values, **{n: machine.layers[n].mean(field) for n, field in fields.items()}}


def _parameters(machine: BoltzmannMachine) -> dict[Any, Tensor]:
    return {**machine.edges(), **machine.biases()}


class Statistics:
    """Sufficient statistics of batches of values, around the offsets of a centered machine.

    The gradients of weights are ``sum_i w_i (s_i - c) (t_i - d)^T``, those of biases ``sum_i w_i r_i (s_i - c)`` with
    ``r_i = 1 - sum_t d . (t_i - d)`` over the neighbours ``t``: the centered gradient of
    :mod:`pplvi.energies.machines.training_step`, and without offsets the plain one.
    """

    def __init__(self, machine: BoltzmannMachine, batches: Sequence[tuple[Tensor, Values]]) -> None:
        self.machine = machine
        self.offsets = {n: machine.offset(n).clone() for n in machine.layers} if machine.centered else None
        with torch.no_grad():
            shapes = [density.shape for density, _ in batches]
            names = (*machine.layers, *machine.conditions(batches[0][1]))
            self.values = {n: self._around(n, [values[n] for _, values in batches], shapes) for n in names}

    def _around(self, layer: str, values: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> Tensor:
        wide = [v.expand(*shape, v.shape[-1]) for v, shape in zip(values, shapes, strict=True)]
        rows = torch.cat([v.reshape(-1, v.shape[-1]) for v in wide])
        return rows if self.offsets is None or layer == GIVEN else rows.sub_(self.offsets[layer])

    def add_to(self, gradients: dict[Any, Tensor], weight: Tensor) -> None:
        """Add the gradients for these weights of the data, ``(total size,)``, in place where there are some."""
        self._add_weights(gradients, weight)
        for layer in self.machine.layers:
            value = self.values[layer]
            own = weight if self.offsets is None else weight - weight * self._reach(layer, self.offsets)
            shared = self.machine.layers[layer].num_biases
            _add(gradients, layer, (own @ value).reshape(shared, -1).sum(-1))

    def _add_weights(self, gradients: dict[Any, Tensor], weight: Tensor) -> None:
        weighted = {b: self.values[b] * weight.unsqueeze(-1) for _, b in self.machine.connections}
        for (a, b), coupling in self.machine.couplings.items():
            if not (coupling.is_lateral and self.offsets is not None):
                gradients[a, b] = coupling.statistics(self.values[a], weighted[b], gradients.get((a, b)))
                continue
            own = coupling.statistics(self.values[a], weighted[a])
            _add(gradients, (a, a), own)
            _add(gradients, a, -(coupling.weight(a, own) @ self.offsets[a]))

    def _reach(self, layer: str, offsets: Values) -> Tensor | float:
        """``sum_m (t - d)^T d`` over a layer's neighbours but itself, ``(total size,)``."""
        neighbours = (m for m in self.machine.neighbours(layer) if m != layer)
        return sum((self.values[m] @ offsets[m] for m in neighbours), 0.0)


def _add(gradients: dict[Any, Tensor], key: Any, term: Tensor) -> None:
    gradients[key] = gradients[key].add_(term) if key in gradients else term


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
