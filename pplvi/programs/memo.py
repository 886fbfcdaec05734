"""What is remembered of a model and its guide, so that they are inspected and checked on their first run only."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

Key = tuple[int | None, ...]


@dataclass(frozen=True)
class Layout:
    """What one plain run of a model and guide shows. It is a hint: a run that needs more of it corrects it.

    :ivar nesting: how deep plates nest.
    :ivar enumerated: whether sites are enumerated.
    :ivar own_subsamples: plates to which the model itself gives indices (``pyro.plate(..., subsample=...)``).
    :ivar compared: whether particles in one call have been found to have the densities that they have alone.
    :ivar dreams_together: whether several dreams in one call have never failed.
    """

    nesting: int
    enumerated: bool
    own_subsamples: frozenset[str]
    compared: bool = False
    dreams_together: bool = True


_LAYOUTS: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Key, Layout]]] = WeakKeyDictionary()


def _key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Key:
    """Numbers of dimensions: a column where a vector is meant must not broadcast unseen."""
    return tuple(value.dim() if isinstance(value, Tensor) else None for value in (*args, *kwargs.values()))


def recall(model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout | None:
    """The layout of a pair for arguments with these numbers of dimensions, if there has been one."""
    with suppress(KeyError, TypeError):
        return _LAYOUTS[model][guide][_key(args, kwargs)]
    return None


def remember(model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: Layout) -> None:
    """Keep a layout for as long as both programs live."""
    with suppress(TypeError):  # not hashable or not weakly referable: inspected anew at every call
        layouts = _LAYOUTS.setdefault(model, WeakKeyDictionary()).setdefault(guide, {})
        layouts[_key(args, kwargs)] = layout
