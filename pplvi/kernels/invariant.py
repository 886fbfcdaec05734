"""Kernels that leave their target invariant, and the frame that they move in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pplvi.types import MutableValues, Values


@dataclass(frozen=True)
class Frame:
    """How a walk looks at a target: one number per particle and per independent element of the data.

    :ivar log_density: ``log gamma[k]`` of constrained values, ``(num_particles, *batch)``.
    :ivar total: sums a tensor over everything but particles and batch; the arguments are the tensor and the number of
        its event dimensions.
    :ivar align: gives a tensor ``(num_particles, *batch)`` the dimensions of a site's value with that many event
        dimensions.
    """

    log_density: Callable[[Values], Tensor]
    total: Callable[[Tensor, int], Tensor]
    align: Callable[[Tensor, int], Tensor]


class InvariantMove(ABC):
    """A move of some of a model's sites that leaves its target invariant; the others stay as they are."""

    kernel: Any

    @property
    @abstractmethod
    def names(self) -> set[str]:
        """Names of the sites that are moved."""

    @abstractmethod
    def move(self, previous: Values, frame: Frame) -> MutableValues:
        """All values after the move, without gradient."""

    def __call__(self, previous: Values, *args: Any, **kwargs: Any) -> None:
        """Refuse to be run as a program.

        :raises ValueError: always.
        """
        raise ValueError(
            f"{self.kernel} leaves its target invariant and has no density: expected a guide that is walked level by "
            "level, with NestedELBO or the Annealed sampler. Elsewhere use LangevinKernel or ResidualKernel."
        )
