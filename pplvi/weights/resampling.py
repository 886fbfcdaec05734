"""Resampling: which particles go on, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Rate
from pplvi.weights.algebra import dead_columns, effective_sample_size, logmeanexp, particle_dim

ResamplingScheme = Literal["systematic", "stratified", "multinomial"]


@checked
def resample(
    log_weight: Tensor, num_samples: Count | None = None, scheme: ResamplingScheme = "systematic", dim: int = 0
) -> Tensor:
    r"""Indices of particles drawn in proportion to their weights.

    Particle ``s`` is drawn ``num_samples * w[s]`` times on average under every scheme, ``w`` normalised. *systematic*
    places one uniform number on a regular grid and *stratified* one in each cell of it; *multinomial* draws
    independently, with the largest variance. To keep the total weight, give each resampled particle the log-weight
    ``logmeanexp(log_weight)``.

    Source: Douc, Cappe and Moulines 2005, Comparison of resampling schemes for particle filtering.

    :param log_weight: log-weights of shape ``(num_particles, *batch)``, in nats; no gradient flows through the indices.
    :param num_samples: how many indices to draw; the number of particles unless given.
    :param scheme: ``"systematic"``, ``"stratified"`` or ``"multinomial"``.
    :param dim: the particle dimension.
    :returns: integer indices with ``num_samples`` on ``dim``, ready for :func:`torch.take_along_dim`; each batch
        element is resampled on its own. In dead columns every particle is equally likely.
    :raises ValueError: if the scheme is unknown, ``num_samples`` is below 1, or ``log_weight`` is not a floating-point
        tensor with at least one particle.

    >>> _ = torch.manual_seed(0)
    >>> resample(torch.tensor([0.5, 0.0, 0.25, 0.25]).log())
    tensor([0, 0, 2, 3])
    """
    dim = particle_dim(log_weight, dim)
    num_samples = log_weight.shape[dim] if num_samples is None else num_samples
    columns = log_weight.detach().movedim(dim, -1).double()
    columns = columns.masked_fill(dead_columns(columns, -1), 0.0)
    total = torch.softmax(columns, -1).cumsum(-1)
    points = _uniform_points(total, num_samples, scheme)
    # The last total and the largest point are pinned, so that rounding never picks a particle of weight 0.
    indices = torch.searchsorted((total / total[..., -1:]).contiguous(), points, right=True)
    return indices.movedim(-1, dim)


def _uniform_points(total: Tensor, num_samples: int, scheme: ResamplingScheme) -> Tensor:
    draws = 1 if scheme == "systematic" else num_samples
    points = torch.rand(*total.shape[:-1], draws, dtype=total.dtype, device=total.device)
    if scheme != "multinomial":
        points = (points + torch.arange(num_samples, dtype=total.dtype, device=total.device)) / num_samples
    return points.clamp(max=1 - torch.finfo(total.dtype).eps)


@checked
@dataclass(frozen=True)
class Resampling:
    """When and how particles are drawn anew in proportion to their weights.

    :ivar when: ``False``: never; ``True``: at every level; a number: where the effective sample size, of each
        independent element of the data on its own, is below that fraction of the particles.
    :ivar scheme: ``"systematic"``, ``"stratified"`` or ``"multinomial"``.
    :ivar num_particles: how many to go on with, at least 2; as many as there are unless given. The mean weight is kept.
    :raises ValueError: for a fraction outside ``(0, 1]``, or a number of particles where resampling is not certain.

    >>> chosen, log_weight = Resampling(0.5).indices(torch.tensor([0.0, 0.0, 0.0, 0.1]))  # even enough: left alone
    >>> chosen, log_weight
    (tensor([0, 1, 2, 3]), tensor([0.0000, 0.0000, 0.0000, 0.1000]))
    """

    when: bool | Rate = False
    scheme: ResamplingScheme = "systematic"
    num_particles: Count | None = None

    def __post_init__(self) -> None:
        if self.num_particles is not None and (self.when is not True or self.num_particles < 2):
            raise ValueError(
                f"num_particles={self.num_particles} with resample={self.when!r}: expected at least 2, and True. The "
                "number of particles cannot depend on a weight."
            )

    def indices(self, log_weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Which particle to take for each one, and its new log weight, ``(num_particles, *batch)``; ``None``: never.

        The mean weight of each batch element is kept.
        """
        if self.when is False or len(log_weight) == 1:
            return None
        chosen = resample(log_weight, self.num_particles, scheme=self.scheme)
        even = logmeanexp(log_weight).expand_as(chosen)
        if self.when is True:
            return chosen, even
        low = effective_sample_size(log_weight) < self.when * len(log_weight)
        own = torch.arange(len(log_weight), device=log_weight.device)
        own = own.reshape(-1, *[1] * (log_weight.dim() - 1)).expand_as(chosen)
        return torch.where(low, chosen, own), torch.where(low, even, log_weight)
