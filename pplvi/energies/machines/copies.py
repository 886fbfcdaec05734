"""Several copies of a layer that have the same weights, as one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from pplvi.energies.machines.units import BernoulliUnits, Beta, GaussianUnits, Units
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count


@checked
class CopiedUnits(Units):
    r"""``copies`` independent copies of a layer with tied weights; the value is their sum.

    Its neighbours have the field of all copies, and each copy has the field of one layer:
    :math:`p(h \mid v) = \sigma(c\, W^T v + b)` and :math:`p(v \mid h) = \sigma(W h + a)`, ``c`` copies of ``v``. With
    two copies a restricted machine is trained as if there were as much input again from the other side, as there will
    be in a deep machine. The base measure is the number of ways in which copies make a sum.

    :param units: the layer that is copied.
    :param copies: how many.
    :raises ValueError: for fewer than one copy.

    Source: Salakhutdinov & Hinton (2009), "Deep Boltzmann machines", section 3.3.

    >>> from pplvi.energies import RestrictedBoltzmannMachine
    >>> rbm = RestrictedBoltzmannMachine(3, 2, visible=CopiedUnits(BernoulliUnits(3)), init_scale=0.0)
    >>> round(rbm.log_partition().item() / torch.log(torch.tensor(2.0)).item(), 4)  # 2 * 3 + 2 bits
    8.0
    """

    def __init__(self, units: Units, copies: Count = 2) -> None:
        super().__init__(units.num_units, units.width)
        self.units, self.copies = units, copies

    @property
    def log_states(self) -> float:
        """Bits of all copies."""
        return self.copies * self.units.log_states

    def statistic(self, value: Tensor) -> Tensor:
        """That of one layer: linear, so that it is the sum of the copies'."""
        return self.units.statistic(value)

    def base_energy(self, value: Tensor) -> Tensor:
        """Minus the logarithm of the number of ways to make a sum; for Gaussian units ``t s^2 / (2 copies)``."""
        if isinstance(self.units, GaussianUnits):
            return self.units.base_energy(value) / self.copies
        one = torch.lgamma(value + 1)
        if isinstance(self.units, BernoulliUnits):
            one = one + torch.lgamma(self.copies - value + 1)
        total = self.num_units * torch.lgamma(value.new_tensor(self.copies + 1.0))
        return one.sum(-1) - total

    def mean(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """Sum of the copies' means."""
        return self.copies * self.units.mean(field, beta)

    def sample(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """Sum of draws of every copy."""
        return torch.stack([self.units.sample(field, beta) for _ in range(self.copies)]).sum(0)

    def log_partition(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """That of one layer, times the number of copies."""
        return self.copies * self.units.log_partition(field, beta)

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Sum of draws of the base measure."""
        return torch.stack([self.units.uniform(shape, like) for _ in range(self.copies)]).sum(0)

    def problem(self, value: Tensor) -> str | None:
        """Refuse what is no sum of copies; of means, what is no mean sum."""
        means = BernoulliUnits(self.num_units, mean_field=True) if isinstance(self.units, BernoulliUnits) else None
        if means is None:
            return None if bool(value.isfinite().all()) else "values that are not finite: expected sums of copies."
        return None if means.problem(value / self.copies) is None else f"sums that are not in [0, {self.copies}]."
