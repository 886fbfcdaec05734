"""Kernels that leave their target invariant, and the frame that they move in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor

from pplvi.types import LogDensity, MutableValues, Values


class Named(Protocol):
    """A site with a name."""

    @property
    def name(self) -> str:
        """The name of the site."""
        ...


KernelT = TypeVar("KernelT")
SiteT = TypeVar("SiteT", bound=Named)


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


@dataclass(frozen=True)
class SitesMove(InvariantMove, Generic[KernelT, SiteT]):
    """A move of those of a model's sites that are of its kernel's kind.

    :ivar kernel: the kernel that made it.
    :ivar sites: the sites that are moved.
    """

    kernel: KernelT
    sites: tuple[SiteT, ...]

    @property
    def names(self) -> set[str]:
        """Names of the sites that are moved."""
        return {site.name for site in self.sites}


class InvariantKernel:
    """Moves the sites of one kind and leaves its target invariant; the others stay as they are.

    :cvar partial: some of a model's sites may be left to other kernels.
    :cvar moves: the class of its moves.
    :cvar kind: the class of the sites that are moved.
    :cvar lacking: what to say of sites that are all of another kind, and what to do.
    """

    partial: ClassVar[bool] = True
    moves: ClassVar[type[SitesMove[Any, Any]]]
    kind: ClassVar[type]
    lacking: ClassVar[str]

    def build(self, sites: Sequence[Any], log_density: LogDensity) -> tuple[InvariantMove, InvariantMove]:
        """One move that is its own reversal; the target comes from the walk.

        :raises ValueError: for a model without sites of the kernel's kind.
        """
        own = tuple(site for site in sites if isinstance(site, self.kind))
        if not own:
            raise ValueError(f"sites {[site.name for site in sites]} {self.lacking}")
        move = self.moves(self, own)
        return move, move
