"""The clock of a budget: CPU seconds of this process and its children, and what it told, to be told again."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


def cpu_seconds() -> float:
    """CPU time of this process, all threads, and of its children that have ended, such as compilers.

    >>> cpu_seconds() >= 0
    True
    """
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


@dataclass(frozen=True)
class Timing:
    """What a clock has told a run: given as the budget of another one, that is cut at the same places, to the bit.

    :ivar measured: seconds that were left, or that something took, where the run went by them.
    :ivar asked: how often it was asked for the time until it was over; ``None`` if it never was.

    >>> import pyro, torch, pyro.distributions as dist, pplvi
    >>> def model():
    ...     pyro.sample("x", dist.StudentT(3.0, torch.zeros(3), 1.0).to_event(1))
    >>> first = pplvi.fit(model, "auto", budget=0.1, seed=0, progress=False)
    >>> again = pplvi.fit(model, "auto", budget=first.timing, seed=0, progress=False)
    >>> torch.equal(first.guide.loc, again.guide.loc), again.timing == first.timing
    (True, True)
    """

    measured: tuple[float, ...] = ()
    asked: int | None = None


class Clock:
    """CPU seconds since it was made, or what an earlier one told.

    :param budget: how many there are; ``None`` for no limit.

    >>> Clock().over(), Clock(0.0).over()
    ('', 'budget')
    """

    def __init__(self, budget: float | Timing | None = None) -> None:
        self._told = budget if isinstance(budget, Timing) else None
        self._end = math.inf if budget is None or self._told else cpu_seconds() + float(budget)  # type: ignore[arg-type]
        self._asked, self._measured, self._kept = 0, list[float](), 0.0
        self._over: int | None = None

    @classmethod
    def of(cls, budget: float | Timing | Clock | None) -> Clock:
        """The clock itself, or a new one."""
        return budget if isinstance(budget, Clock) else cls(budget)

    def over(self) -> str:
        """Why to stop, if it is time."""
        self._asked += 1
        if self._over is None and self._is_late():
            self._over = self._asked
        return "" if self._over is None else "budget"

    def _is_late(self) -> bool:
        if self._told is None:
            return cpu_seconds() >= self._end - self._kept
        return self._told.asked is not None and self._asked >= self._told.asked

    @contextmanager
    def keeping(self, seconds: float) -> Iterator[None]:
        """Have the time be over so much sooner inside the block: for what has to be done behind it.

        >>> clock = Clock(100.0)
        >>> with clock.keeping(200.0):
        ...     clock.over()
        'budget'
        """
        self._kept = seconds
        try:
            yield
        finally:
            self._kept = 0.0

    def left(self) -> float:
        """Seconds that are left."""
        return self.measured(self._end - cpu_seconds())

    def measured(self, seconds: float) -> float:
        """Seconds that the run goes by: these, or those of the run that is repeated."""
        if self._told is not None and len(self._measured) < len(self._told.measured):
            seconds = self._told.measured[len(self._measured)]
        self._measured.append(seconds)
        return seconds

    @property
    def timing(self) -> Timing:
        """What it has told."""
        return Timing(tuple(self._measured), self._over)
