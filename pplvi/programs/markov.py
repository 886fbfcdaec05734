"""Sequential sites of ``pyro.markov`` loops: their numbers, and one iteration at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro.poutine.markov_messenger import MarkovMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor


def numbered(name: str, number: int) -> str:
    """The name of a site at a time step: with the number of the step at its end."""
    return name if name.endswith(f"_{number}") else f"{name}_{number}"


class Numbered(Messenger):
    """Add the number of a time step to the names of its sites, unless they end with it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def _pyro_sample(self, msg: Any) -> None:
        msg["name"] = numbered(msg["name"], self.number)


class Iterations(Messenger):
    """Count the iterations of ``pyro.markov`` loops in which there are sites; loops one after another count on.

    :ivar count: number of the iteration that runs; what stands before a loop belongs to its first one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._last: tuple[Any, int] = None, -1

    def _pyro_sample(self, msg: Any) -> None:
        loop = next((frame for frame in _PYRO_STACK if isinstance(frame, MarkovMessenger)), None)
        if loop is not None and (here := (loop, loop._pos)) != self._last:
            self.count += self._last[0] is not None
            self._last = here


class _Enough(Exception):
    """The iteration that was wanted is over."""


class OnlyIteration(Iterations):
    """Show one iteration of a program's ``pyro.markov`` loop to the handlers around, and stop the program after it.

    Earlier iterations get the values that they had, and are hidden.
    """

    def __init__(self, iteration: int, past: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.iteration, self.past = iteration, past

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if self.count > self.iteration:
            raise _Enough
        if self.count < self.iteration:
            if not msg["is_observed"] and msg["name"] in self.past:
                msg["value"], msg["done"] = self.past[msg["name"]], True
            msg["stop"] = True

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> Any:
        super().__exit__(kind, error, traceback)
        return kind is _Enough
