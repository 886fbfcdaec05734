"""A recorded graph whose sums come first: what is the same for all summands is multiplied, or added, once afterwards.

A normal log density divides the square of every datum by a variance that all data share, takes its logarithm away from
each, and adds them up; its gradient does the same again. Sums of the squares alone make of some twenty passes over the
data five.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pplvi.compile.broadcasting import Shapes, tidied

aten = torch.ops.aten

_SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
_SHIFTS = {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar}
_COMMUTE = {aten.mul.Tensor, aten.add.Tensor}
_VIEWS = {aten.view.default, aten.unsqueeze.default, aten.squeeze.dim}


def outside_of_sums(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The same function, in which factors and summands that do not vary along a sum stand outside of it.

    :param graph: a recorded graph of tensor operations; it is changed in place.
    :param inputs: tensors of the shapes that it is run with.
    :returns: the graph.

    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> x, scale = torch.ones(2, 3), torch.tensor([[1.0], [2.0]])
    >>> graph = outside_of_sums(make_fx(lambda x, scale: (x / scale - scale.log()).sum(1))(x, scale), (x, scale))
    >>> [str(node.target)[5:] for node in graph.graph.nodes if node.op == "call_function"]
    ['log.default', 'sum.dim_IntList', 'div.Tensor', 'mul.Scalar', 'sub.Tensor', 'view.default']
    >>> graph(x, scale)
    tensor([ 3.0000, -0.5794])
    """
    seen = Shapes(graph)
    seen.run(*inputs)
    work = _Pass(graph.graph, seen)
    for node in list(graph.graph.nodes):
        work.visit(node)
    return tidied(graph)


class _Pass:
    """One pass over a graph: each sum, and each product of matrices, of what its factors and summands stand beside."""

    def __init__(self, graph: fx.Graph, seen: Shapes) -> None:
        self.graph, self.shapes, self.dtypes = graph, seen.shapes, seen.dtypes
        self.sums: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        """Put a sum or a product of matrices before what can follow it."""
        source: Any = node.args[0] if node.args else None
        if source not in self.shapes or not self.dtypes[source].is_floating_point:
            return
        self.place = node
        if node.target is aten.sum.dim_IntList and self.dtypes[node] == self.dtypes[source]:
            shape = self.shapes[source]
            every: Any = node.args[1] or range(len(shape))
            dims = tuple(sorted({dim % len(shape) for dim in every if shape[dim] != 1}))
            if dims and (self._linear(source, dims) is not None or self._moved(source, dims) is not None):
                found = self._sum(source, dims)
                node.replace_all_uses_with(
                    self._new(self.shapes[node], aten.view.default, found, list(self.shapes[node]))
                )
        elif node.target is aten.mm.default and self.shapes[node][1] < self.shapes[source][1]:
            node.replace_all_uses_with(self._product(source, node.args[1], self.shapes[node]))

    def _new(self, shape: Sequence[int], target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(self.place):
            new = self.graph.call_function(target, args)
        self.shapes[new], self.dtypes[new] = tuple(shape), self.dtypes[self.place]
        return new

    def _sum(self, node: fx.Node, dims: tuple[int, ...]) -> fx.Node:
        """The sum over these dimensions, which are kept with size 1."""
        if (node, dims) not in self.sums:
            self.sums[node, dims] = self._summed(node, dims)
        return self.sums[node, dims]

    def _summed(self, node: fx.Node, dims: tuple[int, ...]) -> fx.Node:
        shape = self.shapes[node]
        short = [1 if dim in dims else size for dim, size in enumerate(shape)]
        if (moved := self._moved(node, dims)) is not None:
            return self._new(short, aten.view.default, self._sum(*moved), short)
        if (found := self._linear(node, dims)) is None:
            return self._new(short, aten.sum.dim_IntList, node, list(dims), True)
        source, args = found
        inner = self._sum(source, dims)
        if node.target in _SHIFTS:
            count = torch.Size(shape[dim] for dim in dims).numel()
            return self._new(short, node.target, *(inner if x is source else self._times(x, count) for x in args))
        return self._new(short, node.target, *(inner if x is source else x for x in args))

    def _times(self, argument: Any, count: int) -> Any:
        if not isinstance(argument, fx.Node):
            return argument * count
        return self._new(self.shapes[argument], aten.mul.Scalar, argument, count)

    def _product(self, node: fx.Node, matrix: Any, shape: Sequence[int]) -> fx.Node:
        found = None if node.target in _SHIFTS else self._linear(node, (1,))
        if found is None:
            return self._narrow(node, matrix, shape)
        source, args = found
        inner = self._product(source, matrix, shape)
        return self._new(shape, node.target, *(inner if x is source else x for x in args))

    def _narrow(self, node: fx.Node, matrix: Any, shape: Sequence[int]) -> fx.Node:
        """A product with a matrix of few columns, as one of few rows: libraries are up to four times as fast there."""
        left, right = (self._new(self.shapes[x][::-1], aten.permute.default, x, [1, 0]) for x in (matrix, node))
        return self._new(shape, aten.permute.default, self._new(shape[::-1], aten.mm.default, left, right), [1, 0])

    def _moved(self, node: fx.Node, dims: tuple[int, ...]) -> tuple[fx.Node, tuple[int, ...]] | None:
        """For a view that adds or drops dimensions of size 1, what it is of, and the same dimensions there."""
        if node.target not in _VIEWS:
            return None
        source: Any = node.args[0]
        before, after = ([d for d, n in enumerate(self.shapes[x]) if n != 1] for x in (source, node))
        if [self.shapes[source][d] for d in before] != [self.shapes[node][d] for d in after]:
            return None
        return source, tuple(old for old, new in zip(before, after, strict=True) if new in dims)

    def _linear(self, node: fx.Node, dims: tuple[int, ...]) -> tuple[fx.Node, tuple[Any, ...]] | None:
        """The argument that varies along the dimensions where all others do not, and all arguments, if it is so."""
        if node.target is aten.neg.default:
            return node.args[0], node.args  # type: ignore[return-value]
        if node.target not in _SCALES | _SHIFTS or node.kwargs or len(node.args) != 2:
            return None
        first, second = node.args
        for source, other in ((first, second), (second, first))[: 1 + (node.target in _COMMUTE)]:
            if isinstance(source, fx.Node) and self._is_like(source, node) and self._is_same(other, dims, node):
                return source, node.args
        return None

    def _is_like(self, one: fx.Node, other: fx.Node) -> bool:
        return (self.shapes.get(one), self.dtypes.get(one)) == (self.shapes[other], self.dtypes[other])

    def _is_same(self, argument: Any, dims: tuple[int, ...], node: fx.Node) -> bool:
        """Whether an argument of a node does not vary along these dimensions of it."""
        if not isinstance(argument, fx.Node):
            return True
        shape, rank = self.shapes.get(argument), len(self.shapes[node])
        return shape is not None and all(d < rank - len(shape) or shape[d - rank + len(shape)] == 1 for d in dims)
