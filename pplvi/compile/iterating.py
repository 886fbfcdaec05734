"""Iterations on one state, recorded as training steps are: coordinate ascent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pplvi.compile import backends
from pplvi.compile.svi import CompileMode
from pplvi.compile.tracing import Untraceable, record
from pplvi.types import Program


class RecordedMap:
    """A function from tensors to themselves a step later and a number, recorded once: a call takes the step.

    :param step: the function; a tuple of the tensors and the number.
    :param start: where the tensors are at first; they are not changed.
    :param mode: as of :class:`pplvi.CompiledSVI`; ``"max"`` is ``True``, since every number is looked at.
    :ivar carried: where the tensors are now.
    :raises ValueError: for a step that cannot be recorded, and without a compiler; with ``"auto"`` the next best way is
        taken.

    >>> halve = RecordedMap(lambda x: (x / 2, x.sum()), [torch.ones(2)], "trace")
    >>> halve().item(), halve().item(), halve.carried[0]
    (2.0, 1.0, tensor([0.2500, 0.2500]))
    """

    def __init__(self, step: Callable[..., tuple[Tensor, ...]], start: Sequence[Tensor], mode: CompileMode) -> None:
        self.carried = [x.detach().clone() for x in start]
        self._program = self._automatic(step) if mode == "auto" else self._recorded(step, mode)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Take the step.

        :returns: the number.
        """
        number: Tensor = self._program(*self.carried)
        return number

    def _recorded(self, step: Callable[..., tuple[Tensor, ...]], mode: CompileMode) -> Program:
        with backends.uncollected(), torch.no_grad():
            traced = record(step, self.carried, {})
        if traced.state:
            raise Untraceable("the step writes into tensors that it was not given: expected one that returns them.")
        if mode == "trace":
            return backends.as_is(traced, len(self.carried))
        return backends.compiled(traced, len(self.carried), self.carried)

    def _automatic(self, step: Callable[..., tuple[Tensor, ...]]) -> Program:
        for mode in (True, "trace"):
            try:
                return self._recorded(step, mode)
            except ValueError:
                continue
        return backends.in_place(step, len(self.carried))
