"""Quantiles of the marginals of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pplvi.guides.conjugate.families import (
    BetaFamily,
    BlockFamily,
    DirichletFamily,
    GammaFamily,
    InverseGammaFamily,
    WishartFamily,
)
from pplvi.guides.conjugate.lognormal import LogNormalFamily
from pplvi.guides.conjugate.normal import NormalFamily
from pplvi.programs.state import random_state

_DRAWS = 10_000


def site_quantiles(family: BlockFamily, site: str, probs: Tensor) -> Tensor:
    """Quantiles of every element of a site's marginal, ``(Q, *shape)``."""
    if isinstance(family, WishartFamily):
        with random_state(0):
            draws = family.distribution().sample((_DRAWS,))
        return torch.quantile(draws, probs.to(draws.device), dim=0)
    if isinstance(family, NormalFamily):
        mean = family.layout.unpacked(family.canonical["loc"], site)
        probs = probs.to(mean.device).reshape(-1, *(1,) * mean.dim())
        found = mean + family.standard_deviation(site) * torch.special.ndtri(probs)
        return found.exp() if isinstance(family, LogNormalFamily) else found
    values = _scipy_quantiles(family, probs)
    like = next(iter(family.canonical.values()))
    return torch.as_tensor(values, dtype=torch.float64, device=like.device)


def _scipy_quantiles(family: BlockFamily, probs: Tensor) -> Any:
    from scipy import stats  # not at import: it is slow to load

    parameters = [value.numpy(force=True) for value in family.canonical.values()]
    p = probs.numpy(force=True).reshape(-1, *(1,) * parameters[0].ndim)
    if isinstance(family, InverseGammaFamily):
        return stats.invgamma.ppf(p, parameters[0], scale=parameters[1])
    if isinstance(family, GammaFamily):
        return stats.gamma.ppf(p, parameters[0], scale=1 / parameters[1])
    if isinstance(family, DirichletFamily):
        (c,) = parameters
        return stats.beta.ppf(p, c, c.sum(-1, keepdims=True) - c)
    if isinstance(family, BetaFamily):
        return stats.beta.ppf(p, *parameters)
    raise AssertionError(family.kind)


def medians(family: BlockFamily, site: str) -> Tensor:
    """Marginal medians that are a value of the site: a simplex sums to one, a Wishart site is at its mean."""
    if isinstance(family, WishartFamily):
        return family.leaves[0].detach()
    found = site_quantiles(family, site, torch.tensor([0.5], dtype=torch.float64))[0]
    return found / found.sum(-1, keepdim=True) if isinstance(family, DirichletFamily) else found
