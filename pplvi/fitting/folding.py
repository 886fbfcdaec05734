"""What of a recorded density is the same for all rows is computed once, and what changes nothing is left out.

The gradient of a sum begins with ones, priors take logarithms of their constants, and transforms multiply by one: that
is a third of the operations of a density and its gradient, and where a model is small each costs as much as any other.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pplvi.compile.broadcasting import tidied

aten = torch.ops.aten

_OF_SHAPES = {
    getattr(aten, name).default
    for name in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
}
_LARGEST = 4 * 2**20  # bytes: what is larger is made anew faster than it is kept
_NEUTRAL = {
    aten.mul.Tensor: 1.0,
    aten.mul.Scalar: 1.0,
    aten.div.Tensor: 1.0,
    aten.add.Tensor: 0.0,
    aten.add.Scalar: 0.0,
    aten.sub.Tensor: 0.0,
}
_COMMUTE = {aten.mul.Tensor, aten.add.Tensor}


def folded(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The same function of its first input, for the others as they are and rows of one number.

    :param graph: a recorded graph of tensor operations; it is changed in place.
    :param inputs: what it is run with.
    :returns: the graph, whose other inputs are no longer read where they went into constants alone.

    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> graph = make_fx(lambda x, scale: x * torch.ones_like(x) / scale.log())(torch.zeros(2), torch.ones(()))
    >>> graph = folded(graph, (torch.zeros(2), torch.tensor(2.0)))
    >>> [str(node.target) for node in graph.graph.nodes if node.op == "call_function"], graph(torch.ones(2), None)
    (['aten.div.Tensor'], tensor([1.4427, 1.4427]))
    """
    work = _Folding(graph)
    work.run(*inputs)
    for number, node in enumerate(work.ends):
        graph.register_buffer(f"_constant_{number}", work.values[node], persistent=False)
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(f"_constant_{number}"))
    for node, source in work.same.items():
        node.replace_all_uses_with(source)
    return tidied(graph)


class _Folding(fx.Interpreter):
    """Runs a graph once, and notes what does not depend on its first input.

    :ivar values: of the nodes that do not.
    :ivar same: nodes that are equal to one of their arguments, by node.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[fx.Node, Tensor] = {}
        self.same: dict[fx.Node, fx.Node] = {}
        self._first = next(node for node in graph.graph.nodes if node.op == "placeholder")
        self._written = _written(graph.graph)
        self._constant: set[fx.Node] = set()

    @property
    def ends(self) -> list[fx.Node]:
        """Constant nodes that others need, which are not constant."""
        others = [n for n in self.values if n.op == "call_function" and not set(n.users) <= self._constant]
        return [node for node in others if node not in self.same]

    def run_node(self, n: fx.Node) -> Any:
        """The node's value."""
        value = super().run_node(n)
        if n.op == "output" or n in self._written:
            return value
        if self._is_constant(n, value):
            self._constant.add(n)
            if isinstance(value, Tensor):
                self.values[n] = value
        elif n.op == "call_function" and isinstance(value, Tensor) and (source := self._source(n)) is not None:
            before = self.env[source]
            unchanged = before.shape == value.shape and before.stride() == value.stride()
            if unchanged and before.dtype == value.dtype and source not in self._written:
                self.same[n] = self.same.get(source, source)
        return value

    def _is_constant(self, node: fx.Node, value: Any) -> bool:
        if node.op != "call_function":
            return node is not self._first
        if _changes(node) or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return False
        if isinstance(value, Tensor) and value.untyped_storage().nbytes() > _LARGEST:
            return False
        return node.target in _OF_SHAPES or all(arg in self._constant for arg in node.all_input_nodes)

    def _source(self, node: fx.Node) -> fx.Node | None:
        """The argument that a node returns as it is."""
        first, *rest = node.args or (None,)
        if node.target is aten.cat.default:
            return first[0] if len(first) == 1 else None  # type: ignore[index, return-value, arg-type]
        if node.target is aten.slice.Tensor and isinstance(first, fx.Node):
            return first
        if node.target is aten.masked_fill.Scalar:
            mask = self.values.get(rest[0])  # type: ignore[arg-type]
            return first if mask is not None and not bool(mask.any()) else None  # type: ignore[return-value]
        if node.target not in _NEUTRAL or node.kwargs or len(rest) != 1:
            return None
        pairs = [(first, rest[0])] + ([(rest[0], first)] if node.target in _COMMUTE else [])
        neutral = _NEUTRAL[node.target]
        return next((a for a, b in pairs if isinstance(a, fx.Node) and self._is_all(b, neutral)), None)

    def _is_all(self, argument: Any, number: float) -> bool:
        if isinstance(argument, fx.Node):
            return argument in self.values and bool((self.values[argument] == number).all())
        return bool(argument == number)


def _changes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values are written to later, and what they are views of."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not _changes(node):
            continue
        found.add(node)
        for place, argument in zip(node.target._schema.arguments, node.args, strict=False):
            if place.alias_info is not None and place.alias_info.is_write:
                _add_with_bases(argument, found)
    return found


def _add_with_bases(node: Any, found: set[fx.Node]) -> None:
    while isinstance(node, fx.Node):
        found.add(node)
        returns = getattr(getattr(node.target, "_schema", None), "returns", ())
        views = node.target is operator.getitem or any(each.alias_info is not None for each in returns)
        node = node.args[0] if views and node.args else None
