"""A recorded graph that computes each number once: operations on expanded tensors are done before they are expanded.

Distributions expand their parameters to the shape of the data, so that ``scale.log()`` or ``lgamma(df / 2)`` is taken
for every datum although it is one number for each particle, in the density and again in its gradient. Of ``500`` data
under Student's t that is most of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_NAMES = (
    "abs add addcdiv addcmul clamp clamp_min digamma div exp expm1 ge gt le lgamma log log1p logical_and logical_not "
    "lt maximum minimum mul ne eq neg pow reciprocal rsqrt rsub sigmoid sign softplus sqrt square sub tanh where"
)
_POINTWISE = {getattr(aten, name) for name in _NAMES.split()}
_VIEWS = {
    aten.alias.default,
    aten.detach.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.view.default,
    aten._unsafe_view.default,
}


class Shapes(fx.Interpreter):
    """Runs a graph once, for the shapes and dtypes of the tensors that its nodes return."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.dtypes: dict[fx.Node, torch.dtype] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The node's value."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n], self.dtypes[n] = tuple(value.shape), value.dtype
        return value


class _Pass:
    """One pass over a graph: of nodes whose values repeat along dimensions, the part that is not repeated."""

    def __init__(self, graph: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> None:
        self.graph, self.shapes = graph.graph, shapes
        self.compact: dict[fx.Node, fx.Node] = {}
        self.small: dict[fx.Node, tuple[int, ...]] = {}
        self.whole: dict[fx.Node, fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        """Give a node a compact form if it has one; others take what they need in full."""
        if node.op != "call_function" or node not in self.shapes:
            self._in_full(node)
        elif node.target is aten.expand.default:
            self._expanded(node)
        elif getattr(node.target, "overloadpacket", None) in _POINTWISE:
            self._pointwise(node)
        elif node.target in _VIEWS:
            self._viewed(node)
        else:
            self._in_full(node)

    def _expanded(self, node: fx.Node) -> None:
        source: Any = node.args[0]
        short, full = self.small.get(source, self.shapes[source]), self.shapes[node]
        if len(self.shapes[source]) == len(full) and math.prod(short) < math.prod(full):
            self._note(node, self.compact.get(source, source), short)
        else:
            self._in_full(node)

    def _viewed(self, node: fx.Node) -> None:
        """A view that at most adds or drops dimensions of size 1 is one of the compact form too."""
        source: Any = node.args[0]
        before, after = self.shapes[source], self.shapes[node]
        if source not in self.compact or [n for n in before if n != 1] != [n for n in after if n != 1]:
            return self._in_full(node)
        kept = iter([short for short, full in zip(self.small[source], before, strict=True) if full != 1])
        short = tuple(1 if full == 1 else next(kept) for full in after)
        with self.graph.inserting_before(node):
            new = self.graph.call_function(aten.view.default, (self.compact[source], list(short)))
        return self._note(node, new, short)

    def _pointwise(self, node: fx.Node) -> None:
        given = [arg for arg in node.all_input_nodes if arg in self.shapes]
        if not any(arg in self.compact for arg in given):
            return
        short = torch.broadcast_shapes(*(self.small.get(arg, self.shapes[arg]) for arg in given))
        short = (1,) * (len(self.shapes[node]) - len(short)) + tuple(short)
        with self.graph.inserting_before(node):
            new = self.graph.node_copy(node, lambda arg: self.compact.get(arg, arg))
        if math.prod(short) < math.prod(self.shapes[node]):
            self._note(node, new, short)
        else:  # the operation itself expands what is compact
            self.shapes[new] = self.shapes[node]
            node.replace_all_uses_with(new)

    def _note(self, node: fx.Node, compact: fx.Node, short: Sequence[int]) -> None:
        self.compact[node], self.small[node] = compact, tuple(short)

    def _in_full(self, node: fx.Node) -> None:
        for arg in node.all_input_nodes:
            if arg in self.compact and self.compact[arg] is not arg:
                node.replace_input_with(arg, self._expand(arg, node))

    def _expand(self, arg: fx.Node, before: fx.Node) -> fx.Node:
        if arg.target is aten.expand.default:
            return arg
        if arg not in self.whole:
            with self.graph.inserting_before(before):
                wide = self.graph.call_function(aten.expand.default, (self.compact[arg], list(self.shapes[arg])))
                self.whole[arg] = self.graph.call_function(aten.clone.default, (wide,))
                self.whole[arg].kwargs = {"memory_format": torch.contiguous_format}
            self.shapes[self.whole[arg]] = self.shapes[arg]
        return self.whole[arg]


def _drop_trivial(graph: fx.Graph, shapes: dict[fx.Node, tuple[int, ...]]) -> None:
    """Leave out operations that change nothing: views of the same shape, powers of one."""
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.args else None
        if node.op != "call_function" or source not in shapes or shapes[source] != shapes.get(node):
            continue
        same = node.target in _VIEWS or node.target is aten.expand.default
        if same or (node.target is aten.pow.Tensor_Scalar and node.args[1] == 1.0):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def tidied(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph whose nodes were changed, without those that nothing needs any more, and with its code made anew."""
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return graph


def without_repetition(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The same function, in which what repeats along a dimension is computed once, without what changes nothing.

    :param graph: a recorded graph of tensor operations; it is changed in place.
    :param inputs: tensors of the shapes that it is run with.
    :returns: the graph.

    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> graph = make_fx(lambda x: torch.lgamma(x[:, None].expand(2, 3)) * 2.0)(torch.ones(2))
    >>> graph = without_repetition(graph, [torch.ones(2)])
    >>> [tuple(graph(x).shape) for x in (torch.ones(2),)], Shapes(graph).run(torch.full((2,), 3.0))[0]
    ([(2, 3)], tensor([1.3863, 1.3863, 1.3863]))
    """
    seen = Shapes(graph)
    seen.run(*inputs)
    _drop_trivial(graph.graph, seen.shapes)
    work = _Pass(graph, seen.shapes)
    for node in list(graph.graph.nodes):
        work.visit(node)
    return tidied(graph)
