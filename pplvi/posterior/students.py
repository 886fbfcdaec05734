"""Mixtures of multivariate t distributions over packed latents, and their fit to weighted draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.distributions import Chi2

_STEPS = 10  # of EM
_LEAST = 1e-12
_DEGREES = (2.0, 3.0, 5.0, 8.0, 15.0, 40.0)


class Students(NamedTuple):
    r"""A mixture :math:`\sum_k \alpha_k t_{\nu_k}(z; \mu_k, L_k L_k^T)`, in float64.

    :ivar log_share: logarithms of the shares, ``(K,)``.
    :ivar loc: locations, ``(K, dim)``.
    :ivar tril: lower triangular scales, ``(K, dim, dim)``.
    :ivar df: degrees of freedom, ``(K,)``; infinite for a normal.

    >>> one = Students(torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1, 1), torch.ones(1))
    >>> (math.pi * one.log_prob(torch.zeros(1, 1)).exp()).item()  # Cauchy
    1.0
    """

    log_share: Tensor
    loc: Tensor
    tril: Tensor
    df: Tensor

    @property
    def covered(self) -> Tensor:
        """Shares, ``(K,)``."""
        return self.log_share.exp()

    def affine(self, zero: Tensor, one: Tensor) -> Self:
        """The distribution of ``zero + one * draw``, both ``(dim,)``."""
        return self._replace(loc=zero + one * self.loc, tril=one[:, None] * self.tril)

    def heaviest(self, number: int) -> Self:
        """The components of the largest shares, at most so many, the largest first."""
        order = self.log_share.argsort(descending=True)[:number]
        log_share = self.log_share[order]
        return type(self)(log_share - log_share.logsumexp(0), self.loc[order], self.tril[order], self.df[order])

    def sample(self, size: int) -> Tensor:
        """Draws ``(size, dim)``, stratified over the components."""
        positions = (torch.rand((), dtype=torch.float64) + torch.arange(size)) / size
        chosen = torch.searchsorted(self.covered.cumsum(0).clamp(max=1 - 1e-12), positions).clamp(max=len(self.loc) - 1)
        noise = torch.randn(size, self.loc.shape[1], dtype=self.loc.dtype)
        return self.push(noise, chosen[torch.randperm(size)])

    def push(self, noise: Tensor, chosen: Tensor) -> Tensor:
        """Normal noise ``(S, dim)`` to draws, each of its own component."""
        df = self.df[chosen]
        heavy = df.isfinite()
        stretch = torch.ones_like(df)
        stretch[heavy] = (df[heavy] / Chi2(df[heavy]).sample()).sqrt()
        draws = torch.empty_like(noise)
        for k in range(len(self.loc)):
            own = chosen == k
            draws[own] = self.loc[k] + stretch[own, None] * (noise[own] @ self.tril[k].T)
        return draws

    def distances(self, value: Tensor) -> Tensor:
        """Squared Mahalanobis distances ``(S, K)`` of rows ``(S, dim)`` from the components."""
        centred = (value - self.loc.unsqueeze(1)).mT  # (K, dim, S)
        return torch.linalg.solve_triangular(self.tril, centred, upper=False).square().sum(1).T

    def each(self, value: Tensor, distances: Tensor | None = None) -> Tensor:
        """Log densities with shares ``(S, K)`` of rows ``(S, dim)``."""
        square = self.distances(value) if distances is None else distances
        dim, df = self.loc.shape[1], self.df.clamp(max=1e8)
        norm = torch.lgamma((df + dim) / 2) - torch.lgamma(df / 2) - dim / 2 * (df * math.pi).log()
        heavy = norm - (df + dim) / 2 * torch.log1p(square / df)
        light = -square / 2 - dim / 2 * math.log(2 * math.pi)
        scale = self.tril.diagonal(dim1=-2, dim2=-1).log().sum(1)
        return self.log_share - scale + torch.where(self.df.isfinite(), heavy, light)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log densities ``(S,)`` of rows ``(S, dim)``, nats."""
        return self.each(value).logsumexp(1)

    def with_tails(self, draws: Tensor, weight: Tensor) -> Self:
        """The mixture with the degrees of freedom, of a grid, under which weighted draws are most likely."""
        distances, best = self.distances(draws), self
        likelihood = float(weight @ self.each(draws, distances).logsumexp(1))
        for k in range(len(self.loc)):
            for df in _DEGREES:
                new = best.df.clone()
                new[k] = df
                trial = best._replace(df=new)
                if (found := float(weight @ trial.each(draws, distances).logsumexp(1))) > likelihood:
                    best, likelihood = trial, found
        return best

    def fitted(self, draws: Tensor, weight: Tensor, *, steps: int = _STEPS) -> Self:
        """The mixture after EM on weighted draws, from where it is; degrees of freedom stay.

        Covariances are drawn a little towards the present ones, and components that lose their draws are dropped.

        Source: Cappe, Douc, Guillin, Marin and Robert 2008, Adaptive importance sampling in general mixture classes,
        section 4; Hoogerheide, Opschoor and van Dijk 2012, A class of adaptive importance sampling weighted EM
        algorithms.

        :param draws: rows ``(S, dim)``.
        :param weight: normalised weights ``(S,)``.
        """
        found, dim = self, self.loc.shape[1]
        effective = float(1 / weight.square().sum())
        for _ in range(steps):
            distances = found.distances(draws)
            share = found.each(draws, distances).softmax(1) * weight[:, None]
            total = share.sum(0)
            alive = total > (dim + 1) / effective / 2
            if not bool(alive.any()):
                return found
            pull = share * torch.where(found.df.isfinite(), (found.df + dim) / (found.df + distances), 1.0)
            found = found._moved(draws, share[:, alive], pull[:, alive], alive, effective)
        return found

    def _moved(self, draws: Tensor, share: Tensor, pull: Tensor, alive: Tensor, effective: float) -> Self:
        total, dim = share.sum(0), draws.shape[1]
        loc = (pull.T @ draws) / pull.sum(0)[:, None].clamp(min=_LEAST)
        centred = draws - loc.unsqueeze(1)  # (K, S, dim)
        scatter = (pull.T.unsqueeze(2) * centred).mT @ centred
        before, prior = self.tril[alive] @ self.tril[alive].mT, dim + 2.0
        count = (effective * total)[:, None, None]
        tril, failed = torch.linalg.cholesky_ex((effective * scatter + prior * before) / (count + prior))
        kept = failed == 0
        log_share = (total[kept] / total[kept].sum()).log()
        return type(self)(log_share, loc[kept], tril[kept], self.df[alive][kept])


def joined(parts: Sequence[Students], shares: Tensor | None = None) -> Students:
    """Mixtures as one, each with its share, or with an equal one."""
    given = torch.full((len(parts),), 1 / len(parts)) if shares is None else shares
    log_share = torch.cat([part.log_share + float(share.log()) for part, share in zip(parts, given, strict=True)])
    return Students(log_share, *(torch.cat(column) for column in list(zip(*parts, strict=True))[1:]))
