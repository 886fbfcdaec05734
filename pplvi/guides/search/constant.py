"""A base for distributions of packed latents whose components are constants."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints


class Located(Protocol):
    """Components with locations ``(K, dim)``."""

    @property
    def loc(self) -> Tensor:
        """The locations."""


class ConstantMixture(TorchDistribution):
    """A mixture of components that are constants, so that draws carry no gradient.

    :param parts: the components.
    :param batch_shape: of independent copies.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, parts: Located, batch_shape: Sequence[int] = (), validate_args: bool | None = None) -> None:
        self.parts: Any = parts
        super().__init__(torch.Size(batch_shape), parts.loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """Independent copies."""
        return type(self)(self.parts, batch_shape, validate_args=self._validate_args)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws of shape ``(*sample_shape, *batch_shape, dim)``."""
        shape = self._extended_shape(sample_shape)
        return self.rows(shape[:-1].numel()).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of ``(..., dim)``, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        density = self.log_prob_of_rows(value.reshape(-1, value.shape[-1])).reshape(value.shape[:-1])
        return density.expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))

    @abstractmethod
    def rows(self, number: int) -> Tensor:
        """Draws ``(number, dim)``."""

    @abstractmethod
    def log_prob_of_rows(self, rows: Tensor) -> Tensor:
        """Log densities ``(S,)`` of ``(S, dim)``, in nats."""
