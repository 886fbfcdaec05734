"""Rejection control: draws of small weight are tried again, and weights stay proper."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Floats, Number, Plural
from pplvi.weights.algebra import logmeanexp


@checked
def rejection_control(log_weight: Tensor, log_threshold: Number | Floats) -> tuple[Tensor, Tensor]:
    r"""The first of several independent draws that is accepted, and what its weight is multiplied by.

    Draw ``t`` of weight :math:`w_t` is accepted with probability :math:`a_t = \min(1, w_t / c)`. If ``j`` is the first
    that is, and not the last of all ``T``, its new weight is

    .. math:: w_j \; \frac{1}{a_j} \; \frac{1}{T - j} \sum_{t > j} a_t = \max(w_j, c) \; \hat p,

    with an estimate of the probability of acceptance from the draws after it, which had no say in the choice. If none
    is accepted before the last, that one is taken with its own weight. So :math:`E[w' h(x)] = E[w h(x)]` for every
    ``h`` whatever ``c`` and ``T``: weights stay proper and estimates of normalisers unbiased. No draw is dropped: what
    is rejected is still drawn and weighted, so that nothing branches on a value.

    Source: Liu, Chen and Wong 1998, Rejection control and sequential importance sampling; Liu 2001, section 2.6. There
    draws are tried without end, and the estimate comes from their number (Kudlicka et al. 2020).

    :param log_weight: log-weights of shape ``(num_tries, *batch)``, in nats, of draws that are independent and alike
        along the first dimension; no gradient flows into them.
    :param log_threshold: ``log c``, in nats: a number or a tensor that broadcasts against ``batch``. It must not depend
        on these draws.
    :returns: indices of the draws, and the logarithms of the factors of their weights, each of shape ``batch``.
    :raises ValueError: for fewer than two draws, or a threshold of another shape.

    >>> rejection_control(torch.tensor([[-9.0, 0.5], [1.0, 0.5], [1.0, 0.5]]), log_threshold=0.0)
    (tensor([1, 0]), tensor([0., 0.]))
    """
    if log_weight.dim() == 0 or len(log_weight) < 2 or not log_weight.is_floating_point():
        raise ValueError(
            f"log_weight is {log_weight.dtype} of shape {tuple(log_weight.shape)}: expected log-weights of at least "
            "two draws, (num_tries, *batch). Draw more than once."
        )
    if isinstance(log_threshold, Tensor) and not _spreads(log_threshold, log_weight[0]):
        raise ValueError(
            f"log_threshold of shape {tuple(log_threshold.shape)} for draws of shape {tuple(log_weight.shape[1:])}: "
            "expected a number, or one that broadcasts against these."
        )
    count = len(log_weight)
    log_accepted = (log_weight.detach() - log_threshold).clamp(max=0.0)
    accepted = torch.rand_like(log_accepted) < log_accepted.exp()
    number = torch.arange(count, device=log_weight.device).reshape(-1, *[1] * (log_weight.dim() - 1))
    first = torch.where(accepted, number, count - 1).amin(0)
    after = log_accepted.masked_fill(number <= first, -math.inf)
    forced = first == count - 1
    log_estimate = torch.logsumexp(after, 0) - (count - 1 - first).clamp(min=1).to(log_weight.dtype).log()
    own = torch.take_along_dim(log_accepted, first.unsqueeze(0), 0).squeeze(0)
    return first, torch.where(forced, 0.0, log_estimate - own.masked_fill(forced, 0.0))


def _spreads(tensor: Tensor, other: Tensor) -> bool:
    """Whether a tensor broadcasts to the shape of another."""
    pairs = zip(tensor.shape[::-1], other.shape[::-1], strict=False)
    return tensor.dim() <= other.dim() and all(size in (1, wanted) for size, wanted in pairs)


@checked
@dataclass(frozen=True)
class Rejection:
    """How often a particle is moved anew where its incremental weight is small; see :func:`rejection_control`.

    :ivar num_tries: how many draws a particle has for a move, at least 2. All of them are made.
    :ivar log_threshold: ``log c`` for incremental weights, in nats; ``None``: the mean of those of one draw more of
        each particle, which are used for nothing else, for each independent element of the data on its own.
    :raises ValueError: for fewer than two tries.

    >>> Rejection(num_tries=3).num_draws
    4
    """

    num_tries: Plural = 8
    log_threshold: Number | None = None

    @property
    def num_draws(self) -> int:
        """How many draws a move of one particle takes."""
        return self.num_tries + (self.log_threshold is None)

    def choose(self, log_increment: Tensor) -> tuple[Tensor, Tensor]:
        """Which draw of each particle goes on, and the logarithm of the factor of its weight.

        :param log_increment: incremental log-weights, ``(num_draws, num_particles, *batch)``, in nats.
        :returns: indices on the first dimension and log factors, each ``(num_particles, *batch)``.
        """
        if self.log_threshold is not None:
            return rejection_control(log_increment, self.log_threshold)
        threshold = logmeanexp(log_increment[0]).clamp(min=torch.finfo(log_increment.dtype).min)
        chosen, log_factor = rejection_control(log_increment[1:], threshold)
        return chosen + 1, log_factor
