"""A mixture of diagonal normals as two draws: a component, and a value whose density is that of the whole mixture."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

__all__ = ["Component", "StratifiedCategorical", "mixture"]


class StratifiedCategorical(dist.Categorical):
    """A categorical distribution whose draws of one call are stratified.

    Systematic sampling in random order: of ``S`` draws ``S p_k``, up to one, are ``k``, and each of them by itself has
    the distribution (Morningstar et al. 2021).

    >>> _ = torch.manual_seed(0)
    >>> int(StratifiedCategorical(logits=torch.zeros(2)).sample((10,)).sum())
    5
    """

    def expand(self, batch_shape: Any, _instance: Any = None) -> StratifiedCategorical:
        """The same distribution, with another batch shape."""
        return StratifiedCategorical(logits=self.logits.expand(*batch_shape, self.logits.shape[-1]))

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        """Draws ``(*sample_shape, *batch_shape)``; probabilities are the same all over the batch."""
        shape = self._extended_shape(Size(sample_shape))
        edges = self.probs.reshape(-1, self.probs.shape[-1])[0].cumsum(-1)[:-1].contiguous()
        start = torch.rand(1, dtype=edges.dtype, device=edges.device)
        points = (torch.randperm(shape.numel(), device=edges.device) + start) / shape.numel()
        return torch.searchsorted(edges.detach(), points).reshape(shape)


def mixture(logits: Tensor, locs: Tensor, scales: Tensor) -> dist.MixtureSameFamily:
    """``sum_k softmax(logits)_k N(locs_k, diag(scales_k^2))``, of ``(K,)``, ``(K, D)`` and ``(K, D)``."""
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(locs, scales).to_event(1))


class Component(TorchDistribution):
    """The second draw: from component ``k``, with density ``log q(z) - log pi_k`` where ``q`` is the whole mixture.

    With the density ``log pi_k`` of the first draw that makes ``log q(z)`` (nats), whatever ``k``, and draws carry the
    component's path gradient.

    :param component: the components drawn, ``(*batch)``.
    """

    has_rsample = True
    support = constraints.real_vector
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, component: Tensor, logits: Tensor, locs: Tensor, scales: Tensor) -> None:
        self.component, self.logits, self.locs, self.scales = component, logits, locs, scales
        super().__init__(component.shape, locs.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Component:
        """The same distribution, with another batch shape."""
        return Component(self.component.expand(batch_shape), self.logits, self.locs, self.scales)

    @cached_property
    def _mixture(self) -> dist.MixtureSameFamily:
        return mixture(self.logits, self.locs, self.scales)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        """Draws ``(*sample_shape, *batch_shape, D)``."""
        noise = torch.randn(self._extended_shape(Size(sample_shape)), dtype=self.locs.dtype, device=self.locs.device)
        return self.locs[self.component] + self.scales[self.component] * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the mixture less the log weight of the component, ``(*batch)``."""
        return self._mixture.log_prob(value) - self.logits.log_softmax(-1)[self.component]
