"""Compiled steps of several restarts in one call of one program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pplvi.compile import CompiledSVI
from pplvi.programs.calls import Arguments
from pplvi.programs.state import set_torch_rng_state, torch_rng_state
from pplvi.tracing import Traced
from pplvi.types import Program
from pplvi.vectorized import Apart, Quiet, vectorized

Random = dict[str, Any]

_NOISE, _STEPS = 2**24, 50  # numbers and steps that are drawn ahead at most


class Together:
    """The steps of several :class:`CompiledSVI`, a row of one program for each; modes ``"trace"`` and ``True``.

    Restart ``r`` draws its noise from its own random state, as it would alone in mode ``"trace"``, and takes the step
    that it would take alone up to rounding: a row of vectorised arithmetic may differ in the last digits.

    :param svis: before or after their first steps; parameters exist.
    :param record: records the step of one of them, under its own parameter store.
    :param arguments: of every step.
    :raises Apart: if they cannot share a program, with the reason.
    """

    def __init__(
        self, svis: Sequence[CompiledSVI], record: Callable[[CompiledSVI], Traced], arguments: Arguments
    ) -> None:
        self.svis, self.arguments = svis, arguments
        steps = [record(svi) for svi in svis]
        self.buffers = [step.state for step in steps]
        carried, rates = self._carried(), torch.ones(len(svis), dtype=torch.float64, device=svis[0].state[0].device)
        step = vectorized(steps, carried, rates, arguments.tensors)
        self.quiet: Quiet = step.quiet
        ahead = max(1, min(_STEPS, _NOISE // max(1, len(svis) * sum(x.numel() for x in self.quiet.example))))
        blocks = [x.new_zeros((ahead, len(svis), *x.shape)) for x in self.quiet.example]
        self.noise = [[block[t] for block in blocks] for t in range(ahead)]
        self.rows = [[[block[t, r] for block in blocks] for t in range(ahead)] for r in range(len(svis))]
        inputs = (rates, *arguments.tensors, *self.noise[0])
        self.program: Program = svis[0].backend(step.traced, carried, inputs, None)

    def __call__(self, num_steps: int, random: Mapping[int, Random]) -> tuple[dict[int, Tensor], dict[int, Random]]:
        """Several steps of some of the restarts.

        :param random: by restart, the random state that it starts with; the others stay where they are.
        :returns: by restart, its losses, ``(num_steps,)``, in nats, and its random state afterwards.
        """
        carried = self._carried()
        given = [svi.rates(num_steps if r in random else 0, num_steps) for r, svi in enumerate(self.svis)]
        rates = torch.stack(given, 1)
        losses: list[Tensor] = []
        with torch.no_grad():
            while len(losses) < num_steps:
                noise, random = self._drawn(min(len(self.noise), num_steps - len(losses)), random)
                for now in noise:
                    losses.append(self.program(*carried, rates[len(losses)], *self.arguments.tensors, *now))
            self._write_back(carried, random)
        for r in random:
            self.svis[r].count += num_steps
        rows = torch.stack(losses, 1)
        return {r: rows[r] for r in random}, dict(random)

    def _rows(self) -> list[tuple[Tensor, ...]]:
        return [(*svi.carried(), *state) for svi, state in zip(self.svis, self.buffers, strict=True)]

    def _carried(self) -> list[Tensor]:
        return [torch.stack(column) for column in zip(*self._rows(), strict=True)]

    def _write_back(self, carried: Sequence[Tensor], random: Mapping[int, Random]) -> None:
        for r, row in enumerate(self._rows()):
            if r in random:
                for old, column in zip(row, carried, strict=True):
                    old.copy_(column[r])

    def _drawn(self, num_steps: int, random: Mapping[int, Random]) -> tuple[list[list[Tensor]], dict[int, Random]]:
        """The noise of several steps, a row for each restart, and the random states of the restarts afterwards."""
        after = {}
        for r, state in random.items():
            set_torch_rng_state(state)
            for rows in self.rows[r][:num_steps]:
                self.quiet.fill(rows)
            after[r] = {**state, **torch_rng_state()}
        return self.noise[:num_steps], after


__all__ = ["Apart", "Together"]
