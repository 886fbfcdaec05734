"""Minibatches of a plate's data, drawn by as many operations as they have elements, not the plate."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pplvi.programs.sites import is_subsample

_MANY = 8_192  # elements of a plate, up to which a permutation of all takes no time
_LARGE = 2**62  # of integers so large, remainders are as likely as each other, and no two are equal


def some_of(size: int, number: int, device: Any = None) -> Tensor:
    """So many different integers below ``size``, in random order: every order of every choice is as likely.

    Balls are drawn from an urn with ``size - number + 1`` colours, each put back with one more of its colour (Polya),
    so that every multiset of colours is as likely; sorted, and the k-th moved up by k, multisets are choices. A ball of
    a colour that was put in is the copy of an earlier one; what those are copies of is looked up by doubling steps.

    Source: Mahmoud 2008, Polya urn models, for the law of the urn; Feller 1968, An introduction to probability theory,
    volume 1, section II.5, for multisets as choices.

    :param size: at least ``number``.
    :returns: ``(number,)``, of type ``int64``.

    >>> some_of(10**12, 3).shape, some_of(3, 3).sort().values
    (torch.Size([3]), tensor([0, 1, 2]))
    """
    order = torch.arange(number, device=device)
    colours = size - number + 1
    random = torch.randint(_LARGE, (2, number), device=device)
    drawn = random[0] % (colours + order)
    original = torch.where(drawn < colours, order, drawn - colours)
    for _ in range(number.bit_length()):
        original = original[original]
    chosen = drawn[original].sort().values + order
    return chosen[random[1].argsort()]


def minibatch(fn: Any) -> Tensor:
    """The draw of Pyro's distribution of a plate's indices; of a large plate, :func:`some_of` them."""
    number, size = fn.subsample_size, fn.size
    if number is None or fn.use_cuda or size <= _MANY or number >= size:
        whole: Tensor = fn()
        return whole
    return some_of(size, number, fn.device)


class FewIndices(Messenger):
    """Draw minibatches of large plates without a permutation of all their elements."""

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg) and msg["value"] is None:
            msg["value"], msg["done"] = minibatch(msg["fn"]), True
