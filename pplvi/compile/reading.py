"""What a recording has read of its arguments: Python values that follow from them are its constants.

``len(x)``, ``int(lengths.max())`` or a branch on an argument are written down with the values that they had. The
recording then holds for all arguments of which the same values would be read: the operations that lead from the
arguments to what was read are kept, and repeated on new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from pplvi.programs.calls import Arguments
from pplvi.programs.errors import warn
from pplvi.types import Program

MANY = 8  # programs for arguments of other shapes or values before a warning, and for other values before a refusal


@dataclass(frozen=True)
class Slot:
    """The place of a tensor among all that follow from the arguments alone."""

    index: int


@dataclass(frozen=True)
class Operation:
    """An operation on slots, and the slots of its results."""

    function: Any
    args: Any
    kwargs: Any
    results: tuple[Slot, ...]

    def uses(self) -> set[int]:
        """Slots that it needs."""
        leaves = tree_leaves((self.args, self.kwargs))
        return {leaf.index for leaf in leaves if isinstance(leaf, Slot)}

    def repeat(self, values: dict[int, Any]) -> None:
        """Work its results out from the values of its slots."""

        def fill(x: Any) -> Any:
            return values[x.index] if isinstance(x, Slot) else x

        args, kwargs = tree_map(fill, self.args), tree_map(fill, self.kwargs)
        found = tree_leaves(self.function(*args, **kwargs))
        values.update((slot.index, x) for slot, x in zip(self.results, found, strict=True))


@dataclass(frozen=True, eq=False)
class Guard:
    """Whether a recording holds for other arguments: whether it would read the same of them.

    >>> tape = Tape()
    >>> x = torch.tensor([1, 3])
    >>> tape.start([x])
    >>> tape.note(torch.amax, (x,), {}, top := torch.amax(x))
    >>> tape.read([top])
    >>> guard = tape.guard()
    >>> guard.holds([torch.tensor([3, 2])]), guard.holds([torch.tensor([4, 3])])
    (True, False)
    """

    operations: tuple[Operation, ...] = ()
    reads: tuple[tuple[Slot, Tensor], ...] = ()
    _known: list[tuple[Tensor, int]] = field(default_factory=list)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it does; tensors that it was asked of just before are not looked at again."""
        if not self.reads:
            return True
        if len(self._known) == len(tensors) and all(
            x is y and x._version == version for x, (y, version) in zip(tensors, self._known, strict=True)
        ):
            return True
        if not self._reads_the_same(tensors):
            return False
        self._known[:] = [(x, x._version) for x in tensors]
        return True

    @torch.no_grad()
    def _reads_the_same(self, tensors: Sequence[Tensor]) -> bool:
        values: dict[int, Any] = dict(enumerate(tensors))
        for operation in self.operations:
            operation.repeat(values)
        return all(_equal(values[slot.index], value) for slot, value in self.reads)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    same = one == other
    return bool((same | (one.isnan() & other.isnan()) if one.is_floating_point() else same).all())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments or results of an operation.

    >>> [x.item() for x in tensors_in((torch.tensor(1), [torch.tensor(2), 3], {"other": torch.tensor(4)}))]
    [1, 2, 4]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for x in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(x)


class Tape:
    """The operations on tensors that follow from the arguments alone, and which of them were read."""

    def __init__(self) -> None:
        self.slots: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.operations: list[Operation] = []
        self.reads: list[tuple[Slot, Tensor]] = []
        self.size = 0

    def start(self, tensors: Iterable[Tensor]) -> None:
        """The arguments."""
        for x in tensors:
            self._place(x)

    def _place(self, x: Tensor) -> Slot:
        slot = Slot(self.size)
        self.size += 1
        self.slots[x] = slot
        return slot

    def follows(self, *tree: Any) -> list[Tensor]:
        """The tensors in nested containers that follow from arguments."""
        return [x for x in tensors_in(tree) if x in self.slots] if self.size else []

    def note(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Keep an operation."""

        def as_slot(x: Any) -> Any:
            return self.slots[x] if isinstance(x, Tensor) and x in self.slots else x

        given = tree_map(as_slot, args), tree_map(as_slot, kwargs)
        leaves = tree_leaves(result)
        if all(isinstance(x, Tensor) for x in leaves):
            self.operations.append(Operation(function, *given, tuple(self._place(x) for x in leaves)))

    def read(self, tensors: Iterable[Tensor]) -> None:
        """Keep what a program has read."""
        with _disable_current_modes():
            self.reads += [(self.slots[x], x.detach().clone()) for x in tensors]

    def guard(self) -> Guard:
        """What has to be the same for other arguments: only what leads to something that was read."""
        needed, kept = {slot.index for slot, _ in self.reads}, []
        for operation in reversed(self.operations):
            if needed & {slot.index for slot in operation.results}:
                needed |= operation.uses()
                kept.append(operation)
        return Guard(tuple(kept[::-1]), tuple(self.reads))


class Variant(NamedTuple):
    """A program, and for which arguments of its shapes it is meant."""

    guard: Guard
    program: Program


class Programs:
    """The programs that were made so far, by the shapes of their arguments and what they have read of them."""

    def __init__(self) -> None:
        self._made: dict[Hashable, list[Variant]] = {}
        self._fixed: list[Arguments] = []  # what the keys of programs refer to by identity stays alive

    def __bool__(self) -> bool:
        return bool(self._made)

    def find(self, arguments: Arguments, kind: Hashable, make: Callable[[int], Variant]) -> Variant:
        """The program for such arguments.

        :param kind: what else tells programs apart, such as how many of their arguments are stacked.
        :param make: makes one, given how many there are for other values.
        """
        variants = self._made.setdefault((arguments.key, kind), [])
        for variant in variants:
            if variant.guard.holds(arguments.tensors):
                return variant
        variants.append(made := make(len(variants)))
        self._fixed.append(arguments)
        if sum(map(len, self._made.values())) == MANY:
            warn(
                f"{MANY} programs were made for different arguments. Pass what changes from step to step as a "
                "tensor of fixed shape, not as a Python number.",
            )
        return made
