"""Kernels that leave their target invariant: annealed importance sampling and sequential Monte Carlo samplers.

Such a kernel has no density that could be evaluated, and needs none. With its own reversal as the reverse kernel,
``r[k-1](z[k-1] | z[k]) / q[k](z[k] | z[k-1]) = gamma[k](z[k-1]) / gamma[k](z[k])``, so that the incremental weight is
``gamma[k](z[k-1]) / gamma[k-1](z[k-1])``: draws are weighted for the next target where they are, and then moved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pplvi.kernels.coordinates import Coordinates
from pplvi.kernels.invariant import Frame, InvariantKernel, SitesMove
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Positive
from pplvi.types import MutableValues, Values


@dataclass(frozen=True)
class HamiltonianMove(SitesMove["HamiltonianKernel", Coordinates]):
    """The moves of a :class:`HamiltonianKernel` on a model's continuous sites."""

    def move(self, previous: Values, frame: Frame) -> MutableValues:
        """All values after the moves, without gradient."""
        kept = {name: value.detach() for name, value in previous.items() if name not in self.names}
        frame = replace(frame, log_density=_with(kept, frame.log_density)) if kept else frame
        point = {site.name: site.read(previous).detach() for site in self.sites}
        with torch.no_grad():
            log_density, slope = self._slope(point, frame)
            for _ in range(self.kernel.num_moves):
                point, log_density, slope = self._accepted(point, log_density, slope, frame)
            return {**kept, **{site.name: site.write(point[site.name]) for site in self.sites}}

    def _accepted(
        self, point: MutableValues, log_density: Tensor, slope: MutableValues, frame: Frame
    ) -> tuple[MutableValues, Tensor, MutableValues]:
        momentum = {name: torch.randn_like(x) for name, x in point.items()}
        end, after, end_slope, end_momentum = self._leapfrog(point, slope, momentum, frame)
        gain = after - log_density + self._kinetic(momentum, frame) - self._kinetic(end_momentum, frame)
        accept = torch.rand_like(gain).log() < gain  # NaN is refused
        spread = frame.align(accept, 1)
        kept = tuple({n: torch.where(spread, a[n], b[n]) for n in b} for a, b in ((end, point), (end_slope, slope)))
        return kept[0], torch.where(accept, after, log_density), kept[1]

    def _leapfrog(
        self, point: MutableValues, slope: MutableValues, momentum: MutableValues, frame: Frame
    ) -> tuple[MutableValues, Tensor, MutableValues, MutableValues]:
        size, log_density = self.kernel.step_size, torch.zeros(())
        for _ in range(self.kernel.num_leapfrog):
            momentum = {n: p + size / 2 * slope[n] for n, p in momentum.items()}
            point = {n: x + size * momentum[n] for n, x in point.items()}
            log_density, slope = self._slope(point, frame)
            momentum = {n: p + size / 2 * slope[n] for n, p in momentum.items()}
        return point, log_density, slope, momentum

    def _kinetic(self, momentum: MutableValues, frame: Frame) -> Tensor:
        return sum((frame.total(p**2 / 2, 1) for p in momentum.values()), torch.zeros(()))

    def _slope(self, point: MutableValues, frame: Frame) -> tuple[Tensor, MutableValues]:
        """Log density, Jacobian included, and its gradient."""
        with torch.enable_grad():
            leaves = {name: x.detach().requires_grad_() for name, x in point.items()}
            values = {site.name: site.write(leaves[site.name]) for site in self.sites}
            log_density = frame.log_density(values)
            for site in self.sites:
                log_density = log_density + frame.total(site.log_jacobian(values), 0)
            gradients = torch.autograd.grad(log_density.sum(), list(leaves.values()))
        return log_density.detach(), dict(zip(leaves, gradients, strict=True))


@checked
@dataclass(frozen=True)
class HamiltonianKernel(InvariantKernel):
    """Hamiltonian Monte Carlo with a Metropolis test, ``num_moves`` moves of ``num_leapfrog`` steps.

    Duane et al. 1987. In unconstrained coordinates with unit mass; momenta are drawn anew for each move, and each
    independent element of the data is accepted on its own. One leapfrog step is the Metropolis-adjusted Langevin
    algorithm. For annealed guides that are walked level by level, to learn the path or to sample: it has no density,
    so that such a guide cannot be trained on the extended space.

    :param step_size: size of a leapfrog step.
    :param num_leapfrog: leapfrog steps of a move.
    :param num_moves: moves of a transition.
    :raises ValueError: for numbers that are not positive.

    >>> kernel = HamiltonianKernel(step_size=0.2, num_leapfrog=5)
    """

    moves: ClassVar[type[SitesMove[Any, Any]]] = HamiltonianMove
    kind: ClassVar[type] = Coordinates
    lacking: ClassVar[str] = "are discrete: expected continuous ones for HamiltonianKernel. Use GibbsKernel."
    step_size: Positive = 0.1
    num_leapfrog: Count = 1
    num_moves: Count = 1


def _with(kept: Values, log_density: Callable[[Values], Tensor]) -> Callable[[Values], Tensor]:
    return lambda values: log_density({**kept, **values})
