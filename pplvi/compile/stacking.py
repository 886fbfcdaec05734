"""A recorded graph in which what is done for many sites is done once, on a stack of them.

A program that loops over 200 sites records some 90 operations for each. Run one by one they take 60 ms a step, and a
compiler takes minutes over them; on stacks of 200 they are some 300 operations. Nothing is asked of the program: which
operations are alike is read from the graph (:mod:`pplvi.compile.alike`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate, pairwise
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_unflatten

from pplvi.compile.alike import JOINED, Classes, placed
from pplvi.compile.operations import LEAST, VIEWED, Graph, Op, Unit, Unlike, largest
from pplvi.compile.ragged import SUMS, fitted, padded_together, zero_padded
from pplvi.compile.tracing import FUSED_NOISE, Traced, lift_constants, one_fake_mode

aten = torch.ops.aten

MANY, WORTH = 1000, 1 / 2  # operations of a graph that is looked at; the part that may be left
_ROWWISE = {aten._standard_gamma_grad.default, aten._dirichlet_grad.default}  # on arguments of one shape


def stacked_alike(traced: Traced, inputs: Sequence[Tensor], num_carried: int, noise: bool) -> Traced:
    """The same step on stacks, where a long graph becomes half as long or shorter.

    :param traced: the recorded step.
    :param inputs: what it is called with, without its constants.
    :param num_carried: how many of the inputs come back, changed.
    :param noise: whether random numbers of one kind may be drawn together: others than one by one, of the same
        distribution.
    :returns: a step equal to the given one up to rounding.
    """
    before = len(traced.graph.graph.nodes)
    if before < MANY:
        return traced
    state = pyro.util.get_rng_state()
    try:
        with torch.no_grad():
            run = Stacks(traced, inputs, num_carried, noise)
            if len(run) > WORTH * before:
                return traced
            with one_fake_mode():
                graph = make_fx(run)(*inputs)
    except (Unlike, CycleError):
        return traced
    finally:
        pyro.util.set_rng_state(state)
    constants = lift_constants(graph, len(inputs))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    if len(graph.graph.nodes) > WORTH * before:
        return traced
    return Traced(graph, tuple(x.detach() for x in constants), traced.state, traced.guard)


class Stacks:
    """The step as a function of tensors, units of alike operations on stacks.

    :raises Unlike: for a graph that is not of operations on tensors alone.
    :raises CycleError: where draws that are kept in order need each other's stacks.
    """

    def __init__(self, traced: Traced, inputs: Sequence[Tensor], num_carried: int, noise: bool) -> None:
        places = [n for n in traced.graph.graph.nodes if n.op == "placeholder"]
        self._inputs, self._constants = places[: len(inputs)], places[len(inputs) :]
        graph = Graph(traced.graph, [*inputs, *traced.constants])
        copied = aten.lift_fresh_copy.default
        fixed = {n for n in self._constants if n.users and all(u.target is copied for u in n.users)}
        given = {*self._constants, *self._inputs[num_carried + 1 :]}
        self._units = Classes(graph, fixed, given, noise).units
        self._results, self._noise = graph.results, noise
        self._order = _order(graph.ops, noise)
        self._values = dict(zip(self._constants, traced.constants, strict=True))
        self._device = inputs[0].device
        self._literals = {u: self._stacked(u) for u in self._units if u.kind == "literal"}

    def __len__(self) -> int:
        """How many operations are left, those that bring stacks together apart."""
        return len(self._order)

    def _stacked(self, literals: Unit) -> Tensor:
        return padded_together([self._values[x.node] for x in literals.members], literals.size).to(self._device)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One step."""
        values = {**self._values, **dict(zip(self._inputs, inputs, strict=True))}
        run = _Run(values, self._noise, self._device)
        run.stacks.update(self._literals)
        for item in self._order:
            if isinstance(item, Unit):
                if item not in run.stacks:
                    run.unit(item)
            elif item.node in values:
                run.ones[item] = values[item.node]
            else:
                run.single(item)
        return tuple(run.one(op) for op in self._results)


