"""How layers are coupled: which pairs are, and what a coupling gives to fields, energies and statistics.

A machine holds one coupling for each pair of layers, and the parameter of each. All that depends on the form of the
weights is said here, so that a machine, its training step and its statistics do not ask what kind of coupling it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pplvi.energies.machines.units import BernoulliUnits, GaussianUnits, Units
from pplvi.kinds.checked import checked

Edge = tuple[str, str]
Products = defaultdict[Edge, WeakTensorKeyDictionary]
"""By source and target, products of values with weights, each for as long as its value lives: those of passing sweeps
make room at once."""


@checked
@dataclass(frozen=True)
class DenseCoupling:
    r"""A weight for each pair of units of two layers, or (lateral) for each pair of different units of one.

    .. math:: E_{ab}(s) = -\phi(s_a)^T W \phi(s_b), \qquad f_b = \phi(s_a) W, \qquad f_a = \phi(s_b) W^T

    The parameter ``W`` has shape ``(width of a, width of b)``; of a lateral one only the upper triangle counts. It is
    handed to every method, since a training step puts others in the place of a machine's own.

    :ivar edge: names of the layers ``a`` and ``b``.
    :ivar units: their units.

    Source: Ackley, Hinton & Sejnowski (1985); Smolensky (1986) for two layers.

    >>> from pplvi.energies import BernoulliUnits
    >>> coupling = DenseCoupling(("v", "h"), (BernoulliUnits(2), BernoulliUnits(1)))
    >>> v, h, weight = torch.ones(2), torch.ones(1), torch.tensor([[1.0], [2.0]])
    >>> coupling.field("v", v, weight), coupling.field("h", h, weight), coupling.energy((v, h), weight)
    (tensor([3.]), tensor([1., 2.]), tensor(-3.))
    """

    edge: Edge
    units: tuple[Units, Units]

    @property
    def is_lateral(self) -> bool:
        """Whether it is between units of one layer."""
        return self.edge[0] == self.edge[1]

    def start(self, scale: float) -> Tensor:
        """Normal weights with this standard deviation, to begin with."""
        return scale * torch.randn(self.units[0].width, self.units[1].width)

    def weight(self, source: str, parameter: Tensor) -> Tensor:
        """Weights from a layer to the other one, ``(width of source, width of the other)``."""
        if self.is_lateral:
            upper = parameter.triu(1)
            return upper + upper.T
        return parameter if source == self.edge[0] else parameter.T

    def field(self, source: str, value: Tensor, parameter: Tensor, products: Products | None = None) -> Tensor:
        """What values of a layer add to the field of the other one, ``(*batch, width of the other)``.

        :param products: where products of values with weights are kept; none are unless given.
        """
        units = self.units[source != self.edge[0]]
        if products is None or self.is_lateral or not units.is_plain:
            return units.statistic(value) @ self.weight(source, parameter)
        kept, transposed = products[self._way(source)], source != self.edge[0]
        known: Tensor | None = kept.get(value)
        if known is None:
            with torch.no_grad():
                known = kept[value] = value @ self.weight(source, parameter)
        needed = torch.is_grad_enabled() and (parameter.requires_grad or value.requires_grad)
        return _KnownProduct.apply(value, parameter, known, transposed) if needed else known

    def _way(self, source: str) -> Edge:
        return self.edge if source == self.edge[0] else self.edge[::-1]

    def energy(self, values: tuple[Tensor, Tensor], parameter: Tensor, products: Products | None = None) -> Tensor:
        """``-phi(s_a)^T W phi(s_b)``, ``(*batch)``, each pair of units of a lateral coupling once."""
        a, b = self.edge
        first, second = values
        if self.is_lateral:
            return -(self.field(a, first, parameter) * first).sum(-1) / 2
        if products is not None and second in products[b, a]:  # one product is enough
            return -(self.field(b, second, parameter, products) * self.units[0].statistic(first)).sum(-1)
        return -(self.field(a, first, parameter, products) * self.units[1].statistic(second)).sum(-1)

    def statistics(self, first: Tensor, second: Tensor, into: Tensor | None = None) -> Tensor:
        """Sums over rows of what ``W`` is multiplied with, ``(width of a, width of b)``: minus the energy's gradient.

        :param first: statistics of ``a``, ``(size, width of a)``, around an offset or not; ``second`` those of ``b``.
        :param into: sums to add to, in place.
        """
        if self.is_lateral:
            product = (first.T @ second).triu(1)
            return product if into is None else into.add_(product)
        return first.T @ second if into is None else into.addmm_(first.T, second)

    def centered(self, gradient: Tensor, biases: tuple[Tensor, Tensor], offsets: tuple[Tensor, Tensor]) -> Tensor:
        """The gradient of ``W`` around offsets ``c, d``: ``G - c G_b^T - G_a d^T``, from those of both biases."""
        change = torch.stack([offsets[0], biases[0]], 1) @ torch.stack([biases[1], offsets[1]])
        return gradient - (change.triu(1) if self.is_lateral else change)

    def shifts(self, gradient: Tensor, offsets: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What weights moved by a gradient of ``W`` add to the fields of ``a`` and ``b`` at the offsets.

        The gradients of the biases of centered layers are less by so much.
        """
        return gradient @ offsets[1], gradient.T @ offsets[0]

    def limit(self, parameter: Tensor, norm: float) -> None:
        """Shrink, in place, the weights into each unit of ``b`` to a norm of at most this."""
        parameter.mul_((norm / parameter.norm(dim=0)).clamp(max=1.0))


