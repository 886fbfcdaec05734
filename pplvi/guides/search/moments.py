"""Adaptive importance sampling: the Gaussian with the moments of the target, and mixtures where one is too few."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pplvi.guides.search.gaussians import Gaussian, GaussianMixture, full_gaussian, stack_gaussians
from pplvi.posterior.looking import repays, work_of_row
from pplvi.programs.deadline import is_time_over
from pplvi.programs.density import UnconstrainedDensity
from pplvi.weights.algebra import effective_sample_size, log_evidence, normalize
from pplvi.weights.pareto import pareto_smooth

MOST_DIMENSIONS = 100
MOST_MIXED = 20  # dimensions in which mixtures of full covariances are worth their draws
_ENOUGH = 20  # effective draws for each dimension, below which the weights are tempered
_GOOD = 0.9  # of the draws are effective: no mixture is needed
_FAIR, _MOST_WORK = 0.5, 1e9  # of the draws are effective: no mixture is worth so many elements computed
_HEAVY = 0.7  # k-hat that a mixture may not have more of
_DEAR = 1.0  # nats of the ELBO that a mixture may cost
_MORE = 0.5  # nats of evidence: who finds so many more is better, as weights do not show what their draws miss
_SHARE, _WIDE = 7, 1.5  # other draws for one of the wide component, and its variances
_EM_STEPS, _EM_ROUNDS, _LEAST_MIXED = 20, 3, 4_000


class _Judged(NamedTuple):
    mixture: GaussianMixture
    draws: Tensor
    log_weight: Tensor
    ess: float
    pareto_k: float
    evidence: float
    error: float
    elbo: float


@torch.no_grad()
def match_moments(density: UnconstrainedDensity, start: Gaussian, rounds: int, components: int = 1) -> Gaussian:
    r"""Improve an approximation by adaptive importance sampling.

    .. math:: \mu = \textstyle\sum_s \bar w_s z_s, \qquad \Sigma = \sum_s \bar w_s (z_s - \mu)(z_s - \mu)^T, \qquad
        z_s \sim q, \quad \bar w_s \propto (p(x, z_s) / q(z_s))^\beta

    with Pareto-smoothed weights and the largest ``beta <= 1`` that leaves enough effective draws for a covariance. A
    round counts only if it raises the effective sample size without losing evidence; two in a row that do not, end it.
    Where draws are dear, a round that would take more of them than it saves is not made. In up to 20 dimensions
    mixtures of 2, 4, ... Gaussians follow, unless most draws are effective and they are dear: each by weighted EM on
    the draws of the last; one that finds clearly more evidence counts in any case.

    Source: Cappe, Douc, Guillin, Marin and Robert 2008, Adaptive importance sampling in general mixture classes;
    Paananen, Piironen, Buerkner and Vehtari 2021, Implicitly adaptive importance sampling.

    :param density: the target, over ``dim`` coordinates.
    :param start: components, with one leading dimension, of an equal mixture.
    :param rounds: the most rounds.
    :param components: the most Gaussians of a mixture; 1 for none.
    :returns: the best found, which may be ``start``; one leading dimension as well.
    """
    if density.dim > MOST_DIMENSIONS or not rounds:
        return start
    best = current = _judge(density, start)
    wasted, work = 0, work_of_row(density)
    for _ in range(rounds):
        if wasted == 2 or is_time_over() or not repays(best.ess, len(best.draws), work):
            break
        if (proposal := _moments(current)) is None:
            break
        current = _judge(density, proposal)
        better = _is_better(current, best)
        best, wasted = (current, 0) if better else (best, wasted + 1)
    return _mixed(density, best, components).mixture.parts


def _mixed(density: UnconstrainedDensity, best: _Judged, components: int) -> _Judged:
    """Mixtures of 2, 4, ... components, each as long as it gets better."""
    if components < 2 or density.dim > MOST_MIXED or best.ess > _GOOD:
        return best
    rounds = _EM_ROUNDS * int(math.log2(components)) + 1
    if best.ess > _FAIR and rounds * _LEAST_MIXED * work_of_row(density) > _MOST_WORK:
        return best
    best = _judge(density, best.mixture.parts, _LEAST_MIXED)
    size, least = 2, best.elbo - _DEAR
    while size <= components:
        for _ in range(_EM_ROUNDS):
            if is_time_over():
                return best
            current = _judge(density, _fitted(best, size), _LEAST_MIXED)
            light = current.pareto_k < max(_HEAVY, best.pareto_k) and current.elbo > least
            if (light and _is_better(current, best)) or _gains(current, best) > _MORE:
                best = current
        size *= 2
    return best


def _fitted(found: _Judged, size: int) -> Gaussian:
    """An equal mixture fitted to weighted draws by EM, and for its tails a component that is wider than the whole."""
    count, dim = found.draws.shape
    weight = normalize(_tempered(found.log_weight, min(_ENOUGH * dim * size, count / 2)))
    loc, common = weight @ found.draws, _covariance(weight, found.draws)
    whole = full_gaussian(loc, common)
    if whole is None:
        return found.mixture.parts
    axes = whole.push(torch.eye(dim).to(loc)) - whole.loc
    locs, covariances = _expectation_maximisation(weight, whole.pull(found.draws), size - 1)
    fitted = [full_gaussian(whole.loc + m @ axes, axes.T @ c @ axes) for m, c in zip(locs, covariances, strict=True)]
    parts = [part for part in fitted if part is not None]
    wide = whole._replace(root=whole.root * _WIDE**0.5)
    return stack_gaussians([*parts * max(_SHARE // max(len(parts), 1), 1), wide])


def _expectation_maximisation(weight: Tensor, draws: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Means ``(size, dim)`` and covariances of equal components of weighted draws ``(S, dim)`` that have mean 0 and
    covariance 1, towards a part of which covariances are drawn a little; the component of the highest density first."""
    dim = draws.shape[1]
    prior, effective = dim + 2.0, float(1 / weight.square().sum())
    common = torch.eye(dim).to(draws)
    locs, covariances = draws[torch.multinomial(weight, size)], common.expand(size, -1, -1)
    for _ in range(_EM_STEPS):
        share = _log_densities(locs, covariances, draws).softmax(0) * weight
        total = share.sum(1) + 1e-12
        locs = (share @ draws) / total.unsqueeze(1)
        centred = draws - locs.unsqueeze(1)
        scatter = effective * (share.unsqueeze(2) * centred).mT @ centred
        narrow = prior * (size + 1) ** (-2 / dim) * common
        covariances = (scatter + narrow) / (effective * total + prior).reshape(-1, 1, 1)
    order = _log_densities(locs, covariances, locs).logsumexp(0).argsort(descending=True)
    return locs[order], covariances[order]


