"""What a program shows: its latent sites, its factors as expectations, its blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pplvi.guides.conjugate.chains import MarkovChain
from pplvi.guides.conjugate.expectations import Expected
from pplvi.guides.conjugate.loops import LoopTurns
from pplvi.guides.conjugate.normal import BlockLayout
from pplvi.programs.sites import Plate


@dataclass(frozen=True)
class Latent:
    """A latent site of the model.

    :ivar start: its first value, float64.
    :ivar fn: its distribution in a run of the prior.
    :ivar plates: around it.
    :ivar mask: of its density, if it has one.
    :ivar dtype: of its values in the model.
    """

    start: Tensor
    fn: Any
    plates: tuple[Plate, ...]
    mask: Any
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor | None:
        """What stands before the entropy, of the batch shape; ``None`` for one."""
        scale = math.prod(plate.scale for plate in self.plates)
        if self.mask is None and scale == 1:
            return None
        shape = self.start.shape[: self.start.dim() - self.fn.event_dim]
        return scale_and_mask(torch.full(shape, scale, dtype=torch.float64, device=self.start.device), 1.0, self.mask)


@dataclass(frozen=True)
class Factor:
    """The expected log density of one site, or of several turns of a loop.

    :ivar expected: of a state of the mean field.
    :ivar turns: the sites, in the enumerated trace.
    :ivar summed: whether it depends on enumerated sites.
    """

    expected: Expected
    turns: LoopTurns
    summed: bool

    @property
    def name(self) -> str:
        """Of the sites."""
        return self.turns.name

    @property
    def site(self) -> Any:
        """The first site."""
        return self.turns.sites[0]

    @property
    def shape(self) -> torch.Size:
        """Of the log density in full."""
        return self.turns.shape

    @property
    def weight(self) -> Tensor:
        """Scale and mask, for each element."""
        one = torch.ones((), dtype=torch.float64, device=self.turns.device)
        return scale_and_mask(one.expand(self.shape), self.site["scale"], self.site["mask"])

    def at(self, state: Any) -> Tensor:
        """Its value for each element."""
        value = self.expected(state).double()
        return value.expand(torch.broadcast_shapes(value.shape, self.shape))

    @property
    def left_out(self) -> Tensor | None:
        """Where an enumerated latent is masked, if it is anywhere."""
        mask = self.turns.mask if self.turns.is_enumerated else None
        return None if mask is None else ~mask

    def of_values(self, state: Any) -> Tensor:
        """Its value for each element; that of a uniform distribution where an enumerated latent is masked, so that its
        prior sums to one there without counting."""
        value, left_out = self.at(state), self.left_out
        if left_out is None:
            return value
        size = self.site["value"].shape[self.site["infer"]["_enumerate_dim"] - self.site["fn"].event_dim]
        return torch.where(left_out, value.new_full((), -math.log(size)), value)


@dataclass(frozen=True)
class Reading:
    """What a program shows.

    :ivar latents: its continuous latent sites.
    :ivar summed: its discrete ones, which are enumerated.
    :ivar factors: the expected log density of every site.
    :ivar layouts: of the normal blocks, by block.
    :ivar blocks: the sites of each block, in order.
    :ivar trace: of the sites that depend on enumerated ones.
    :ivar drawn: discrete sites that do not ask to be summed out.
    :ivar fallback: blocks without a closed form, and how they are updated.
    :ivar positive: those of them whose logarithm is normal.
    :ivar chain: the Markov chain that the enumerated sites are, if they are one.
    """

    latents: dict[str, Latent]
    summed: dict[str, Any]
    factors: list[Factor]
    layouts: dict[str, BlockLayout]
    blocks: dict[str, tuple[str, ...]]
    trace: Any
    drawn: tuple[str, ...]
    fallback: dict[str, str]
    positive: frozenset[str]
    chain: MarkovChain | None

    @property
    def empty(self) -> Any:
        """The trace of no guide."""
        return poutine.Trace()

    def locals(self) -> tuple[str, ...]:
        """Blocks that belong to a minibatch: those in subsampled plates."""
        return tuple(b for b, sites in self.blocks.items() if any(_is_part(self.latents[s]) for s in sites))

    def subsampled(self) -> tuple[str, ...]:
        """Plates of which there is a minibatch."""
        frames = {f.name: f for factor in self.factors for f in factor.site["cond_indep_stack"] if f.vectorized}
        return tuple(n for n, f in frames.items() if f.full_size is not None and f.full_size > f.size)


def _is_part(found: Latent) -> bool:
    return any(plate.size < plate.full_size for plate in found.plates)
