"""A penalty that keeps the hidden units of an undirected model rarely active."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.convolutional import PooledUnits
from pplvi.energies.machines.couplings import GIVEN
from pplvi.energies.machines.exact_posterior import FactorisedGuide
from pplvi.energies.machines.training_step import training_step
from pplvi.energies.machines.units import BernoulliUnits
from pplvi.kinds.checked import checked
from pplvi.losses.base import Loss
from pplvi.types import Program


@checked
class SparsityPenalty(Loss):
    r"""Cross entropy between a target activity and the mean activity of each hidden unit over the batch.

    .. math:: -\sum_j \rho \log \bar q_j + (1 - \rho) \log(1 - \bar q_j)

    A loss to add to another one: ``BoltzmannELBO() + 0.01 * SparsityPenalty(0.1)``. For a machine's own program and a
    guide that declares its factorised posterior; activities are those of a unit given the guide's means of the others.
    Layers of binary units count, pooled ones too (Lee et al. 2009).

    :param target: activity ``rho`` that units are drawn to.
    :raises ValueError: for a target outside (0, 1), or, at the first step, another program or guide.

    Source: Lee, Ekanadham & Ng (2008); Nair & Hinton (2009); Hinton (2012), "A practical guide to training RBMs".

    >>> from pplvi.energies import RestrictedBoltzmannMachine
    >>> rbm = RestrictedBoltzmannMachine(3, 2, init_scale=0.0)
    >>> round(SparsityPenalty(0.5).loss(rbm.model, rbm.guide, torch.ones(4, 3)), 4)
    1.3863
    """

    def __init__(self, target: float = 0.05) -> None:
        if not 0 < target < 1:
            raise ValueError(f"target={target!r}: expected an activity between 0 and 1.")
        super().__init__()
        self.target = target

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The penalty, in nats, summed over the hidden binary units.

        :raises ValueError: for another program or guide, or hidden layers of other units.
        """
        machine = getattr(model, "__self__", None)
        if not (isinstance(machine, BoltzmannMachine) and isinstance(guide, FactorisedGuide)):
            raise ValueError(
                f"a sparsity penalty on {type(model).__name__} and {type(guide).__name__}: expected machine.model of a "
                "BoltzmannMachine, and a guide with factorised(), such as rbm.guide or MeanFieldGuide."
            )
        machine.announce()
        with training_step():
            with torch.no_grad():
                data = machine.joined(args[0], kwargs.get(GIVEN))
                values = {**machine.observed(data, kwargs.get("mask")), **guide.factorised(*args, **kwargs).means}
            layers = [n for n in machine.hidden if isinstance(machine.layers[n], BernoulliUnits | PooledUnits)]
            if not layers:
                raise ValueError(f"a sparsity penalty on {machine.hidden}: expected hidden layers of binary units.")
            return torch.stack([self._penalty(machine, layer, values) for layer in layers]).sum()

    def _penalty(self, machine: BoltzmannMachine, layer: str, values: dict[str, Tensor]) -> Tensor:
        activity = machine.layers[layer].mean(machine.field(layer, values)).mean(0)
        target = torch.full_like(activity, self.target)
        return torch.nn.functional.binary_cross_entropy(activity, target, reduction="sum")
