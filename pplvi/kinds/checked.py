"""A call is checked by its signature: whatever an annotation says of an argument has to hold."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

from pplvi.kinds.annotations import condition_of
from pplvi.kinds.kinds import HUGE, Condition

T = TypeVar("T")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_LONGEST = 80


def checked(target: T) -> T:
    """A function or class whose arguments have to be what its signature says.

    Types are checked, choices (``Literal``), what is in sequences and mappings, and the kinds of
    :mod:`pplvi.kinds.kinds`, before anything is done.

    :returns: the same class with a checked constructor, or the function with a check before it, which raises
        ``ValueError`` with the argument, what came and what was expected.

    >>> from pplvi.kinds.kinds import Count
    >>> def repeated(word: str, times: Count = 1) -> str:
    ...     return word * times
    >>> checked(repeated)("ab", 2)
    'abab'
    >>> checked(repeated)("ab", times=0)
    Traceback (most recent call last):
    ValueError: times=0: expected a whole number of at least 1.
    """
    if isinstance(target, type):
        own: Any = target
        own.__init__ = _guarded(own.__init__)
        return target
    return cast(T, _guarded(target))


def check_values(hint: Any, /, **values: Any) -> None:
    """Check values where a signature cannot say what they have to be.

    :param hint: a type or a kind.
    :param values: by the names under which they were given.
    :raises ValueError: with the first that is something else.

    >>> check_values(int | None, size=None)
    """
    kind = condition_of(hint)
    for name, value in values.items():
        if kind is not None and not kind.holds(value):
            raise _refusal(name, value, kind)


def _guarded(function: Any) -> Any:
    check = _check(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        check(args, kwargs)
        return function(*args, **kwargs)

    return call


def _check(function: Any) -> Callable[[tuple[Any, ...], Mapping[str, Any]], None]:
    names = [name for name, p in inspect.signature(function).parameters.items() if p.kind in _POSITIONAL]
    found: dict[str, Condition] = {}
    read: list[bool] = []

    def check(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not read:  # at the first call, when all that annotations name is defined
            found.update(_kinds(function))
            read.append(True)
        for name, value in zip(names, args, strict=False):
            if name in found and not found[name].holds(value):
                raise _refusal(name, value, found[name])
        for name, value in kwargs.items():
            if name in found and not found[name].holds(value):
                raise _refusal(name, value, found[name])

    return check


def _kinds(function: Any) -> dict[str, Condition]:
    """The kinds of a function's parameters; of those whose annotation says nothing that can be checked, none."""
    names, found = inspect.unwrap(function).__globals__, {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in _POSITIONAL or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            try:
                kind = condition_of(_hint(parameter.annotation, names))
            except NameError:  # of what is imported for type checkers alone
                kind = None
            if kind is not None:
                found[name] = kind
    return found


def _hint(annotation: Any, names: dict[str, Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    return typing.get_type_hints(holder, globalns=names, include_extras=True)["it"]


def _refusal(name: str, value: Any, kind: Condition) -> ValueError:
    expected = kind.words
    if isinstance(value, int) and abs(value) >= HUGE:
        expected += ", and less than 2**32"
    return ValueError(f"{name}{_shown(value)}: expected {expected}.")


def _shown(value: Any) -> str:
    """What came: itself if that is short, or else its type."""
    try:
        text = repr(value)
    except Exception:  # of an object that is broken
        text = "\n"
    return f" is a {type(value).__name__}" if "\n" in text or len(text) > _LONGEST else f"={text}"
