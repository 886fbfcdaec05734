"""The latents of one element of amortised plates: where they sit, and how they are packed into one vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pplvi.kernels.coordinates import Coordinates
from pplvi.programs.sites import Plate
from pplvi.programs.state import random_state

__all__ = ["Locals"]

_DRAWS = 2_000


@dataclass(frozen=True)
class Locals:
    """The latents of one element of the amortised plates, in unconstrained coordinates, and where they sit.

    :ivar plates: the amortised plates, left to right, with the sizes that they have for these arguments.
    :ivar own_subsample: whether the model gives a plate its indices itself.
    """

    sites: tuple[Coordinates, ...]
    plates: tuple[Plate, ...]
    own_subsample: bool

    @property
    def size(self) -> int:
        """How many coordinates an element has."""
        return sum(self.width(site) for site in self.sites)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the plates in the dimensions where Pyro has them, 1 between."""
        sizes = {plate.dim: plate.size for plate in self.plates}
        return tuple(sizes.get(dim, 1) for dim in range(min(sizes), 0))

    def inner(self, site: Coordinates) -> tuple[Plate, ...]:
        """Plates of a site inside the amortised ones."""
        names = {plate.name for plate in self.plates}
        return tuple(plate for plate in site.plates if plate.name not in names)

    def width(self, site: Coordinates) -> int:
        """Coordinates of a site in one element."""
        return site.size * math.prod(plate.size for plate in self.inner(site))

    def split(self, packed: Tensor) -> dict[str, Tensor]:
        """Each site's flat unconstrained coordinates, ``(*particles, *plates, size)``, from ``(..., D)``."""
        parts = packed.split([self.width(site) for site in self.sites], -1)
        return {site.name: self._place(site, part) for site, part in zip(self.sites, parts, strict=True)}

    def _place(self, site: Coordinates, part: Tensor) -> Tensor:
        inner = self.inner(site)
        depth = max(-plate.dim for plate in site.plates)
        batch = (*[1] * (depth - part.dim() + 1), *part.shape[:-1])
        part = part.reshape(*batch, *(plate.size for plate in inner), site.size)
        for plate in inner:  # its slot among the plates has size 1 until now
            first = len(batch)
            part = part.transpose(first + plate.dim, first).squeeze(first)
        return part

    def pack(self, latents: Mapping[str, Tensor]) -> Tensor:
        """The packed coordinates ``(*particles, *plates, D)`` of constrained values: the inverse of :meth:`split`."""
        parts = [self._gather(site, site.read(latents)) for site in self.sites]
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)

    def _gather(self, site: Coordinates, free: Tensor) -> Tensor:
        inner = self.inner(site)
        for done, plate in enumerate(inner, 1):  # its slot among the plates gets size 1
            free = free.unsqueeze(-2).transpose(plate.dim - 1 - done, -2)
        return free.flatten(-1 - len(inner))

    def quantiles(
        self, guide: Callable[..., Any], probs: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Marginal quantiles ``{site: (Q, *shape)}`` by simulation in unconstrained coordinates; no seed moves."""
        depth = max(-plate.dim for site in self.sites for plate in site.plates)
        with random_state(0), poutine.block(), pyro.plate("_draws", _DRAWS, dim=-depth - 1):
            draws = guide(*args, **kwargs)
        free = ((site, site.read(draws)) for site in self.sites)
        return {site.name: site.write(torch.quantile(x, probs.to(x), 0)) for site, x in free}

    def check(self) -> None:
        """Check that inner plates are whole.

        :raises ValueError: for a subsampled one.
        """
        for site in self.sites:
            if cut := [plate.name for plate in self.inner(site) if plate.size != plate.full_size]:
                raise ValueError(
                    f"site {site.name!r} is in plates {cut}, which are subsampled inside the amortised ones: expected "
                    "all elements of inner plates. Amortise these plates too (plates=[...])."
                )
