"""The clock of a budget: CPU seconds of this process and its children."""

from __future__ import annotations

import os
import time


def cpu_seconds() -> float:
    """CPU time of this process, all threads, and of its children that have ended, such as compilers.

    >>> cpu_seconds() >= 0
    True
    """
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


class Clock:
    """CPU seconds since it was made.

    :param budget: how many there are; ``None`` for no limit.

    >>> Clock().over(), Clock(0.0).over()
    ('', 'budget')
    """

    def __init__(self, budget: float | None = None) -> None:
        self.budget, self._start = budget, cpu_seconds()

    def over(self) -> str:
        """Why to stop, if it is time."""
        return "budget" if self.budget is not None and cpu_seconds() - self._start >= self.budget else ""
