"""The metric of Hamiltonian moves: the covariance of the particles, whose inverse is the mass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DENSE = 512  # dimensions: beyond, a product with a full covariance would cost more than most densities
_PRIOR = 2.0  # weight of what is known already, in particles for each dimension


@dataclass(frozen=True)
class Metric:
    r"""A covariance :math:`\Sigma` for each group of draws: momenta are :math:`p \sim N(0, \Sigma^{-1})`.

    Draws ``(S, dim)`` lie group after group, all of one size.

    :ivar covariance: ``(groups, dim, dim)``, or variances ``(groups, 1, dim)``.
    :ivar root: lower Cholesky factors, or standard deviations.

    >>> metric = Metric.of(torch.tensor([[[4.0, 0.0], [0.0, 9.0]]]))
    >>> momentum = metric.momentum(torch.ones(1, 2))
    >>> momentum, metric.velocity(momentum), metric.kinetic(momentum)
    (tensor([[0.5000, 0.3333]]), tensor([[2., 3.]]), tensor([1.]))
    """

    covariance: Tensor
    root: Tensor

    @classmethod
    def of(cls, covariance: Tensor) -> Metric:
        """From covariances or from variances; of singular covariances the variances alone."""
        if covariance.shape[1] == 1 < covariance.shape[2]:
            return cls(covariance, covariance.sqrt())
        root, failed = torch.linalg.cholesky_ex(covariance.double())
        if bool(failed.any()) or not bool(root.isfinite().all()):
            variance = covariance.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
            return cls.of(variance.clamp(min=torch.finfo(covariance.dtype).tiny))
        return cls(covariance, root.to(covariance.dtype))

    @property
    def is_dense(self) -> bool:
        """Whether it knows correlations."""
        return self.covariance.shape[1] == self.covariance.shape[2]

    @property
    def log_scale(self) -> Tensor:
        """Half the log determinants of the covariances, ``(groups,)``."""
        return (self.root.diagonal(dim1=-2, dim2=-1) if self.is_dense else self.root.squeeze(1)).log().sum(-1)

    def push(self, noise: Tensor) -> Tensor:
        """Standard normal noise ``(S, dim)`` to vectors of this covariance."""
        grouped = self._grouped(noise)
        return (grouped @ self.root.mT if self.is_dense else grouped * self.root).reshape(noise.shape)

    def momentum(self, noise: Tensor) -> Tensor:
        """Standard normal noise ``(S, dim)`` to momenta."""
        grouped = self._grouped(noise)
        if not self.is_dense:
            return (grouped / self.root).reshape(noise.shape)
        return torch.linalg.solve_triangular(self.root, grouped, upper=False, left=False).reshape(noise.shape)

    def velocity(self, momentum: Tensor) -> Tensor:
        """What a momentum moves a position by in a unit of time."""
        grouped = self._grouped(momentum)
        return (grouped @ self.covariance if self.is_dense else grouped * self.covariance).reshape(momentum.shape)

    def kinetic(self, momentum: Tensor) -> Tensor:
        """Kinetic energies ``(S,)``."""
        return 0.5 * (momentum * self.velocity(momentum)).sum(-1)

    def _grouped(self, draws: Tensor) -> Tensor:
        return draws.reshape(len(self.covariance), -1, draws.shape[-1])

    def updated(self, draws: Tensor, groups: int) -> Metric:
        """The metric of each group with this one as what was known before, and the draws ``(S, dim)`` of the others.

        Those of a group itself would make its moves too long where it happens to be wide. The covariance is the mean of
        the conjugate posterior, a prior of two draws for each dimension: noise of few draws in many dimensions stays
        small, and correlations that are known already are kept.
        """
        grouped = draws.reshape(groups, -1, draws.shape[-1])
        others = [torch.cat([grouped[:g], grouped[g + 1 :]]).flatten(0, 1) for g in range(groups)]
        if not self.is_dense:
            found = torch.stack([each.var(0, keepdim=True) for each in others])
            return Metric.of(found.clamp(min=torch.finfo(draws.dtype).tiny))
        known, seen = _PRIOR * draws.shape[1], len(others[0])
        found = torch.stack([torch.cov(each.mT).reshape(2 * draws.shape[1:]) for each in others])
        return Metric.of((known * self.covariance + seen * found) / (known + seen))


@dataclass(frozen=True)
class GaussianBase:
    """A normal distribution from which a tempered path starts.

    :ivar loc: its mean, ``(dim,)``.
    :ivar metric: its covariance.

    >>> base = GaussianBase.of(torch.zeros(2), torch.eye(2))
    >>> base.value_and_gradient(torch.ones(1, 2))
    (tensor([-2.8379]), tensor([[-1., -1.]]))
    """

    loc: Tensor
    metric: Metric
    precision: Tensor

    @classmethod
    def of(cls, loc: Tensor, covariance: Tensor) -> GaussianBase:
        """From a mean ``(dim,)`` and a covariance ``(dim, dim)``, or variances ``(dim,)``."""
        dense = covariance.dim() == 2 and len(loc) <= DENSE
        variance = covariance if covariance.dim() == 1 else covariance.diagonal()
        metric = Metric.of(covariance[None] if dense else variance[None, None])
        if not metric.is_dense:
            return cls(loc, metric, 1 / metric.covariance[0, 0])
        return cls(loc, metric, torch.cholesky_inverse(metric.root[0].double()).to(loc))

    def draw(self, count: int) -> Tensor:
        """Draws ``(count, dim)``."""
        return self.loc + self.metric.push(torch.randn(count, len(self.loc), dtype=self.loc.dtype).to(self.loc))

    def value_and_gradient(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities ``(S,)``, in nats, and their gradients ``(S, dim)``."""
        apart = draws - self.loc
        gradient = -(apart @ self.precision if self.metric.is_dense else apart * self.precision)
        constant = self.metric.log_scale[0] + 0.5 * len(self.loc) * math.log(2 * math.pi)
        return 0.5 * (apart * gradient).sum(-1) - constant, gradient
