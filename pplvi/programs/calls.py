"""The arguments of a step: tensors, which a compiled program takes anew at every call, and all else, which is fixed."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pplvi.kinds.kinds import is_whole
from pplvi.types import Call

LastBatch = Literal["compile", "drop", "pad"]


def to_call(item: Any) -> Call:
    """Arguments and keyword arguments of the model for one item of the data.

    :raises ValueError: if the item is no tensor, tuple, list or dictionary.

    >>> to_call({"x": 1}), to_call([1, 2])
    (((), {'x': 1}), ((1, 2), {}))
    """
    if isinstance(item, (Tensor, np.ndarray)) or hasattr(item, "to_numpy"):
        return (item,), {}
    if isinstance(item, Mapping):
        return (), {str(key): value for key, value in item.items()}
    if isinstance(item, (tuple, list)):
        return tuple(item), {}
    raise ValueError(
        f"the data yielded a {type(item).__name__}: expected a tuple or list of the model's arguments, a dictionary of "
        "its keyword arguments, or one tensor or array."
    )


def checked_call(args: Any, kwargs: Any, example: str) -> Call:
    """Arguments and keyword arguments of the model as a user gave them.

    :param example: how the caller is called.
    :raises ValueError: for arguments that are no tuple or list, or keyword arguments that are no dictionary.

    >>> checked_call([1, 2], None, "fit(model, guide, args=(x, y))")
    ((1, 2), {})
    """
    if not isinstance(args, (tuple, list)):
        raise ValueError(f"args is a {type(args).__name__}: expected a tuple of the model's arguments, {example}.")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ValueError(
            f"kwargs is a {type(kwargs).__name__}: expected a dictionary of the model's keyword arguments. Pass all "
            f"positional ones as one tuple: {example}."
        )
    return tuple(args), dict(kwargs or {})


def check_counts(least: int = 1, /, **counts: Any) -> None:
    """Check that arguments are whole numbers of at least 1, or of another least one.

    :param counts: values by the names under which they were given.
    :raises ValueError: with the first that is not.

    >>> check_counts(num_codes=3), check_counts(0, sweeps=0)
    (None, None)
    """
    for name, value in counts.items():
        if not (is_whole(value) and value >= least):
            raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}.")


@dataclass(frozen=True, eq=False)
class Arguments:
    """A call, taken apart.

    :ivar leaves: what is in the nested containers of the call.
    :ivar structure: the containers.

    >>> arguments = Arguments.of((torch.zeros(3), 2), {"beta": torch.tensor(0.5)})
    >>> len(arguments.tensors), arguments.size
    (2, 3)
    >>> arguments.call([torch.ones(1), torch.tensor(0.1)])
    ((tensor([1.]), 2), {'beta': tensor(0.1000)})
    """

    leaves: Sequence[Any]
    structure: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Take a call apart."""
        return cls(*pytree.tree_flatten((args, dict(kwargs))))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves."""
        return [x for x in self.leaves if isinstance(x, Tensor)]

    @cached_property
    def key(self) -> Hashable:
        """Equal for calls that can use the same program: layouts and dtypes of tensors, values of all else."""
        return self.structure, tuple(map(_key, self.leaves))

    @property
    def size(self) -> int | None:
        """Length of the first dimension of the first tensor that has one."""
        return next((len(x) for x in self.tensors if x.dim()), None)

    def call(self, tensors: Iterable[Tensor]) -> Call:
        """The call with these tensors in place of its own."""
        new = iter(tensors)
        return pytree.tree_unflatten([next(new) if isinstance(x, Tensor) else x for x in self.leaves], self.structure)

    def padded(self, size: int) -> Arguments:
        """Tensors as long as the batch made ``size`` long by starting over from their first elements.

        >>> Arguments.of((torch.tensor([1, 2]),), {}).padded(3).tensors
        [tensor([1, 2, 1])]
        """
        short = self.size
        index = torch.arange(size) % (short or 1)
        return Arguments([x[index.to(x.device)] if _is_long(x, short) else x for x in self.leaves], self.structure)

    def fitted(self, size: int | None, last_batch: LastBatch) -> Arguments | None:
        """As long as ``size``: a shorter one as it is, ``None``, or padded, by choice.

        >>> short = Arguments.of((torch.tensor([1, 2]),), {})
        >>> [short.fitted(3, "compile") is short, short.fitted(3, "drop"), short.fitted(3, "pad").tensors]
        [True, None, [tensor([1, 2, 1])]]
        """
        if size is None or self.size is None or self.size >= size or last_batch == "compile":
            return self
        return None if last_batch == "drop" else self.padded(size)


def check_last_batch(last_batch: Any) -> None:
    """Check an argument of this name.

    :raises ValueError: for an unknown one.
    """
    if last_batch not in get_args(LastBatch):
        raise ValueError(f"last_batch={last_batch!r}: expected 'compile', 'drop' or 'pad'.")


def _is_long(leaf: Any, length: int | None) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == length


def _key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    if isinstance(leaf, np.ndarray):
        return leaf.shape, leaf.dtype, hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).digest()
    return (type(leaf), leaf) if isinstance(leaf, (bool, int, float, str, bytes, type(None))) else id(leaf)


def in_runs(calls: Iterable[Arguments], length: int) -> Iterator[list[Arguments]]:
    """Neighbours that can use the same program, at most ``length`` at a time."""
    run: list[Arguments] = []
    for call in calls:
        if run and (len(run) == length or call.key != run[0].key):
            yield run
            run = []
        run.append(call)
    if run:
        yield run


def stacked(calls: Sequence[Arguments], length: int) -> list[Tensor]:
    """The tensors of several calls along a new first dimension, filled up with the last one.

    >>> stacked([Arguments.of((torch.tensor([1.0]),), {})], 2)
    [tensor([[1.],
            [1.]])]
    """
    last = [calls[-1].tensors] * (length - len(calls))
    return [torch.stack(column) for column in zip(*(call.tensors for call in calls), *last, strict=True)]
