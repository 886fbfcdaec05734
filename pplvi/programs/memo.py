"""What is remembered of a model and its guide, so that they are inspected and checked on their first run only."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
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
    :ivar indices: plates that are subsampled, whose index draws are no particle's own.
    :ivar ways: how several particles are run, by the word that asked for it (``None``: any way).
    :ivar dreams_together: whether several dreams in one call have never failed.
    """

    nesting: int
    enumerated: bool
    own_subsamples: frozenset[str]
    indices: frozenset[str] = frozenset()
    ways: Mapping[str | None, Any] = field(default_factory=dict, compare=False)
    dreams_together: bool = True


_ByCall = dict[Key, Layout]
_LAYOUTS: WeakKeyDictionary[Any, dict[Any, WeakKeyDictionary[Any, dict[Any, _ByCall]]]] = WeakKeyDictionary()


def _owner(program: Any) -> tuple[Any, Any]:
    """What lives as long as a program, and which of its methods the program is: bound methods are made anew at will."""
    return getattr(program, "__self__", program), getattr(program, "__func__", None)


def _key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Key:
    """Numbers of dimensions: a column where a vector is meant must not broadcast unseen."""
    return tuple(value.dim() if isinstance(value, Tensor) else None for value in (*args, *kwargs.values()))


def recall(model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout | None:
    """The layout of a pair for arguments with these numbers of dimensions, if there has been one."""
    (ours, method), (theirs, other) = _owner(model), _owner(guide)
    with suppress(KeyError, TypeError):
        return _LAYOUTS[ours][method][theirs][other][_key(args, kwargs)]
    return None


def remember(model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: Layout) -> None:
    """Keep a layout for as long as both programs live."""
    (ours, method), (theirs, other) = _owner(model), _owner(guide)
    with suppress(TypeError):  # not hashable or not weakly referable: inspected anew at every call
        guides = _LAYOUTS.setdefault(ours, {}).setdefault(method, WeakKeyDictionary())
        guides.setdefault(theirs, {}).setdefault(other, {})[_key(args, kwargs)] = layout
