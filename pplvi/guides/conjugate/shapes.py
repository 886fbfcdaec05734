"""What a guide keeps of a program's latent sites to draw them without the program: shapes, plates, dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pplvi.guides.conjugate.normal import BlockLayout
from pplvi.guides.conjugate.reading import Latent, Reading
from pplvi.programs.sites import Plate


@dataclass(frozen=True)
class SiteShape:
    """A latent site as a guide draws it.

    :ivar shape: of its value.
    :ivar event_dim: how many dimensions of it are its event.
    :ivar plates: around it.
    :ivar dtype: of its value.
    """

    shape: tuple[int, ...]
    event_dim: int
    plates: tuple[Plate, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, latent: Latent) -> SiteShape:
        """That of a latent site of a program."""
        return cls(tuple(latent.start.shape), latent.fn.event_dim, latent.plates, latent.dtype)

    @property
    def batch_dim(self) -> int:
        """How many dimensions of the value are not its event."""
        return len(self.shape) - self.event_dim


@dataclass(frozen=True)
class Structure:
    """Latent sites, and how they are grouped.

    :ivar sites: by name.
    :ivar blocks: the sites of each block.
    :ivar layouts: of normal blocks.
    """

    sites: dict[str, SiteShape]
    blocks: dict[str, tuple[str, ...]]
    layouts: dict[str, BlockLayout]

    @classmethod
    def of(cls, reading: Reading) -> Structure:
        """That of a program."""
        return cls({n: SiteShape.of(s) for n, s in reading.latents.items()}, reading.blocks, reading.layouts)