def _order(ops: Sequence[Op], noise: bool) -> list[Op | Unit]:
    """Units and single operations, each behind what it depends on; draws as they were, unless they may be others."""
    needs: dict[Op | Unit, set[Op | Unit]] = {}
    last: Op | None = None
    for op in sorted(ops, key=lambda op: op.place):
        mine = needs.setdefault(op.unit or op, set())
        mine.update(x.unit or x for x in op.inputs)
        if op.random and not noise:
            mine.update([last] if last else [])
            last = op
    return list(TopologicalSorter(needs).static_order())


class _Run:
    """Values of single operations and stacks of units, in one call.

    All stacks are on one device: single numbers of the CPU go with tensors of any other, and a stack of them does not.
    """

    def __init__(self, values: dict[fx.Node, Tensor], noise: bool, device: torch.device) -> None:
        self.values, self.noise, self.device = values, noise, device
        self.ones: dict[Op, Any] = {}
        self.stacks: dict[Unit, Tensor] = {}

    # ------------------------------------------------------------------ values

    def one(self, op: Op) -> Any:
        """The value of one operation."""
        if op not in self.ones:
            if op.unit is None or op.unit.kind == "place":
                self.single(op)
            else:
                self.ones[op] = fitted(self.stacks[op.unit].select(0, op.unit.members.index(op)), op.shape.size)
        return self.ones[op]

    def many(self, ops: Sequence[Op]) -> Tensor:
        """A stack of the values of several, along the first dimension, the smaller ones padded."""
        size = largest(ops)
        blocks: dict[Any, list[Op]] = {}
        for op in ops:
            whole = op.unit is not None and op.unit.kind != "place"
            blocks.setdefault(op.unit if whole else None, []).append(op)
        order, parts = list[Op](), list[Tensor]()
        for unit, needed in blocks.items():
            some = list(dict.fromkeys(needed))
            parts.append(self._singles(some, size) if unit is None else self._part(unit, some, size))
            order += some
        return _taken(parts[0] if len(parts) == 1 else torch.cat(parts), order, ops)

    def _singles(self, some: list[Op], size: Sequence[int]) -> Tensor:
        return padded_together([self.one(x).to(self.device) for x in some], size)

    def _part(self, unit: Unit, some: list[Op], size: Sequence[int]) -> Tensor:
        return fitted(_taken(self.stacks[unit], unit.members, some), size)

    # ------------------------------------------------------------------ operations

    def single(self, op: Op) -> None:
        """Do one operation."""
        if op.terms:
            value = self._sum(op.terms)
        elif op.target in JOINED and _repeats(op.inputs):
            value = self._joined(op)
        else:
            leaves = [self.one(x) if isinstance(x, Op) else x for x in op.leaves]
            args, kwargs = tree_unflatten(leaves, op.spec)
            value = op.target(*([_empty(op.fresh)] if op.fresh else []), *args, **kwargs)
        self.ones[op] = value

    def unit(self, unit: Unit) -> None:
        """Do all operations of a unit."""
        if unit.kind != "place":
            value = getattr(self, f"_{unit.kind}")(unit)
            assert value.shape == (len(unit.members), *unit.size)
            self.stacks[unit] = value.to(self.device, unit.first.shape.dtype)

    def _input(self, unit: Unit) -> Tensor:
        return padded_together([self.values[op.node] for op in unit.members], unit.size)

    def _pick(self, unit: Unit) -> Tensor:
        """Parts of one value: a view where they lie at equal distances."""
        op = unit.first
        source, dim = self.one(op.leaves[0]), op.leaves[1] % len(op.leaves[0].shape.size)
        starts = [x.leaves[2] for x in unit.members]
        if op.target is aten.select.int:
            return _at(source, dim, starts).movedim(dim, 0)
        width, widths = unit.size[dim], [x.shape.size[dim] for x in unit.members]
        if width == 1:
            return _at(source, dim, starts).movedim(dim, 0).unsqueeze(dim + 1)
        index = [start + min(i, w - 1) for start, w in zip(starts, widths, strict=True) for i in range(width)]
        return _at(source, dim, index).unflatten(dim, (len(starts), width)).movedim(dim, 0)

    def _draw(self, unit: Unit) -> Tensor:
        op, size = unit.first, [len(unit.members), *unit.size]
        if op.fresh is None and any(isinstance(x, Op) for x in op.leaves):
            return _apply(op, [self.many(column) for column in _columns(unit)])  # element by element
        many = math.prod(size) > FUSED_NOISE
        args, kwargs = tree_unflatten(op.leaves, op.spec)
        if op.target is aten.randn.default and many:
            return torch.empty(size, **kwargs).normal_()
        if op.fresh:
            return op.target(_empty(op.fresh, size), *args, **kwargs)
        return op.target(size, **kwargs)

    def _sum(self, terms: Sequence[Op]) -> Tensor:
        """A sum of single values: of one unit's by their stack, of parts of a gradient by putting them together."""
        blocks: dict[Any, list[Op]] = {}
        for op in terms:
            blocks.setdefault(op.unit or op, []).append(op)
        parts = []
        for unit, some in blocks.items():
            if isinstance(unit, Unit) and len(some) >= LEAST:
                parts.append(self._together(some) if unit.kind == "place" else self.many(some).sum(0))
            else:
                parts += [self.one(op) * n if n > 1 else self.one(op) for op, n in Counter(some).items()]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _together(self, some: Sequence[Op]) -> Tensor:
        """The sum of tensors that are zero but for a part."""
        begins = [where for op in some if (where := placed(op))]
        dim, size = begins[0][0], some[0].shape.size
        pieces = [op.leaves[0] for op in some]
        part, new = self.many(pieces), some[0].target is aten.select_backward.default
        part = part.unsqueeze(dim + 1) if new else part
        wide, widths = part.shape[dim + 1], [1 if new else x.shape.size[dim] for x in pieces]
        flat = part.movedim(0, dim).flatten(dim, dim + 1)
        kept = [k * wide + i for k, width in enumerate(widths) for i in range(width)]
        index = [start + i for (_, start), width in zip(begins, widths, strict=True) for i in range(width)]
        if len(set(index)) < len(index):
            rows = torch.tensor(index, device=flat.device)
            return flat.new_zeros(size).index_add(dim, rows, _at(flat, dim, kept))
        found, nothing = dict(zip(index, kept, strict=True)), flat.shape[dim]
        if len(found) < size[dim]:
            edge = [*flat.shape[:dim], 1, *flat.shape[dim + 1 :]]
            flat = torch.cat([flat, flat.new_zeros(edge)], dim)
        return _at(flat, dim, [found.get(i, nothing) for i in range(size[dim])])

    def _joined(self, op: Op) -> Tensor:
        """Many values side by side: units first, then in order."""
        pieces, new = op.inputs, op.target is aten.stack.default
        statics = [x for x in op.leaves if not isinstance(x, Op)]
        dim = (statics[0] if statics else 0) % len(op.shape.size)
        widths = [1 if new else x.shape.size[dim] for x in pieces]
        begins = list(accumulate(widths, initial=0))
        parts, found, past = list[Tensor](), dict[int, int](), 0
        for places in _by_unit(pieces):
            part = self.many([pieces[i] for i in places]).movedim(0, dim)
            wide = 1 if new else part.shape[dim + 1]
            parts.append(part if new else part.flatten(dim, dim + 1))
            for k, i in enumerate(places):
                found.update({begins[i] + j: past + k * wide + j for j in range(widths[i])})
            past += len(places) * wide
        return _at(torch.cat(parts, dim), dim, [found[i] for i in range(len(found))])

    def _add(self, unit: Unit) -> Tensor:
        columns = _columns(unit)
        total = self._column(columns[0], unit)
        for column in columns[1:]:
            total = total + self._column(column, unit)
        return total

    def _column(self, column: Sequence[Op], unit: Unit) -> Tensor:
        rank = len(unit.first.shape.size)
        if all(x is column[0] for x in column):
            return self.one(column[0])
        return _aligned(self.many(column), rank)

    def _call(self, unit: Unit) -> Tensor:
        op, n, size = unit.first, len(unit.members), unit.size
        columns = _columns(unit)
        if op.target in _ROWWISE:
            return _apply(op, [self.many(column) for column in columns])
        shared = [all(x is column[0] for x in column) for column in columns]
        values = [self.one(c[0]) if same else self.many(c) for c, same in zip(columns, shared, strict=True)]
        if op.target in VIEWED and not shared[0]:
            return values[0].reshape(n, *size)
        if op.target is aten.expand.default:
            return (values[0] if shared[0] else _aligned(values[0], len(size))).expand(n, *size)
        if op.target in SUMS:
            values = [zero_padded(values[0], columns[0])]
        if _pointwise(op):
            values = [x if same else _aligned(x, len(size)) for x, same in zip(values, shared, strict=True)]
            return _apply(op, values)
        dims = tuple(None if same else 0 for same in shared)
        return torch.vmap(lambda *x: _apply(op, x), dims)(*values)


