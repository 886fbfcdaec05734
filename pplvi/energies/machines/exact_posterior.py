"""Factorised posteriors of hidden layers: what a guide declares so that expectations of the energy are exact.

The energy of a pairwise machine is linear in every unit, so that under a factorised distribution its expectation is the
energy at the means. A guide with a method ``factorised(*args, **kwargs) -> Factorised`` is used that way by
:class:`pplvi.BoltzmannELBO`: nothing is drawn, and the entropy is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from torch import Tensor

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.energy import Fixed, Mask, Shown
from pplvi.energies.machines.training_step import active_step
from pplvi.kinds.checked import checked
from pplvi.programs.plates import data_plate
from pplvi.types import Values


@checked
@dataclass(frozen=True)
class Factorised:
    """A factorised distribution of hidden layers, one for each datum.

    :ivar means: mean value of each hidden layer, ``(*batch, width)``.
    :ivar entropy: its entropy, ``(*batch)``, in nats, less ``E[base(s)] - base(E[s])`` of layers that have such a term,
        the distribution held: where units have parameters, ``base`` of such has a gradient.
    """

    means: Mapping[str, Tensor]
    entropy: Tensor


@runtime_checkable
class FactorisedGuide(Protocol):
    """A guide that declares its factorised posterior."""

    def factorised(self, *args: Any, **kwargs: Any) -> Factorised:
        """The posterior for the arguments of the model."""
        ...


@checked
class ConditionalGuide:
    """The exact posterior ``p(h | v)`` of a machine whose hidden layers are independent given the data.

    A Pyro guide for ``machine.model``: it has no parameters, and its ELBO is ``-F(v)``, the log evidence plus log Z.

    :param machine: a machine such as :class:`pplvi.energies.RestrictedBoltzmannMachine`.
    :param observed: layers beside the visible one that the data have, such as labels.
    :raises ValueError: if hidden layers are connected with each other: use a mean-field guide.

    >>> from pplvi.energies import RestrictedBoltzmannMachine
    >>> rbm = RestrictedBoltzmannMachine(3, 2, init_scale=0.0)
    >>> ConditionalGuide(rbm).factorised(torch.ones(1, 3)).means["h"]
    tensor([[0.5000, 0.5000]])
    """

    def __init__(self, machine: BoltzmannMachine, observed: Sequence[str] = ()) -> None:
        self.latent = tuple(layer for layer in machine.hidden if layer not in observed)
        joined = [edge for edge in machine.connections if sum(name in self.latent for name in edge) > 1]
        if joined:
            raise ValueError(
                f"the hidden layers are connected by {joined}, so that p(h | v) is not factorised: expected hidden "
                "layers that are independent given the visible one. Use a mean-field guide."
            )
        self.machine = machine

    def factorised(
        self,
        v: Tensor | Values,
        *,
        mask: Mask = None,
        size: int | None = None,
        num_draws: int = 1,
        given: Tensor | None = None,
    ) -> Factorised:
        """The posterior of data ``(num_data, width)``, without gradient but, in training, of the units' parameters.

        :raises ValueError: with a mask: units that are missing tie the hidden ones together.
        """
        _refuse(mask)
        machine, entropy = self.machine, torch.zeros(())
        values, means = machine.observed(machine.joined(v, given)), {}
        for layer in self._missing(values):
            units = machine.layers[layer]
            with torch.no_grad():
                field = machine.field(layer, values)
                means[layer] = units.mean(field)
            with torch.set_grad_enabled(active_step() is not None):
                entropy = entropy + units.field_entropy(field, means[layer])
        return Factorised(means, entropy)

    def __call__(
        self, v: Shown = None, *, mask: Mask = None, size: int | None = None, num_draws: int = 1, given: Fixed = None
    ) -> None:
        """Sample sites of the hidden layers in plate ``"data"``; from their base measures without data."""
        _refuse(mask)
        machine = self.machine
        values = machine.observed(machine.joined(v, given))
        count = next((len(value) for value in values.values()), num_draws)
        with data_plate(count, size):
            for layer in self._missing(values) if machine.visible in values else machine.hidden:
                field = machine.field(layer, values) if machine.visible in values else machine.draw((count,))[layer]
                pyro.sample(layer, machine.layers[layer].conditional(field))

    def _missing(self, values: Values) -> list[str]:
        found = [layer for layer in self.machine.hidden if layer not in values]
        if unknown := sorted(set(found) - set(self.latent)):
            raise ValueError(f"data without values of the layers {unknown}: expected them, or a mean-field guide.")
        return found


def _refuse(mask: Mask) -> None:
    if mask is not None:
        raise ValueError(
            "a mask with the exact posterior of the hidden layers: where visible units are missing it is not "
            "factorised. Use MeanFieldGuide(machine), or GibbsGuide(machine)."
        )
