"""Minibatches of a plate's data, drawn by as many operations as they have elements, not the plate."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pplvi.programs.randomness import for_all_particles
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


class _Few(_Subsample):
    """Indices of a minibatch of a large plate, as Pyro's distribution of them."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Some of the plate's elements, in random order."""
        return some_of(self.size, self.subsample_size or self.size, self.device)


class FewIndices(Messenger):
    """Draw minibatches of large plates without a permutation of all their elements, if nothing else gives them."""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_subsample(msg) or msg["value"] is not None:
            return
        fn = msg["fn"]
        if fn.size > _MANY and not fn.use_cuda and fn.subsample_size is not None and fn.subsample_size < fn.size:
            msg["fn"] = _Few(fn.size, fn.subsample_size, fn.use_cuda, fn.device)


class OneMinibatch(Messenger):
    """Draw the indices of each plate once, for all particles that are run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not is_subsample(msg) or msg["value"] is not None:
            return
        if msg["name"] not in self.drawn:
            with for_all_particles():
                self.drawn[msg["name"]] = msg["fn"](*msg["args"], **msg["kwargs"])
        msg["value"], msg["done"] = self.drawn[msg["name"]], True
