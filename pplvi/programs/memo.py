"""What is remembered of a model and its guide, so that they are inspected and checked on their first run only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor

from pplvi.programs.state import fingerprint

Found = TypeVar("Found")


class Memo(Generic[Found]):
    """What has been found of one or several programs together, for as long as all of them live.

    Programs that are not hashable or not weakly referable are not remembered: they are inspected anew at every call.

    >>> memo = Memo[int]()
    >>> def program():
    ...     pass
    >>> memo.keep((program, program), "nesting", 2)
    2
    >>> memo.recall((program, program), "nesting"), memo.recall((program, program), "other")
    (2, None)
    """

    def __init__(self) -> None:
        self._table: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def recall(self, programs: tuple[Any, ...], key: Hashable = None) -> Found | None:
        """What has been kept of these programs under a key, if anything.

        :param programs: the programs, always in the same order.
        :param key: what else it depends on, such as :func:`dimensions` or :func:`argument_shapes` of arguments.
        """
        owners, methods = _apart(programs)
        with suppress(KeyError, TypeError):
            table: Any = self._table
            for owner in owners:
                table = table[owner]
            found: Found = table[methods, key]
            return found
        return None

    def keep(self, programs: tuple[Any, ...], key: Hashable, found: Found) -> Found:
        """Keep, and return, what has been found of these programs."""
        owners, methods = _apart(programs)
        with suppress(TypeError):
            table = self._table
            for owner in owners[:-1]:
                table = table.setdefault(owner, WeakKeyDictionary())
            table.setdefault(owners[-1], {})[methods, key] = found
        return found


class Recent(Generic[Found]):
    """What was found of the last few inputs, each known by the numbers in it.

    It is for what depends on programs only by their values at some points: a program whose data or parameters have
    changed, wherever it keeps them, is another input, and two programs that compute the same are one.

    :param most: how many are kept.

    >>> import torch
    >>> recent = Recent[float](most=8)
    >>> [recent.find(torch.ones(2), lambda: total) for total in (2.0, 3.0)], recent.find(torch.zeros(2), lambda: 0.0)
    ([2.0, 2.0], 0.0)
    """

    def __init__(self, most: int) -> None:
        self._most, self._table = most, OrderedDict[str, Found]()

    def find(self, content: Any, how: Callable[[], Found]) -> Found:
        """What was found of this content, or what ``how`` finds now.

        :param content: nested containers of tensors, arrays, numbers and strings.
        """
        key = fingerprint(content)
        if key not in self._table:
            self._table[key] = how()
        self._table.move_to_end(key)
        if len(self._table) > self._most:
            self._table.popitem(last=False)
        return self._table[key]


def _apart(programs: tuple[Any, ...]) -> tuple[list[Any], tuple[Any, ...]]:
    """What lives as long as each program, and which of its methods each is: a bound method is made anew at will."""
    owners = [getattr(program, "__self__", program) for program in programs]
    return owners, tuple(getattr(program, "__func__", None) for program in programs)


def dimensions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Numbers of dimensions of arguments: a column where a vector is meant must not broadcast unseen.

    >>> import torch
    >>> dimensions((torch.zeros(3), 1.0), {"x": torch.zeros(3, 1)})
    (1, None, 2)
    """
    return tuple(value.dim() if isinstance(value, Tensor) else None for value in (*args, *kwargs.values()))


def argument_shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, ...]:
    """Shapes of arguments, for what depends on the sizes too.

    >>> import torch
    >>> argument_shapes((torch.zeros(3), 1.0), {})
    ((3,), None)
    """
    return tuple(tuple(value.shape) if isinstance(value, Tensor) else None for value in (*args, *kwargs.values()))


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


_LAYOUTS = Memo[Layout]()


def recall(model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout | None:
    """The layout of a pair for arguments with these numbers of dimensions, if there has been one."""
    return _LAYOUTS.recall((model, guide), dimensions(args, kwargs))


def remember(model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: Layout) -> None:
    """Keep a layout for as long as both programs live."""
    _LAYOUTS.keep((model, guide), dimensions(args, kwargs), layout)
