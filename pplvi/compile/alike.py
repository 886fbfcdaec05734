"""Which operations of a recorded graph are alike: the same ones on the same kinds of values, once for every site.

Two nodes are of one class if their operations, constants and shapes are equal and their inputs are, position by
position, of one class. Members of a class never depend on each other, and no two classes depend on each other both
ways: what a member depends on is nearer to the inputs by a number of steps that all members share.
"""

from __future__ import annotations

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from pplvi.compile.broadcasting import Shapes
from pplvi.compile.watching import written_by

aten = torch.ops.aten

LEAST = 4  # members of a class that is worth a stack
MOST = 2**22  # numbers in a stack
_SAME = {aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach.default, aten.alias.default}
_RESHAPED = {aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.reshape.default}
_NEUTRAL: dict[Any, float] = {
    aten.add.Tensor: 0.0,
    aten.sub.Tensor: 0.0,
    aten.mul.Tensor: 1.0,
    aten.div.Tensor: 1.0,
    aten.pow.Tensor_Scalar: 1.0,
}
_FILLED = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}
_FLOATS = {torch.float32, torch.float64}
_FACTORIES = {aten.randn.default, aten.rand.default}
_DRAWN = {  # whose draws have the shape of their arguments
    aten._standard_gamma.default,
    aten._sample_dirichlet.default,
    aten.poisson.default,
    aten.bernoulli.default,
    aten.binomial.default,
}
_MASKED = {aten.index.Tensor, aten.index_put.default, aten._index_put_impl.default}
JOINED = {aten.cat.default, aten.stack.default}


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
        """A member that stands for all."""
        return self.members[0]


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
        if op.target in _SAME or op.target in _RESHAPED:
            return source
        neutral = len(op.leaves) == 2 and isinstance(op.leaves[1], (int, float)) and op.target in _NEUTRAL
        return source if neutral and op.leaves[1] == _NEUTRAL[op.target] else None

    def _twice(self, op: Op) -> Op | None:
        """The operation that has returned the same before."""
        leaves = op.leaves[1:] if op.target in _FILLED else op.leaves
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
            part = members[0].leaves[0] if key[0] == "place" else members[0]
            size = max(1, MOST // max(1, math.prod(part.shape.size)))
            if key[0] not in ("one", "apart") and min(len(members), size) >= LEAST:
                for start in range(0, len(members), size):
                    yield Unit(key[0], members[start : start + size])

    def _joined(self, found: Mapping[Any, list[Op]]) -> Mapping[Any, list[Op]]:
        """Classes that differ in where their inputs come from alone are one, where there are many."""
        loose: dict[Any, list[Any]] = defaultdict(list)
        for key, (op, *_) in found.items():
            kinds = [_same_for(x, op) for x in op.leaves]
            loose[("call", op.target, op.shape, str(op.spec), *kinds) if key[0] == "call" else key].append(key)
        several = {key: keys for key, keys in loose.items() if len(keys) >= LEAST}
        alone = {key: found[key] for keys in loose.values() if len(keys) < LEAST for key in keys}
        return {**alone, **{key: [op for one in keys for op in found[one]] for key, keys in several.items()}}

    def _key(self, op: Op) -> tuple[Any, ...]:
        shape = op.shape
        if op.node.op == "placeholder":
            return ("literal" if op.node in self.fixed else "input", shape) if op.node in self.given else ("one", op)
        if op.terms:
            return ("add", shape, *(self._class[x] for x in op.terms))
        if self._picks(op):
            return ("pick", op.target, id(op.leaves[0]), op.leaves[1], shape)
        if (where := placed(op)) is not None:
            return ("place", op.target, self._class[op.leaves[0]], where[0], op.leaves[0].shape, shape)
        return (self._way(op), op.target, shape, str(op.spec), *self._named(op))

    def _way(self, op: Op) -> str:
        """How operations of one class are done: together, if that can be."""
        if op.random:
            known = op.target in _DRAWN if op.inputs else op.fresh is not None or op.target in _FACTORIES
            return "draw" if self.noise and known else "apart"
        operation = isinstance(op.target, torch._ops.OpOverload) and op.shape.dtype is not None
        memory = op.target in JOINED or "strided" in str(op.target)
        return "call" if operation and op.inputs and not memory else "apart"

    def _named(self, op: Op) -> list[Any]:
        same = {x: ("class", self._class[x]) for x in op.inputs if not _is_mask(x, op)}
        return [_same_for(x, op) if not isinstance(x, Op) else same.get(x) or _same_for(x, op) for x in op.leaves]

    def _picks(self, op: Op) -> bool:
        """Whether it is a part of a value that has no class of its own."""
        long = 3 if op.target is aten.select.int else 4 if op.target is aten.slice.Tensor else 0
        plain = long and len(op.leaves) >= long and all(x == 1 for x in op.leaves[4:])
        return bool(plain) and op.leaves[2] >= 0 and self._alone(op.leaves[0])

    def _alone(self, op: Op) -> bool:
        return len(self._members[self._class[op]]) < LEAST

    def _order(self, op: Op) -> tuple[int, ...]:
        """In the order of the first inputs that differ; parts of one value by their position."""
        if self._picks(op):
            return (op.leaves[2], op.place)
        ranks = [(self._class[x], self._rank[x]) for x in op.inputs if not self._alone(x)]
        return (*(ranks[0] if ranks else (0, 0)), op.place)

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


def _is_mask(x: Op, user: Op) -> bool:
    return user.target in _MASKED and x.shape.dtype in (torch.bool, torch.uint8)  # values say what shape comes out


def _same_for(x: Any, user: Op) -> Any:
    """What of an argument is the same in alike operations, wherever it comes from."""
    return (id(x) if _is_mask(x, user) else x.shape) if isinstance(x, Op) else (type(x), str(x))


def placed(op: Op) -> tuple[int, int] | None:
    """Of the gradient of a part: the dimension and where the part begins."""
    if op.target is aten.select_backward.default:
        dim, start, step = *op.leaves[-2:], 1
    elif op.target is aten.slice_backward.default:
        dim, start, _, step = op.leaves[-4:]
    else:
        return None
    return (dim % len(op.shape.size), start) if start >= 0 and step == 1 else None
