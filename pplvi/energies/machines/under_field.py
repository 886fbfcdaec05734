"""The units of a layer under a field, as a distribution."""

from __future__ import annotations

from typing import Any, ClassVar

from pyro.distributions import TorchDistribution, constraints
from torch import Tensor


class UnderField(TorchDistribution):
    """Units of one layer under a field, with one event dimension, by what their class knows in closed form.

    Its log density is for the layer's base measure, ``beta (phi(s) . f - base(s)) - log Z(f)``.

    :param units: the layer.
    :param field: fields of its units, ``(*batch, width)``.
    :param beta: inverse temperature, a number or ``(*batch)``.

    >>> import torch
    >>> from pplvi.energies import BernoulliUnits
    >>> UnderField(BernoulliUnits(2), torch.zeros(3, 2)).log_prob(torch.ones(2))
    tensor([-1.3863, -1.3863, -1.3863])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, units: Any, field: Tensor, beta: Any = 1.0) -> None:
        self.units, self.field, self.beta = units, field, beta
        super().__init__(field.shape[:-1], field.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> UnderField:
        """The same distribution, more often."""
        return UnderField(self.units, self.field.expand(*batch_shape, self.field.shape[-1]), self.beta)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, ``(*sample_shape, *batch, width)``."""
        found: Tensor = self.units.sample(self.field.expand(*sample_shape, *self.field.shape), self.beta)
        return found

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, ``(*batch)``, in nats."""
        linear = (self.units.statistic(value) * self.field).sum(-1) - self.units.base_energy(value)
        density: Tensor = self.beta * linear - self.units.log_partition(self.field, self.beta)
        return density

    @property
    def mean(self) -> Tensor:
        """Mean value, ``(*batch, width)``."""
        found: Tensor = self.units.mean(self.field, self.beta)
        return found
