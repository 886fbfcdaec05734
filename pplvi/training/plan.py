"""The plan of a training: everything that restarts share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pplvi.programs.ranks import Processes
from pplvi.training.batches import Batches
from pplvi.training.checkpoint import PathLike
from pplvi.training.loop import Trainer
from pplvi.training.replicas import Recipe
from pplvi.training.restart import Restart
from pplvi.training.steps import Steps
from pplvi.training.watch import Watch
from pplvi.types import Program


class Start:
    """What happens before the first step of a restart: here, nothing."""

    def begin(self, trainer: Trainer) -> bool:
        """Bring the guide to where its training starts, inside the scope of its run.

        :returns: whether nothing is left to train.
        """
        return False

    def searches(self, guide: Program) -> bool:
        """Whether a guide is no guide before :meth:`begin` was called, so that it cannot be tried out."""
        return False

    def needs_all_data(self, guide: Program) -> bool:
        """Whether a beginning with a share of the data is another beginning."""
        return self.searches(guide)

    def take_back(self, run: Restart, saved: Mapping[str, Any]) -> None:
        """Give a guide what a checkpoint holds of its beginning."""


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that :func:`train_restarts` needs.

    :ivar steps: makes what takes the steps of a restart.
    :ivar settings: readable settings that a resumed run has to share, by name.
    :ivar start: what happens before the first step.
    :ivar ranks: the processes that train together.
    :ivar ended: what is done with a restart that has ended.
    :ivar mesh: the ranks that hold parts of parameters, as torch sees them; ``None`` where all have the whole.
    :ivar mine: which of the restarts are trained here; all unless given.
    """

    recipe: Recipe
    objective: Any
    steps: Steps
    batches: Batches
    watch: Watch
    restarts: int = 1
    seed: int | None = None
    progress: bool = True
    checkpoint: PathLike | None = None
    resume: PathLike | None = None
    settings: Mapping[str, Any] | None = None
    start: Start = field(default_factory=Start)
    ranks: Processes = field(default_factory=Processes)
    ended: Callable[[Restart], None] = lambda run: None
    mesh: Any = None
    mine: Sequence[int] | None = None

    @property
    def indices(self) -> Sequence[int]:
        """The restarts that are trained here."""
        return range(self.restarts) if self.mine is None else self.mine

    def programs(self, initial: Mapping[str, Tensor] | None = None) -> tuple[Program, Program, Any]:
        """Model, guide and objective of one restart; Pyro's objectives remember the first programs that they see."""
        return *self.recipe.build(initial), copy.deepcopy(self.objective)
