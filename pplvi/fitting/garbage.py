"""Python's garbage collector beside a fit: it need not look through what was there before."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_LAST = [-1]  # how many full collections there had been at the end of the last block


@contextmanager
def old_objects_aside() -> Iterator[None]:
    """Have full collections leave out the objects that exist already, most of them those of imported modules.

    Imports leave one behind that is due, and a small fit meets it: a quarter of a second. What was garbage before
    stays, so that it is done only once until there has been a full collection of everything.
    """
    if gc.get_freeze_count() or _collections() == _LAST[0]:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        _LAST[0] = _collections()


def _collections() -> int:
    return int(gc.get_stats()[-1]["collections"])
