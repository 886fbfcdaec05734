"""What a guide of coordinate ascent keeps beside its program: names of buffers, facts of families, options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro

from pplvi.guides.conjugate.families import BlockFamily


def key_of(prefix: str, block: str, name: str) -> str:
    """Of a buffer, whose names have no dots."""
    return f"{prefix}{block}:{name}".replace(".", "/")


def constants_of(family: BlockFamily) -> dict[str, Any]:
    """What of a distribution is no tensor."""
    return {name: value for name, value in vars(family).items() if name not in ("canonical", "leaves")}


def checked_blocks(blocks: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """Groups of sites.

    :raises ValueError: for a site in two of them.
    """
    groups = tuple((group,) if isinstance(group, str) else tuple(group) for group in blocks)
    names = [name for group in groups for name in group]
    if len(set(names)) < len(names):
        raise ValueError(f"blocks={blocks!r}: expected every site in at most one block.")
    return groups


def named_values(init: Any) -> Mapping[str, Any]:
    """Sites whose first values a user names: those of ``init_to_value``."""
    values: Mapping[str, Any] = getattr(init, "keywords", {}).get("values", {})
    return values


def new_plates(found: Sequence[Any]) -> dict[str, Any]:
    """Plates of a guide by name."""
    once = {plate.name: plate for plate in found}
    return {p.name: pyro.plate(p.name, p.full_size, dim=p.dim, subsample_size=p.size) for p in once.values()}


def are_same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two calls have the same objects."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
