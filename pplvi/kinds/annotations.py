"""What an annotation says of a value, as a kind of argument."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import numpy as np
import torch
from torch import Tensor, nn

from pplvi.kinds.kinds import Condition, is_number, is_whole

_TYPES: dict[Any, Condition] = {
    bool: Condition("True or False", lambda x: isinstance(x, (bool, np.bool_))),
    int: Condition("a whole number", is_whole),
    float: Condition("a number", is_number),
    str: Condition("a string", lambda x: isinstance(x, str)),
    type(None): Condition("None", lambda x: x is None),
    Tensor: Condition(
        "a Tensor, dense and with values",
        lambda x: isinstance(x, Tensor) and x.layout is torch.strided and x.device.type != "meta",
    ),
    nn.Module: Condition("a torch.nn.Module", lambda x: isinstance(x, nn.Module)),
}


@cache
def condition_of(hint: Any) -> Condition | None:
    """What an annotation says; ``None`` if that is nothing, as of ``Any``.

    >>> choice = condition_of(Literal["a", "b"] | None)
    >>> choice.words, choice.holds("a"), choice.holds("c")
    ("'a' or 'b' or None", True, False)
    >>> condition_of(Sequence[float]).holds([0.0, float("nan")])
    False
    """
    if hint in _TYPES:
        return _TYPES[hint]
    origin = get_origin(hint)
    if origin is None:
        return _of_class(hint) if isinstance(hint, type) else None
    read = _FORMS.get(origin)
    return read(*get_args(hint)) if read is not None else _of_class(origin) if isinstance(origin, type) else None


def misfit(hint: Any, value: Any, where: str) -> str | None:
    """Where a value is not what a ``TypedDict`` says, and what is there; ``None`` if it is.

    >>> from typing import TypedDict
    >>> class Point(TypedDict):
    ...     place: list[float]
    >>> misfit(Point, {"place": [0.5]}, "point"), misfit(Point, {}, "point")
    (None, "point lacks 'place'")
    """
    if is_typeddict(hint):
        if not isinstance(value, dict):
            return f"{where or 'it'} is a {type(value).__name__}, expected a dictionary"
        hints = get_type_hints(hint, include_extras=True)
        optional = {key for key, each in hints.items() if get_origin(each) is NotRequired}
        if lacking := sorted(key for key in hints if key not in value and key not in optional):
            return f"{where or 'it'} lacks {', '.join(map(repr, lacking))}"
        there = {k: get_args(each)[0] if k in optional else each for k, each in hints.items() if k in value}
        parts = ((each, value[key], f"{where}[{key!r}]" if where else key) for key, each in there.items())
    elif get_origin(hint) is list and is_typeddict(get_args(hint)[0]) and isinstance(value, list):
        parts = ((get_args(hint)[0], each, f"{where}[{index}]") for index, each in enumerate(value))
    else:
        kind = condition_of(hint)
        fits = kind is None or kind.holds(value)
        return None if fits or kind is None else f"{where} is a {type(value).__name__}, expected {kind.words}"
    return next((fault for part in parts if (fault := misfit(*part)) is not None), None)


def _of_class(kind: type) -> Condition | None:
    if kind is object or kind is Any:
        return None
    if getattr(kind, "_is_protocol", False):
        return _of_protocol(kind)
    name = f"{_article(kind.__name__)} {kind.__name__}"
    return _FORMS[kind]() if kind in _FORMS else Condition(name, lambda x: isinstance(x, kind))


def _of_protocol(kind: type) -> Condition:
    """An object that has what the protocol names."""
    named = {*vars(kind), *getattr(kind, "__annotations__", {})}
    wanted = sorted(name for name in named if name == "__call__" or name[0] != "_")
    words = "a callable" if wanted == ["__call__"] else f"an object with {', '.join(wanted)}"
    return Condition(
        f"{words}, as {kind.__name__}",
        lambda x: not isinstance(x, type) and all(hasattr(x, name) for name in wanted),
    )


def _article(name: str) -> str:
    return "an" if name[0] in "AEIO" else "a"


def _annotated(hint: Any, *metadata: Any) -> Condition | None:
    base = condition_of(hint)
    kinds = [_named(each) if isinstance(each, str) else each for each in metadata]
    kinds = [kind for kind in kinds if isinstance(kind, Condition)]
    every = [kind for kind in (base, *kinds) if kind is not None]
    return Condition(every[-1].words, lambda x: all(kind.holds(x) for kind in every)) if every else None


def _named(words: str) -> Condition:
    """What words alone say of a type: a value, which a class is not."""
    return Condition(words, lambda x: not isinstance(x, type))


def _union(*hints: Any) -> Condition | None:
    kinds = [condition_of(hint) for hint in hints]
    known = [kind for kind in kinds if kind is not None]
    if len(known) < len(kinds):
        return None
    return Condition(" or ".join(kind.words for kind in known), lambda x: any(kind.holds(x) for kind in known))


def _literal(*choices: Any) -> Condition:
    words = ", ".join(map(repr, choices[:-1])) + " or " * (len(choices) > 1) + repr(choices[-1])
    return Condition(words, lambda x: any(type(x) is type(choice) and x == choice for choice in choices))


def _mapping(key: Any = Any, value: Any = Any) -> Condition:
    parts = condition_of(key), condition_of(value)
    of = f" from {_plural(parts[0])} to {_plural(parts[1])}" if all(parts) else ""
    return Condition(
        f"a dictionary{of}",
        lambda x: isinstance(x, Mapping) and all(_holds(parts[0], k) and _holds(parts[1], v) for k, v in x.items()),
    )


def _sequence(item: Any = Any) -> Condition:
    kind = condition_of(item)
    return Condition(
        f"a sequence, each {kind.words}" if kind else "a sequence",
        lambda x: _is_sequence(x) and all(_holds(kind, y) for y in x),
    )


def _iterable(*_: Any) -> Condition:
    return Condition("something to iterate over", lambda x: hasattr(x, "__iter__") or hasattr(x, "__getitem__"))


def _tuple(*items: Any) -> Condition:
    if not items or items[-1] is Ellipsis:
        one = condition_of(items[0]) if items else None
        return Condition(
            f"a tuple, each {one.words}" if one else "a tuple, such as (x, y)",
            lambda x: isinstance(x, (tuple, list)) and all(_holds(one, y) for y in x),
        )
    kinds = [condition_of(item) for item in items]
    words = ", ".join(kind.words if kind else "anything" for kind in kinds)
    return Condition(
        f"({words})",
        lambda x: isinstance(x, (tuple, list)) and len(x) == len(kinds) and all(map(_holds, kinds, x)),
    )


def _callable(*_: Any) -> Condition:
    return Condition("a callable", callable)


def _class(*_: Any) -> Condition:
    return Condition("a class", lambda x: isinstance(x, type))


def _holds(kind: Condition | None, value: Any) -> bool:
    return kind is None or kind.holds(value)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _plural(kind: Condition | None) -> str:
    return kind.words if kind else "anything"


_FORMS: dict[Any, Callable[..., Condition | None]] = {
    Annotated: _annotated,
    Union: _union,
    types.UnionType: _union,
    Literal: _literal,
    Mapping: _mapping,
    dict: _mapping,
    Sequence: _sequence,
    list: _sequence,
    Iterable: _iterable,
    tuple: _tuple,
    Callable: _callable,
    type: _class,
}
