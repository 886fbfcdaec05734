"""Updates of batch and match, of a full covariance and of one with few factors, which is *patched* after each.

A covariance with few factors is

.. math:: \\Sigma = \\mathrm{diag}(\\psi) + \\Lambda \\Lambda^T

An update changes it by a low rank, and the patch projects what comes out on as few factors as before, so that nothing
is ever of shape ``(dim, dim)``. Source: Modi, Cai and Saul (2025), Batch, match, and patch: low-rank approximations for
score-based variational inference, AISTATS.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from pplvi.guides.search.gaussians import Gaussian, full_gaussian

_EM_STEPS = 2
_LEAST_SPECIFIC = 1e-3  # of a variance, that is no factor's


class Full(NamedTuple):
    """A normal with mean ``(dim,)`` and covariance ``(dim, dim)``."""

    loc: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, part: Gaussian) -> Full:
        """The same distribution."""
        return cls(part.loc, part.covariance)

    def sample(self, number: int) -> Tensor | None:
        """Draws ``(number, dim)``, or ``None`` where the covariance is not positive definite."""
        tril, failed = torch.linalg.cholesky_ex(self.covariance)
        return None if bool(failed) else self.loc + torch.randn(number, len(self.loc)).to(self.loc) @ tril.mT

    def updated(self, draws: Tensor, scores: Tensor, rate: float) -> Full:
        """What an update makes of it, see :func:`update`."""
        return Full(*update(self.loc, self.covariance, draws, scores, rate))

    def towards(self, other: Self, share: float) -> Full:
        """The mean of both, of which the other has this share."""
        return Full(self.loc.lerp(other.loc, share), self.covariance.lerp(other.covariance, share))

    def gaussian(self) -> Gaussian | None:
        """The same distribution, or ``None`` where the covariance is not positive definite."""
        return full_gaussian(self.loc, self.covariance)


class Factored(NamedTuple):
    """A normal with mean ``(dim,)`` and covariance ``diag(diagonal) + factors diag(signs) factors^T``.

    ``diagonal`` is ``(dim,)``, ``factors`` ``(dim, m)`` and ``signs`` ``(m,)``, 1 or -1; ``rank`` is how many factors a
    patch leaves. It draws, and is a :class:`Gaussian`, where all signs are 1, as after a patch.
    """

    loc: Tensor
    diagonal: Tensor
    factors: Tensor
    signs: Tensor
    rank: int

    @classmethod
    def of(cls, part: Gaussian, rank: int) -> Factored:
        """The nearest to a Gaussian."""
        values, vectors = torch.linalg.eigh(part.tril @ part.tril.mT - torch.eye(len(part.tril)).to(part.tril))
        factors = part.root.unsqueeze(1) * (part.basis @ (vectors * values.abs().sqrt()))
        return cls(part.loc, part.root.square(), factors, values.sign(), rank).patched()

    def times(self, rows: Tensor) -> Tensor:
        """Rows ``(..., dim)`` times the covariance."""
        return rows * self.diagonal + ((rows @ self.factors) * self.signs) @ self.factors.mT

    @property
    def variance(self) -> Tensor:
        """The marginal variances ``(dim,)``."""
        return self.diagonal + self.factors.square() @ self.signs

    def plus(self, rows: Tensor, sign: float) -> Factored:
        """With ``sign * rows^T rows`` added to the covariance, of ``(n, dim)``."""
        factors, signs = (
            torch.cat([self.factors, rows.mT], 1),
            torch.cat([self.signs, rows.new_full(rows.shape[:1], sign)]),
        )
        return self._replace(factors=factors, signs=signs)

    def patched(self) -> Factored:
        r"""The factors, as many as ``rank``, whose normal has the least KL divergence from this one.

        Given ``diagonal`` the best factors are the largest eigenvectors of what is divided by it; then a few steps of
        EM for both, :math:`\Lambda' = \Sigma B^T M^{-1}, \psi' = \mathrm{diag}(\Sigma - \Lambda' B \Sigma)` with
        :math:`B = \Lambda^T (\Lambda \Lambda^T + \psi)^{-1}, M = I - B \Lambda + B \Sigma B^T`.
        """
        root, variance = self.diagonal.sqrt().unsqueeze(1), self.variance
        basis, upper = torch.linalg.qr(self.factors / root)
        values, vectors = (x[..., -self.rank :] for x in torch.linalg.eigh((upper * self.signs) @ upper.mT))
        factors = root * (basis @ (vectors * values.clamp(min=0).sqrt()))
        diagonal = (variance - factors.square().sum(1)).maximum(_LEAST_SPECIFIC * variance)
        one = torch.eye(factors.shape[1]).to(factors)
        for _ in range(_EM_STEPS):
            scaled = (factors / diagonal.unsqueeze(1)).mT
            back = torch.linalg.solve(one + scaled @ factors, scaled)
            moved = self.times(back)
            factors = torch.linalg.solve(one - back @ factors + moved @ back.mT, moved).mT
            diagonal = (variance - (factors * moved.mT).sum(1)).maximum(_LEAST_SPECIFIC * variance)
        return Factored(self.loc, diagonal, factors, torch.ones_like(factors[0]), self.rank)

    def sample(self, number: int) -> Tensor | None:
        """Draws ``(number, dim)``, or ``None`` where the covariance is not positive definite."""
        if not bool(self.diagonal.isfinite().all() & (self.diagonal > 0).all() & self.factors.isfinite().all()):
            return None
        own, common = (torch.randn(number, size).to(self.loc) for size in self.factors.shape)
        return self.loc + own * self.diagonal.sqrt() + common @ self.factors.mT

    def updated(self, draws: Tensor, scores: Tensor, rate: float) -> Factored:
        """What an update and a patch make of it."""
        centre, force, spread, pull = _moments(self.loc, draws, scores, rate)
        v = self.plus(spread, 1.0)
        new = v.plus(_taken(pull, v.times(pull)), -1.0)
        return new.patched()._replace(loc=(self.loc + rate * (new.times(force) + centre)) / (1 + rate))

    def towards(self, other: Self, share: float) -> Factored:
        """The mean of both, of which the other has this share, patched."""
        factors = torch.cat([(1 - share) ** 0.5 * self.factors, share**0.5 * other.factors], 1)
        signs = torch.cat([self.signs, other.signs])
        loc, diagonal = self.loc.lerp(other.loc, share), self.diagonal.lerp(other.diagonal, share)
        return Factored(loc, diagonal, factors, signs, self.rank).patched()

    def gaussian(self) -> Gaussian:
        """The same distribution."""
        root = self.diagonal.sqrt()
        basis, upper = torch.linalg.qr(self.factors / root.unsqueeze(1))
        tril = torch.linalg.cholesky(torch.eye(len(upper)).to(upper) + upper @ upper.mT)
        return Gaussian(self.loc, root, basis, tril)


def update(loc: Tensor, covariance: Tensor, draws: Tensor, scores: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """One update of batch and match.

    :param loc: mean, ``(dim,)``.
    :param covariance: ``(dim, dim)``.
    :param draws: from that Gaussian, ``(batch, dim)``.
    :param scores: gradient of the target's log density at them, ``(batch, dim)``.
    :param rate: the inverse regularisation, positive.
    :returns: the new mean and covariance.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    >>> target = torch.tensor([2.0, 3.0], dtype=torch.float64)  # precisions
    >>> start = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    >>> update(*start, z, -target * z, rate=1e6)[1].diagonal()  # to the variances of the target, in one step
    tensor([0.5000, 0.3333], dtype=torch.float64)
    """
    centre, force, spread, pull = _moments(loc, draws, scores, rate)
    v = torch.addmm(covariance, spread.T, spread)
    new = _solve_low_rank(pull, v) if len(pull) < len(v) else _solve(pull.T @ pull, v)
    return (loc + rate * (new @ force + centre)) / (1 + rate), new


def _moments(loc: Tensor, draws: Tensor, scores: Tensor, rate: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of draws and scores, and rows whose squares are what is added to the covariance, and ``U``."""
    share = rate / (1 + rate)
    centre, force = draws.mean(0), scores.mean(0)
    spread = torch.cat([(rate / len(draws)) ** 0.5 * (draws - centre), share**0.5 * (loc - centre)[None]])
    pull = torch.cat([(rate / len(scores)) ** 0.5 * (scores - force), share**0.5 * force[None]])
    return centre, force, spread, pull


