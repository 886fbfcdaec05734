"""Pareto smoothing of importance weights and its diagnostic, k-hat (Vehtari et al. 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.weights.algebra import normalize, particle_dim

_MIN_TAIL = 5
_STEEP = 1e30
_MOST_AT_ONCE = 2**21  # numbers of the fit: 16 MiB, a few times over


@checked
def pareto_k_threshold(num_draws: Count) -> float:
    r"""Largest Pareto k-hat at which averages over this many weighted draws can be trusted.

    .. math:: \min(1 - 1 / \log_{10} S, \; 0.7)

    Source: Vehtari, Simpson, Gelman, Yao and Gabry 2024, Pareto smoothed importance sampling, JMLR 25(72).

    :param num_draws: how many weighted draws ``S`` there are; at least 2.
    :returns: the threshold, without a unit; 0.7 from 2,155 draws on.
    :raises ValueError: if there are fewer than two draws.

    >>> round(pareto_k_threshold(1000), 4), pareto_k_threshold(4000)
    (0.6667, 0.7)
    """
    if num_draws < 2:
        raise ValueError(f"num_draws is {num_draws}; the threshold of k-hat needs at least 2 draws. Draw more.")
    return min(1 - 1 / math.log10(num_draws), 0.7)


@checked
def pareto_smooth(log_weight: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    r"""Pareto-smoothed importance weights and the diagnostic k-hat.

    The largest ``min(S / 5, 3 sqrt(S))`` weights of each column are replaced by the expected order statistics of a
    generalised Pareto distribution fitted to them, cut off at the largest raw weight. k-hat is the fitted shape:
    the weights have about ``1 / k`` finite moments. Compare it with :func:`pareto_k_threshold`.

    The overall scale of the weights is kept, so that the result can go wherever ``log_weight`` could.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry 2024, Pareto smoothed importance sampling, JMLR 25(72).

    :param log_weight: log-weights of shape ``(num_particles, *batch)``, in nats.
    :param dim: the particle dimension.
    :returns: the smoothed log-weights, detached, of the shape of ``log_weight``, in nats; and k-hat of shape ``batch``.
        With fewer than five draws in the tail (20 draws or fewer, or a dead column) nothing can be fitted: k-hat is
        ``inf`` and the weights come back as they are. Where the largest weights are all equal to within rounding there
        is no tail: k-hat is 0 and the weights come back as they are.
    :raises ValueError: if ``log_weight`` is not a floating-point tensor with at least one particle, or holds NaN or
        plus infinity.

    >>> _ = torch.manual_seed(0)
    >>> log_weight = torch.distributions.Pareto(1.0, 1 / 0.5).sample((100_000,)).log()  # two moments: k = 0.5
    >>> smoothed, pareto_k = pareto_smooth(log_weight)
    >>> smoothed.shape, bool(abs(pareto_k - 0.5) < 0.1)
    (torch.Size([100000]), True)
    """
    dim = particle_dim(log_weight, dim)
    columns = log_weight.detach().movedim(dim, -1).cpu().contiguous()
    if bool((columns.isnan() | columns.isposinf()).any()):
        raise ValueError(
            "log_weight holds NaN or +inf, so its tail cannot be fitted; expected finite numbers or -inf. "
            "Look for NaN in the data or in the densities of the model and the guide."
        )
    rows, num_tail = columns.reshape(-1, columns.shape[-1]), _tail_length(columns.shape[-1])
    smoothed, pareto_k = rows.clone(), rows.new_full(rows.shape[:1], math.inf)
    if num_tail >= _MIN_TAIL:
        with torch.device("cpu"):
            for part in torch.arange(len(rows)).split(max(1, _MOST_AT_ONCE // (num_tail * _grid_length(num_tail)))):
                smoothed[part], pareto_k[part] = _smooth_rows(rows[part], num_tail)
    smoothed, pareto_k = smoothed.reshape(columns.shape).movedim(-1, dim), pareto_k.reshape(columns.shape[:-1])
    return smoothed.to(log_weight.device), pareto_k.to(log_weight.device)


def pareto_k_error(pareto_k: Tensor, num_draws: int) -> Tensor:
    r"""Standard error of a Pareto k-hat that was fitted to the tail of so many draws.

    .. math:: (1 + \hat k)_+ / \sqrt M, \qquad M = \min(S / 5, 3 \sqrt S)

    which is that of the maximum likelihood estimate of the shape from the ``M`` draws of the tail.

    Source: Smith 1987, Estimating tails of probability distributions, Annals of Statistics 15(3).

    :param pareto_k: k-hat, of any shape.
    :param num_draws: how many draws ``S`` there are, of which the tail is a part.
    :returns: errors of the same shape; infinite where there is no tail to fit.

    >>> pareto_k_error(torch.tensor([0.0, 0.5]), 4000)
    tensor([0.0725, 0.1088])
    """
    if (num_tail := _tail_length(num_draws)) < _MIN_TAIL:
        return torch.full_like(pareto_k, math.inf)
    return (1 + pareto_k).clamp(min=0.0) / math.sqrt(num_tail)


def tail_shortfall(log_weight: Tensor, pareto_k: Tensor, dim: int = 0) -> Tensor:
    r"""What the weights beyond the largest of these draws would add to their sum, as a part of it.

    .. math:: \frac{\sum_{s \in \text{tail}} (w_s - u)}{\sum_s w_s} M^{\min(\hat k, 1) - 1}

    with the ``M`` largest weights as the tail above ``u``. The excess of a generalised Pareto distribution above its
    quantile of ``1 - 1/M`` is on average so much of its mean: the sample has not been there. Where k-hat is large, this
    and not the variance is the error of an estimated evidence. Importance weights have a finite mean, the evidence, so
    that no more than a k-hat of 1 is believed: the tail weighs as much again.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry 2024, Pareto smoothed importance sampling, JMLR 25(72), section 3.

    :param log_weight: log-weights of shape ``(num_particles, *batch)``, in nats.
    :param pareto_k: their k-hat, of shape ``batch``.
    :param dim: the particle dimension.
    :returns: of shape ``batch``; 0 where there is no tail to fit.

    >>> log_weight = torch.distributions.Pareto(1.0, 1 / 0.5).icdf(torch.linspace(0, 1, 1002)[1:-1]).log()
    >>> tail_shortfall(log_weight, torch.tensor(0.5)), tail_shortfall(log_weight, torch.tensor(1.0))
    (tensor(0.0139), tensor(0.1357))
    """
    dim = particle_dim(log_weight, dim)
    if (num_tail := _tail_length(log_weight.shape[dim])) < _MIN_TAIL:
        return torch.zeros_like(pareto_k)
    weight = normalize(log_weight, dim)
    top = weight.topk(num_tail + 1, dim).values
    tail = (top - top.amin(dim, keepdim=True)).sum(dim)
    missing = tail * num_tail ** (pareto_k.clamp(max=1.0) - 1)
    return missing.masked_fill(pareto_k.isinf() | (tail == 0), 0.0)


def _tail_length(num_draws: int) -> int:
    return math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))


def _smooth_rows(log_weight: Tensor, num_tail: int) -> tuple[Tensor, Tensor]:
    """Smooth rows of shape ``(columns, num_particles)``; the arithmetic is that of ArviZ's ``psislw``."""
    peak = log_weight.max(1, keepdim=True).values
    relative = (log_weight.double() - peak).nan_to_num(nan=0.0)  # a dead row is flat
    top, places = _largest(relative, num_tail + 1)
    cutoff = top[:, 0].clamp(min=math.log(torch.finfo(torch.double).tiny))
    sizes = (top > cutoff[:, None]).sum(1)
    flat = -cutoff <= torch.finfo(log_weight.dtype).eps ** 0.5
    pareto_k = torch.where(flat, 0.0, math.inf).double().masked_fill(peak.squeeze(1).isneginf(), math.inf)
    result = log_weight.clone()
    for size in sizes[~flat & (sizes >= _MIN_TAIL)].unique().tolist():  # ties at the cutoff are not of the tail
        rows = torch.where(~flat & (sizes == size))[0]
        k, smoothed = _smooth_tails(top[rows, -size:], cutoff[rows, None])
        pareto_k[rows] = k
        result[rows[:, None], places[rows, -size:]] = (smoothed + peak[rows]).to(log_weight.dtype)
    return result, pareto_k.to(log_weight.dtype)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of each row in ascending order and their places, equal ones in the order of their places."""
    top, places = (part.flip(1) for part in values.topk(count, 1))
    tied = torch.where((top[:, 1:] == top[:, :-1]).any(1))[0]
    if len(tied):
        ordered = values[tied].sort(dim=1, stable=True)
        top[tied], places[tied] = ordered.values[:, -count:], ordered.indices[:, -count:]
    return top, places


def _smooth_tails(tail: Tensor, cutoff: Tensor) -> tuple[Tensor, Tensor]:
    """Fit ascending relative log-weights ``(rows, size)`` above ``cutoff`` and return k-hat and smoothed values."""
    floor = cutoff.exp()
    k, sigma = (part[:, None] for part in _fitted(tail.exp() - floor))
    probabilities = (torch.arange(tail.shape[1], dtype=tail.dtype) + 0.5) / tail.shape[1]
    survival = -torch.log1p(-probabilities)
    exponential = k.abs() < 1e-15
    quantiles = sigma * torch.where(exponential, survival, torch.expm1(k * survival) / k.masked_fill(exponential, 1.0))
    smoothed = (quantiles + floor).log().clamp(max=0.0)
    found = k.isfinite()
    return k.masked_fill(~found, math.inf).squeeze(1), torch.where(found, smoothed, tail)


def _grid_length(size: int) -> int:
    return 30 + int(math.sqrt(size))


def _fitted(excess: Tensor) -> tuple[Tensor, Tensor]:
    """k-hat and scale of generalised Pareto tails, one for each ascending row ``(rows, size)`` of excesses.

    The posterior mean of ``k / sigma`` on a grid of its profile likelihood, and k-hat drawn towards 1/2 as by ten more
    observations (Zhang and Stephens 2009, A new and efficient estimation method for the generalized Pareto
    distribution). An exponential tail has no such ratio, and neither have ties.
    """
    size, length = excess.shape[1], _grid_length(excess.shape[1])
    grid = 1 - math.sqrt(length) / (torch.arange(1, length + 1, dtype=excess.dtype) - 0.5).sqrt()
    rates = grid / (3 * excess[:, int(size / 4 - 0.5), None]) + 1 / excess[:, -1:]
    ks = _mean_log1p(-rates, excess)
    likelihood = size * ((-rates / ks).log() - (ks + 1))
    weight = likelihood.softmax(1).nan_to_num(nan=0.0)
    rate = (weight * rates.nan_to_num()).sum(1)
    exponential = rate == 0
    k = torch.log1p(-rate[:, None] * excess).mean(1)
    sigma = torch.where(exponential, excess.mean(1), -k / rate)
    return k.masked_fill(exponential, 0.0) * size / (size + 10) + 5 / (size + 10), sigma


def _mean_log1p(factor: Tensor, excess: Tensor) -> Tensor:
    """Means ``(rows, grid)`` of ``log(1 + factor * excess)`` over ``size``: logarithms of products of eight."""
    terms = factor[:, :, None] * excess[:, None]
    if bool((excess[:, -1] > _STEEP * excess[:, int(excess.shape[1] / 4 - 0.5)]).any()):
        return terms.log1p().mean(2)  # products might overflow
    terms = torch.nn.functional.pad(terms, (0, -excess.shape[1] % 8)).add_(1.0)
    for _ in range(3):
        half = terms.shape[2] // 2
        terms = terms[:, :, :half] * terms[:, :, half:]
    return terms.log_().sum(2) / excess.shape[1]
