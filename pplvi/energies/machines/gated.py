"""Third-order machines: units that gate the weights between others, factored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.couplings import GIVEN, Coupling, Edge, Products
from pplvi.energies.machines.exact_posterior import ConditionalGuide
from pplvi.energies.machines.rbm import Kind, make_units
from pplvi.energies.machines.units import Units
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, NonNegative
from pplvi.types import Values


@checked
@dataclass(frozen=True)
class FactoredCoupling(Coupling):
    r"""Weights between three or more layers as a sum of products, one for each factor.

    .. math:: E(x, v, h) = -\sum_f (x^T U)_f\, (v^T V)_f\, (h^T W)_f

    The parameter is ``U``, ``V`` and ``W`` one below the other, ``(sum of widths, num_factors)``.

    :ivar edge: names of the layers, ``"given"`` among them for a conditional machine.
    :ivar widths: their widths.
    :ivar num_factors: number of factors.

    Source: Memisevic & Hinton (2010), "Learning to represent spatial transformations with factored higher-order
    Boltzmann machines".

    >>> coupling = FactoredCoupling(("x", "v", "h"), (2, 2, 1), num_factors=3)
    >>> coupling.energy({"x": torch.ones(2), "v": torch.ones(2), "h": torch.ones(1)}, torch.ones(5, 3))
    tensor(-12.)
    """

    edge: Edge
    widths: tuple[Count, ...]
    num_factors: Count

    def start(self, scale: float) -> Tensor:
        """Normal weights with this standard deviation."""
        return scale * torch.randn(sum(self.widths), self.num_factors)

    def factors(self, parameter: Tensor) -> dict[str, Tensor]:
        """Weights from each layer to the factors, ``(width, num_factors)`` by name."""
        return dict(zip(self.edge, parameter.split(list(self.widths)), strict=True))

    def field(self, target: str, values: Values, parameter: Tensor, products: Products | None = None) -> Tensor:
        """The product over the other layers of what reaches a factor, back through the layer's own weights."""
        factors = self.factors(parameter)
        reached = [values[layer] @ factors[layer] for layer in self.edge if layer != target]
        product = reached[0]
        for other in reached[1:]:
            product = product * other
        return product @ factors[target].T

    def filters(self, parameter: Tensor) -> Tensor:
        """Weights of the first layer to each factor, ``(num_factors, width)``."""
        return self.factors(parameter)[self.edge[0]].T


@checked
class GatedBoltzmannMachine(BoltzmannMachine):
    r"""A gated restricted Boltzmann machine: hidden units that stand for transformations of ``x`` into ``v``.

    .. math:: E(v, h \mid x) = -a \cdot v - b \cdot h - \sum_f (x^T U)_f\, (v^T V)_f\, (h^T W)_f

    Conditional: ``machine.model(v, given=x)``. It is not centered.

    :param num_visible: visible units.
    :param num_hidden: hidden units.
    :param given: width of ``x``.
    :param num_factors: number of factors.
    :param visible: ``"bernoulli"``, ``"gaussian"``, or units of your own.
    :param name: prefix of the parameters' names.
    :param init_scale: standard deviation of the weights at the start.
    :raises ValueError: for unknown kinds of units.

    Source: Memisevic & Hinton (2007), "Unsupervised learning of image transformations"; (2010) for the factors.

    >>> machine = GatedBoltzmannMachine(4, 3, given=5, num_factors=6)
    >>> machine.log_partition(given=torch.ones(2, 5)).shape
    torch.Size([2])
    """

    def __init__(
        self,
        num_visible: Count,
        num_hidden: Count,
        *,
        given: Count,
        num_factors: Count,
        visible: Kind | Units = "bernoulli",
        name: str = "",
        init_scale: NonNegative = 0.1,
    ) -> None:
        layers = {"v": make_units(visible, num_visible), "h": make_units("bernoulli", num_hidden)}
        coupling = FactoredCoupling((GIVEN, "v", "h"), (given, num_visible, num_hidden), num_factors)
        super().__init__(layers, [coupling], centered=False, name=name, init_scale=init_scale, given=given)

    @property
    def guide(self) -> ConditionalGuide:
        """The exact posterior of the hidden layer, as a Pyro guide."""
        return ConditionalGuide(self)
