"""The operations of a recorded graph: what is left of its nodes without those that change nothing."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from pplvi.compile.broadcasting import Shapes
from pplvi.compile.watching import written_by

aten = torch.ops.aten

LEAST = 4  # members of a class that is worth a stack, terms of a long sum
SAME = {aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach.default, aten.alias.default}
VIEWED = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
FILLED = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}
_NEUTRAL: dict[Any, float] = {
    aten.add.Tensor: 0.0,
    aten.sub.Tensor: 0.0,
    aten.mul.Tensor: 1.0,
    aten.div.Tensor: 1.0,
    aten.pow.Tensor_Scalar: 1.0,
}
_FLOATS = {torch.float32, torch.float64}


class Unlike(Exception):
    """The graph is not of a kind that can be rewritten; the recording serves as it is."""


@dataclass(frozen=True)
class Shape:
    """Shape and dtype of a value; of what is no tensor, no dtype."""

    size: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


@dataclass(eq=False)
class Op:
    """One operation that is left, on the operations that are.

    :ivar place: of its node in the graph.
    :ivar leaves: arguments, flat: operations and constants; ``spec`` is the way back.
    :ivar fresh: the empty tensor that a random operation fills.
    """

    node: fx.Node
    place: int
    target: Any
    leaves: list[Any]
    spec: Any
    shape: Shape
    fresh: fx.Node | None = None
    terms: list[Op] = field(default_factory=list)
    users: list[Op] = field(default_factory=list)
    depth: int = 0
    unit: Unit | None = None

    @property
    def inputs(self) -> list[Op]:
        """The operations that it depends on; of a long sum, the terms."""
        return self.terms or [x for x in self.leaves if isinstance(x, Op)]

    @property
    def random(self) -> bool:
        """Whether it draws."""
        return torch.Tag.nondeterministic_seeded in getattr(self.target, "tags", ())


@dataclass(eq=False)
class Unit:
    """Operations of one class that become one.

    :ivar kind: ``"literal"``, ``"input"``, ``"pick"`` (parts of one value), ``"place"`` (gradients of such parts),
        ``"draw"``, ``"add"`` or ``"call"``.
    """

    kind: str
    members: list[Op]

    @property
    def first(self) -> Op:
        """A member that stands for all, but for its size."""
        return self.members[0]

    @cached_property
    def size(self) -> tuple[int, ...]:
        """What all members fit in."""
        return largest(self.members)


def largest(ops: Sequence[Op]) -> tuple[int, ...]:
    """The largest size in each dimension."""
    return tuple(map(max, zip(*(op.shape.size for op in ops), strict=True)))


class Graph:
    """The operations of a recorded graph, without those that change nothing or are done twice.

    :param graph: a recorded graph.
    :param inputs: what it is run with once, which moves the random state.
    :ivar ops: in the order of the graph, inputs first.
    :ivar results: what is returned.
    :raises Unlike: for writes to what is given or to parts of a value, and graphs within the graph.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        self._seen_shapes, self.ops = Shapes(graph), list[Op]()
        self._seen_shapes.run(*inputs)
        self._of: dict[fx.Node, Op] = {}
        self._seen: dict[Any, Op] = {}
        self._empty: set[Any] = set()
        self._names: dict[Any, list[fx.Node]] = {}
        for place, node in enumerate(graph.graph.nodes):
            if node.op == "output":
                self.results = [self._of[x] for x in node.args[0]]
            else:
                self._take(node, place)
        for op in self.ops:
            for x in op.inputs:
                x.users.append(op)
        self._find_sums()

    def _take(self, node: fx.Node, place: int) -> None:
        if node.op not in ("placeholder", "call_function"):
            raise Unlike
        if node.target is aten.empty.memory_format:
            self._empty.add(node)
            return
        target, first = node.target, node.args[0] if node.args else None
        writes = node.op == "call_function" and bool(written_by(target))
        fresh = first if writes and first in self._empty and isinstance(first, fx.Node) else None
        if any(x in self._empty for x in node.all_input_nodes if x is not fresh or len(x.users) > 1):
            raise Unlike
        leaves, spec = tree_flatten((node.args[1:] if fresh else node.args, node.kwargs))
        leaves = [self._of[x] if isinstance(x, fx.Node) else x for x in leaves]
        new = _without_writing(target) if writes and not fresh else target
        shape = Shape(self._seen_shapes.shapes.get(node, ()), self._seen_shapes.dtypes.get(node))
        op = Op(node, place, new, leaves, spec, shape, fresh)
        _plain(op)
        stands = self._same(op) or (None if fresh or op.random or node.op == "placeholder" else self._twice(op))
        self._of[node] = stands or op
        if stands is None:
            self.ops.append(op)
        self._follow(node, first, writes and not fresh)

    def _follow(self, node: fx.Node, first: Any, writes: bool) -> None:
        """Note whose memory a value shares; what is written to is another value from here on, under all its names."""
        views = node.op == "call_function" and isinstance(first, fx.Node) and first in self._names and _views(node)
        names = self._names[first] if views or writes else []
        if writes:
            if names[0].op == "placeholder" or any(self._of[x] is not self._of[first] for x in names):
                raise Unlike
            self._of.update(dict.fromkeys(names, self._of[node]))
        names.append(node)
        self._names[node] = names

    def _same(self, op: Op) -> Op | None:
        """Its argument, if that is all that it returns."""
        source = op.leaves[0] if op.leaves else None
        if not isinstance(source, Op) or op.shape != source.shape or op.fresh:
            return None
        if op.target in SAME or op.target in VIEWED or op.target is aten.expand.default:
            return source
        neutral = len(op.leaves) == 2 and isinstance(op.leaves[1], (int, float)) and op.target in _NEUTRAL
        return source if neutral and op.leaves[1] == _NEUTRAL[op.target] else None

    def _twice(self, op: Op) -> Op | None:
        """The operation that has returned the same before."""
        leaves = op.leaves[1:] if op.target in FILLED else op.leaves
        key = (op.target, op.shape, str(op.spec), *map(_named, leaves))
        first = self._seen.setdefault(key, op)
        return first if first is not op else None

    def _find_sums(self) -> None:
        """Long chains of additions become sums of their terms."""
        inside: set[Op] = set()
        kept = Counter(self.results)
        for op in reversed(self.ops):
            if _adds(op) and op not in inside:
                terms, within = _terms(op, kept)
                if len(terms) >= LEAST:
                    op.terms = terms
                    inside.update(within)
        self.ops = [op for op in self.ops if op not in inside]
        for op in self.ops:
            op.users = []
        for op in self.ops:
            for x in op.inputs:
                x.users.append(op)
            op.depth = 1 + max((x.depth for x in op.inputs), default=-1)


