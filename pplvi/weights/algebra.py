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

import torch
from torch import Tensor

from pplvi.kinds.checked import checked


@checked
def logmeanexp(x: Tensor, dim: int = 0, keepdim: bool = False) -> Tensor:
    r"""Logarithm of the mean of exponentials.

    .. math:: \log \tfrac{1}{S} \sum_{s=1}^{S} e^{x_s}

    Source: Burda, Grosse and Salakhutdinov 2016, Importance weighted autoencoders, for log-weights.

    :param x: values of shape ``(num_particles, *batch)``, in nats.
    :param dim: the dimension that is averaged.
    :param keepdim: keep that dimension with size 1.
    :returns: a tensor of shape ``batch``, in nats; ``-inf``, with gradient 0, where every value is ``-inf``.
    :raises ValueError: if ``x`` is not a floating-point tensor with at least one particle.

    >>> logmeanexp(torch.tensor([0.0, math.log(3.0)])).exp()
    tensor(2.)
    """
    dim = particle_dim(x, dim)
    dead = dead_columns(x, dim)
    total = torch.logsumexp(x.masked_fill(dead, 0.0), dim, keepdim) - math.log(x.shape[dim])
    return total.masked_fill(dead if keepdim else dead.squeeze(dim), -math.inf)


def normalize(log_weight: Tensor, dim: int = 0) -> Tensor:
    r"""Normalised weights.

    .. math:: \bar w_s = w_s / \textstyle\sum_r w_r

    Source: Owen 2013, Monte Carlo theory, methods and examples, chapter 9.

    :param log_weight: log-weights of shape ``(num_particles, *batch)``, in nats.
    :param dim: the particle dimension.
    :returns: a tensor of the same shape that sums to 1 over ``dim`` (0 in dead columns). It is differentiable: detach
        it where the formula holds the weights fixed.
    :raises ValueError: if ``log_weight`` is not a floating-point tensor with at least one particle.

    >>> normalize(torch.tensor([1000.0, 1000.0 + math.log(3.0)]))
    tensor([0.2500, 0.7500])
    """
    dim = particle_dim(log_weight, dim)
    dead = dead_columns(log_weight, dim)
    return torch.softmax(log_weight.masked_fill(dead, 0.0), dim).masked_fill(dead, 0.0)


@checked
def expectation(log_weight: Tensor, values: Tensor, dim: int = 0) -> Tensor:
    r"""Self-normalised expectation under detached weights.

    .. math:: E_w[f] = \textstyle\sum_s \bar w_s f_s, \qquad \bar w = \text{softmax}(\log w)

    The bias of a self-normalised estimate falls as ``1 / num_particles``. Particles of weight 0 count for nothing,
    also where their value is infinite.

    Source: Owen 2013, Monte Carlo theory, methods and examples, chapter 9.

    :param log_weight: log-weights of shape ``(num_particles, *batch)``, in nats; no gradient flows into them.
    :param values: what is averaged, of shape ``(num_particles, *batch, *event)``.
    :param dim: the particle dimension, counted in ``log_weight``.
    :returns: a tensor of shape ``(*batch, *event)``, in the units of ``values``; NaN in dead columns.
    :raises ValueError: if ``values`` does not begin with the shape of ``log_weight``.

    >>> expectation(torch.tensor([0.0, math.log(3.0)]), torch.tensor([1.0, 5.0]))
    tensor(4.)
    """
    dim = particle_dim(log_weight, dim)
    if values.shape[: log_weight.dim()] != log_weight.shape:
        raise ValueError(
            f"values has shape {tuple(values.shape)}, which does not begin with the shape "
            f"{tuple(log_weight.shape)} of log_weight: give one value to each particle of each batch element."
        )
    weight = normalize(log_weight.detach(), dim)
    weight = weight.reshape(weight.shape + (1,) * (values.dim() - weight.dim()))
    average = (weight * values.masked_fill(weight == 0, 0.0)).sum(dim)
    return average.masked_fill((weight == 0).all(dim), math.nan)


