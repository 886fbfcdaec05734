"""What takes the steps of the training loop: Pyro's ``SVI``, or compiled steps, several a call."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from pyro.infer import SVI
from torch import Tensor

from pplvi.compile.svi import CompiledSVI, Mode
from pplvi.programs.autoguides import check_local_sizes
from pplvi.programs.state import clone
from pplvi.training.batches import Batches, FullData
from pplvi.training.optimizers import DEFAULT_LR, OptimLike, PyroEngine, Update
from pplvi.training.schedules import Cosine, Schedule
from pplvi.training.watch import Watch
from pplvi.types import Call, Program

Loss = float | Tensor
Step = Callable[[tuple[Any, ...], dict[str, Any]], Loss]
Turns = Generator[Sequence[Call], Sequence[Loss], None]


class CompiledUpdate(Update):
    """An :class:`pplvi.training.Update` inside a compiled step: schedule and backoff reach it as rates.

    :param mode: as of :class:`pplvi.compile.CompiledSVI`.
    :param chunk: the most steps in one call.
    """

    def __init__(
        self,
        optim: OptimLike = None,
        num_steps: int = 1000,
        schedule: str | Schedule | None = "cosine",
        clip: Any = "adaptive",
        *,
        mode: Mode = True,
        chunk: int = 50,
    ) -> None:
        super().__init__(optim, num_steps, schedule, clip)
        self.options = {"mode": mode, "clip": clip, "chunk": chunk}
        self.optim: Any = partial(torch.optim.Adam, lr=DEFAULT_LR) if optim is None else optim
        if isinstance(optim, Mapping) and isinstance(self.engine, PyroEngine):
            self.optim = self.engine.optim  # the one that is told the programs
        self.svi: CompiledSVI | None = None

    def make_step(self, model: Program, guide: Program, objective: Any) -> CompiledStep:
        """The compiled step of a pair of programs; it is recorded and compiled at its first call."""
        self.svi = CompiledSVI(model, guide, self.optim, objective, schedule=self._factor_at, **self.options)
        return CompiledStep(self.svi, self)

    def _factor_at(self, step: int) -> float:
        return self.backoff * (1.0 if self.schedule is None else self.schedule(step))

    def get_state(self) -> dict[str, Any]:
        """A copy of everything that the next steps depend on."""
        assert self.svi is not None
        parts = {name: part.state_dict() for name, part in self._parts() if name != "clip"}
        return clone({"count": self.count, "backoff": self.backoff, "optimizer": self.svi.optimizer_state(), **parts})

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`get_state` was called."""
        assert self.svi is not None
        state = clone(state_dict)
        self.count, self.backoff = state["count"], state["backoff"]
        self.svi.load_state_dict({"count": state["count"], "optimizer": state["optimizer"]})
        for name, part in self._parts():
            if name != "clip":
                part.load_state_dict(state[name])


class CompiledUpdates:
    """Makes the update of each restart; what ``"auto"`` has come to in one restart holds for the next.

    :param options: of :class:`CompiledUpdate`.
    :param mode: as of :class:`pplvi.compile.CompiledSVI`.
    """

    def __init__(self, *options: Any, mode: Mode) -> None:
        self.options, self.mode = options, mode
        self.last: CompiledUpdate | None = None

    def __call__(self) -> CompiledUpdate:
        """A new update."""
        if self.last is not None and self.last.svi is not None:
            self.mode = self.last.svi.mode
        self.last = CompiledUpdate(*self.options, mode=self.mode)
        return self.last


class CompiledStep:
    """What the training loop calls: one step, or :meth:`many`."""

    def __init__(self, svi: CompiledSVI, update: Update) -> None:
        self.svi, self.update = svi, update

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """One step; the loss (nats) stays on the device."""
        return self.many([(args, kwargs)])[0]

    def prepare(self, call: Call) -> None:
        """Make the parameters; before the first step they are looked at once."""
        if self.update.count == 0:
            self.update.at(self.svi.model, self.svi.guide, *call)
        self.svi.prepare(*call)
        if self.update.count == 0:
            self.update.before_first()

    def many(self, calls: Sequence[Call]) -> Sequence[Tensor]:
        """A step on each of these calls."""
        if self.update.count == 0:
            self.prepare(calls[0])
        losses = self.svi.steps(calls)
        self.update.count = self.svi.count
        return losses.unbind()


def svi_step(model: Program, guide: Program, update: Update, objective: Any) -> Step:
    """The core of the loop: Pyro's own ``SVI.step``, or the compiled step that the update belongs to."""
    if isinstance(update, CompiledUpdate):
        return update.make_step(model, guide, objective)
    svi = SVI(model, guide, update, loss=objective)

    def step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Loss:
        update.at(model, guide, args, kwargs)
        loss = svi.step(*args, **kwargs)
        if update.count <= 1:  # losses of Pyro check nothing before
            check_local_sizes(guide)
        return sum(loss) if isinstance(loss, tuple) else loss  # ReweightedWakeSleep has one for model and guide

    return step


def drive(turns: Turns, take: Callable[[Sequence[Call]], Sequence[Loss]]) -> None:
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


def stride(step: Any, at: int, update: Update, batches: Batches, watch: Watch, settle_every: int) -> int:
    """How many steps can be taken before the loop has to look at one of them.

    Batches are drawn ahead only for a loop of compiled steps, which needs them: a ``DataLoader`` that shuffles with the
    global random state would otherwise mix its draws with the steps' in another order.

    :param step: what takes them; one that has no ``many`` takes one at a time.
    :param at: steps taken so far.
    :param watch: the :class:`pplvi.training.Watch` of the loop.
    :param settle_every: steps between copies of the state.
    """
    if not isinstance(step, CompiledStep) or watch.callbacks:
        return 1
    if step.svi.mode != "max" and not isinstance(batches, FullData):
        return 1
    every = [settle_every, watch.save_every, *(w.every for w in (watch.stop, watch.monitor) if w is not None)]
    ends = [watch.num_steps - at, *(n - at % n for n in every)]
    if isinstance(update.schedule, Cosine) and update.schedule.cooling:
        ends.append(update.schedule.end - update.count)
    return max(1, min(ends))


def replayed(step: Any, find: Callable[[], str | None], call: Call, most: int) -> str | None:
    """The first finding in a replay of the last steps; steps that are taken one at a time have nothing to replay."""
    site = find()
    for _ in range(most if isinstance(step, CompiledStep) else 0):
        if site is not None:
            break
        step(*call)
        site = find()
    return site


def next_calls(batches: Batches, count: int) -> list[Call]:
    """The next batches, fewer or none where the data are used up."""
    calls: list[Call] = []
    with suppress(StopIteration):
        while len(calls) < count:
            calls.append(next(batches))
    return calls