def _without_writing(target: Any) -> Any:
    """The operation that returns what this one would write."""
    name, overload = target._schema.name.split("::")[1], target._overloadname
    found = getattr(getattr(aten, name.removesuffix("_"), None), overload, None)
    if list(written_by(target)) != [0] or not name.endswith("_") or found is None:
        raise Unlike
    return found


def _views(node: fx.Node) -> bool:
    """Whether the result may share the memory of the first argument."""
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return any(x.alias_info is not None for x in returns)


def _plain(op: Op) -> None:
    """An element of what ``unbind`` returns is one of ``select``."""
    source = op.leaves[0] if op.leaves else None
    if op.target is operator.getitem and isinstance(source, Op) and source.target is aten.unbind.int:
        dim = source.leaves[1] if len(source.leaves) > 1 else 0
        op.target, (op.leaves, op.spec) = aten.select.int, tree_flatten(((source.leaves[0], dim, op.leaves[1]), {}))


def _named(leaf: Any) -> Any:
    return ("op", id(leaf)) if isinstance(leaf, Op) else (type(leaf), str(leaf))


def _adds(op: Op) -> bool:
    if op.target is not aten.add.Tensor or len(op.leaves) != 2 or not all(isinstance(x, Op) for x in op.leaves):
        return False
    return op.shape.dtype in _FLOATS and all(x.shape.dtype == op.shape.dtype for x in op.leaves)


def _terms(root: Op, kept: Mapping[Op, int]) -> tuple[list[Op], list[Op]]:
    """What a chain of additions adds up, and the additions within."""
    terms, within, waiting = list[Op](), list[Op](), list(reversed(root.leaves))
    while waiting:
        op = waiting.pop()
        if _adds(op) and len(op.users) == 1 and not kept[op] and op.shape == root.shape:
            within.append(op)
            waiting.extend(reversed(op.leaves))
        else:
            terms.append(op)
    return terms, within
