"""Pareto smoothing of importance weights and its diagnostic, k-hat (Vehtari et al. 2024)."""

from __future__ import annotations

import math

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pplvi.weights.algebra import particle_dim

_MIN_TAIL = 5


def pareto_k_threshold(num_draws: int) -> float:
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
    columns = log_weight.detach().movedim(dim, -1).cpu()  # a loop over columns: faster there, whatever the device
    if bool((columns.isnan() | columns.isposinf()).any()):
        raise ValueError(
            "log_weight holds NaN or +inf, so its tail cannot be fitted; expected finite numbers or -inf. "
            "Look for NaN in the data or in the densities of the model and the guide."
        )
    with torch.device("cpu"):
        fitted = [_smooth_column(column) for column in columns.reshape(-1, columns.shape[-1])]
    smoothed = torch.stack([column for column, _ in fitted]) if fitted else columns
    pareto_k = columns.new_tensor([k for _, k in fitted])
    smoothed, pareto_k = smoothed.reshape(columns.shape).movedim(-1, dim), pareto_k.reshape(columns.shape[:-1])
    return smoothed.to(log_weight.device), pareto_k.to(log_weight.device)


def _smooth_column(log_weight: Tensor) -> tuple[Tensor, float]:
    """Smooth one column of shape ``(num_particles,)``; the arithmetic is that of ArviZ's ``psislw``."""
    num_tail = math.ceil(min(log_weight.shape[0] / 5, 3 * math.sqrt(log_weight.shape[0])))
    peak = log_weight.max().item()
    if num_tail < _MIN_TAIL or peak == -math.inf:
        return log_weight, math.inf
    relative = log_weight.double() - peak
    cutoff = max(relative.sort().values[-num_tail - 1].item(), math.log(torch.finfo(torch.double).tiny))
    if -cutoff <= torch.finfo(log_weight.dtype).eps ** 0.5:
        return log_weight, 0.0
    k, smoothed = _smooth_tail(relative[relative > cutoff], cutoff)
    result = log_weight.clone()
    result[relative > cutoff] = (smoothed + peak).to(log_weight.dtype)
    return result, k


def _smooth_tail(tail: Tensor, cutoff: float) -> tuple[float, Tensor]:
    """Fit the relative log-weights above ``cutoff`` and return k-hat and their smoothed values, in their order."""
    if tail.shape[0] < _MIN_TAIL:
        return math.inf, tail
    excess = tail.exp() - math.exp(cutoff)
    k, sigma = fit_generalized_pareto(excess)
    if not math.isfinite(k):
        return math.inf, tail
    probabilities = (torch.arange(tail.shape[0], dtype=tail.dtype) + 0.5) / tail.shape[0]
    survival = -torch.log1p(-probabilities)
    quantiles = sigma * (survival if abs(k) < 1e-15 else torch.expm1(k * survival) / k)
    smoothed = torch.empty_like(tail)
    smoothed[tail.argsort(stable=True)] = (quantiles + math.exp(cutoff)).log().clamp(max=0.0)
    return k, smoothed
