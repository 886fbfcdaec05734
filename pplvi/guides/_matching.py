"""Moment matching: one Gaussian with the mean and covariance of the target, from importance-weighted draws."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pplvi.guides._density import UnconstrainedDensity
from pplvi.guides._gaussians import Gaussian, GaussianMixture, full_gaussian, stack
from pplvi.weights import effective_sample_size, log_evidence, normalize, pareto_smooth

MOST_DIMENSIONS = 100
_ENOUGH = 20  # effective draws for each dimension, below which the weights are tempered


class _Judged(NamedTuple):
    mixture: GaussianMixture
    draws: Tensor
    log_weight: Tensor
    ess: float
    evidence: float
    error: float


@torch.no_grad()
def match_moments(density: UnconstrainedDensity, start: Gaussian, rounds: int) -> Gaussian:
    r"""Improve an approximation by adaptive importance sampling.

    .. math:: \mu = \textstyle\sum_s \bar w_s z_s, \qquad \Sigma = \sum_s \bar w_s (z_s - \mu)(z_s - \mu)^T, \qquad
        z_s \sim q, \quad \bar w_s \propto (p(x, z_s) / q(z_s))^\beta

    with Pareto-smoothed weights and the largest ``beta <= 1`` that leaves enough effective draws for a covariance. A
    round counts only if it raises the effective sample size without losing evidence; two in a row that do not, end it.

    Args:
        density: the target, over ``dim`` coordinates.
        start: components, with one leading dimension, of an equal mixture.
        rounds: the most rounds.

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
    return best.mixture.parts


def _judge(density: UnconstrainedDensity, parts: Gaussian) -> _Judged:
    mixture = GaussianMixture(parts, validate_args=False)
    draws = mixture.sample((min(max(200 * density.dim, 1000), 10_000),))
    log_weight = density(draws.to(density.dtype)).double() - mixture.log_prob(draws)
    log_weight = log_weight.nan_to_num(-math.inf, -math.inf, -math.inf)
    smoothed, _ = pareto_smooth(log_weight)
    evidence, error = log_evidence(log_weight)
    ess = float(effective_sample_size(log_weight)) / len(draws)
    return _Judged(mixture, draws, smoothed, ess, float(evidence), float(error))


def _is_better(new: _Judged, old: _Judged) -> bool:
    loss = old.evidence - new.evidence
    return new.ess > old.ess and loss < 3 * math.hypot(new.error, old.error)


def _moments(found: _Judged) -> Gaussian | None:
    weight = normalize(_tempered(found.log_weight, _ENOUGH * found.draws.shape[1]))
    loc = weight @ found.draws
    centred = found.draws - loc
    covariance = (weight.unsqueeze(-1) * centred).T @ centred
    gaussian = full_gaussian(loc, covariance)
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
