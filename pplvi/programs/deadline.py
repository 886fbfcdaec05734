"""When to leave off: what takes rounds looks whether its time is over, and returns the best so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_STOPS: list[Callable[[], str]] = []


@contextmanager
def ending(stop: Callable[[], str]) -> Iterator[None]:
    """Have what runs inside leave off as soon as ``stop`` returns a reason.

    >>> with ending(lambda: "budget"):
    ...     is_time_over()
    True
    """
    _STOPS.append(stop)
    try:
        yield
    finally:
        _STOPS.pop()


def is_time_over() -> bool:
    """Whether it is time to return the best so far: false where nobody has set a time.

    >>> is_time_over()
    False
    """
    return bool(_STOPS) and bool(_STOPS[-1]())
