"""Reproducible randomness that leaves the random state of the process as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro

from pplvi.environment import preserved_rng


@contextmanager
def random_state(seed: int | None) -> Iterator[None]:
    """Seed torch (all devices), NumPy and Python within, and put their states back afterwards.

    Args:
        seed: the seed; ``None`` draws from the global state as usual.

    Raises:
        ValueError: if the seed is negative or does not fit in 32 bits.

    Example:
        >>> import torch
        >>> before = torch.get_rng_state()
        >>> with random_state(0):
        ...     first = torch.rand(3)
        >>> with random_state(0):
        ...     second = torch.rand(3)
        >>> torch.equal(first, second), torch.equal(before, torch.get_rng_state())
        (True, True)
    """
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"got seed={seed}; expected an integer from 0 to 2**32 - 1, which NumPy takes.")
    with preserved_rng(active=seed is not None):
        if seed is not None:
            pyro.set_rng_seed(seed)
        yield
