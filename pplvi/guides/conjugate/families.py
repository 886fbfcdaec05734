"""Distributions of blocks of sites by their expected sufficient statistics, and what gradients make of them.

The update of coordinate ascent, ``q_i ~ exp E[log p]``, has natural parameters that are the gradient of the expected
log joint in the block's mean parameters. A :class:`BlockFamily` holds these mean parameters as leaves, answers for
moments, and turns a gradient into its next self.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.utils import clamp_probs

from pplvi.guides.conjugate.terms import Atom, Labelling

Parameters = tuple[Tensor, ...]


class BlockFamily(ABC):
    """The distribution of one block.

    :ivar canonical: parameters that a natural-gradient step moves along a line, by name; buffers of the guide.
    :cvar kind: name of the family.
    """

    kind: ClassVar[str]
    canonical: dict[str, Any]
    leaves: tuple[Tensor, ...]

    def refresh(self) -> None:
        """Make the mean parameters anew from the canonical ones."""
        with torch.no_grad():
            means = self.mean_parameters()
        self.leaves = tuple(mean.detach().requires_grad_() for mean in means)

    @classmethod
    def revived(cls, canonical: dict[str, Tensor], **facts: Any) -> Self:
        """A distribution with these canonical parameters."""
        made = cls.__new__(cls)
        made.__dict__.update(facts)
        made.canonical = canonical
        made.refresh()
        return made

    @abstractmethod
    def mean_parameters(self) -> Parameters:
        """Expected sufficient statistics."""

    @abstractmethod
    def target(self, gradients: Sequence[Tensor], weight: Tensor | None) -> Parameters:
        """Canonical parameters of the maximiser, from the gradient of the expected log joint in the leaves.

        :param weight: what the entropy is multiplied with, of the shape of the block's independent elements.
        """

    @abstractmethod
    def entropy(self) -> Tensor:
        """One number for each independent element."""

    def step(self, target: Parameters, rate: float) -> None:
        """Move towards a target: all the way for ``rate=1``, along a line of canonical parameters otherwise."""
        for (name, old), new in zip(self.canonical.items(), target, strict=True):
            self.canonical[name] = new if rate == 1.0 else torch.lerp(old, new, rate)
        self.refresh()

    # what expectations ask for

    def moment(self, site: str, power: float) -> Tensor:
        """``E[z^power]``."""
        return self.leaves[0]

    def log(self, site: str) -> Tensor:
        """``E[log z]``."""
        return self.leaves[-1]

    def log_complement(self, site: str) -> Tensor:
        """``E[log(1 - z)]``."""
        raise AssertionError(self.kind)

    def covariance(self, a: Atom, b: Atom) -> tuple[Tensor, Labelling]:
        """The covariance of two atoms."""
        raise AssertionError(self.kind)


def _per_weight(gradient: Tensor, weight: Tensor | None, event_dim: int = 0) -> Tensor:
    if weight is None:
        return gradient
    weight = weight.reshape((*weight.shape, *(1,) * event_dim))
    return torch.where(weight > 0, gradient / weight.clamp(min=1e-300), gradient.new_zeros(()))


class ElementaryFamily(BlockFamily):
    """Independent distributions of a class that Pyro has.

    :cvar law: the class.
    :cvar names: its parameters, which are the canonical ones.
    :cvar validate_args: whether draws are of a distribution that checks its arguments; ``None`` as Pyro does.
    """

    law: ClassVar[Any]
    names: ClassVar[tuple[str, ...]]
    validate_args: ClassVar[bool | None] = False

    def __init__(self, *parameters: Tensor) -> None:
        self.canonical = dict(zip(self.names, parameters, strict=True))
        self.refresh()

    def entropy(self) -> Tensor:
        """Of each element, vector or matrix."""
        found: Tensor = type(self).law(**self.canonical, validate_args=False).entropy()
        return found

    def distribution(self) -> Any:
        """Of each element, vector or matrix."""
        return type(self).law(**self.canonical, validate_args=self.validate_args)


class GammaFamily(ElementaryFamily):
    """Independent gamma distributions."""

    kind = "gamma"
    law = dist.Gamma
    names = ("concentration", "rate")
    validate_args = None

    def mean_parameters(self) -> Parameters:
        """``E[z], E[log z]``."""
        a, b = self.canonical.values()
        return a / b, torch.digamma(a) - b.log()

    def target(self, gradients: Sequence[Tensor], weight: Tensor | None) -> Parameters:
        """``1 + dF/dE[log z], -dF/dE[z]``."""
        mean, log = (_per_weight(g, weight) for g in gradients)
        return 1 + log, -mean if weight is None else torch.where(weight > 0, -mean, 1.0)


class InverseGammaFamily(GammaFamily):
    """Independent inverse gamma distributions."""

    kind = "inverse gamma"
    law = dist.InverseGamma

    def mean_parameters(self) -> Parameters:
        """``E[1 / z], E[log z]``."""
        a, b = self.canonical.values()
        return a / b, b.log() - torch.digamma(a)

    def target(self, gradients: Sequence[Tensor], weight: Tensor | None) -> Parameters:
        """``-1 - dF/dE[log z], -dF/dE[1 / z]``."""
        inverse, log = (_per_weight(g, weight) for g in gradients)
        return -1 - log, -inverse

    def entropy(self) -> Tensor:
        """Of each element."""
        a, b = self.canonical.values()
        return a + b.log() + torch.lgamma(a) - (1 + a) * torch.digamma(a)


class BetaFamily(ElementaryFamily):
    """Independent beta distributions."""

    kind = "beta"
    law = dist.Beta
    names = ("concentration1", "concentration0")

    def mean_parameters(self) -> Parameters:
        """``E[log(1 - z)], E[log z]``."""
        a, b = self.canonical.values()
        total = torch.digamma(a + b)
        return torch.digamma(b) - total, torch.digamma(a) - total

    def target(self, gradients: Sequence[Tensor], weight: Tensor | None) -> Parameters:
        """One plus the gradients."""
        second, first = (1 + _per_weight(g, weight) for g in gradients)
        return first, second

    def log_complement(self, site: str) -> Tensor:
        """``E[log(1 - z)]``."""
        return self.leaves[0]


class DirichletFamily(ElementaryFamily):
    """Independent Dirichlet distributions."""

    kind = "Dirichlet"
    law = dist.Dirichlet
    names = ("concentration",)

    def mean_parameters(self) -> Parameters:
        """``E[log z]``."""
        (c,) = self.canonical.values()
        return (torch.digamma(c) - torch.digamma(c.sum(-1, keepdim=True)),)

    def target(self, gradients: Sequence[Tensor], weight: Tensor | None) -> Parameters:
        """One plus the gradient."""
        return (1 + _per_weight(gradients[0], weight, 1),)


class WishartFamily(ElementaryFamily):
    """Independent Wishart distributions."""

    kind = "Wishart"
    names = ("df", "inverse_scale")

    def mean_parameters(self) -> Parameters:
        """``E[z], E[log |z|]``."""
        df, inverse = self.canonical.values()
        tril, size = torch.linalg.cholesky(inverse), inverse.shape[-1]
        halves = (df.unsqueeze(-1) - torch.arange(size, dtype=df.dtype, device=df.device)) / 2
        log_det = -2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return df[..., None, None] * torch.cholesky_inverse(tril), torch.digamma(halves).sum(-1) + size * math.log(
            2
        ) + log_det

    def target(self, gradients: Sequence[Tensor], weight: Tensor | None) -> Parameters:
        """``2 dF/dE[log |z|] + D + 1, -2 dF/dE[z]``."""
        mean = _per_weight(gradients[0], weight, 2)
        return 2 * _per_weight(gradients[1], weight) + mean.shape[-1] + 1, -(mean + mean.mT)

    def log(self, site: str) -> Tensor:
        """The expected log determinant, at each entry of the matrix."""
        return self.leaves[1][..., None, None].expand(self.leaves[0].shape)

    def entropy(self) -> Tensor:
        """Of each matrix."""
        df, inverse = self.canonical.values()
        size, log_det = inverse.shape[-1], self.leaves[1].detach()
        constant = 0.5 * df * (size * math.log(2) - torch.logdet(inverse)) + torch.mvlgamma(df / 2, size)
        return constant - 0.5 * (df - size - 1) * log_det + 0.5 * df * size

    def distribution(self) -> Any:
        """Of each matrix."""
        df, inverse = self.canonical.values()
        return dist.Wishart(df, precision_matrix=inverse, validate_args=False)


def start_of(fn: Any, value: Tensor, known: Mapping[str, Any], given: bool) -> BlockFamily:
    """The first distribution of a site: its prior where that is known, spread around ``value`` otherwise.

    :param fn: a distribution of the model.
    :param value: where to start.
    :param known: parameters of the distribution that are numbers.
    :param given: whether the user named the value: then its mean is there.
    """
    kind = family_of(type(fn).__name__)
    shape = value.shape
    if kind in ("gamma", "inverse gamma"):
        if not given and {"concentration", "rate"} <= set(known) and type(fn).__name__ in ("Gamma", "InverseGamma"):
            a, b = (known[n].expand(shape).to(value).clone() for n in ("concentration", "rate"))
            return (GammaFamily if kind == "gamma" else InverseGammaFamily)(a, b)
        ones = torch.ones_like(value)
        return GammaFamily(ones, 1 / value) if kind == "gamma" else InverseGammaFamily(2 * ones, value)
    if kind == "beta":
        p = clamp_probs(value)
        return BetaFamily(1 + p, 2 - p)
    if kind == "Dirichlet":
        return DirichletFamily(1 + shape[-1] * value)
    df = torch.full(shape[:-2], shape[-1] + 1.0).to(value)
    return WishartFamily(df, torch.linalg.inv(value + 1e-6 * torch.eye(shape[-1]).to(value)) * (shape[-1] + 1.0))


FAMILY_OF: dict[str, str] = {
    "Normal": "normal", "MultivariateNormal": "normal", "Gamma": "gamma", "Exponential": "gamma", "Chi2": "gamma",
    "InverseGamma": "inverse gamma", "Beta": "beta", "Uniform": "beta", "Dirichlet": "Dirichlet", "Wishart": "Wishart",
}  # fmt: skip


def family_of(kind: str) -> str | None:
    """The family of the mean field for a distribution of the model."""
    return FAMILY_OF.get(kind)
