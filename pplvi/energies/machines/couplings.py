"""How layers are coupled: which are, and what a coupling gives to fields, energies and statistics.

A machine holds one coupling for each pair of layers (or three of them), and the parameter of each. All that depends on
the form of the weights is said here, so that a machine, its training step and its statistics do not ask what kind of
coupling it is. A new kind is a :class:`Coupling` with :meth:`~Coupling.start` and :meth:`~Coupling.field`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pplvi.energies.machines.units import BernoulliUnits, GaussianUnits, Units
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.types import Values

GIVEN = "given"
Edge = tuple[str, ...]
Products = defaultdict[Edge, WeakTensorKeyDictionary]
"""By source and target, products of values with weights, each for as long as its value lives: those of passing sweeps
make room at once."""


class Coupling:
    r"""What some layers have to do with each other: an energy that is linear in the statistic of each of them.

    .. math:: E_{ab}(s) = -f_b(\phi(s_a)) \cdot \phi(s_b)

    with one parameter, which is handed to every method, since a training step puts others in the place of a machine's
    own. Gradients are those of automatic differentiation, unless :attr:`has_statistics` says that
    :meth:`DenseCoupling.statistics` and what goes with it are there.

    :ivar edge: names of the layers.
    :ivar has_statistics: whether its gradient is known from sufficient statistics: declared, never guessed.
    :ivar has_centering: whether the centered gradient is, :meth:`DenseCoupling.centered`.

    >>> class Shared(Coupling):  # one weight for all pairs of units
    ...     edge = ("v", "h")
    ...     def start(self, scale): return torch.full((1,), scale)
    ...     def field(self, target, values, parameter, products=None):
    ...         return parameter * sum(x.sum(-1, keepdim=True) for n, x in values.items() if n != target)
    >>> from pplvi.energies import BernoulliUnits, BoltzmannMachine
    >>> layers = {"v": BernoulliUnits(3), "h": BernoulliUnits(2)}
    >>> machine = BoltzmannMachine(layers, [Shared()], centered=False, init_scale=0.5)
    >>> machine.energy({"v": torch.ones(3), "h": torch.ones(2)})
    tensor(-3., grad_fn=<NegBackward0>)
    """

    edge: Edge
    has_statistics: ClassVar[bool] = False
    has_centering: ClassVar[bool] = False

    @property
    def is_lateral(self) -> bool:
        """Whether it is between units of one layer."""
        return len(set(self.edge)) == 1

    def others(self, layer: str) -> frozenset[str]:
        """The layers whose values make the field of a layer."""
        return frozenset(self.edge) if self.is_lateral else frozenset(self.edge) - {layer}

    def start(self, scale: float) -> Tensor:
        """The parameter to begin with, of this standard deviation."""
        raise NotImplementedError

    def field(self, target: str, values: Values, parameter: Tensor, products: Products | None = None) -> Tensor:
        """What the other layers add to the field of one, ``(*batch, width)``.

        :param values: statistics of the other layers, ``(*batch, width)`` by name.
        :param products: where products of values with weights are kept; none are unless given.
        """
        raise NotImplementedError

    def energy(self, values: Values, parameter: Tensor, products: Products | None = None) -> Tensor:
        """Its part of the energy, ``(*batch)``, of the statistics of its layers."""
        last = self.edge[-1]
        return -(self.field(last, values, parameter, products) * values[last]).sum(-1)

    def weight(self, source: str, parameter: Tensor) -> Tensor:
        """Weights from a layer to the other one, ``(width of source, width of the other)``.

        :raises ValueError: if they are no matrix.
        """
        raise ValueError(f"{type(self).__name__} between {self.edge} has no matrix of weights: expected DenseCoupling.")

    def filters(self, parameter: Tensor) -> Tensor:
        """What each unit of the last layer looks at in the first one, ``(num_units, size)``."""
        return self.weight(self.edge[0], parameter).T

    def statistics(self, first: Tensor, second: Tensor, into: Tensor | None = None) -> Tensor:
        """Sums over rows of what the parameter is multiplied with, where :attr:`has_statistics` says so.

        :raises ValueError: where it does not.
        """
        raise ValueError(f"{type(self).__name__} between {self.edge} has no statistics: expected DenseCoupling.")

    def limit(self, parameter: Tensor, norm: float) -> None:
        """Shrink, in place, the weights into each unit of the last layer to a norm of at most this.

        :raises ValueError: if a unit has no weights of its own.
        """
        raise ValueError(f"{type(self).__name__} between {self.edge} limits no norms: expected DenseCoupling.")


@checked
@dataclass(frozen=True)
class DenseCoupling(Coupling):
    r"""A weight for each pair of units of two layers, or (lateral) for each pair of different units of one.

    .. math:: E_{ab}(s) = -\phi(s_a)^T W \phi(s_b), \qquad f_b = \phi(s_a) W, \qquad f_a = \phi(s_b) W^T

    The parameter ``W`` has shape ``(width of a, width of b)``; of a lateral one only the upper triangle counts.

    :ivar edge: names of the layers ``a`` and ``b``.
    :ivar widths: their widths.

    Source: Ackley, Hinton & Sejnowski (1985); Smolensky (1986) for two layers.

    >>> coupling = DenseCoupling(("v", "h"), (2, 1))
    >>> values, weight = {"v": torch.ones(2), "h": torch.ones(1)}, torch.tensor([[1.0], [2.0]])
    >>> coupling.field("h", values, weight), coupling.field("v", values, weight), coupling.energy(values, weight)
    (tensor([3.]), tensor([1., 2.]), tensor(-3.))
    """

    has_statistics: ClassVar[bool] = True
    has_centering: ClassVar[bool] = True
    edge: Edge
    widths: tuple[Count, Count]

    def start(self, scale: float) -> Tensor:
        """Normal weights with this standard deviation, to begin with."""
        return scale * torch.randn(self.widths)

    def weight(self, source: str, parameter: Tensor) -> Tensor:
        """Weights from a layer to the other one, ``(width of source, width of the other)``."""
        if self.is_lateral:
            upper = parameter.triu(1)
            return upper + upper.T
        return parameter if source == self.edge[0] else parameter.T

    def field(self, target: str, values: Values, parameter: Tensor, products: Products | None = None) -> Tensor:
        """What values of a layer add to the field of the other one, ``(*batch, width of the other)``."""
        source = self.edge[target == self.edge[0]]
        value = values[source]
        if products is None or self.is_lateral:
            return value @ self.weight(source, parameter)
        kept, transposed = products[self._way(source)], source != self.edge[0]
        known: Tensor | None = kept.get(value)
        if known is None:
            with torch.no_grad():
                known = kept[value] = value @ self.weight(source, parameter)
        needed = torch.is_grad_enabled() and (parameter.requires_grad or value.requires_grad)
        return _KnownProduct.apply(value, parameter, known, transposed) if needed else known

    def _way(self, source: str) -> Edge:
        return self.edge if source == self.edge[0] else self.edge[::-1]

    def energy(self, values: Values, parameter: Tensor, products: Products | None = None) -> Tensor:
        """``-phi(s_a)^T W phi(s_b)``, ``(*batch)``, each pair of units of a lateral coupling once."""
        a, b = self.edge
        if self.is_lateral:
            return super().energy(values, parameter) / 2
        if products is not None and values[b] in products[b, a]:  # one product is enough
            return -(self.field(a, values, parameter, products) * values[a]).sum(-1)
        return super().energy(values, parameter, products)

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
            colour[other] for edge in connections if layer in edge for other in set(edge) - {layer} & colour.keys()
        }
        colour[layer] = next(c for c in range(len(layers)) if c not in taken)
    return tuple(tuple(n for n in layers if colour[n] == c) for c in range(max(colour.values()) + 1))


def check_centering(couplings: Mapping[Edge, Coupling], centered: bool) -> None:
    """Refuse to center couplings whose centered gradient is not known.

    :raises ValueError: then.
    """
    if centered and (without := [edge for edge, coupling in couplings.items() if not coupling.has_centering]):
        raise ValueError(f"centered=True with couplings {without} that are not dense: expected centered=False.")


def check_graph(layers: Mapping[str, Units], connections: Sequence[Edge], given: int | None = None) -> None:
    """Refuse graphs that make no machine.

    :raises ValueError: for connections of unknown layers, given twice, or without a normalisable energy.
    """
    if not layers:
        raise ValueError("a machine without layers: expected at least one, such as {'v': BernoulliUnits(9)}.")
    if GIVEN in layers:
        raise ValueError(f"a layer named {GIVEN!r}: expected another name, or given=WIDTH for what a machine is given.")
    pairs = [frozenset(pair) for pair in connections]
    for pair in connections:
        if GIVEN in pair and given is None:
            raise ValueError(f"connection {pair} of a machine that is given nothing: expected given=WIDTH with it.")
        if unknown := [name for name in pair if name not in (*layers, GIVEN)]:
            raise ValueError(f"connection {pair} of unknown layers {unknown}: expected names among {list(layers)}.")
        if pairs.count(frozenset(pair)) > 1:
            raise ValueError(f"connection {pair} is given more than once: expected each pair of layers once.")
        if all(isinstance(layers.get(name), GaussianUnits) for name in pair):
            raise ValueError(f"connection {pair} between Gaussian layers: its energy may have no finite normaliser.")
        if len(set(pair)) == 1 and not isinstance(layers[pair[0]], BernoulliUnits):
            raise ValueError(f"lateral connection {pair}: expected Bernoulli units, one of which is drawn at a time.")
