"""Families of sites without a closed form: normal logarithms of positive values, and points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pplvi.guides.conjugate.families import Parameters
from pplvi.guides.conjugate.normal import NormalFamily


class LogNormalFamily(NormalFamily):
    """Positive values whose logarithms are normal: every power has an expectation, ``exp(p m + p^2 v / 2)``."""

    kind: ClassVar[str] = "lognormal"

    def moment(self, site: str, power: float) -> Tensor:
        """``E[z^power]``."""
        mean = self.layout.unpacked(self.leaves[0], site)
        return torch.exp(power * mean + 0.5 * power**2 * self.log_variance(site))

    def log(self, site: str) -> Tensor:
        """``E[log z]``."""
        return self.layout.unpacked(self.leaves[0], site)

    def log_variance(self, site: str) -> Tensor:
        """``Var(log z)``."""
        return self.layout.unpacked(self._variances(), site)

    def slopes(self, gradients: Sequence[Tensor], weight: Tensor | None) -> Parameters:
        """As of the normal logarithm, whose density has the Jacobian besides."""
        jacobian = torch.ones_like(gradients[0]) if weight is None else weight.unsqueeze(-1).expand(gradients[0].shape)
        return super().slopes((gradients[0] + jacobian, gradients[1]), weight)

    def entropy(self) -> Tensor:
        """That of the logarithm plus its mean."""
        return super().entropy() + self.leaves[0].detach().sum(-1)


class PointFamily(NormalFamily):
    """A point in place of a distribution; its entropy is left out."""

    kind: ClassVar[str] = "delta"

    def covariance_matrix(self) -> Tensor:
        """Zero."""
        return torch.zeros_like(self.canonical["precision"])

    def entropy(self) -> Tensor:
        """Zero."""
        return torch.zeros_like(self.canonical["loc"][..., 0])


class PositivePointFamily(LogNormalFamily):
    """A positive point, by its logarithm."""

    kind: ClassVar[str] = "positive delta"

    def covariance_matrix(self) -> Tensor:
        """Zero."""
        return torch.zeros_like(self.canonical["precision"])

    def slopes(self, gradients: Sequence[Tensor], weight: Tensor | None) -> Parameters:
        """As of a normal: a point has no Jacobian."""
        return NormalFamily.slopes(self, gradients, weight)

    def entropy(self) -> Tensor:
        """Zero."""
        return torch.zeros_like(self.canonical["loc"][..., 0])


def is_point(family: object) -> bool:
    """Whether a block is a point."""
    return isinstance(family, (PointFamily, PositivePointFamily))
