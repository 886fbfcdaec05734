"""One mean-field problem: a machine, what is observed of it, and the fields that its other layers have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.couplings import GIVEN
from pplvi.energies.machines.energy import Mask
from pplvi.kinds.checked import checked
from pplvi.types import Values


@checked
@dataclass(frozen=True)
class MeanField:
    """A factorised posterior of the layers that are not observed.

    :ivar values: what is observed, and the means of the other layers, ``(*batch, width)`` by layer.
    :ivar fields: fields of the other layers, which their distributions are made of, ``(*batch, width)`` by layer.
    :ivar masks: of partly observed layers, which are among the others, where units are observed.
    """

    values: dict[str, Tensor]
    fields: dict[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def means(self) -> dict[str, Tensor]:
        """Means of the layers that are not observed."""
        return {layer: self.values[layer] for layer in self.fields}


class Problem:
    """A machine, what is observed of it, and the fields of the rest.

    :ivar free: layers that are not, or only partly, observed.
    :ivar order: the same, in the order in which sweeps update them: odd layers, then even ones.
    """

    def __init__(self, machine: BoltzmannMachine, observed: Mapping[str, Tensor], mask: Mask, count: int) -> None:
        self.machine, self.masks = machine, machine.masks(mask, observed)
        self.partly = {layer: observed[layer] for layer in self.masks}
        self.known = {layer: value for layer, value in observed.items() if layer not in self.masks}
        self.free = [layer for layer in machine.layers if layer not in self.known]
        turns = [[layer for layer in group if layer in self.free] for group in machine.classes]
        self.order = [layer for turn in turns[1:] + turns[:1] for layer in turn]
        shape = next((value.shape[:-1] for value in observed.values()), torch.Size([count]))
        self.fixed = {n: machine.field(n, self.known).expand(*shape, machine.layers[n].width) for n in self.free}

    def field(self, layer: str, values: Values) -> Tensor:
        """Field of a layer; what comes from observed layers was worked out once."""
        field = self.fixed[layer]
        for _, part in self.machine.contributions(layer, values, self.known):
            field = field + part
        return field

    def mean(self, layer: str, field: Tensor) -> Tensor:
        """Means under a field, but for the units that are observed."""
        mean, mask = self.machine.layers[layer].mean(field), self.masks.get(layer)
        return mean if mask is None else torch.where(mask, self.partly[layer], mean)

    def one_by_one(self, layer: str, values: Values) -> tuple[Tensor, Tensor]:
        """Fields and means of a layer with lateral connections, one unit after another."""
        outer = self.field(layer, {**values, layer: torch.zeros_like(values[layer])})
        weight, mask = self.machine.weight(layer, layer), self.masks.get(layer)
        mask = None if mask is None else mask.expand_as(outer)
        means, fields = list(values[layer].unbind(-1)), []
        for i in range(len(means)):
            fields.append(outer[..., i] + torch.stack(means, -1) @ weight[:, i])
            new = self.machine.layers[layer].mean(fields[i])
            means[i] = new if mask is None else torch.where(mask[..., i], means[i], new)
        return torch.stack(fields, -1), torch.stack(means, -1)

    def first_pass(self) -> MeanField:
        """Bottom up, with what comes from below counted twice where a layer above is not known yet."""
        values, fields = dict(self.known), {}
        for layer in self.free:
            fields[layer] = self._first_field(layer, values)
            values[layer] = self.mean(layer, fields[layer])
        return MeanField(values, fields, self.masks)

    def _first_field(self, layer: str, values: Values) -> Tensor:
        field, missing = self.fixed[layer], [n for n in self.machine.neighbours(layer) if n not in values]
        for other in missing:
            field = field + self._center(other, layer)
        for others, below in self.machine.contributions(layer, values):
            field = field if others <= self.known.keys() else field + below
            if set(missing) - {layer}:
                field = field + below - sum((self._center(other, layer) for other in others), torch.zeros(()))
        return field

    def _center(self, other: str, layer: str) -> Tensor:
        """What a layer adds to the field of another one at its offset, of a centered machine."""
        if not self.machine.centered or other == GIVEN:
            return torch.zeros(())
        # training moves the offset in place, under the gradient
        return self.machine.offset(other).clone() @ self.machine.weight(other, layer)
