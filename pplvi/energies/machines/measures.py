"""The measures that energies are densities for."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

from pplvi.energies.machines.units import Units
from pplvi.kinds.checked import checked


@checked
class BaseMeasure(TorchDistribution):
    """The measure of a layer that an energy is a density for: counting measure, or Lebesgue's; ``log_prob`` is 0.

    It is no distribution: beside it a model has a factor ``exp(-E)``. Draws come from ``draw``.

    :param units: the layer.
    :param batch_shape: shape of the plates.
    :param draw: what :meth:`sample` calls with the batch shape; by default :meth:`Units.uniform`.
    :param checked: whether :meth:`log_prob` refuses values outside the support, under the name given here.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, units: Units, batch_shape: tuple[int, ...], like: Tensor, draw: Any = None, checked: str | None = None
    ) -> None:
        self.units, self.like, self.draw, self.checked = units, like, draw, checked
        super().__init__(Size(batch_shape), Size([units.width]), validate_args=False)
        self._validate_args = checked is not None

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether a layer has few enough states to list."""
        return self.units.log_states <= 20

    @property
    def support(self) -> Any:
        """Zeros and ones, or the reals."""
        return constraints.real_vector if self.units.num_states is None else _binary_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> BaseMeasure:
        """The same measure, more often."""
        return BaseMeasure(self.units, tuple(batch_shape), self.like, self.draw, self.checked)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws for the site, ``(*sample_shape, *batch_shape, width)``."""
        shape = (*sample_shape, *self.batch_shape)
        value: Tensor = self.units.uniform(shape, self.like) if self.draw is None else self.draw(shape)
        return value

    def _validate_sample(self, value: Tensor) -> None:
        if self.checked is not None:
            self.units.validate(value, self.checked)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero, ``(*batch)``."""
        if self._validate_args:
            self._validate_sample(value)
        return value.new_zeros(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Every state of the layer, ``(num_states, *batch_shape, width)``.

        :raises NotImplementedError: for a continuum.
        """
        if self.units.num_states is None:
            raise NotImplementedError(
                f"the states of {type(self.units).__name__} are a continuum: expected finite units."
            )
        count = self.units.count_states()
        states = self.units.states(torch.arange(count), self.like)
        states = states.reshape(count, *(1 for _ in self.batch_shape), self.units.width)
        return states.expand(count, *self.batch_shape, self.units.width) if expand else states


@checked
class PartlyObserved(TorchDistribution):
    """Units of one layer under a field, of which some were observed: these have their values, with probability 1.

    :param units: the layer.
    :param field: fields of its units, ``(*batch, width)``.
    :param mask: true where a unit was observed; broadcasts to the field.
    :param value: values of the observed units, ``(*batch, width)``.

    >>> from pplvi.energies import BernoulliUnits
    >>> known = torch.tensor([True, False])
    >>> layer = PartlyObserved(BernoulliUnits(2), torch.zeros(2), known, torch.ones(2))
    >>> layer.sample()[0], layer.log_prob(torch.ones(2))
    (tensor(1.), tensor(-0.6931))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, units: Units, field: Tensor, mask: Tensor, value: Tensor) -> None:
        self.units, self.field, self.seen, self.value = units, field, mask, value
        self.under = units.conditional(field)
        super().__init__(field.shape[:-1], field.shape[-1:], validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether the missing units have a reparameterised path."""
        return bool(self.under.has_rsample)

    @property
    def support(self) -> Any:
        """That of the layer."""
        return self.under.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> PartlyObserved:
        """The same distribution, more often."""
        shape = (*batch_shape, self.units.width)
        return PartlyObserved(self.units, self.field.expand(shape), self.seen, self.value.expand(shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of the missing units, beside the observed ones."""
        return torch.where(self.seen, self.value, self.under.sample(Size(sample_shape)))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """The same with a gradient path."""
        return torch.where(self.seen, self.value, self.under.rsample(Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the missing units, ``(*batch)``."""
        return self.units.log_probs(self.field, value).masked_fill(self.seen, 0.0).sum(-1)


_binary_vector = constraints.independent(constraints.boolean, 1)
