"""What takes the steps of the training loop: Pyro's ``SVI``, or compiled steps, several a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.infer
from pyro.optim import PyroOptim
from torch import Tensor

from pplvi.compile.svi import CompiledSVI, CompileMode
from pplvi.compile.vectorized import Apart
from pplvi.programs.autoguides import check_local_sizes
from pplvi.programs.state import clone
from pplvi.training.batches import Batches, FullData
from pplvi.training.optimizers import OptimLike, Update
from pplvi.training.restart import Restart
from pplvi.training.schedules import Schedule
from pplvi.training.watch import Monitor, Watch
from pplvi.types import Call, Program

StepLoss = float | Tensor
Turns = Generator[Sequence[Call], Sequence[StepLoss], None]
BeforeFirst = Callable[[], None]
Find = Callable[..., str | None]


class Stepper(ABC):
    """Takes the steps of one restart: the replaceable core of the training loop.

    :ivar update: counts them and says how large the next one is.
    :cvar exact: whether the losses have no Monte Carlo error.
    :cvar reads_late: whether losses may be looked at some steps later.
    """

    update: Update
    exact: ClassVar[bool] = False
    reads_late: ClassVar[bool] = False

    @abstractmethod
    def many(self, calls: Sequence[Call]) -> Sequence[StepLoss]:
        """A step on each of these calls; the losses, in nats, may stay on the device."""

    @abstractmethod
    def stride(self, at: int, batches: Batches, watch: Watch, settle_every: int) -> int:
        """How many steps can be taken before the loop has to look at one of them.

        :param at: steps taken so far.
        :param settle_every: steps between copies of the state.
        """

    @abstractmethod
    def replay(self, find: Find, calls: Sequence[Call]) -> str | None:
        """What is found first at the present parameters on the first call, or after steps on the calls up to it."""

    def watched(self, monitor: Monitor, run: Restart, call: Call) -> float:
        """The value of a monitor at the present parameters, in nats."""
        return monitor(run, call)

    def packed(self, state: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds of all that take these steps, from the state of this one."""
        return state

    def unpacked(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state of this one, from what a checkpoint holds."""
        return state

    def agreed(self, flag: Any) -> bool:
        """Whether all that take these steps are to act on a flag."""
        return bool(flag)

    def answered(self, ask: Callable[[], Any]) -> bool:
        """Whether all that take these steps are to act on the answer to what is asked between them.

        :raises KeyboardInterrupt: if any of them was interrupted.
        """
        return bool(ask())

    @abstractmethod
    def prepare(self, call: Call) -> None:
        """Make the parameters without a step, where that can be done."""

    @abstractmethod
    def shared(self) -> CompiledSVI:
        """What several restarts can be one program of.

        :raises Apart: if there is nothing of the kind.
        """

    @abstractmethod
    def get_state(self) -> dict[str, Any]:
        """A copy of everything that the next steps depend on, but for parameters and data."""

    @abstractmethod
    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`get_state` was called."""


class EagerStepper(Stepper):
    """Pyro's own ``SVI.step``.

    :param before_first: called before parameters move for the first time, when lazily made ones exist.
    """

    def __init__(
        self, model: Program, guide: Program, objective: Any, update: Update, before_first: BeforeFirst
    ) -> None:
        self.model, self.guide, self.update = model, guide, update
        self.svi = pyro.infer.SVI(model, guide, _Announced(update, before_first), loss=objective)

    def many(self, calls: Sequence[Call]) -> Sequence[StepLoss]:
        """One step after another."""
        return [self._step(*call) for call in calls]

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepLoss:
        self.update.at(self.model, self.guide, args, kwargs)
        loss = self.svi.step(*args, **kwargs)
        if self.update.count <= 1:  # losses of Pyro check nothing before
            check_local_sizes(self.guide)
        return sum(loss) if isinstance(loss, tuple) else loss  # ReweightedWakeSleep has one for model and guide

    def stride(self, at: int, batches: Batches, watch: Watch, settle_every: int) -> int:
        """One: the loss of every step is looked at."""
        return 1

    def replay(self, find: Find, calls: Sequence[Call]) -> str | None:
        """Steps that are taken one at a time have nothing to replay."""
        return find(*calls[0])

    def prepare(self, call: Call) -> None:
        """Nothing: the first step makes the parameters, with the random numbers that it draws."""

    def shared(self) -> CompiledSVI:
        """Nothing is recorded.

        :raises Apart: always.
        """
        raise Apart("Pyro's handlers run at every step")

    def get_state(self) -> dict[str, Any]:
        """The state of the update."""
        return self.update.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Give it back."""
        self.update.set_state(state)


class _Announced(PyroOptim):
    """An update that says so before it moves parameters for the first time."""

    def __init__(self, update: Update, before_first: BeforeFirst) -> None:
        self.update, self.before_first = update, before_first

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        if self.update.count == 0:
            self.before_first()
        self.update(params)


class CompiledStepper(Stepper):
    """Steps that are recorded and compiled at the first call; schedule and backoff reach them as rates.

    :param before_first: called before parameters move for the first time.
    :param options: of :class:`pplvi.compile.CompiledSVI`.
    """

    reads_late: ClassVar[bool] = True

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: Any,
        update: Update,
        before_first: BeforeFirst,
        **options: Any,
    ) -> None:
        self.update, self.before_first = update, before_first
        self.svi = CompiledSVI(model, guide, update.engine.optim, objective, schedule=update.factor_at, **options)

    def many(self, calls: Sequence[Call]) -> Sequence[Tensor]:
        """Steps in one call; the losses stay on the device."""
        if self.update.count == 0:
            self.prepare(calls[0])
        losses = self.svi.steps(calls)
        self.update.count = self.svi.count
        return losses.unbind()

    def prepare(self, call: Call) -> None:
        """Make the parameters; before the first step they are looked at once."""
        if self.update.count == 0:
            self.update.at(self.svi.model, self.svi.guide, *call)
        self.svi.prepare(*call)
        if self.update.count == 0:
            self.before_first()

    def stride(self, at: int, batches: Batches, watch: Watch, settle_every: int) -> int:
        """As many as fit before something is due.

        Batches are drawn ahead only for a loop of compiled steps, which needs them: a ``DataLoader`` that shuffles with
        the global random state would otherwise mix its draws with the steps' in another order.
        """
        if watch.callbacks or (self.svi.mode != "max" and not isinstance(batches, FullData)):
            return 1
        every = [settle_every, watch.save_every, *(w.every for w in (watch.stop, watch.monitor) if w is not None)]
        ends = [watch.num_steps - at, *(n - at % n for n in every)]
        if self.update.left is not None:
            ends.append(self.update.left)
        return max(1, min(ends))

    def replay(self, find: Find, calls: Sequence[Call]) -> str | None:
        """The losses of steps in one call were not looked at: which of them went wrong is found step by step."""
        for call in calls:
            if (site := find(*call)) is not None:
                return site
            self.many([call])
        return find(*calls[-1])

    def shared(self) -> CompiledSVI:
        """The recorded steps."""
        return self.svi

    def get_state(self) -> dict[str, Any]:
        """The pace, and the optimiser's vectors."""
        return clone({**self.update.pace(), "optimizer": self.svi.optimizer_state()})

    def set_state(self, state: dict[str, Any]) -> None:
        """Give both back."""
        self.update.set_pace(state)
        self.svi.load_state_dict({"count": state["count"], "optimizer": clone(state["optimizer"])})


@dataclass
class Steps(ABC):
    """Makes what takes the steps of each restart.

    :ivar optim: as all the others, of :class:`pplvi.training.Update`.
    :raises ValueError: for a wrong optimiser, schedule or clip, before anything runs.
    """

    optim: OptimLike = None
    num_steps: int = 1000
    schedule: str | Schedule | None = "cosine"
    clip: Any = "adaptive"

    def __post_init__(self) -> None:
        self.update()

    @property
    def side_by_side(self) -> bool:
        """Whether restarts may be rows of one program."""
        return False

    def update(self) -> Update:
        """The update of one restart."""
        return Update(self.optim, self.num_steps, self.schedule, self.clip)

    @abstractmethod
    def __call__(self, model: Program, guide: Program, objective: Any, before_first: BeforeFirst) -> Stepper:
        """The steps of one pair of programs.

        :param before_first: called before parameters move for the first time, when lazily made ones exist.
        """


@dataclass
class EagerSteps(Steps):
    """Steps through Pyro's handlers."""

    def __call__(self, model: Program, guide: Program, objective: Any, before_first: BeforeFirst) -> Stepper:
        """Pyro's ``SVI``."""
        return EagerStepper(model, guide, objective, self.update(), before_first)


@dataclass
class CompiledSteps(Steps):
    """Makes compiled steps; what ``"auto"`` has come to in one restart holds for the next.

    :ivar mode: as of :class:`pplvi.compile.CompiledSVI`.
    :ivar chunk: the most steps in one call.
    """

    mode: CompileMode = field(default=True, kw_only=True)
    chunk: int = field(default=50, kw_only=True)
    last: CompiledStepper | None = field(default=None, init=False)

    @property
    def side_by_side(self) -> bool:
        """Unless there is a loop inside the program."""
        return self.mode in ("trace", True, "auto")

    def __call__(self, model: Program, guide: Program, objective: Any, before_first: BeforeFirst) -> Stepper:
        """A :class:`pplvi.compile.CompiledSVI`, recorded and compiled at its first call."""
        mode = self.mode if self.last is None else self.last.svi.mode
        options: dict[str, Any] = {"mode": mode, "clip": self.clip, "chunk": self.chunk}
        self.last = self.stepper(model, guide, objective, self.update(), before_first, **options)
        return self.last

    def stepper(self, *programs: Any, **options: Any) -> CompiledStepper:
        """A :class:`CompiledStepper`."""
        return CompiledStepper(*programs, **options)


def drive(turns: Turns, take: Callable[[Sequence[Call]], Sequence[StepLoss]]) -> None:
    """Take the steps that are asked for; what is raised meanwhile is raised where they were asked for."""
    with suppress(StopIteration):
        calls = next(turns)
        while True:
            try:
                losses = take(calls)
            except (Exception, KeyboardInterrupt) as error:
                calls = turns.throw(error)
            else:
                calls = turns.send(losses)


def next_calls(batches: Batches, count: int) -> list[Call]:
    """The next batches, fewer or none where the data are used up."""
    calls: list[Call] = []
    with suppress(StopIteration):
        while len(calls) < count:
            calls.append(next(batches))
    return calls
