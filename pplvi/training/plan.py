"""The plan of a training: everything that restarts share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pplvi.training.batches import Batches
from pplvi.training.checkpoint import PathLike
from pplvi.training.optimizers import Update
from pplvi.training.replicas import Recipe
from pplvi.training.watch import Watch
from pplvi.types import Program


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that :func:`train_restarts` needs.

    :ivar make_update: makes the optimiser of a restart.
    :ivar settings: readable settings that a resumed run has to share, by name.
    :ivar init: where a guide starts: see :func:`pplvi.fitting.starts.begin`.
    """

    recipe: Recipe
    objective: Any
    make_update: Callable[[], Update]
    batches: Batches
    watch: Watch
    restarts: int = 1
    seed: int | None = None
    progress: bool = True
    checkpoint: PathLike | None = None
    resume: PathLike | None = None
    settings: Mapping[str, Any] | None = None
    init: str | None = None

    def programs(self, initial: Mapping[str, Tensor] | None = None) -> tuple[Program, Program, Any]:
        """Model, guide and objective of one restart; Pyro's objectives remember the first programs that they see."""
        return *self.recipe.build(initial), copy.deepcopy(self.objective)
