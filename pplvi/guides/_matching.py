"""Adaptive importance sampling: the Gaussian with the moments of the target, and mixtures where one is too few."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pplvi.guides._density import UnconstrainedDensity
from pplvi.guides._gaussians import Gaussian, GaussianMixture, full_gaussian, stack
from pplvi.weights import effective_sample_size, log_evidence, normalize, pareto_smooth

MOST_DIMENSIONS = 100
MOST_MIXED = 20  # dimensions in which mixtures of full covariances are worth their draws
_ENOUGH = 20  # effective draws for each dimension, below which the weights are tempered
_GOOD = 0.9  # of the draws are effective: no mixture is needed
_HEAVY = 0.7  # k-hat that a mixture may not have more of
_SHARE, _WIDE = 7, 1.5  # draws of a mixture for one of its widest component, and variances of that
_EM_STEPS, _EM_ROUNDS, _LEAST_MIXED = 20, 3, 4_000


class _Judged(NamedTuple):
    mixture: GaussianMixture
    draws: Tensor
    log_weight: Tensor
    ess: float
    pareto_k: float
    evidence: float
    error: float


@torch.no_grad()
def match_moments(density: UnconstrainedDensity, start: Gaussian, rounds: int, components: int = 1) -> Gaussian:
    r"""Improve an approximation by adaptive importance sampling.

    .. math:: \mu = \textstyle\sum_s \bar w_s z_s, \qquad \Sigma = \sum_s \bar w_s (z_s - \mu)(z_s - \mu)^T, \qquad
        z_s \sim q, \quad \bar w_s \propto (p(x, z_s) / q(z_s))^\beta

    with Pareto-smoothed weights and the largest ``beta <= 1`` that leaves enough effective draws for a covariance. A
    round counts only if it raises the effective sample size without losing evidence; two in a row that do not, end it.
    In up to 20 dimensions mixtures of 2, 4, ... Gaussians follow, each by weighted EM on the draws of the last.

    Args:
        density: the target, over ``dim`` coordinates.
        start: components, with one leading dimension, of an equal mixture.
        rounds: the most rounds.
        components: the most Gaussians of a mixture; 1 for none.

    Returns:
        The best found, which may be ``start``; one leading dimension as well.

    References:
        Cappe, Douc, Guillin, Marin and Robert 2008, Adaptive importance sampling in general mixture classes; Paananen,
        Piironen, Buerkner and Vehtari 2021, Implicitly adaptive importance sampling.
    """
    if density.dim > MOST_DIMENSIONS or not rounds:
        return start
    best = current = _judge(density, start)
    wasted = 0
    for _ in range(rounds):
        if (proposal := _moments(current)) is None or wasted == 2:
            break
        current = _judge(density, proposal)
        better = _is_better(current, best)
        best, wasted = (current, 0) if better else (best, wasted + 1)
    return _mixed(density, best, components).mixture.parts


def _mixed(density: UnconstrainedDensity, best: _Judged, components: int) -> _Judged:
    """Mixtures of 2, 4, ... components, each as long as it gets better."""
    if components < 2 or density.dim > MOST_MIXED or best.ess > _GOOD:
        return best
    best = _judge(density, best.mixture.parts, _LEAST_MIXED)
    size = 2
    while size <= components:
        for _ in range(_EM_ROUNDS):
            current = _judge(density, _fitted(best, size), _LEAST_MIXED)
            if _is_better(current, best) and current.pareto_k < max(_HEAVY, best.pareto_k):
                best = current
        size *= 2
    return best


def _fitted(found: _Judged, size: int) -> Gaussian:
    """An equal mixture fitted to weighted draws by EM, and a wide component for the tails in it; covariances are drawn
    a little towards the common one."""
    count, dim = found.draws.shape
    weight = normalize(_tempered(found.log_weight, min(_ENOUGH * dim * size, count / 2)))
    common = _covariance(weight, found.draws)
    prior, effective = dim + 2.0, float(1 / weight.square().sum())
    locs = found.draws[torch.multinomial(weight, size - 1)]
    covariances = common.expand(size - 1, -1, -1)
    for _ in range(_EM_STEPS):
        each = MultivariateNormal(locs, covariances, validate_args=False).log_prob(found.draws.unsqueeze(1))
        share = each.softmax(1) * weight.unsqueeze(1)
        total = share.sum(0) + 1e-12
        locs = (share.T @ found.draws) / total.unsqueeze(1)
        centred = found.draws.unsqueeze(1) - locs
        scatter = effective * torch.einsum("sk,ski,skj->kij", share, centred, centred)
        covariances = (scatter + prior * size ** (-2 / dim) * common) / (effective * total + prior).reshape(-1, 1, 1)
    highest = MultivariateNormal(locs, covariances, validate_args=False).log_prob(locs.unsqueeze(1)).logsumexp(1)
    parts = [full_gaussian(locs[k], covariances[k]) for k in highest.argsort(descending=True).tolist()]
    parts = parts * max(_SHARE // len(parts), 1) + [full_gaussian(weight @ found.draws, _WIDE * common)]
    return stack([part for part in parts if part is not None])


def _covariance(weight: Tensor, draws: Tensor) -> Tensor:
    centred = draws - weight @ draws
    return (weight.unsqueeze(-1) * centred).T @ centred


def _judge(density: UnconstrainedDensity, parts: Gaussian, least: int = 1000) -> _Judged:
    mixture = GaussianMixture(parts, validate_args=False)
    draws = mixture.sample((min(max(200 * density.dim, least), 10_000),))
    log_weight = density(draws.to(density.dtype)).double() - mixture.log_prob(draws)
    log_weight = log_weight.nan_to_num(-math.inf, -math.inf, -math.inf)
    smoothed, pareto_k = pareto_smooth(log_weight)
    evidence, error = log_evidence(log_weight)
    ess = float(effective_sample_size(log_weight)) / len(draws)
    return _Judged(mixture, draws, smoothed, ess, float(pareto_k), float(evidence), float(error))


def _is_better(new: _Judged, old: _Judged) -> bool:
    loss = old.evidence - new.evidence
    return new.ess > old.ess and loss < 3 * math.hypot(new.error, old.error)


def _moments(found: _Judged) -> Gaussian | None:
    weight = normalize(_tempered(found.log_weight, _ENOUGH * found.draws.shape[1]))
    gaussian = full_gaussian(weight @ found.draws, _covariance(weight, found.draws))
    return None if gaussian is None else stack([gaussian])


def _tempered(log_weight: Tensor, enough: float) -> Tensor:
    """The weights to the largest power of at most 1 that leaves so many effective draws."""
    low, high = 0.0, 1.0
    if float(effective_sample_size(log_weight)) >= enough:
        return log_weight
    finite = log_weight.masked_fill(log_weight.isneginf(), float(log_weight[log_weight.isfinite()].min()) - 100.0)
    for _ in range(20):
        middle = 0.5 * (low + high)
        enough_left = float(effective_sample_size(middle * finite)) >= enough
        low, high = (middle, high) if enough_left else (low, middle)
    return low * finite
