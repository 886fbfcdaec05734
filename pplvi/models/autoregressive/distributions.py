"""Distributions of one number after another, and what they say where some of the numbers are missing."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor

__all__ = ["AutoregressiveDistribution", "Completion", "EventDistribution", "Seen"]


class EventDistribution(TorchDistribution):
    """A distribution of vectors whose parameters stay as they are when its batch grows."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, width: int, batch_shape: Any = ()) -> None:
        super().__init__(Size(batch_shape), Size([width]), validate_args=False)
        self._validate_args = torch.distributions.Distribution._validate_args

    @property
    def support(self) -> Any:
        """Zeros and ones, or the reals."""
        return constraints.independent(constraints.boolean, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same for more data."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = Size(batch_shape)
        return new

    def _checked(self, x: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(x)
        return x


class AutoregressiveDistribution(EventDistribution):
    r"""A distribution of vectors, one number after another.

    .. math:: \log p(x) = \sum_d \log p(x_d \mid x_{<d})

    A subclass has :meth:`conditionals`, and may draw faster than by one pass for each number.

    :param width: numbers in a vector.
    :param like: a tensor of the dtype and device of draws.
    :param batch_shape: of parameters that differ between data.
    """

    def __init__(self, width: int, like: Tensor, batch_shape: Any = ()) -> None:
        super().__init__(width, batch_shape)
        self._like = like

    @property
    def order(self) -> list[int]:
        """Which number comes first, and so on."""
        return list(range(self.event_shape[0]))

    def conditionals(self, x: Tensor) -> TorchDistribution:
        """``p(x_d | x_<d)`` of every number of ``x``, of batch shape ``(*, D)``."""
        raise NotImplementedError

    def log_terms(self, x: Tensor) -> Tensor:
        """``log p(x_d | x_<d)``, ``(*, D)``, in nats."""
        found: Tensor = self.conditionals(x).log_prob(x)
        return found

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact, ``(*batch)``, in nats."""
        return self.log_terms(self._checked(value)).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, one number after another."""
        nothing = self._like.detach().new_zeros(Size(sample_shape) + self.batch_shape + self.event_shape)
        return self.complete(nothing, torch.zeros_like(nothing, dtype=torch.bool))

    @torch.no_grad()
    def complete(self, x: Tensor, observed: Tensor) -> Tensor:
        """Draw the missing numbers in their turn, each given those before it, observed or drawn."""
        x = torch.where(observed, x, 0.0)
        for d in self.order:
            drawn = self.conditionals(x).sample()[..., d]
            x[..., d] = torch.where(observed[..., d], x[..., d], drawn)
        return x


class Completion(EventDistribution):
    r"""Missing numbers, each given those before it: :math:`\sum_{d \text{ missing}} \log p(x_d \mid x_{<d})`.

    :param base: the distribution of whole vectors.
    :param x: data, ``(N, D)``; missing entries may hold anything.
    :param observed: which numbers were seen, ``(N, D)`` or ``(D,)``, boolean.
    :param frozen: no gradient reaches the parameters: a proposal.
    """

    def __init__(self, base: AutoregressiveDistribution, x: Tensor, observed: Tensor, frozen: bool = False) -> None:
        super().__init__(base.event_shape[0])
        self.base, self.x, self.observed, self.frozen = base, x, observed, frozen

    @property
    def support(self) -> Any:
        """That of whole vectors."""
        return self.base.support

    def log_prob(self, value: Tensor) -> Tensor:
        """Of what is missing alone, ``(*batch)``, in nats."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.base.log_terms(value).masked_fill(self.observed, 0.0).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Whole vectors with the observed numbers in their places."""
        shape = Size(sample_shape) + self.batch_shape + self.event_shape
        return self.base.complete(self.x.expand(shape), self.observed.expand(shape))


class Seen(EventDistribution):
    r"""Observed numbers, given all those before them: :math:`\sum_{d \text{ observed}} \log p(x_d \mid x_{<d})`.

    :param base: the distribution of whole vectors.
    :param whole: vectors with the missing numbers filled in, ``(*, D)``.
    :param observed: which numbers were seen.
    """

    def __init__(self, base: AutoregressiveDistribution, whole: Tensor, observed: Tensor) -> None:
        super().__init__(base.event_shape[0], whole.shape[:-1])
        self.base, self.whole, self.observed = base, whole, observed

    @property
    def support(self) -> Any:
        """Anything, where data are missing."""
        return constraints.independent(constraints.dependent, 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Of what was seen, ``(*batch)``, in nats, whatever the value holds elsewhere."""
        return self.base.log_terms(self.whole).masked_fill(~self.observed, 0.0).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """The whole vectors."""
        return self.whole.expand(Size(sample_shape) + self.whole.shape)
