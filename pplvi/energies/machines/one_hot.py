"""Layers of softmax units as distributions: one-hot codes side by side."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor


class OneHots(TorchDistribution):
    """Independent one-hot variables whose codes lie side by side on one event dimension."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.boolean, 1)

    def __init__(self, logits: Tensor) -> None:
        self.each = dist.OneHotCategorical(logits=logits, validate_args=False)
        self._apart = logits.shape[-2:]
        super().__init__(logits.shape[:-2], Size([self._apart.numel()]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> OneHots:
        """The same distribution, more often."""
        return OneHots(self.each.logits.expand((*batch_shape, *self._apart)))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """One-hot codes."""
        return self.each.sample(Size(sample_shape)).flatten(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of one-hot codes."""
        density: Tensor = self.each.log_prob(value.reshape(*value.shape[:-1], *self._apart)).sum(-1)
        return density

    @property
    def mean(self) -> Tensor:
        """Probabilities side by side."""
        return self.each.probs.flatten(-2)

    def entropy(self) -> Tensor:
        """Entropy, in nats."""
        entropy: Tensor = self.each.entropy().sum(-1)
        return entropy
