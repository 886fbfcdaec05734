"""Many tensors that a program only puts side by side are put side by side before it is called.

A program over 100 groups is called with the data of each. A compiler writes a loop for every one of them, and takes
longer over these than over the rest; torch's own ``cat`` takes microseconds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

aten = torch.ops.aten

MANY = 8  # tensors that a compiler still puts side by side


class Pack(NamedTuple):
    """Inputs that are put side by side, and how: the operation and its other arguments."""

    places: tuple[int, ...]
    target: Any
    options: tuple[Any, ...]


class Packed(NamedTuple):
    """A graph of which some inputs come in packs.

    :ivar graph: takes what is left of the inputs, then the packs.
    :ivar kept: which inputs are left.
    """

    graph: fx.GraphModule
    kept: tuple[int, ...]
    packs: tuple[Pack, ...]

    def given(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the graph takes for such inputs."""
        packs = [pack.target([inputs[i] for i in pack.places], *pack.options) for pack in self.packs]
        return [*(inputs[i] for i in self.kept), *packs]


def packed(graph: fx.GraphModule, num_carried: int) -> Packed:
    """The same function of packs of inputs.

    :param num_carried: how many inputs stay in any case.

    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> inputs = [torch.tensor(float(i)) for i in range(9)]
    >>> found = packed(make_fx(lambda *x: torch.stack(x[1:]) * x[0])(*inputs), 1)
    >>> found.kept, [x.tolist() for x in found.given(inputs)]
    ((0,), [0.0, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])
    """
    graph = copy.deepcopy(graph)
    places = [n for n in graph.graph.nodes if n.op == "placeholder"]
    position = {node: i for i, node in enumerate(places)}
    packs = list[Pack]()
    for node in list(graph.graph.nodes):
        joins = node.target in (aten.cat.default, aten.stack.default)
        if joins and len(node.args[0]) >= MANY and all(x in position for x in node.args[0]):
            with graph.graph.inserting_after(places[-1]):
                places.append(graph.graph.placeholder(f"pack_{len(packs)}"))
            packs.append(Pack(tuple(position[x] for x in node.args[0]), node.target, tuple(node.args[1:])))
            node.replace_all_uses_with(places[-1])
            graph.graph.erase_node(node)
    kept = [i for node, i in position.items() if i < num_carried or node.users]
    for node, i in position.items():
        if i not in kept:
            graph.graph.erase_node(node)
    graph.recompile()
    return Packed(graph, tuple(kept), tuple(packs))
