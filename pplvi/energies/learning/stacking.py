"""Deep machines as stacks of restricted ones, for training layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pplvi.energies.machines.copies import CopiedUnits
from pplvi.energies.machines.dbm import DeepBoltzmannMachine
from pplvi.energies.machines.dbn import DeepBeliefNetwork
from pplvi.energies.machines.rbm import RestrictedBoltzmannMachine
from pplvi.energies.machines.units import Units
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count


@checked
@dataclass
class Stage:
    """Two neighbouring layers of a deep machine, as a restricted machine of their own.

    In a deep Boltzmann machine a hidden layer gets input from both sides. In the stack every layer but the two outer
    ones therefore sees two copies of its neighbour: of the lower layer, unless the stage is the top one, and of the
    upper one, unless it is the first. With these copies the weights need no halving afterwards.

    :ivar network: the deep machine.
    :ivar below: name of the lower layer.
    :ivar above: name of the upper layer.
    :ivar machine: the restricted machine, over the lower layer ``"v"`` and the upper one ``"h"``.
    :ivar copies: copies of the lower and of the upper layer in it.
    """

    network: DeepBoltzmannMachine | DeepBeliefNetwork
    below: str
    above: str
    machine: RestrictedBoltzmannMachine
    copies: tuple[Count, Count]

    def inputs(self, value: Tensor) -> Tensor:
        """Data of the machine for values of the lower layer, ``(*batch, width)``."""
        return self.copies[0] * value

    def means(self, value: Tensor) -> Tensor:
        """Means of the upper layer for values of the lower one, ``(*batch, width)``: the next stage's data."""
        with torch.no_grad():
            field = self.machine.field("h", {"v": self.inputs(value)})
            return self.network.layers[self.above].mean(field)

    def sample(self, value: Tensor) -> Tensor:
        """Draws of the upper layer for values of the lower one, ``(*batch, width)``."""
        with torch.no_grad():
            field = self.machine.field("h", {"v": self.inputs(value)})
            return self.network.layers[self.above].sample(field)

    def adopt(self) -> None:
        """Give the deep machine the weights and biases of this one; a bias that two stages have is their mean."""
        weight = self.machine.weight("v", "h").detach()
        lower, upper = self.machine.bias("v").detach(), self.machine.bias("h").detach()
        if isinstance(self.network, DeepBeliefNetwork):
            _adopt_directed(self.network, self.below, self.above, weight, lower, upper)
            return
        with torch.no_grad():
            network = self.network
            network.get_parameter(f"weight_{self.below}_{self.above}").copy_(weight)
            bias = network.get_parameter(f"bias_{self.below}")
            bias.copy_(lower if self.below == network.visible else (bias + lower) / 2)
            network.get_parameter(f"bias_{self.above}").copy_(upper)
            for layer, name, copies in ((self.below, "v", self.copies[0]), (self.above, "h", self.copies[1])):
                network.offset(layer).copy_(self.machine.offset(name) / copies)


def _adopt_directed(
    network: DeepBeliefNetwork, below: str, above: str, weight: Tensor, lower: Tensor, upper: Tensor
) -> None:
    if below == network.top.visible:
        with torch.no_grad():
            for name, value in (
                (f"weight_{below}_{above}", weight),
                (f"bias_{below}", lower),
                (f"bias_{above}", upper),
            ):
                network.top.get_parameter(name).copy_(value)
        return
    network.generation.adopt(below, above, weight, lower)
    network.guide.recognition.adopt(below, above, weight, upper)


@checked
def stages(network: DeepBoltzmannMachine | DeepBeliefNetwork) -> Iterator[Stage]:
    """The stages of a deep machine, bottom to top, each with a new restricted machine.

    :raises ValueError: for a network that is no stack.

    >>> [(stage.below, stage.above, stage.copies) for stage in stages(DeepBoltzmannMachine([5, 4, 3, 2]))]
    [('v', 'h1', (2, 1)), ('h1', 'h2', (2, 2)), ('h2', 'h3', (1, 2))]
    """
    if not isinstance(network, DeepBoltzmannMachine | DeepBeliefNetwork):
        raise ValueError(f"got a {type(network).__name__}: expected a DeepBoltzmannMachine or a DeepBeliefNetwork.")
    pairs = list(pairwise(network.levels))
    undirected = isinstance(network, DeepBoltzmannMachine) and len(pairs) > 1
    centered = network.centered if isinstance(network, DeepBoltzmannMachine) else network.top.centered
    for level, (below, above) in enumerate(pairs):
        copies = (2 if undirected and level < len(pairs) - 1 else 1, 2 if undirected and level > 0 else 1)
        lower, upper = (network.layers[name] for name in (below, above))
        machine = RestrictedBoltzmannMachine(
            lower.num_units,
            upper.num_units,
            visible=_copied(lower, copies[0]),
            hidden=_copied(upper, copies[1]),
            centered=centered,
        )
        yield Stage(network, below, above, machine, copies)


def _copied(units: Units, copies: int) -> Units:
    return units if copies == 1 else CopiedUnits(units, copies)
