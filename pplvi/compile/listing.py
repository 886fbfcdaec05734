"""The operations of a function on tensors, written down while it runs, as a graph.

``make_fx`` does so, too, but runs every operation a second time on tensors without values, for symbolic shapes and
compilers to come: a recording takes five times as long, some tens of evaluations of what it records.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from pplvi.programs.state import recording

aten = torch.ops.aten


class Likeness(NamedTuple):
    """What is known of the value of a node, which stands in its ``meta["val"]``."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def listed(function: Callable[..., Any], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Run a function of tensors, and write down its operations.

    :param function: what it returns are tensors, alone or in nested containers.
    :param inputs: what to run it with. Other tensors that it reaches are attributes of the graph.
    :returns: a graph from the inputs to a tuple of the results.

    >>> graph = listed(lambda x: (x * 2 + 1,), [torch.zeros(3)])
    >>> [str(node.target) for node in graph.graph.nodes if node.op == "call_function"], graph(torch.ones(1))
    (['aten.mul.Tensor', 'aten.add.Tensor'], (tensor([3.]),))
    """
    script = _Script(inputs)
    with recording(), script:
        results = function(*inputs)
    script.graph.output(tuple(script.argument(x) for x in tree_leaves(results)))
    with _use_lazy_graph_module(True):  # passes follow, and code is made of what they leave
        return _make_graph_module(script.root, script.graph)


class _Script(TorchDispatchMode):
    """Adds a node to a graph for every operation."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph, self.root = fx.Graph(), torch.nn.Module()
        self._nodes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._number = 0
        for place, x in enumerate(inputs):
            self._note(x, self.graph.placeholder(f"input_{place}"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.lift_fresh.default:  # of a constant, into which the program may write
            func = aten.lift_fresh_copy.default
        given = self.argument(args), self.argument(kwargs or {})
        result = func(*args, **(kwargs or {}))
        node = self.graph.call_function(func, *given)
        if isinstance(result, (tuple, list)):
            for place, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._note(part, self.graph.call_function(operator.getitem, (node, place)))
        elif isinstance(result, Tensor):
            self._note(result, node)
        return result

    def argument(self, value: Any) -> Any:
        """What stands for a value in the graph."""
        if isinstance(value, Tensor):
            return self._nodes[value] if value in self._nodes else self._constant(value)
        if isinstance(value, dict):
            return {name: self.argument(x) for name, x in value.items()}
        return type(value)(map(self.argument, value)) if type(value) in (tuple, list) else value

    def _constant(self, value: Tensor) -> fx.Node:
        name, self._number = f"_tensor_constant{self._number}", self._number + 1
        setattr(self.root, name, value)
        return self._note(value, self.graph.get_attr(name))

    def _note(self, value: Tensor, node: fx.Node) -> fx.Node:
        self._nodes[value] = node
        node.meta["val"] = Likeness(value.shape, value.dtype, value.device)
        return node
