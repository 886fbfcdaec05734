"""Checks of what directed models are called with."""

from __future__ import annotations

import torch
from torch import Tensor


def checked_data(x: Tensor, width: int) -> Tensor:
    """Data of the right width.

    :raises ValueError: for others.

    >>> checked_data(torch.zeros(2, 3), 3).shape
    torch.Size([2, 3])
    """
    if x.dim() != 2 or x.shape[1] != width or not x.is_floating_point():
        raise ValueError(
            f"x of shape {tuple(x.shape)} and {x.dtype}: expected floating point data (N, {width}). Flatten images."
        )
    return x


def checked_mask(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of what was seen, as large as the data.

    :raises ValueError: for one of another shape, or that is not boolean.

    >>> checked_mask(torch.tensor([True, False]), torch.zeros(3, 2)).shape
    torch.Size([3, 2])
    """
    if mask.dtype is not torch.bool or tuple(mask.shape) not in (tuple(x.shape), tuple(x.shape[-1:])):
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} and {mask.dtype}: expected boolean {tuple(x.shape)} or "
            f"{tuple(x.shape[-1:])}, true where a number was seen."
        )
    return mask.expand(x.shape)
