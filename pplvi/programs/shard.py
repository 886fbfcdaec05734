"""The part of a plate that is on one rank of a process group, and the means that are taken over the ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
import torch.distributed._functional_collectives as collectives
from torch import Tensor

ABSENT = 1e-30  # what a rank without an element counts for: it runs the programs on one that is another's

_Layout = tuple[torch.Size, torch.dtype, torch.device]


@dataclass
class Exchanges:
    """The means that one evaluation takes over the ranks.

    A rank whose evaluation fails half-way takes the rest of them with NaN (:meth:`Shard.finish`): nobody waits for it,
    and all see that something went wrong.
    """

    expected: list[_Layout] = field(default_factory=list)
    done: list[_Layout] = field(default_factory=list)

    def start(self) -> None:
        """Begin an evaluation; the one before was complete."""
        self.expected, self.done = self.done or self.expected, []


@dataclass(frozen=True)
class Shard:
    """The part of a plate that is on this rank.

    :ivar group: the process group.
    :ivar plates: names of the plates that are split.
    :ivar rows: elements here.
    :ivar total: elements on all ranks together.
    :ivar absent: whether there is none, and the one here stands for nothing.
    :ivar exchanges: the means that were taken.
    :ivar whole: names of the plates that were met and have no elements but these.
    """

    group: Any
    plates: frozenset[str]
    rows: int
    total: int
    absent: bool = False
    exchanges: Exchanges = field(default_factory=Exchanges, compare=False)
    whole: set[str] = field(default_factory=set, compare=False)

    @property
    def rank(self) -> int:
        """The number of this process."""
        return torch.distributed.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """How many processes there are."""
        return torch.distributed.get_world_size(self.group)

    @property
    def share(self) -> float:
        """What the elements here count for, so that the mean over the ranks is the sum of all."""
        return ABSENT if self.absent else float(self.ranks)

    def scale(self, size: int, full: int) -> float:
        """What an element stands for, where ``size`` of ``full`` are met here."""
        return self.share if full in (size, self.total) else self.share * full / self.total

    def splits(self, site: Any) -> bool:
        """Whether a site is inside a plate that is split."""
        return not self.plates.isdisjoint(frame.name for frame in site["cond_indep_stack"])

    def mean(self, density: Tensor) -> Tensor:
        """The mean over the ranks; a gradient goes through as it is, since the ranks' gradients will be averaged."""
        self.exchanges.done.append((density.shape, density.dtype, density.device))
        mean: Tensor = _Mean.apply(density, self.group, self.ranks)
        return mean

    def finish(self) -> None:
        """Take the means that are left of an evaluation that has failed here, with NaN."""
        for shape, dtype, device in self.exchanges.expected[len(self.exchanges.done) :]:
            self.mean(torch.full(shape, torch.nan, dtype=dtype, device=device))


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, density: Tensor, group: Any, ranks: int) -> Tensor:
        return mean_over(density, group, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None, None


def mean_over(tensor: Tensor, group: Any, ranks: int) -> Tensor:
    """The mean over the ranks of a group, an operation that a recorded step can hold."""
    total = collectives.all_reduce(tensor.contiguous(), "sum", group)
    return collectives.wait_tensor(total) / ranks
