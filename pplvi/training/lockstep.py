"""Restarts that are trained together, a chunk of steps at a time, in one program where that is possible.

Every restart keeps its own loop, with its own stopping, cooling, rolling back and random numbers: the loops ask for
steps, and those that ask for equally many get them from one call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import Tensor

from pplvi.compile.svi import CompiledSVI
from pplvi.compile.vectorized import Apart, Together
from pplvi.programs.calls import Arguments
from pplvi.programs.state import rng_state, set_rng_state
from pplvi.training.loop import Trainer
from pplvi.training.steps import StepLoss, Turns
from pplvi.types import Call

_LOG = logging.getLogger(__name__)


@dataclass
class Member:
    """One restart: its loop, its random state, and what it asks for."""

    index: int
    trainer: Trainer
    random: dict[str, Any] = field(default_factory=rng_state)
    asked: Sequence[Call] = ()

    def __post_init__(self) -> None:
        self.turns: Turns = self.trainer.turns()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside the block, its parameters and its random state are the global ones."""
        set_rng_state(self.random)
        try:
            with self.trainer.run.scope():
                yield
        finally:
            self.random = rng_state()

    def go_on(self, resume: Callable[[Turns], Sequence[Call]] = next) -> None:
        """Let its loop run until it asks for the next steps, or ends."""
        self.asked = ()
        with self.at_work(), suppress(StopIteration):
            self.asked = resume(self.turns)


class Lockstep:
    """Trains restarts side by side.

    :param members: the restarts, whose loops are at their beginning.
    :param after_round: called after each round, when every restart that asked for steps has got them.
    :ivar alone: why the restarts do not share a program; empty as long as they do.
    """

    def __init__(self, members: Sequence[Member], after_round: Callable[[], None]) -> None:
        self.members, self.after_round = members, after_round
        self.together: Together | None = None
        self.alone = ""

    def train(self) -> None:
        """Take steps until every restart has a reason to end.

        :raises TrainingError: if the loss of one stays non-finite.
        """
        for member in self.members:
            member.go_on()
        while live := [member for member in self.members if member.asked]:
            self._round(live)
            self.after_round()
        self.after_round()

    def _round(self, live: Sequence[Member]) -> None:
        """Steps for all that ask for some; an interruption is one for all of them."""
        try:
            if self.together is None and not self.alone:
                self._share(live[0].asked[0])
            for count, group in groupby(sorted(live, key=_count), key=_count):
                self._steps(list(group), count)
        except KeyboardInterrupt:
            self._interrupt()
        if any(member.trainer.run.reason == "interrupted" for member in self.members):
            self._interrupt()

    def _interrupt(self) -> None:
        for member in self.members:
            if member.asked:
                member.go_on(lambda turns: turns.throw(KeyboardInterrupt()))

    def _steps(self, group: Sequence[Member], count: int) -> None:
        if self.together is None:
            for member in group:
                self._by_itself(member)
            return
        try:
            losses, random = self.together(count, {m.index: m.random for m in group})
        except RuntimeError:  # a factorisation that failed, say: nothing has changed yet, and one of them is to blame
            for member in group:
                self._by_itself(member)
            return
        for member in group:
            member.random = random[member.index]
            member.trainer.update.count = member.trainer.stepper.shared().count
            self._answer(member, losses[member.index].unbind())

    def _by_itself(self, member: Member) -> None:
        try:
            with member.at_work():
                losses = member.trainer.stepper.many(member.asked)
        except Exception as error:  # its own loop knows what to do about it
            failure = error
            member.go_on(lambda turns: turns.throw(failure))
        else:
            self._answer(member, losses)

    @staticmethod
    def _answer(member: Member, losses: Sequence[StepLoss] | Sequence[Tensor]) -> None:
        member.go_on(lambda turns: turns.send(losses))

    def _share(self, call: Call) -> None:
        """Make the program that the restarts share."""
        for member in self.members:
            self._prepare(member, call)
        try:
            svis = [member.trainer.stepper.shared() for member in self.members]
            self.together = svis[0].settled(lambda: self._program(svis, Arguments.of(*call)))
        except Apart as error:
            self.alone = str(error)
            _LOG.info("restarts are trained side by side, but each with a program of its own: %s", error)

    @staticmethod
    def _prepare(member: Member, call: Call) -> None:
        try:
            with member.at_work():
                member.trainer.stepper.prepare(call)
        except Exception as error:  # a first density that is not finite, say: its loop names the site
            failure = error
            member.go_on(lambda turns: turns.throw(failure))
            raise

    def _program(self, svis: Sequence[CompiledSVI], arguments: Arguments) -> Together:
        for svi in svis:
            svi.mode = svis[0].mode  # what "auto" has come to
        if svis[0].mode is False:
            raise Apart("compile='auto' has come to Pyro's handlers")
        of = {id(svi): member for svi, member in zip(svis, self.members, strict=True)}

        def record(svi: CompiledSVI) -> Any:
            with of[id(svi)].at_work():
                return svi.recorded(arguments)

        return Together(svis, record, arguments)


def _count(member: Member) -> int:
    return len(member.asked)
