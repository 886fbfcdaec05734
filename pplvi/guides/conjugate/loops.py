"""Which sites of a program are turns of a loop, and merged: factors of one form, rows of a normal block."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pplvi.guides.conjugate.merging import Places, merge
from pplvi.programs.masks import without_missing
from pplvi.programs.sites import is_enumerated

LEAST = 3  # fewer are no loop


@dataclass(frozen=True)
class LoopTurns:
    """Sites of a loop that are scored at once.

    :ivar sites: in the trace, in order.
    :ivar fn: their distribution; with several sites it has a first dimension over them.
    :ivar value: their value.
    :ivar mask: where enumerated sites count, of a shape that broadcasts to that of their density; ``None``: everywhere.
    """

    sites: tuple[Any, ...]
    fn: Any
    value: Any
    mask: torch.Tensor | None = None

    @property
    def name(self) -> str:
        """Of the sites: the first and the last."""
        names = [str(site["name"]) for site in self.sites]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"

    @property
    def device(self) -> torch.device | None:
        """Where their values are."""
        return self.value.device if isinstance(self.value, torch.Tensor) else None

    @property
    def is_enumerated(self) -> bool:
        """Whether they are enumerated latents."""
        return is_enumerated(self.sites[0])

    @property
    def shape(self) -> torch.Size:
        """Of their log density."""
        return torch.Size(self.fn.batch_shape)


def stem_of(name: str) -> str:
    """A name without its last number.

    >>> stem_of("x_12"), stem_of("beta")
    ('x_*', 'beta')
    """
    return re.sub(r"\d+(?!.*\d)", "*", name)


def turns(sites: Sequence[Any], rows: Places) -> list[LoopTurns]:
    """Sites with those of one form merged, in the order of the first of each."""
    groups: dict[Any, list[Any]] = {}
    for site in sites:
        groups.setdefault(_merged_turns(site), []).append(site)
    return [found for group in groups.values() for found in _merged(group, rows)]


def alone(site: Any) -> LoopTurns:
    """A site by itself."""
    mask = site["mask"]
    return LoopTurns((site,), site["fn"], without_missing(site), None if mask is None else torch.as_tensor(mask))


def form_of(site: Any) -> Any:
    """What sites that may be turns of one loop have in common but for scales and masks."""
    frames = tuple((f.name if f.vectorized else None, f.dim, f.size) for f in site["cond_indep_stack"])
    return stem_of(site["name"]), site["is_observed"], frames


def _merged_turns(site: Any) -> Any:
    """What sites that are scored at once have in common."""
    plain = isinstance(site["scale"], float | int) and site["mask"] is None and stem_of(site["name"]) != site["name"]
    return (*form_of(site), float(site["scale"])) if plain else site["name"]


def _merged(group: list[Any], rows: Places) -> list[LoopTurns]:
    """A group whole, or without its first turn, which often differs; one by one where that fails."""
    for skipped in (0, 1):
        rest = group[skipped:]
        if len(rest) >= LEAST and (found := merge([(s["fn"], without_missing(s)) for s in rest], rows)) is not None:
            return [*map(alone, group[:skipped]), LoopTurns(tuple(rest), *found)]
    return list(map(alone, group))
