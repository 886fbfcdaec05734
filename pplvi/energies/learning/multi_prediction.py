"""Multi-prediction training: a Boltzmann machine as networks that predict some variables from the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.energy import Mask
from pplvi.energies.machines.training_step import training_step
from pplvi.energies.machines.units import Units
from pplvi.energies.posteriors.mean_field import MeanFieldGuide
from pplvi.energies.posteriors.problem import MeanField
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Fraction, Rate
from pplvi.losses.base import Loss
from pplvi.programs.plates import full_size
from pplvi.types import Values


@checked
class MultiPrediction(Loss):
    r"""The multi-prediction criterion: mean field predicts random subsets of the observed units from the others.

    .. math:: \ell = -E_S \sum_{i \in S} \log q_i(x_i), \qquad q = \text{mean field given } x_{-S}

    In nats per datum. The gradient goes back through every sweep of the guide's mean field: there is no sampling and no
    partition function, and what is trained is the inference that fills in missing units and labels
    (:meth:`pplvi.energies.MeanFieldGuide.fill_in`, :meth:`~pplvi.energies.MeanFieldGuide.means`). It bounds nothing
    (``monitor`` is ``None``). Units are observed one by one, softmax units as a whole; grey levels count as soft
    targets. Offsets of centered machines follow as under :class:`pplvi.BoltzmannELBO`. Units that are missing in the
    data (``mask=``, as for :meth:`pplvi.energies.BoltzmannMachine.model`) are neither given nor asked for.

    Labels are a layer like any other: train on ``{"v": v, "y": y}``, infer them by ``guide.means(v)["y"]``, from parts
    of the data too by ``guide.means(v, mask=mask)["y"]``.

    :param keep: probability that a unit is observed.
    :param keep_labels: the same for the layers above the visible one, such as labels; ``keep`` unless given.
    :param offset_rate: rate at which the offsets of a centered machine follow.
    :raises ValueError: for numbers outside their ranges.

    Source: Goodfellow, Mirza, Courville & Bengio (2013), "Multi-prediction deep Boltzmann machines".

    >>> import pyro
    >>> from pplvi.energies import DeepBoltzmannMachine
    >>> dbm, v = DeepBoltzmannMachine([4, 3, 2]), torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    >>> guide = MeanFieldGuide(dbm, iterations=5)
    >>> svi = pyro.infer.SVI(dbm.model, guide, pyro.optim.Adam({"lr": 0.05}), MultiPrediction())
    >>> losses = [svi.step(v) for _ in range(200)]
    >>> known = torch.tensor([True, False, True, False])
    >>> guide.fill_in(v, known).round()
    tensor([[1., 1., 0., 0.],
            [0., 0., 1., 1.]])
    """

    def __init__(self, keep: Fraction = 0.5, *, keep_labels: Fraction | None = None, offset_rate: Rate = 0.01) -> None:
        super().__init__(num_particles=1, vectorize_particles=True)
        self.keep, self.offset_rate = keep, offset_rate
        self.keep_labels = keep if keep_labels is None else keep_labels

    def __repr__(self) -> str:
        return f"MultiPrediction(keep={self.keep}, keep_labels={self.keep_labels})"

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The criterion on one random subset for each datum; the model itself is not run.

        :raises ValueError: for a guide that is no mean field, or data outside the support.
        """
        if not isinstance(guide, MeanFieldGuide):
            raise ValueError(
                f"multi-prediction training goes through mean-field sweeps, got the guide {guide!r}: expected a "
                "MeanFieldGuide."
            )
        with training_step():
            return self._loss(guide, *args, **kwargs)

    def _loss(self, guide: MeanFieldGuide, v: Tensor | Values, *, mask: Mask = None, size: int | None = None) -> Tensor:
        machine = guide.machine
        machine.announce()
        observed = machine.checked(v, mask)
        full_size(len(next(iter(observed.values()))), size)  # the mean over the data is that of any number
        seen = {n: torch.ones_like(x, dtype=torch.bool) for n, x in observed.items()} | machine.masks(mask, observed)
        keep = {n: self._mask(machine.layers[n], value, n == machine.visible) for n, value in observed.items()}
        found = guide.solve(observed, mask={n: seen[n] & keep[n] for n in observed})
        total = torch.zeros(())
        for layer, value in observed.items():
            score = machine.layers[layer].log_probs(found.fields[layer], value)
            total = total - score.masked_fill(keep[layer] | ~seen[layer], 0.0).sum(-1)
        self._follow(machine, {n: torch.where(seen[n], x, found.values[n]) for n, x in observed.items()}, found)
        return total.mean()

    def _mask(self, units: Units, value: Tensor, visible: bool) -> Tensor:
        """Which units stay observed, ``(*batch, width)``."""
        apart = units.width // units.num_units
        chance = torch.rand(*value.shape[:-1], units.num_units, dtype=value.dtype, device=value.device)
        return (chance < (self.keep if visible else self.keep_labels)).repeat_interleave(apart, -1)

    def _follow(self, machine: BoltzmannMachine, observed: Values, found: MeanField) -> None:
        if torch.is_grad_enabled() and machine.centered:
            values = {layer: value.detach() for layer, value in {**found.values, **observed}.items()}
            machine.move_offsets(values, self.offset_rate)
