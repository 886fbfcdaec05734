"""Which operations of a recorded graph are alike: the same ones on the same kinds of values, once for every site.

Two nodes are of one class if their operations, constants and shapes are equal and their inputs are, position by
position, of one class; sizes of data may differ where padding does no harm (:mod:`pplvi.compile.ragged`). Members of a
class never depend on each other, and no two classes depend on each other both ways: what a member depends on is nearer
to the inputs by a number of steps that all members share.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from pplvi.compile.operations import LEAST, Graph, Op, Unit, largest
from pplvi.compile.ragged import FACTORIES, blurred, mask_of, traits

aten = torch.ops.aten

MOST = 2**22  # numbers in a stack
_DRAWN = {  # whose draws have the shape of their arguments
    aten._standard_gamma.default,
    aten._sample_dirichlet.default,
    aten.poisson.default,
    aten.bernoulli.default,
    aten.binomial.default,
}
JOINED = {aten.cat.default, aten.stack.default}


class Classes:
    """The operations of a graph in units: those of one class together, where that leaves fewer operations.

    :param fixed: inputs whose values are numbers of the program, which may be stacked beforehand.
    :param given: inputs that are not carried from step to step.
    :param noise: whether draws may be taken together, which are other random numbers then.
    """

    def __init__(self, graph: Graph, fixed: set[fx.Node], given: set[fx.Node], noise: bool) -> None:
        self.graph, self.fixed, self.given, self.noise = graph, fixed, given, noise
        self._class: dict[Op, int] = {}
        self._members: dict[Any, list[Op]] = defaultdict(list)
        self._number: dict[Any, int] = {}
        self._rank: dict[Op, int] = {}
        by_depth: dict[int, list[Op]] = defaultdict(list)
        for op in graph.ops:
            by_depth[op.depth].append(op)
        self.units = [unit for depth in sorted(by_depth) for unit in self._level(by_depth[depth])]
        self._keep_what_gains()

    def _level(self, ops: Sequence[Op]) -> Iterator[Unit]:
        """Units of the operations at one depth, whose inputs all have their classes."""
        found: dict[Any, list[Op]] = defaultdict(list)
        for op in ops:
            found[self._key(op)].append(op)
        for key, members in self._joined(found).items():
            number = len(self._number)
            self._number[key] = number
            members.sort(key=self._order)
            self._members[number] = members
            for rank, op in enumerate(members):
                self._class[op], self._rank[op] = number, rank
            parts = [op.leaves[0] for op in members] if key[0] == "place" else members
            size = max(1, MOST // max(1, math.prod(largest(parts))))
            if key[0] not in ("one", "apart") and min(len(members), size) >= LEAST:
                for start in range(0, len(members), size):
                    yield Unit(key[0], members[start : start + size])

    def _joined(self, found: Mapping[Any, list[Op]]) -> Mapping[Any, list[Op]]:
        """Classes that differ in where their inputs come from alone are one, where there are many."""
        loose: dict[Any, list[Any]] = defaultdict(list)
        for key, (op, *_) in found.items():
            loose[("call", *traits(op)) if key[0] == "call" else key].append(key)
        several = {key: keys for key, keys in loose.items() if len(keys) >= LEAST}
        alone = {key: found[key] for keys in loose.values() if len(keys) < LEAST for key in keys}
        return {**alone, **{key: [op for one in keys for op in found[one]] for key, keys in several.items()}}

    def _key(self, op: Op) -> tuple[Any, ...]:
        shape = blurred(op.shape)
        if op.node.op == "placeholder":
            return ("literal" if op.node in self.fixed else "input", shape) if op.node in self.given else ("one", op)
        if op.terms:
            return ("add", shape, *(self._class[x] for x in op.terms))
        if self._picks(op):
            return ("pick", op.target, id(op.leaves[0]), op.leaves[1], shape)
        if (where := placed(op)) is not None:
            part = op.leaves[0]
            return ("place", op.target, self._class[part], where[0], blurred(part.shape), op.shape)
        sources = [self._class[x] for x in op.inputs if not mask_of(x, op)]
        return (self._way(op), *traits(op), *sources)

    def _way(self, op: Op) -> str:
        """How operations of one class are done: together, if that can be."""
        if op.random:
            known = op.target in _DRAWN if op.inputs else op.fresh is not None or op.target in FACTORIES
            return "draw" if self.noise and known else "apart"
        operation = isinstance(op.target, torch._ops.OpOverload) and op.shape.dtype is not None
        memory = op.target in JOINED or "strided" in str(op.target)
        return "call" if operation and op.inputs and not memory else "apart"

    def _picks(self, op: Op) -> bool:
        """Whether it is a part of a value that has no class of its own."""
        long = 3 if op.target is aten.select.int else 4 if op.target is aten.slice.Tensor else 0
        plain = long and len(op.leaves) >= long and all(x == 1 for x in op.leaves[4:])
        return bool(plain) and op.leaves[2] >= 0 and self._alone(op.leaves[0])

    def _alone(self, op: Op) -> bool:
        return len(self._members[self._class[op]]) < LEAST

    def _order(self, op: Op) -> tuple[int, ...]:
        """In the order of the inputs of the largest class; parts of one value by their position."""
        if self._picks(op):
            return (op.leaves[2], op.place)
        some = [x for x in op.inputs if not self._alone(x)]
        if not some:
            return (0, 0, op.place)
        leading = max(some, key=lambda x: len(self._members[self._class[x]]))
        return (self._class[leading], self._rank[leading], op.place)

    # ------------------------------------------------------------------ what a unit is worth

    def _keep_what_gains(self) -> None:
        """Take units apart that would cost more operations than they have members."""
        for unit in self.units:
            for op in unit.members:
                op.unit = unit
        results = set(self.graph.results)
        while losing := [unit for unit in self.units if self._cost(unit, results) >= len(unit.members)]:
            for unit in losing:
                for op in unit.members:
                    op.unit = None
            self.units = [unit for unit in self.units if unit.first.unit is unit]

    def _cost(self, unit: Unit, results: set[Op]) -> float:
        alone = sum(1 for op in unit.members if op in results or any(not _takes_stacks(u, op) for u in op.users))
        if unit.kind in ("literal", "input"):
            return alone + (0 if unit.kind == "literal" else 1)
        columns = zip(*(op.inputs for op in unit.members), strict=True)
        return 1 + alone + sum(_gathered(column) for column in columns)


def _takes_stacks(user: Op, op: Op) -> bool:
    """Whether an operation can use a value as part of its unit's stack."""
    if user.unit is not None:
        return True
    if user.terms or user.target in JOINED:
        return sum(1 for x in user.inputs if x.unit is op.unit) >= LEAST
    return False


def _gathered(column: Sequence[Op]) -> float:
    """Operations that make one argument of a unit."""
    if all(x is column[0] for x in column):
        return 0
    outside = sum(1 for x in set(column) if x.unit is None or x.unit.kind == "place")
    return outside / 2 + (len({id(x.unit) for x in column}) > 1)


def placed(op: Op) -> tuple[int, int] | None:
    """Of the gradient of a part: the dimension and where the part begins."""
    if op.target is aten.select_backward.default:
        dim, start, step = *op.leaves[-2:], 1
    elif op.target is aten.slice_backward.default:
        dim, start, _, step = op.leaves[-4:]
    else:
        return None
    return (dim % len(op.shape.size), start) if start >= 0 and step == 1 else None
