"""The M-step: in closed form for blocks that have one, by L-BFGS for the other parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pplvi.guides.search.lbfgs import Options, minimise
from pplvi.training.em.blocks import Block, blocks_of
from pplvi.training.em.complete import CompleteData, ParameterLeaves
from pplvi.training.em.gathers import links_of
from pplvi.training.em.moments import ClosedMoments, closed_moments


class Maximisation:
    """Raises ``Q`` in all parameters.

    :param problem: the complete-data problem.
    :param m_steps: iterations of L-BFGS for every parameter; ``None`` for closed forms where there are any, and
        L-BFGS to convergence elsewhere.
    :ivar closed: names of parameters with a closed form.
    :ivar searched: names of the others.
    """

    def __init__(self, problem: ParameterLeaves, m_steps: int | None = None) -> None:
        self.problem, self.m_steps = problem, m_steps
        self.blocks: list[Block] = []
        self.moments: ClosedMoments | None = None
        self._looked = m_steps is not None or isinstance(problem, CompleteData)
        if m_steps is None and isinstance(problem, CompleteData):
            self.blocks = blocks_of(problem, links_of(problem))
        self.closed = sorted(name for block in self.blocks for name in block.roles)
        self.searched = [name for name in problem.leaves if name not in self.closed]

    def __call__(self, counts: Mapping[str, Tensor]) -> None:
        """One M-step for these expected counts."""
        if not self._looked:
            self._looked, self.moments = True, closed_moments(self.problem, counts)
            if self.moments is not None:
                self.closed, self.searched = sorted(self.problem.leaves), []
        if self.moments is not None:
            self.moments(self.problem, counts)
        with torch.no_grad():
            for block in self.blocks:
                self.problem.assign(block.maximise(self.problem, counts))
        if self.searched:
            self._search(counts)

    def _search(self, counts: Mapping[str, Tensor]) -> None:
        leaves = [self.problem.leaves[name] for name in self.searched]
        precision = max(torch.finfo(leaf.dtype).eps for leaf in leaves)
        options = Options(precision=precision, init_alpha=1.0, max_iterations=self.m_steps or Options.max_iterations)

        def place(x: Tensor) -> None:
            with torch.no_grad():
                for leaf, part in zip(leaves, x.split([leaf.numel() for leaf in leaves]), strict=True):
                    leaf.copy_(part.reshape(leaf.shape))

        def rows(positions: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(torch.stack(x) for x in zip(*map(value, positions), strict=True))  # type: ignore[return-value]

        def value(x: Tensor) -> tuple[Tensor, Tensor]:
            place(x)
            loss, gradient = self.problem.value_and_gradient(counts, leaves)
            return loss.double(), gradient.double()

        start = torch.cat([leaf.detach().flatten() for leaf in leaves]).double()
        (trail,) = minimise(rows, [start], options)
        place(trail.points[-1].position)
