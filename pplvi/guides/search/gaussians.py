"""Gaussians from the pairs of a quasi-Newton path, and their mixture as a Pyro distribution.

The covariance is the factored BFGS inverse Hessian, low rank plus diagonal:

.. math::
    H^{-1} = \\mathrm{diag}(\\alpha) + \\beta^T \\gamma \\beta = A (I + Q (L L^T - I) Q^T) A,
    \\quad A = \\mathrm{diag}(\\alpha)^{1/2}

with ``2 J`` rows in ``beta`` for ``J`` pairs, ``Q`` an orthonormal basis of at most ``2 J`` columns, and ``L`` lower
triangular. Source: Zhang, Carpenter, Gelman and Vehtari (2022), Pathfinder: parallel quasi-Newton variational
inference, JMLR 23(306).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pplvi.guides.search.constant import ConstantMixture
from pplvi.guides.search.lbfgs import Point, Trail, is_curved


class Gaussian(NamedTuple):
    """Normal with mean ``loc`` and covariance ``A (I + Q (L L^T - I) Q^T) A``; leading dimensions are a batch.

    ``loc`` and ``root``, the diagonal of ``A``, are ``(dim,)``, ``basis`` (``Q``) is ``(dim, rank)`` and ``tril``
    (``L``) is ``(rank, rank)``.
    """

    loc: Tensor
    root: Tensor
    basis: Tensor
    tril: Tensor

    def push(self, noise: Tensor) -> Tensor:
        """Standard normal noise ``(..., dim)`` to draws."""
        inside = noise @ self.basis
        moved = (inside @ self.tril.mT - inside) @ self.basis.mT
        return self.loc.unsqueeze(-2) + self.root.unsqueeze(-2) * (noise + moved)

    def affine(self, zero: Tensor, one: Tensor) -> Gaussian:
        """The distribution of ``zero + one * draw``, both ``(dim,)``."""
        return self._replace(loc=zero + one * self.loc, root=one * self.root)

    def pull(self, draws: Tensor) -> Tensor:
        """The noise behind draws ``(..., S, dim)``."""
        scaled = (draws - self.loc.unsqueeze(-2)) / self.root.unsqueeze(-2)
        inside = scaled @ self.basis
        back = torch.linalg.solve_triangular(self.tril, inside.mT, upper=False).mT
        return scaled + (back - inside) @ self.basis.mT

    @property
    def log_scale(self) -> Tensor:
        """Half the log determinant of the covariance, in nats."""
        return self.root.log().sum(-1) + self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def log_prob(self, draws: Tensor) -> Tensor:
        """Log densities ``(..., S)``, in nats."""
        return standard_normal(self.pull(draws)) - self.log_scale.unsqueeze(-1)

    @property
    def covariance(self) -> Tensor:
        """The covariance, ``(dim, dim)``."""
        inner = self.tril @ self.tril.mT - torch.eye(self.tril.shape[-1]).to(self.tril)
        middle = torch.eye(self.root.shape[-1]).to(self.root) + self.basis @ inner @ self.basis.mT
        return self.root.unsqueeze(-1) * middle * self.root.unsqueeze(-2)

    @property
    def variance(self) -> Tensor:
        """The marginal variances ``(dim,)``."""
        inner = self.tril @ self.tril.mT - torch.eye(self.tril.shape[-1]).to(self.tril)
        return self.root.square() * (1 + ((self.basis @ inner) * self.basis).sum(-1))


def standard_normal(noise: Tensor) -> Tensor:
    """Log density of noise ``(..., dim)``, in nats."""
    return -0.5 * (noise.square().sum(-1) + noise.shape[-1] * math.log(2 * math.pi))


def update_diagonal(alpha: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """The next diagonal inverse Hessian, from one pair (Gilbert and Lemarechal 1989; algorithm 3 of the paper)."""
    a, b = change @ (alpha * change), change @ step
    c = step @ (step / alpha)
    return 1 / (a / (b * alpha) + change.square() / b - a * step.square() / (b * c * alpha.square()))


def local_gaussian(
    position: Tensor, gradient: Tensor, alpha: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]
) -> Gaussian | None:
    """The Gaussian at one point of a path, or ``None`` where its covariance is not positive definite.

    :param position: the point, ``(dim,)``.
    :param gradient: gradient of *minus* the log density there.
    :param alpha: diagonal inverse Hessian, ``(dim,)``.
    :param pairs: steps and gradient differences, the oldest first; at least one.

    >>> bowl = torch.tensor([2.0, 2.0])  # minus log density x' diag(bowl) x / 2: the variances are 1 / 2
    >>> step = torch.tensor([1.0, 0.0])
    >>> local_gaussian(step, bowl * step, 1 / bowl, [(step, bowl * step)]).variance
    tensor([0.5000, 0.5000])
    """
    steps, changes = (torch.stack(column) for column in zip(*pairs, strict=True))
    cross = steps @ changes.T
    inverse = torch.linalg.inv(cross.triu())
    corner = inverse.T @ (cross.diagonal().diag() + changes @ (alpha * changes).T) @ inverse
    gamma = torch.cat([torch.cat([torch.zeros_like(cross), -inverse], 1), torch.cat([-inverse.T, corner], 1)])
    beta, root = torch.cat([alpha * changes, steps]), alpha.sqrt()
    basis, upper = torch.linalg.qr((beta / root).T)
    inner = torch.eye(basis.shape[1]).to(basis) + upper @ gamma @ upper.T
    tril, failed = torch.linalg.cholesky_ex(0.5 * (inner + inner.T))
    loc = position - alpha * gradient - beta.T @ (gamma @ (beta @ gradient))
    return _healthy(Gaussian(loc, root, basis, tril), failed)


class LocalGaussians:
    """The local Gaussians along one path, as far as it has come.

    :param history: how many pairs the inverse Hessian keeps.
    """

    def __init__(self, history: int) -> None:
        self.pairs = deque[tuple[Tensor, Tensor]](maxlen=history)
        self.alpha: Tensor | None = None
        self.seen = 1

    def advance(self, trail: Trail) -> list[Gaussian | None]:
        """The Gaussians at the points that are new since the last call; the first point of a path has none."""
        found = [self._at(*trail.points[i - 1 : i + 1]) for i in range(self.seen, len(trail.points))]
        self.seen = len(trail.points)
        return found

    def _at(self, old: Point, new: Point) -> Gaussian | None:
        step, change = new.position - old.position, new.gradient - old.gradient
        if is_curved(step, change):
            alpha = torch.ones_like(step) if self.alpha is None else self.alpha
            self.alpha = update_diagonal(alpha, step, change)
            self.pairs.append((step, change))
        if self.alpha is None:
            return None
        return local_gaussian(new.position, new.gradient, self.alpha, list(self.pairs))


def full_gaussian(loc: Tensor, covariance: Tensor) -> Gaussian | None:
    """The Gaussian with this covariance ``(dim, dim)``, or ``None`` where it is not positive definite.

    >>> full_gaussian(torch.zeros(2), torch.tensor([[4.0, 1.0], [1.0, 1.0]])).covariance
    tensor([[4., 1.],
            [1., 1.]])
    """
    root = covariance.diagonal().sqrt()
    tril, failed = torch.linalg.cholesky_ex(covariance / (root.unsqueeze(-1) * root))
    return _healthy(Gaussian(loc, root, torch.eye(len(loc)).to(loc), tril), failed)


def _healthy(found: Gaussian, failed: Tensor) -> Gaussian | None:
    return found if not bool(failed) and all(bool(part.isfinite().all()) for part in found) else None


def stack_gaussians(parts: Sequence[Gaussian]) -> Gaussian:
    """Several Gaussians as one batch; ranks are filled up with directions in which nothing is added."""
    rank = max(part.tril.shape[-1] for part in parts)
    padded = [_padded(part, rank) for part in parts]
    return Gaussian(*(torch.stack(column) for column in zip(*padded, strict=True)))


def _padded(part: Gaussian, rank: int) -> Gaussian:
    more = rank - part.tril.shape[-1]
    basis = torch.nn.functional.pad(part.basis, (0, more))
    tril = torch.block_diag(part.tril, torch.eye(more).to(part.tril))
    return Gaussian(part.loc, part.root, basis, tril)


class GaussianMixture(ConstantMixture):
    """Equal mixture of a batch of :class:`Gaussian`; its components are constants, so draws carry no gradient.

    :param parts: the components, one leading dimension.
    :param batch_shape: of independent copies.

    >>> one = Gaussian(torch.zeros(1, 2), torch.ones(1, 2), torch.eye(2)[None], torch.eye(2)[None])
    >>> GaussianMixture(one).log_prob(torch.zeros(3, 2)).exp() * 2 * math.pi
    tensor([1., 1., 1.])
    """

    parts: Gaussian

    def rows(self, number: int) -> Tensor:
        """Draws ``(number, dim)``."""
        loc = self.parts.loc
        noise = torch.randn(number, loc.shape[-1], dtype=loc.dtype, device=loc.device)
        return self.transport(noise, torch.randint(len(loc), (number,), device=loc.device))

    def transport(self, noise: Tensor, chosen: Tensor) -> Tensor:
        """Noise ``(S, dim)`` to draws, each of its own component."""
        draws = torch.empty_like(noise)
        for index in range(len(self.parts.loc)):
            draws[chosen == index] = Gaussian(*(p[index] for p in self.parts)).push(noise[chosen == index])
        return draws

    def log_prob_of_rows(self, rows: Tensor) -> Tensor:
        """Log densities ``(S,)`` of ``(S, dim)``, in nats."""
        return torch.logsumexp(self.parts.log_prob(rows), 0) - math.log(len(self.parts.loc))

    @property
    def mean(self) -> Tensor:
        """Mean, ``(*batch_shape, dim)``."""
        return self.parts.loc.mean(0).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Marginal variances, ``(*batch_shape, dim)``."""
        spread = self.parts.variance.mean(0) + self.parts.loc.var(0, correction=0)
        return spread.expand(self.batch_shape + self.event_shape)
