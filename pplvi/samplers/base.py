"""What every part of this room keeps to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pplvi.objectives.step import Routing, Step
from pplvi.programs.ways import Vectorize, named
from pplvi.types import Program


@dataclass(frozen=True)
class Request:
    """How many particles an objective wants, in which way they are run, and how gradients are routed."""

    num_particles: int = 1
    vectorize: Vectorize = None
    routing: Routing = field(default_factory=Routing)

    @property
    def counts(self) -> list[int]:
        """Numbers of particles to run at once, for what has no way but two: together, or one after another."""
        return [1] * self.num_particles if named(self.vectorize) == "loop" else [self.num_particles]


class Sampler(Protocol):
    """Anything that runs a model and a guide and yields weighted steps."""

    @property
    def proposal(self) -> str:
        """Where draws come from."""
        ...

    def __call__(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], request: Request
    ) -> Iterator[Step]:
        """Yield the steps of one evaluation."""
        ...
