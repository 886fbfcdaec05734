"""Algebra of log-weights, in plain torch and in log space throughout.

Every function takes ``log_weight`` of shape ``(num_particles, *batch)``: the logarithm, in nats, of an unnormalised
importance weight, with the particles on dimension ``dim`` (0 unless told otherwise). Each element of the batch is a
problem of its own, so that one call gives what a Python loop over the batch would give.

A column in which every log-weight is minus infinity (no particle reached the support) is *dead*: its total is
``-inf``, its effective sample size 0 and its normalised weights 0, without a NaN in the value or the gradient.
Averages under the weights of a dead column do not exist and are NaN.

All functions but :func:`pareto_smooth` can be traced: they neither read a value nor branch on one.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

ResamplingScheme = Literal["systematic", "stratified", "multinomial"]
_MIN_TAIL = 5


def logmeanexp(x: Tensor, dim: int = 0, keepdim: bool = False) -> Tensor:
    r"""Logarithm of the mean of exponentials.

    .. math:: \log \tfrac{1}{S} \sum_{s=1}^{S} e^{x_s}

    Args:
        x: values of shape ``(num_particles, *batch)``, in nats.
        dim: the dimension that is averaged.
        keepdim: keep that dimension with size 1.

    Returns:
        A tensor of shape ``batch``, in nats; ``-inf``, with gradient 0, where every value is ``-inf``.

    Raises:
        ValueError: if ``x`` is not a floating-point tensor with at least one particle.

    References:
        Burda, Grosse and Salakhutdinov 2016, Importance weighted autoencoders, for log-weights.

    Example:
        >>> logmeanexp(torch.tensor([0.0, math.log(3.0)])).exp()
        tensor(2.)
    """
    dim = _particle_dim(x, dim)
    dead = _dead(x, dim)
    total = torch.logsumexp(x.masked_fill(dead, 0.0), dim, keepdim) - math.log(x.shape[dim])
    return total.masked_fill(dead if keepdim else dead.squeeze(dim), -math.inf)


def normalize(log_weight: Tensor, dim: int = 0) -> Tensor:
    r"""Normalised weights.

    .. math:: \bar w_s = w_s / \textstyle\sum_r w_r

    Args:
        log_weight: log-weights of shape ``(num_particles, *batch)``, in nats.
        dim: the particle dimension.

    Returns:
        A tensor of the same shape that sums to 1 over ``dim`` (0 in dead columns). It is differentiable: detach it
        where the formula holds the weights fixed.

    Raises:
        ValueError: if ``log_weight`` is not a floating-point tensor with at least one particle.

    References:
        Owen 2013, Monte Carlo theory, methods and examples, chapter 9.

    Example:
        >>> normalize(torch.tensor([1000.0, 1000.0 + math.log(3.0)]))
        tensor([0.2500, 0.7500])
    """
    dim = _particle_dim(log_weight, dim)
    dead = _dead(log_weight, dim)
    return torch.softmax(log_weight.masked_fill(dead, 0.0), dim).masked_fill(dead, 0.0)


def expectation(log_weight: Tensor, values: Tensor, dim: int = 0) -> Tensor:
    r"""Self-normalised expectation under detached weights.

    .. math:: E_w[f] = \textstyle\sum_s \bar w_s f_s, \qquad \bar w = \text{softmax}(\log w)

    The bias of a self-normalised estimate falls as ``1 / num_particles``. Particles of weight 0 count for nothing,
    also where their value is infinite.

    Args:
        log_weight: log-weights of shape ``(num_particles, *batch)``, in nats; no gradient flows into them.
        values: what is averaged, of shape ``(num_particles, *batch, *event)``.
        dim: the particle dimension, counted in ``log_weight``.

    Returns:
        A tensor of shape ``(*batch, *event)``, in the units of ``values``; NaN in dead columns.

    Raises:
        ValueError: if ``values`` does not begin with the shape of ``log_weight``.

    References:
        Owen 2013, Monte Carlo theory, methods and examples, chapter 9.

    Example:
        >>> expectation(torch.tensor([0.0, math.log(3.0)]), torch.tensor([1.0, 5.0]))
        tensor(4.)
    """
    dim = _particle_dim(log_weight, dim)
    if values.shape[: log_weight.dim()] != log_weight.shape:
        raise ValueError(
            f"values has shape {tuple(values.shape)}, which does not begin with the shape "
            f"{tuple(log_weight.shape)} of log_weight: give one value to each particle of each batch element."
        )
    weight = normalize(log_weight.detach(), dim)
    weight = weight.reshape(weight.shape + (1,) * (values.dim() - weight.dim()))
    average = (weight * values.masked_fill(weight == 0, 0.0)).sum(dim)
    return average.masked_fill((weight == 0).all(dim), math.nan)


def effective_sample_size(log_weight: Tensor, dim: int = 0) -> Tensor:
    r"""Kish's effective sample size of a set of weights.

    .. math:: \text{ESS} = \frac{(\sum_s w_s)^2}{\sum_s w_s^2}, \qquad 1 \le \text{ESS} \le S

    Args:
        log_weight: log-weights of shape ``(num_particles, *batch)``, in nats.
        dim: the particle dimension.

    Returns:
        A tensor of shape ``batch``, in draws; 0 in dead columns.

    Raises:
        ValueError: if ``log_weight`` is not a floating-point tensor with at least one particle.

    References:
        Kong 1992, A note on importance sampling using standardized weights; Kish 1965, Survey sampling.

    Example:
        >>> effective_sample_size(torch.tensor([0.0, 0.0, -math.inf]))
        tensor(2.)
    """
    dim = _particle_dim(log_weight, dim)
    dead = _dead(log_weight, dim)
    safe = log_weight.masked_fill(dead, 0.0)
    ess = (2 * torch.logsumexp(safe, dim) - torch.logsumexp(2 * safe, dim)).exp()
    return ess.masked_fill(dead.squeeze(dim), 0.0)


def log_evidence(log_weight: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    r"""Importance-sampling estimate of the log evidence with its standard error.

    .. math::
        \log \hat Z = \log \tfrac1S \sum_s w_s, \qquad
        \text{se}^2 = \frac{\widehat{\text{Var}}(w)}{S \hat Z^2} = \frac{S / \text{ESS} - 1}{S - 1}

    The mean weight is unbiased for Z, so that its logarithm lies below log Z on average. The standard error is the
    delta method's and is to be trusted only where the Pareto k-hat is small.

    Args:
        log_weight: log-weights ``log p(x, z) - log q(z)`` of shape ``(num_particles, *batch)``, in nats.
        dim: the particle dimension.

    Returns:
        The estimate and its standard error, each of shape ``batch``, in nats. The error is infinite for a dead
        column and for a single particle.

    Raises:
        ValueError: if ``log_weight`` is not a floating-point tensor with at least one particle.

    References:
        Owen 2013, Monte Carlo theory, methods and examples, chapters 2 and 9.

    Example:
        >>> log_evidence(torch.tensor([0.0, 0.0, math.log(4.0)]))
        (tensor(0.6931), tensor(0.5000))
    """
    estimate = logmeanexp(log_weight, dim)
    num_particles = log_weight.shape[dim]
    if num_particles == 1:
        return estimate, torch.full_like(estimate, math.inf)
    ess = effective_sample_size(log_weight, dim)
    return estimate, ((num_particles / ess - 1).clamp(min=0) / (num_particles - 1)).sqrt()


def pareto_k_threshold(num_draws: int) -> float:
    r"""Largest Pareto k-hat at which averages over this many weighted draws can be trusted.

    .. math:: \min(1 - 1 / \log_{10} S, \; 0.7)

    Args:
        num_draws: how many weighted draws ``S`` there are; at least 2.

    Returns:
        The threshold, without a unit; 0.7 from 2,155 draws on.

    Raises:
        ValueError: if there are fewer than two draws.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry 2024, Pareto smoothed importance sampling, JMLR 25(72).

    Example:
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

    Args:
        log_weight: log-weights of shape ``(num_particles, *batch)``, in nats.
        dim: the particle dimension.

    Returns:
        The smoothed log-weights, detached, of the shape of ``log_weight``, in nats; and k-hat of shape ``batch``.
        With fewer than five draws in the tail (20 draws or fewer, or a dead column) nothing can be fitted: k-hat
        is ``inf`` and the weights come back as they are. Where the largest weights are all equal to within
        rounding there is no tail: k-hat is 0 and the weights come back as they are.

    Raises:
        ValueError: if ``log_weight`` is not a floating-point tensor with at least one particle, or holds NaN or
            plus infinity.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry 2024, Pareto smoothed importance sampling, JMLR 25(72).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> log_weight = torch.distributions.Pareto(1.0, 1 / 0.5).sample((100_000,)).log()  # two moments: k = 0.5
        >>> smoothed, pareto_k = pareto_smooth(log_weight)
        >>> smoothed.shape, bool(abs(pareto_k - 0.5) < 0.1)
        (torch.Size([100000]), True)
    """
    dim = _particle_dim(log_weight, dim)
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


def resample(
    log_weight: Tensor, num_samples: int | None = None, scheme: ResamplingScheme = "systematic", dim: int = 0
) -> Tensor:
    r"""Indices of particles drawn in proportion to their weights.

    Particle ``s`` is drawn ``num_samples * w[s]`` times on average under every scheme, ``w`` normalised. *systematic*
    places one uniform number on a regular grid and *stratified* one in each cell of it; *multinomial* draws
    independently, with the largest variance. To keep the total weight, give each resampled particle the log-weight
    ``logmeanexp(log_weight)``.

    Args:
        log_weight: log-weights of shape ``(num_particles, *batch)``, in nats; no gradient flows through the indices.
        num_samples: how many indices to draw; the number of particles unless given.
        scheme: ``"systematic"``, ``"stratified"`` or ``"multinomial"``.
        dim: the particle dimension.

    Returns:
        Integer indices with ``num_samples`` on ``dim``, ready for :func:`torch.take_along_dim`; each batch element
        is resampled on its own. In dead columns every particle is equally likely.

    Raises:
        ValueError: if the scheme is unknown, ``num_samples`` is below 1, or ``log_weight`` is not a floating-point
            tensor with at least one particle.

    References:
        Douc, Cappe and Moulines 2005, Comparison of resampling schemes for particle filtering.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> resample(torch.tensor([0.5, 0.0, 0.25, 0.25]).log())
        tensor([0, 0, 2, 3])
    """
    dim = _particle_dim(log_weight, dim)
    num_samples = log_weight.shape[dim] if num_samples is None else num_samples
    if scheme not in get_args(ResamplingScheme) or num_samples < 1:
        raise ValueError(
            f"got scheme={scheme!r} and num_samples={num_samples}; expected one of "
            f"{', '.join(map(repr, get_args(ResamplingScheme)))} and at least 1 sample."
        )
    columns = log_weight.detach().movedim(dim, -1).double()
    columns = columns.masked_fill(_dead(columns, -1), 0.0)
    total = torch.softmax(columns, -1).cumsum(-1)
    points = _uniform_points(total, num_samples, scheme)
    # The last total and the largest point are pinned, so that rounding never picks a particle of weight 0.
    indices = torch.searchsorted((total / total[..., -1:]).contiguous(), points, right=True)
    return indices.movedim(-1, dim)


def _particle_dim(log_weight: Tensor, dim: int) -> int:
    if not log_weight.is_floating_point() or not -log_weight.dim() <= dim < log_weight.dim():
        raise ValueError(
            f"got {log_weight.dtype} of shape {tuple(log_weight.shape)} with dim={dim}; expected floating-point "
            "log-weights of shape (num_particles, *batch) and dim one of its dimensions."
        )
    if log_weight.shape[dim] == 0:
        raise ValueError(f"dimension {dim} of shape {tuple(log_weight.shape)} holds no particles; give at least one.")
    return dim % log_weight.dim()


def _dead(log_weight: Tensor, dim: int) -> Tensor:
    return log_weight.detach().isneginf().all(dim, keepdim=True)


def _uniform_points(total: Tensor, num_samples: int, scheme: ResamplingScheme) -> Tensor:
    draws = 1 if scheme == "systematic" else num_samples
    points = torch.rand(*total.shape[:-1], draws, dtype=total.dtype, device=total.device)
    if scheme != "multinomial":
        points = (points + torch.arange(num_samples, dtype=total.dtype, device=total.device)) / num_samples
    return points.clamp(max=1 - torch.finfo(total.dtype).eps)


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
