"""What a loop watches: the monitor, the best value, and whether the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.losses.elbo import ELBO
from pplvi.programs.calls import to_call
from pplvi.training.batches import Batches
from pplvi.training.restart import Restart, evaluate, unobtrusive
from pplvi.training.stopping import Plateau
from pplvi.types import Call


@checked
@dataclass(frozen=True)
class Monitor:
    """A loss to judge by in place of the objective, now and then, on held-back data if there are any.

    :param objective: a loss of :mod:`pplvi.losses.elbo` or of Pyro.
    :param held_back: what one item of minibatches is: a tuple of arguments, a dictionary of keyword arguments, or one
        tensor; the data of the step unless given.
    :param every: steps between two evaluations.
    :raises ValueError: for a number below 1.

    >>> Monitor(every=20)
    Monitor(objective=ELBO(num_particles=1), held_back=None, every=20)
    """

    objective: Any = field(default_factory=ELBO)
    held_back: Any = None
    every: Count = 10

    def __call__(self, run: Restart, call: Call) -> float:
        """Its value (nats); the random state is left as it was, so that watching changes nothing."""
        with unobtrusive(run):
            given = call if self.held_back is None else to_call(self.held_back)
            return evaluate(self.objective, run.model, run.guide, given)


class Training(Protocol):
    """What a checkpoint is written of: a run, its last good state, and where its data are."""

    run: Restart
    batches: Batches
    good: dict[str, Any]
    call: Call

    @property
    def stepper(self) -> Packing:
        """What takes the steps."""


class Packing(Protocol):
    """What knows the state of all that take steps."""

    def packed(self, state: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds of them."""


@dataclass
class Watch:
    """What is looked at between the steps.

    :ivar num_steps: the most steps to take.
    :ivar stop: when to stop before that; ``None`` for never.
    :ivar monitor: a loss to watch beside the objective.
    :ivar callbacks: called with the run after every step, inside its scope; returning true ends it.
    :ivar save: writes a checkpoint.
    :ivar save_every: steps between checkpoints.
    :ivar report: called with the run after every step, for a progress bar.
    """

    num_steps: int
    stop: Plateau | None = None
    monitor: Monitor | None = None
    callbacks: Sequence[Callable[[Restart], Any]] = ()
    save: Callable[[Training], None] | None = None
    save_every: int = 500
    report: Callable[[Restart], None] = field(default=lambda run: None)
