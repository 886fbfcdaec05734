"""What directed models with layers of latent variables share: their widths, and the plate of the data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, overload

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pplvi.guides.owned import claim_name
from pplvi.models.inputs import checked_data, checked_mask
from pplvi.programs.calls import check_counts
from pplvi.programs.plates import data_plate


class LayeredModel(PyroModule):
    """Layers from the data, ``"x"``, up: ``"z1"``, ``"z2"`` and so on.

    :param widths: of the data and of each latent layer.
    :param name: prefix of the parameters' names.
    """

    def __init__(self, widths: Sequence[int], name: str) -> None:
        super().__init__(name)
        if len(widths) < 2:
            raise ValueError(f"widths={list(widths)}: expected those of the data and of at least one latent layer.")
        check_counts(**{f"widths[{i}]": width for i, width in enumerate(widths)})
        self.widths = tuple(widths)

    def plate(self, x: Tensor | None, size: int | None) -> AbstractContextManager[Any]:
        """The plate of the data: of those given, or of as many as are to be drawn.

        :raises ValueError: for data of another width.
        """
        claim_name(self)
        if x is None:
            return data_plate(size or 1, None)
        return data_plate(len(checked_data(x, self.widths[0])), size)


def given_to_guide(x: Tensor | None) -> Tensor:
    """Data, whose latents a guide draws.

    :raises ValueError: without data.
    """
    if x is None:
        raise ValueError("x=None: expected data, whose latents the guide draws.")
    return x


def masked_event(each: dist.TorchDistribution, x: Tensor | None, mask: Tensor | None) -> dist.TorchDistribution:
    """The distribution of independent numbers, those left out that are missing.

    :param each: of batch shape ``(*, D)``.
    :param mask: which numbers were seen, ``(N, D)`` or ``(D,)``, boolean.
    :raises ValueError: for a mask of another shape.

    >>> coins = dist.Bernoulli(torch.tensor([0.5, 0.5]))
    >>> masked_event(coins, torch.ones(1, 2), torch.tensor([True, False])).log_prob(torch.ones(2))
    tensor([-0.6931])
    """
    if x is None or mask is None:
        return each.to_event(1)
    return each.mask(checked_mask(mask, x)).to_event(1)


@overload
def zero_filled(x: Tensor, mask: Tensor | None) -> Tensor: ...


@overload
def zero_filled(x: None, mask: Tensor | None) -> None: ...


def zero_filled(x: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Data with a zero where a number is missing, which may be nan.

    >>> zero_filled(torch.tensor([[1.0, torch.nan]]), torch.tensor([[True, False]]))
    tensor([[1., 0.]])
    """
    return x if x is None or mask is None else torch.where(mask, x, 0.0)