def _solve(u: Tensor, v: Tensor) -> Tensor:
    """The positive definite ``S`` with ``S U S + S = V``, which is ``2 V (I + (I + 4 U V)^{1/2})^{-1}``.

    With ``V = K K^T`` it is ``K 2 (I + (I + 4 K^T U K)^{1/2})^{-1} K^T``, of symmetric matrices only.
    """
    root = torch.linalg.cholesky(v)
    values, vectors = torch.linalg.eigh(root.T @ u @ root)
    shrunk = root @ (vectors * (2 / (1 + (1 + 4 * values.clamp(min=0)).sqrt())).sqrt())
    return shrunk @ shrunk.T


def _solve_low_rank(q: Tensor, v: Tensor) -> Tensor:
    """The same for ``U = Q^T Q`` of few rows, at ``rank * dim^2`` operations instead of ``dim^3``."""
    taken = _taken(q, q @ v)
    return torch.addmm(v, taken.T, taken, alpha=-1)


def _taken(q: Tensor, moved: Tensor) -> Tensor:
    """Rows ``T`` with ``S = V - T^T T``, of ``Q`` and ``Q V``: ``M = Q S Q^T`` solves ``M + M^2 = Q V Q^T``, and
    ``S = V - V Q^T (I + M)^{-2} Q V``."""
    values, vectors = torch.linalg.eigh(moved @ q.T)
    inside = 0.5 + (values.clamp(min=0) + 0.25).sqrt()
    return (vectors / inside).T @ moved