class _KnownProduct(torch.autograd.Function):
    """``value @ weight`` whose result is known: only the gradient is left to work out."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor, product: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(value, weight)
        ctx.transposed = transposed
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        value, weight = ctx.saved_tensors
        to_value = to_weight = None
        if ctx.needs_input_grad[0]:
            to_value = gradient @ (weight if ctx.transposed else weight.T)
        if ctx.needs_input_grad[1]:
            left, right = value.reshape(-1, value.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
            to_weight = right.T @ left if ctx.transposed else left.T @ right
        return to_value, to_weight, None, None


def colour_classes(layers: tuple[str, ...], connections: Sequence[Edge]) -> tuple[tuple[str, ...], ...]:
    """Groups of layers without connections between them, found greedily from the bottom."""
    colour: dict[str, int] = {}
    for layer in layers:
        taken = {
            colour[b if a == layer else a]
            for a, b in connections
            if layer in (a, b) and {a, b} - {layer} & colour.keys()
        }
        colour[layer] = next(c for c in range(len(layers)) if c not in taken)
    return tuple(tuple(n for n in layers if colour[n] == c) for c in range(max(colour.values()) + 1))


def check_graph(layers: Mapping[str, Units], connections: Sequence[Edge]) -> None:
    """Refuse graphs that make no machine.

    :raises ValueError: for connections of unknown layers, given twice, or without a normalisable energy.
    """
    if not layers:
        raise ValueError("a machine without layers: expected at least one, such as {'v': BernoulliUnits(9)}.")
    pairs = [frozenset(pair) for pair in connections]
    for pair in connections:
        if unknown := [name for name in pair if name not in layers]:
            raise ValueError(f"connection {pair} of unknown layers {unknown}: expected names among {list(layers)}.")
        if pairs.count(frozenset(pair)) > 1:
            raise ValueError(f"connection {pair} is given more than once: expected each pair of layers once.")
        if all(isinstance(layers[name], GaussianUnits) for name in pair):
            raise ValueError(f"connection {pair} between Gaussian layers: its energy may have no finite normaliser.")
        if pair[0] == pair[1] and not isinstance(layers[pair[0]], BernoulliUnits):
            raise ValueError(f"lateral connection {pair}: expected Bernoulli units, one of which is drawn at a time.")
