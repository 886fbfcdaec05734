"""When and how weighted particles are drawn anew, with fresh and even weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pplvi.weights import ResamplingScheme, effective_sample_size, logmeanexp, resample


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

    when: bool | float = False
    scheme: ResamplingScheme = "systematic"
    num_particles: int | None = None

    def __post_init__(self) -> None:
        if self.num_particles is not None and (self.when is not True or self.num_particles < 2):
            raise ValueError(
                f"num_particles={self.num_particles} with resample={self.when!r}: expected at least 2, and True. The "
                "number of particles cannot depend on a weight."
            )
        if not isinstance(self.when, bool) and not 0 < self.when <= 1:
            raise ValueError(f"resample={self.when!r}: expected True, False, or a fraction of the particles in (0, 1].")

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
