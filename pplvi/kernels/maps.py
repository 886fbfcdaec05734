"""Deterministic maps with a tractable Jacobian, there and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pplvi.kernels.coordinates import Coordinates
from pplvi.types import MutableValues, Score, Values


class Known(dist.TorchDistribution):
    """A value that is computed, not drawn, with a log density that is kept in the books for it.

    :param value: what ``rsample`` returns, ``(*batch, *event)``.
    :param support: its support, which tells the event dimensions.
    :param score: log density of a value, of the batch shape; zero unless given.

    >>> Known(torch.tensor([1.0, 2.0]), dist.constraints.real).sample()
    tensor([1., 2.])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True
    computed: ClassVar[bool] = True

    def __init__(self, value: Tensor, support: Any, score: Score | None = None) -> None:
        self.value, self._support, self._score = value, support, score
        events = value.dim() - support.event_dim
        super().__init__(value.shape[:events], value.shape[events:], validate_args=False)

    @property
    def support(self) -> Any:
        """The support of the value."""
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Known:
        """The same value for every element of a larger batch."""
        return Known(self.value.expand(*batch_shape, *self.event_shape), self._support, self._score)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """The value."""
        return self.value.expand(self._extended_shape(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """What is kept for the value."""
        if self._score is not None:
            return self._score(value)
        return torch.zeros(value.shape[: value.dim() - self._support.event_dim], device=value.device)


class MapProgram(PyroModule):
    """The forward program of a kernel that moves by a map; on the way back it scores the values that were moved."""

    sites: tuple[Coordinates, ...]

    def gains(self, reached: Values) -> MutableValues:
        """``log |du' / du|`` in unconstrained coordinates, for each site, from what was reached."""
        raise NotImplementedError

    def back(self, reached: Values, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Score every site's previous value by the Jacobian of the map that led to what was reached."""
        gains = self.gains(reached)
        plates: dict[str, Any] = {}
        for site in self.sites:
            here = gains[site.name] + site.log_jacobian(reached)
            with site.inside(reached, plates):
                value = reached[site.name]
                pyro.sample(site.name, Known(value, site.transform.codomain, _Jacobian(site, here)))


@dataclass(frozen=True)
class _Jacobian:
    """``log |dz' / dz|`` of constrained values, given all of it but the part of the value moved."""

    site: Coordinates
    here: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        return self.here - self.site.log_jacobian({self.site.name: value})
