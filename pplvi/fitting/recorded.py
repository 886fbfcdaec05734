"""The unconstrained density of a model, recorded once where thousands of evaluations follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pplvi.compile import backends
from pplvi.compile.broadcasting import without_repetition
from pplvi.compile.outside import outside_of_sums
from pplvi.compile.tracing import record
from pplvi.fitting.folding import folded
from pplvi.programs.carrying import LOOP
from pplvi.programs.density import UnconstrainedDensity

_PAYS = 2  # evaluations of as many rows after which recording pays, as dozens follow
_FEW = 16  # rows; of fewer, such as those of a few paths, a call takes as long, whatever their number
_PAYS_FEW = 10
_LONG = 250  # tensors that a gradient keeps, as of loops, whose recording takes as long as tens of calls
_PAYS_LONG = 50
_BYTES = 64 * 2**20  # of what a gradient keeps of the evaluation

Pair = tuple[Tensor, Tensor]


class RecordedDensity(UnconstrainedDensity):
    """As :class:`pplvi.programs.density.UnconstrainedDensity`, quicker where many batches of one size are asked for.

    Value and gradient are recorded as a graph of tensor operations when as many rows were asked for several times, and
    only that runs from then on; a few rows, as of paths that end one after another, are filled up to as many as there
    were at most. What cannot be recorded is run as before. Rows go through in parts, so that what a
    gradient keeps of the evaluation stays below 64 MiB.

    >>> import pyro, pyro.distributions as dist
    >>> density = RecordedDensity(lambda: pyro.sample("x", dist.Exponential(1.0)))
    >>> rows = torch.zeros(100, 1)
    >>> [density.value_and_gradient(rows) for _ in range(30)][-1][0][0].item(), list(density.programs)
    (-1.0, [100])
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.programs: dict[int, Callable[[Tensor], Pair] | None] = {}
        self._asked: Counter[int] = Counter()
        self._few = 0
        self._looked: tuple[int, bool] | None = None

    def value_and_gradient(self, u: Tensor) -> Pair:
        """Log densities ``(S,)`` and their gradients ``(S, dim)``, detached and in float64."""
        values, gradients = zip(*map(self._part, u.to(self.device, self.dtype).split(self.at_once)), strict=True)
        return torch.cat(values).double(), torch.cat(gradients).double()

    @property
    def at_once(self) -> int:
        """How many rows are evaluated at once."""
        return self._look()[0]

    def _look(self) -> tuple[int, bool]:
        """How many rows are evaluated at once, and whether the program has so many operations as loops have."""
        if self._looked is None:
            rows = self.start.expand(_FEW, -1) + 0.01 * torch.linspace(-1.0, 1.0, _FEW).to(self.start)[:, None]
            kept = self._kept(rows)
            most = _BYTES * _FEW // max(1, sum(kept.values()))
            self._looked = max(_FEW, min(self.rows_at_once, most)), len(kept) > _LONG
        return self._looked

    def _kept(self, rows: Tensor) -> dict[int, int]:
        """Bytes of each storage that a gradient keeps of an evaluation."""
        kept: dict[int, int] = {}

        def note(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            self._eagerly(rows)
        return kept

    def _eagerly(self, u: Tensor) -> Pair:
        return super().value_and_gradient(u)

    def _part(self, u: Tensor) -> Pair:
        size, pays = self._size_of(len(u))
        self._asked[size] += 1
        if size not in self.programs and self._asked[size] >= pays and self.way != LOOP:
            self.programs[size] = self._recorded(_filled(u, size))
        if (program := self.programs.get(size)) is None:
            return self._eagerly(u)
        self.gradients += len(u)
        self.rows += len(u)
        try:
            value, gradient = program(_filled(u, size))
        except LinAlgError:  # a factorisation failed in one row
            return self._eagerly(u)
        return value[: len(u)], gradient[: len(u)]

    def _size_of(self, number: int) -> tuple[int, int]:
        """As how many rows so many are evaluated, and from which evaluation on recording pays."""
        is_long = self._look()[1]
        if number >= _FEW:
            return number, _PAYS_LONG if is_long else _PAYS
        self._few = max(self._few, number)
        return self._few, _PAYS_LONG if is_long else _PAYS_FEW

    @torch.no_grad()
    def _recorded(self, u: Tensor) -> Callable[[Tensor], Pair] | None:
        """Value and gradient of so many rows as one graph; ``None`` where it cannot be recorded, or would be wrong."""

        try:
            with backends.uncollected():
                traced = record(lambda rows: self._with_gradient(rows.detach()), (u,), {})
            given = (*traced.state, *traced.constants)
            graph = folded(without_repetition(traced.graph, (u, *given)), (u, *given))
            graph = outside_of_sums(graph, (u, *given))
            # What is not constant would not be folded rightly by chance.
            other = u.flip(0) + 0.01 * torch.linspace(-1.0, 1.0, len(u)).to(u)[:, None]
            found, expected = graph(other, *given), self._eagerly(other)
        except (ValueError, LinAlgError):
            return None
        same = all(
            torch.allclose(
                a.to(b), b, rtol=1e-2, atol=1e-3 * float(b.nan_to_num(0.0, 0.0, 0.0).abs().max()), equal_nan=True
            )
            for a, b in zip(found, expected, strict=True)
        )
        return (lambda rows: graph(rows, *given)) if same and not traced.state else None


def _filled(rows: Tensor, size: int) -> Tensor:
    """So many rows, the last of them repeated."""
    return rows if len(rows) == size else torch.cat([rows, rows[-1:].expand(size - len(rows), -1)])