def _columns(unit: Unit) -> list[tuple[Op, ...]]:
    """The inputs of a unit's members, position by position."""
    return list(zip(*(op.inputs for op in unit.members), strict=True))


def _apply(op: Op, values: Sequence[Tensor]) -> Any:
    given = iter(values)
    args, kwargs = tree_unflatten([next(given) if isinstance(x, Op) else x for x in op.leaves], op.spec)
    return op.target(*args, **kwargs)


def _pointwise(op: Op) -> bool:
    """Whether stacks can be handed to the operation as they are: dtypes agree, so that none is promoted otherwise."""
    dtypes = {x.shape.dtype for x in op.inputs} - {torch.bool}
    return torch.Tag.pointwise in op.target.tags and len(dtypes) <= 1


def _aligned(stack: Tensor, rank: int) -> Tensor:
    """A stack whose elements have so many dimensions."""
    missing = rank - (stack.dim() - 1)
    return stack.reshape(len(stack), *[1] * missing, *stack.shape[1:]) if missing else stack


def _taken(stack: Tensor, members: Sequence[Op], wanted: Sequence[Op]) -> Tensor:
    """Rows of a stack."""
    place = {op: i for i, op in enumerate(members)}
    return _at(stack, 0, [place[op] for op in wanted])


def _at(x: Tensor, dim: int, index: Sequence[int]) -> Tensor:
    """Entries along a dimension, as a view where they lie at equal distances."""
    step = index[1] - index[0] if len(index) > 1 else 1
    if step > 0 and all(b - a == step for a, b in pairwise(index)):
        if len(index) == x.shape[dim] and step == 1:
            return x
        return torch.ops.aten.slice.Tensor(x, dim, index[0], index[-1] + 1, step)
    return x.index_select(dim, torch.tensor(index, device=x.device))


def _by_unit(ops: Sequence[Op]) -> list[list[int]]:
    """Positions of those that lie in one stack, together; others alone."""
    found: dict[Any, list[int]] = {}
    for i, op in enumerate(ops):
        found.setdefault(i if op.unit is None or op.unit.kind == "place" else op.unit, []).append(i)
    return list(found.values())


def _repeats(ops: Sequence[Op]) -> bool:
    units = [op.unit for op in ops if op.unit is not None]
    return any(units.count(unit) >= LEAST for unit in set(units))


def _empty(fresh: fx.Node, size: Sequence[int] | None = None) -> Tensor:
    args = fresh.args if size is None else (list(size), *fresh.args[1:])
    empty: Tensor = aten.empty.memory_format(*args, **fresh.kwargs)
    return empty