@checked
def effective_sample_size(log_weight: Tensor, dim: int = 0) -> Tensor:
    r"""Kish's effective sample size of a set of weights.

    .. math:: \text{ESS} = \frac{(\sum_s w_s)^2}{\sum_s w_s^2}, \qquad 1 \le \text{ESS} \le S

    Source: Kong 1992, A note on importance sampling using standardized weights; Kish 1965, Survey sampling.

    :param log_weight: log-weights of shape ``(num_particles, *batch)``, in nats.
    :param dim: the particle dimension.
    :returns: a tensor of shape ``batch``, in draws; 0 in dead columns.
    :raises ValueError: if ``log_weight`` is not a floating-point tensor with at least one particle.

    >>> effective_sample_size(torch.tensor([0.0, 0.0, -math.inf]))
    tensor(2.)
    """
    dim = particle_dim(log_weight, dim)
    dead = dead_columns(log_weight, dim)
    safe = log_weight.masked_fill(dead, 0.0)
    ess = (2 * torch.logsumexp(safe, dim) - torch.logsumexp(2 * safe, dim)).exp()
    return ess.masked_fill(dead.squeeze(dim), 0.0)


@checked
def log_evidence(log_weight: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    r"""Importance-sampling estimate of the log evidence with its standard error.

    .. math::
        \log \hat Z = \log \tfrac1S \sum_s w_s, \qquad
        \text{se}^2 = \frac{\widehat{\text{Var}}(w)}{S \hat Z^2} = \frac{S / \text{ESS} - 1}{S - 1}

    The mean weight is unbiased for Z, so that its logarithm lies below log Z on average. The standard error is the
    delta method's and is to be trusted only where the Pareto k-hat is small.

    Source: Owen 2013, Monte Carlo theory, methods and examples, chapters 2 and 9.

    :param log_weight: log-weights ``log p(x, z) - log q(z)`` of shape ``(num_particles, *batch)``, in nats.
    :param dim: the particle dimension.
    :returns: the estimate and its standard error, each of shape ``batch``, in nats. The error is infinite for a dead
        column and for a single particle.
    :raises ValueError: if ``log_weight`` is not a floating-point tensor with at least one particle.

    >>> log_evidence(torch.tensor([0.0, 0.0, math.log(4.0)]))
    (tensor(0.6931), tensor(0.5000))
    """
    estimate = logmeanexp(log_weight, dim)
    num_particles = log_weight.shape[dim]
    if num_particles == 1:
        return estimate, torch.full_like(estimate, math.inf)
    ess = effective_sample_size(log_weight, dim)
    return estimate, ((num_particles / ess - 1).clamp(min=0) / (num_particles - 1)).sqrt()


def particle_dim(log_weight: Tensor, dim: int) -> int:
    """The dimension of the particles, counted from the left.

    :raises ValueError: for log-weights that are not floating-point numbers, have no such dimension, or no particle.

    >>> particle_dim(torch.zeros(3, 5), -2)
    0
    """
    if not log_weight.is_floating_point() or not -log_weight.dim() <= dim < log_weight.dim():
        raise ValueError(
            f"got {log_weight.dtype} of shape {tuple(log_weight.shape)} with dim={dim}; expected floating-point "
            "log-weights of shape (num_particles, *batch) and dim one of its dimensions."
        )
    if log_weight.shape[dim] == 0:
        raise ValueError(f"dimension {dim} of shape {tuple(log_weight.shape)} holds no particles; give at least one.")
    return dim % log_weight.dim()


def dead_columns(log_weight: Tensor, dim: int) -> Tensor:
    """Where every particle has weight 0; the particle dimension is kept, with size 1.

    >>> dead_columns(torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]]), 0)
    tensor([[False,  True]])
    """
    return log_weight.detach().isneginf().all(dim, keepdim=True)
