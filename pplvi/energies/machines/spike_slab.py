"""Spike-and-slab units: off, or a real number."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pplvi.energies.machines.units import Beta, Units, times
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Number, Positive


@checked
class SpikeSlabUnits(Units):
    r"""Units that are off, ``s = 0``, or on with a real value (the slab), ``s ~ N(f / a, 1 / a)``.

    .. math:: \text{base}(s) = [s \ne 0]\,\Big(\frac{a s^2}{2} - c - \frac12 \log \frac{a}{2 \pi}\Big), \qquad
        p(s \ne 0) = \sigma\Big(c + \frac{f^2}{2 a}\Big)

    with a precision ``a`` and log odds ``c`` of being on without a field, both learned. As hidden units of Gaussian
    visible ones they model the covariance of the data: given which units are on, ``v`` is normal with the precision
    ``t - sum a^-1 (t W_i) (t W_i)^T`` over these, and the machine is normalisable if that is positive definite with all
    of them on (annealed importance sampling refuses others). The measure of a unit is a point at 0 beside Lebesgue's.

    :param num_units: number of units.
    :param precision: initial precision of the slabs.
    :param log_odds: initial log odds of a slab without a field.
    :raises ValueError: for a precision that is not positive.

    Source: Courville, Bergstra & Bengio (2011), "A spike and slab restricted Boltzmann machine".

    >>> units = SpikeSlabUnits(2, precision=4.0)
    >>> units.mean(torch.tensor([0.0, 2.0])), units.log_partition(torch.zeros(2))
    (tensor([0.0000, 0.3112], grad_fn=<DivBackward0>), tensor(1.3863, grad_fn=<SumBackward1>))
    """

    def __init__(self, num_units: Count, *, precision: Positive = 1.0, log_odds: Number = 0.0) -> None:
        super().__init__(num_units)
        self.log_precision = torch.nn.Parameter(torch.full((num_units,), math.log(precision)))
        self.log_odds = torch.nn.Parameter(torch.tensor(float(log_odds)).expand(num_units).clone())

    @property
    def precision(self) -> Tensor:
        """Precision of each slab, ``(num_units,)``."""
        return self.log_precision.exp()

    def _at(self, field: Tensor, beta: Beta) -> tuple[Tensor, Tensor, Tensor]:
        """Fields, precisions and log odds at an inverse temperature."""
        one = torch.ones_like(self.log_odds)
        precision, height = times(beta, self.precision * one), self.log_odds + self.log_precision / 2
        odds = times(beta, height - math.log(2 * math.pi) / 2) + (math.log(2 * math.pi) - precision.log()) / 2
        scaled = times(beta, field)
        return scaled, precision, odds + scaled**2 / (2 * precision)

    def base_energy(self, value: Tensor) -> Tensor:
        """``sum [s != 0] (a s^2 / 2 - c - log(a / (2 pi)) / 2)``."""
        height = self.log_odds + (self.log_precision - math.log(2 * math.pi)) / 2
        return torch.where(value != 0, self.precision * value**2 / 2 - height, 0.0).sum(-1)

    def mean(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """``sigmoid(c + f^2 / (2 a)) f / a``."""
        scaled, precision, odds = self._at(field, beta)
        return torch.sigmoid(odds) * scaled / precision

    def chance(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """Probability that a unit is on, ``(*batch, width)``."""
        return torch.sigmoid(self._at(field, beta)[2])

    def sample(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """Zero, or a draw of the slab."""
        scaled, precision, odds = self._at(field.detach(), beta)
        slab = scaled / precision + torch.randn_like(scaled) * precision**-0.5
        return torch.where(torch.empty_like(odds).uniform_() < torch.sigmoid(odds), slab, 0.0).detach()

    def log_partition(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """``sum softplus(c + f^2 / (2 a))``."""
        return softplus(self._at(field, beta)[2]).sum(-1)

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Draws without a field."""
        return self.sample(like.new_zeros((*shape, self.width)))

    def problem(self, value: Tensor) -> str | None:
        """Refuse what is not finite."""
        return None if bool(value.isfinite().all()) else "values that are not finite: expected real numbers."
