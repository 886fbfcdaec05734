"""Kernels that move draws by a map with a known Jacobian: flows, and Hamiltonian dynamics without a Metropolis test.

A deterministic kernel has no density, but a pair of them has a ratio, ``r(z | z') / q(z' | z) = |dz' / dz|``. It is
kept in the reverse program, whose parameters are live, and the forward program's density is one: the gradient of the
Jacobian is then exact for every objective that follows draws, frozen densities included. Momenta are auxiliary sites of
the forward program, which the reverse program is told of and the next transition may refresh in part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from pplvi.kernels.base import ReverseProgram
from pplvi.kernels.coordinates import Coordinates, seen_by, side_by_side
from pplvi.kernels.maps import Known, MapProgram
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.types import LogDensity, MutableValues, Values


@checked
@dataclass(frozen=True)
class FlowKernel:
    """Deterministic affine coupling flow in unconstrained coordinates, the identity at first.

    Each layer scales and shifts one half of a site's coordinates, then the other, by a network of everything else that
    the site can see: its other half, and sites outside its plates (``z' = exp(s) z + t``, Dinh et al. 2017). With
    resampling and moves that leave the target invariant this is annealed flow transport (Arbel et al. 2021). It is
    learned by objectives that follow draws; the forward KL divergence is not one.

    :param hidden: number of hidden units.
    :param num_layers: number of layers of two updates for every site.
    :raises ValueError: for sizes that are not positive.

    >>> kernel = FlowKernel(hidden=16, num_layers=3)
    """

    hidden: Count = 32
    num_layers: Count = 2

    def build(self, sites: Sequence[Coordinates], log_density: LogDensity) -> tuple[FlowProgram, ReverseProgram]:
        """The flow and its bookkeeping; the target plays no part."""
        ahead = FlowProgram(self, sites)
        return ahead, ReverseProgram(ahead)


@dataclass(frozen=True)
class _Update:
    """One half of one site's coordinates, and what its network reads."""

    site: Coordinates
    moved: tuple[int, ...]
    fixed: tuple[int, ...]
    seen: tuple[Coordinates, ...]

    @property
    def inputs(self) -> int:
        return 1 + len(self.fixed) + sum(other.size for other in self.seen)

    def read(self, free: MutableValues) -> Tensor:
        """The network's inputs: a constant, the other half, and the sites around."""
        own = free[self.site.name]
        parts = [torch.ones_like(own[..., :1]), own[..., list(self.fixed)]]
        return side_by_side([*parts, *(free[other.name] for other in self.seen)])

    def write(self, free: MutableValues, moved: Tensor) -> MutableValues:
        """The point with other values in the half that is moved."""
        index = torch.tensor(self.moved, device=moved.device)
        own = free[self.site.name].expand(*moved.shape[:-1], self.site.size)
        return {**free, self.site.name: own.index_copy(-1, index, moved)}


class FlowProgram(MapProgram):
    """The program that :class:`FlowKernel` builds."""

    def __init__(self, kernel: FlowKernel, sites: Sequence[Coordinates]) -> None:
        super().__init__()
        self.sites = tuple(sites)
        self.updates = tuple(update for _ in range(kernel.num_layers) for update in _updates(self.sites))
        for index, update in enumerate(self.updates):
            first = torch.nn.Linear(update.inputs, kernel.hidden)
            second = torch.zeros(2 * len(update.moved), kernel.hidden + 1)
            for part, value in (("first", first.weight.detach().clone()), ("second", second)):
                setattr(self, f"{part}_{index}", PyroParam(value, constraints.real))

    def forward(self, previous: Values, *args: Any, **kwargs: Any) -> None:
        """Move every site."""
        free: MutableValues = {site.name: site.read(previous) for site in self.sites}
        for index, update in enumerate(self.updates):
            log_scale, shift = self._affine(index, update, free)
            moved = free[update.site.name][..., list(update.moved)] * log_scale.exp() + shift
            free = update.write(free, moved)
        plates: dict[str, Any] = {}
        for site in self.sites:
            with site.inside(previous, plates):
                pyro.sample(site.name, Known(site.write(free[site.name]), site.transform.codomain))

    def gains(self, reached: Values) -> MutableValues:
        """``log |du' / du|`` in unconstrained coordinates, for each site, from what was reached."""
        free: MutableValues = {site.name: site.read(reached) for site in self.sites}
        gains = {name: torch.zeros_like(value[..., 0]) for name, value in free.items()}
        for index, update in reversed(list(enumerate(self.updates))):
            log_scale, shift = self._affine(index, update, free)
            moved = (free[update.site.name][..., list(update.moved)] - shift) * (-log_scale).exp()
            free = update.write(free, moved)
            gains[update.site.name] = gains[update.site.name] + log_scale.sum(-1)
        return gains

    def _affine(self, index: int, update: _Update, free: MutableValues) -> tuple[Tensor, Tensor]:
        first, second = getattr(self, f"first_{index}"), getattr(self, f"second_{index}")
        hidden = torch.tanh(torch.nn.functional.linear(update.read(free), first))
        raw, shift = torch.nn.functional.linear(hidden, second[:, :-1], second[:, -1]).chunk(2, -1)
        return 3.0 * torch.tanh(raw / 3.0), shift


def _updates(sites: Sequence[Coordinates]) -> Iterator[_Update]:
    """The updates of one layer."""
    for site in sites:
        seen = tuple(other for other in seen_by(site, sites) if other is not site)
        halves = tuple(range(0, site.size, 2)), tuple(range(1, site.size, 2))
        yield from (_Update(site, a, b, seen) for a, b in (halves, halves[::-1]) if a)