def _log_densities(locs: Tensor, covariances: Tensor, points: Tensor) -> Tensor:
    """Normal log densities of K components at rows of points, ``(K, S)``, up to a constant."""
    roots = torch.linalg.cholesky(covariances)
    whitened = torch.linalg.solve_triangular(roots, (points - locs.unsqueeze(1)).mT, upper=False)
    return -0.5 * whitened.square().sum(1) - roots.diagonal(dim1=1, dim2=2).log().sum(1, keepdim=True)


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
    return _Judged(
        mixture, draws, smoothed, ess, float(pareto_k), float(evidence), float(error), float(log_weight.mean())
    )


def _is_better(new: _Judged, old: _Judged) -> bool:
    return new.ess > old.ess and _keeps(new, old)


def _keeps(new: _Judged, old: _Judged) -> bool:
    return _gains(old, new) < 0


def _gains(new: _Judged, old: _Judged) -> float:
    """How much more evidence one has found than the other, beyond three standard errors."""
    return new.evidence - old.evidence - 3 * math.hypot(new.error, old.error)


def _moments(found: _Judged) -> Gaussian | None:
    weight = normalize(_tempered(found.log_weight, _ENOUGH * found.draws.shape[1]))
    gaussian = full_gaussian(weight @ found.draws, _covariance(weight, found.draws))
    return None if gaussian is None else stack_gaussians([gaussian])


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
