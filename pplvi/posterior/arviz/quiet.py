"""ArviZ without the words that its users can do nothing about."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _OfOneChain(logging.Filter):
    """Drops the line that one chain has no R-hat, which the NaN of a table says already."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show a record."""
        return not record.getMessage().startswith("Shape validation failed: input_shape: (1,")


_OF_ONE_CHAIN = _OfOneChain()


def arviz_itself() -> Any:
    """The library, imported without its announcement of the day, which from now on says nothing of a single chain.

    >>> arviz_itself().__name__
    'arviz'
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            import arviz
        except FileNotFoundError:  # another process wrote the stamp of the day at the same time: now it is there
            import arviz
    logger_of(arviz).addFilter(_OF_ONE_CHAIN)  # once: the same object is not added again
    return arviz


def logger_of(arviz: Any) -> logging.Logger:
    """The logger of the library: before 1.0 one of its own, unknown to ``logging``."""
    found: logging.Logger = getattr(arviz, "_log", logging.getLogger("arviz"))
    return found


@contextmanager
def its_own_affairs() -> Iterator[None]:
    """Keep warnings of how ArviZ calls pandas and matplotlib from the user: nobody else can mend them.

    >>> with its_own_affairs():
    ...     warnings.warn("inplace is deprecated", DeprecationWarning)
    """
    with warnings.catch_warnings():
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        yield


@contextmanager
def said_in_a_table() -> Iterator[None]:
    """Keep warnings of single leave-one-out densities from a user whose table has a column for them.

    >>> with said_in_a_table():
    ...     warnings.warn("Pareto k is above 0.70 for 1 of 8 observations")
    """
    with warnings.catch_warnings():
        for start in ("Pareto k is above", "Estimated shape parameter of Pareto distribution"):
            warnings.filterwarnings("ignore", start, UserWarning)
        yield
