r"""Many lasso problems at once: proximal gradient steps, accelerated or not, and coordinate descent, with duality gaps.

.. math:: P(h) = \tfrac12 h^T G h - c^T h + \sum_j \lambda_j |h_j|

Each row is a problem of its own; the Gram matrix ``G`` is one for all rows, or one each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pplvi.guides.recording import Recorder

LassoMethod = Literal["ista", "fista", "coordinate"]
_LOOK = 10  # iterations
_ROUNDING = 8.0
_FEWER = 0.7  # rows are left out when no more than this share of them is left
_FAR_FEWER = 0.25  # of a recording, which costs more to make anew


def soft_threshold(x: Tensor, by: Tensor) -> Tensor:
    r"""The proximal map of :math:`\lambda |x|`, ``sign(x) max(|x| - by, 0)``.

    >>> soft_threshold(torch.tensor([-2.0, 0.5, 3.0]), torch.tensor(1.0))
    tensor([-1.,  0.,  2.])
    """
    return x - x.clamp(-by, by)


@dataclass(frozen=True)
class Lasso:
    """Problems in rows.

    :ivar gram: ``G``, ``(K, K)``, or ``(N, K, K)`` for a matrix of each row's own.
    :ivar linear: ``c``, ``(N, K)``.
    :ivar penalty: ``lambda``, ``(K,)`` or ``(N, K)``, positive.

    >>> problem = Lasso(torch.eye(2), torch.tensor([[3.0, 0.5]]), torch.ones(2))
    >>> found = solve(problem, "fista")
    >>> found.codes, found.gap.item() < 1e-6
    (tensor([[2., 0.]]), True)
    """

    gram: Tensor
    linear: Tensor
    penalty: Tensor

    def product(self, h: Tensor) -> Tensor:
        """``G h`` for every row."""
        return h @ self.gram if self.gram.dim() == 2 else (self.gram @ h.unsqueeze(-1)).squeeze(-1)

    def value(self, h: Tensor) -> Tensor:
        """``P(h)``, ``(N,)``."""
        return (h * (0.5 * self.product(h) - self.linear)).sum(-1) + (self.penalty * h.abs()).sum(-1)

    def gap(self, h: Tensor, length: Tensor) -> Tensor:
        """How far ``P(h)`` is above its minimum at most, ``(N,)``: by the dual point that the residual scales to.

        :param length: :meth:`squared_length` of the rows.
        """
        product = self.product(h)
        rest, along = self.linear - product, (self.linear * h).sum(-1)
        shrink = (self.penalty / rest.abs().clamp(min=torch.finfo(h.dtype).tiny)).amin(-1).clamp(max=1.0)
        residual = length - 2 * along + (h * product).sum(-1)
        dual = shrink * (length - along) - 0.5 * shrink.square() * residual
        return (0.5 * residual + (self.penalty * h.abs()).sum(-1) - dual).clamp(min=0.0)

    def squared_length(self) -> Tensor:
        """``c G^+ c``, ``(N,)``: squared lengths of what the quadratic explains, in units of its noise."""
        values, vectors = torch.linalg.eigh(self.gram)
        inside = (self.linear.unsqueeze(-2) @ vectors).squeeze(-2)
        kept = values > values.amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(values.dtype).eps
        return (inside.square() / values).masked_fill(~kept, 0.0).sum(-1)

    def lipschitz(self) -> Tensor:
        """The largest eigenvalue of ``G``, a scalar or ``(N, 1)``."""
        largest = torch.linalg.eigvalsh(self.gram)[..., -1:]
        return largest.squeeze(-1) if self.gram.dim() == 2 else largest

    def rows(self, index: Tensor) -> Lasso:
        """Some of the problems."""
        gram = self.gram if self.gram.dim() == 2 else self.gram[index]
        return Lasso(gram, self.linear[index], self.penalty if self.penalty.dim() == 1 else self.penalty[index])


class Codes(NamedTuple):
    """Solutions.

    :ivar codes: ``(N, K)``.
    :ivar gap: largest distance of each from its minimum, ``(N,)``.
    :ivar iterations: steps (sweeps of coordinate descent) until the last row was done.
    """

    codes: Tensor
    gap: Tensor
    iterations: int


def solve(
    problem: Lasso,
    method: LassoMethod = "fista",
    start: Tensor | None = None,
    *,
    tol: float = 1e-6,
    max_iterations: int = 10_000,
    restart: bool = True,
    recorder: Recorder | None = None,
) -> Codes:
    """Minimise every row until its duality gap is at most ``tol``, or at its rounding errors.

    Rows that are done are left alone.

    :param method: ``"ista"``: proximal gradient steps; ``"fista"``: accelerated; ``"coordinate"``: coordinate descent.
    :param start: ``(N, K)``; zero unless given.
    :param max_iterations: the most steps.
    :param restart: start FISTA's momentum anew where it points uphill.
    :param recorder: what records the iterations from one look at the gaps to the next, if anything does.
    :raises ValueError: for a recorder that fails.

    Source: Daubechies, Defrise & De Mol (2004); Beck & Teboulle (2009), FISTA; O'Donoghue & Candès (2015), adaptive
    restart; Friedman, Hastie & Tibshirani (2010), coordinate descent.
    """
    codes = torch.zeros_like(problem.linear) if start is None else start.clone()
    length = problem.squared_length()
    bound = (_ROUNDING * torch.finfo(codes.dtype).eps * length).clamp(min=tol)
    gaps, left = torch.full_like(length, torch.inf), torch.arange(len(codes), device=codes.device)
    make, look = _METHODS[method]
    descent, iteration = make(problem, codes, length, restart), 0
    search = _Search(descent) if recorder is None else _RecordedSearch(descent, look, recorder)
    while iteration < max_iterations:
        steps = min(look, max_iterations - iteration)
        iteration += steps
        codes[left], gaps[left] = search.advance(steps)
        unfinished = gaps[left] > bound[left]
        if not bool(unfinished.any()):
            break
        if unfinished.sum() < _FEWER * len(left):
            left = left[unfinished]
            search.keep(unfinished)
    return Codes(codes, gaps, iteration)


class _Descent:
    """Steps on all rows that are left, as a function of tensors, of which the first are the codes."""

    def __init__(self, problem: Lasso, codes: Tensor, length: Tensor, restart: bool) -> None:
        self.problem, self.length, self.restart = problem, length, restart
        self.state = self._begin(codes)
        self._prepare()

    def _begin(self, codes: Tensor) -> tuple[Tensor, ...]:
        return (codes,)

    def _prepare(self) -> None:
        """What all steps use."""
        largest = self.problem.lipschitz()
        self.shift, self.threshold = self.problem.linear / largest, self.problem.penalty / largest
        scaled = self.problem.gram / (largest if largest.dim() == 0 else largest.unsqueeze(-1))
        self.contraction = torch.eye(scaled.shape[-1]).to(scaled) - scaled

    def step(self, *state: Tensor) -> tuple[Tensor, ...]:
        """A proximal gradient step."""
        return (self._proximal(state[0]),)

    def _proximal(self, h: Tensor) -> Tensor:
        if self.contraction.dim() == 2:
            return soft_threshold(torch.addmm(self.shift, h, self.contraction), self.threshold)
        return soft_threshold(self.shift + (self.contraction @ h.unsqueeze(-1)).squeeze(-1), self.threshold)

    def advanced(self, steps: int, *state: Tensor) -> tuple[Tensor, ...]:
        """The tensors some steps later, and the gaps of the rows."""
        for _ in range(steps):
            state = self.step(*state)
        return (*state, self.problem.gap(state[0], self.length))

    def keep(self, rows: Tensor) -> None:
        """Leave out all other rows."""
        self.problem, self.length = self.problem.rows(rows), self.length[rows]
        self.state = tuple(x[rows] for x in self.state)
        self._keep_prepared(rows)

    def _keep_prepared(self, rows: Tensor) -> None:
        self.shift = self.shift[rows]
        if self.contraction.dim() == 3:
            self.contraction = self.contraction[rows]
        if self.threshold.dim() == 2:
            self.threshold = self.threshold[rows]


class _Accelerated(_Descent):
    """Steps from a point ahead."""

    def _begin(self, codes: Tensor) -> tuple[Tensor, ...]:
        return codes, codes, codes.new_ones(len(codes), 1)

    def step(self, *state: Tensor) -> tuple[Tensor, ...]:
        codes, ahead, age = state
        new = self._proximal(ahead)
        move = new - codes
        if self.restart:
            uphill = ((ahead - new) * move).sum(-1, keepdim=True) > 0
            age = age.masked_fill(uphill, 1.0)
        older = (1 + (1 + 4 * age.square()).sqrt()) / 2
        return new, torch.addcmul(new, (age - 1) / older, move), older


class _Coordinate(_Descent):
    """Sweeps over the coordinates, each minimised exactly."""

    def _prepare(self) -> None:
        self.columns = range(self.problem.linear.shape[1])

    def step(self, *state: Tensor) -> tuple[Tensor, ...]:
        problem, h = self.problem, state[0].clone()
        size, slope = problem.gram.diagonal(dim1=-2, dim2=-1), problem.linear - problem.product(h)
        penalty = problem.penalty.expand_as(h)
        for j in self.columns:
            own = size[..., j]
            best = soft_threshold(slope[:, j] + own * h[:, j], penalty[:, j]) / own
            new = torch.where(own > 0, best, 0.0)  # what nothing depends on is at its prior's mode
            slope = slope - (new - h[:, j]).unsqueeze(-1) * problem.gram[..., j, :]
            h[:, j] = new
        return (h,)

    def _keep_prepared(self, rows: Tensor) -> None:
        """All of it belongs to columns."""


_METHODS: dict[str, tuple[type[_Descent], int]] = {
    "ista": (_Descent, _LOOK),
    "fista": (_Accelerated, _LOOK),
    "coordinate": (_Coordinate, 1),
}


class _Search:
    """Steps until the next look."""

    def __init__(self, descent: _Descent) -> None:
        self.descent = descent

    def advance(self, steps: int) -> tuple[Tensor, Tensor]:
        """Codes and gaps of the rows that are left, some steps later."""
        *state, gaps = self.descent.advanced(steps, *self.descent.state)
        self.descent.state = tuple(state)
        return state[0], gaps

    def keep(self, unfinished: Tensor) -> None:
        """Leave out all other rows."""
        self.descent.keep(unfinished)


class _RecordedSearch(_Search):
    """The same, recorded.

    Rows that are done go on in the recording, where nobody looks at them, until so few are left that another one pays.
    """

    def __init__(self, descent: _Descent, look: int, recorder: Recorder) -> None:
        super().__init__(descent)
        self.look, self.recorder = look, recorder
        self._record()

    def _record(self) -> None:
        self.rows = torch.arange(len(self.descent.length), device=self.descent.length.device)
        self.recording = self.recorder(partial(self.descent.advanced, self.look), self.descent.state)

    def advance(self, steps: int) -> tuple[Tensor, Tensor]:
        if steps == self.look:
            gaps, codes = self.recording(), self.recording.carried[0]
        else:  # the last ones of max_iterations
            self.descent.state = tuple(self.recording.carried)
            codes, gaps = super().advance(steps)
        return codes[self.rows], gaps[self.rows]

    def keep(self, unfinished: Tensor) -> None:
        self.rows = self.rows[unfinished]
        if len(self.rows) < _FAR_FEWER * len(self.descent.length):
            self.descent.state = tuple(self.recording.carried)
            self.descent.keep(self.rows)
            self._record()
