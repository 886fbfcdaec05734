"""Memory of the C library, which is asked for anew by every operation on large tensors unless freed blocks are kept."""

from __future__ import annotations

import torch

_LARGEST = 2**25 - 2**16  # bytes: glibc learns from blocks of up to 32 MiB


def keep_freed_memory() -> None:
    """Have blocks of up to 32 MiB kept for the next tensor when they are freed, where the C library is glibc.

    It learns from the largest block that was freed which ones to keep, and returns others to the system, which gives
    them back page by page: for matrices of a few hundred draws that takes as long as what is computed. A block that
    nothing was written to teaches it in microseconds what long programs teach it in time.

    Source: mallopt(3), Linux manual, on ``M_MMAP_THRESHOLD``, which is dynamic.
    """
    torch.empty(_LARGEST, dtype=torch.uint8, device="cpu")
