"""One number after another, with hidden states that each adds to: how NADE draws, and scores any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Turn(NamedTuple):
    """One number of each datum.

    :ivar number: which it is, ``(N,)``.
    :ivar value: seen or drawn, ``(N,)``.
    :ivar log_prob: given those that came before, ``(N,)``, in nats.
    """

    number: Tensor
    value: Tensor
    log_prob: Tensor


class OutputCells(NamedTuple):
    """Binary numbers that hidden states predict, and add to.

    :ivar state: of nothing seen, ``(N, H)`` or ``(H,)``.
    :ivar seen: what a number that is one adds, ``(D, H)``.
    :ivar known: what it adds whether one or zero, ``(D, H)``, if anything.
    :ivar output: ``(D, H')``.
    :ivar bias: ``(D,)`` or ``(N, D)``.
    :ivar activate: from states to what the outputs see, ``(N, H')``.
    """

    state: Tensor
    seen: Tensor
    known: Tensor | None
    output: Tensor
    bias: Tensor
    activate: Callable[[Tensor], Tensor] = torch.sigmoid

    def walk(self, order: Tensor, x: Tensor, observed: Tensor) -> Iterator[Turn]:
        """Take each datum's numbers in its order, ``(N, D)``; those that are not observed are drawn."""
        state = self.state.expand(len(x), -1)
        bias = self.bias.expand(x.shape)
        for index in order.unbind(1):
            at = index[:, None]
            logit = (self.activate(state) * self.output[index]).sum(-1) + bias.gather(1, at)[:, 0]
            given = x.gather(1, at)[:, 0]
            drawn = (torch.rand_like(logit) < torch.sigmoid(logit)).to(x)
            value = torch.where(observed.gather(1, at)[:, 0], given, drawn)
            yield Turn(index, value, logsigmoid(torch.where(value > 0.5, logit, -logit)))
            state = state + value[:, None] * self.seen[index]
            if self.known is not None:
                state = state + self.known[index]

    def filled(self, order: Tensor, x: Tensor, observed: Tensor) -> Tensor:
        """Data with what was not observed drawn, ``(N, D)``."""
        whole = torch.zeros_like(x)
        for turn in self.walk(order, x, observed):
            whole = whole.scatter(1, turn.number[:, None], turn.value[:, None])
        return whole
