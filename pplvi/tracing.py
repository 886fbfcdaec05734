"""Recording a training step as a graph of tensor operations, or saying why it cannot be recorded.

``make_fx`` runs the step once on real tensors and writes down every operation. What does not pass through tensor
operations is written down with today's value: a branch on a tensor, a shape that follows from data, a number from
Python's or NumPy's generator. Such steps are refused here instead of being repeated wrongly. Python values that a
program reads or counts itself (closures, attributes, global variables) stay as they were when the step was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pplvi.programs import last_site

aten = torch.ops.aten

BRANCH = "a Python value taken from a tensor (a branch, .item(), float(), bool(), .tolist() or .numpy())"
SHAPE = "a shape that depends on the data (boolean indexing, nonzero, unique)"
RANDOM = "numbers from Python's or NumPy's random generator, which would be the same at every step"
_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}


class Untraceable(ValueError):
    """A step cannot be recorded: the message names the site and the reason."""


class _Refusal(Exception):
    """Why an operation cannot be part of a graph."""


@dataclass(frozen=True)
class Traced:
    """A recorded step.

    :ivar graph: from ``(*inputs, *constants)`` to a tuple of tensors; nothing but tensor operations.
    :ivar constants: tensors that the programs reached by themselves: closures, buffers, numbers of the priors.
    """

    graph: fx.GraphModule
    constants: tuple[Tensor, ...]

    @property
    def changes_constants(self) -> bool:
        """Whether the step writes to a constant in place, as batch normalisation does to its running means."""
        places = [n for n in self.graph.graph.nodes if n.op == "placeholder"]
        constants = set(places[len(places) - len(self.constants) :])
        return any(constants & set(n.all_input_nodes[:1]) for n in self.graph.graph.nodes if _is_in_place(n))


def record(
    step: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], parameters: Mapping[int, tuple[int, Tensor]]
) -> Traced:
    """Record a step.

    :param step: a function of the inputs that returns a tuple of tensors. The random state and every buffer that it
        changes are put back.
    :param inputs: tensors to record it with; the first is the vector that holds all parameters.
    :param parameters: by the identity of a parameter that the programs reach by themselves: where it starts in that
        vector, and the parameter.
    :raises Untraceable: with the last site that was met and the reason.

    >>> offset = torch.tensor(1.0)
    >>> traced = record(lambda x: (x * 2 + offset,), [torch.ones(3)], {})
    >>> traced.graph(torch.zeros(3), *traced.constants)
    (tensor([1., 1., 1.]),)
    """
    watch = _Watch({i: p for i, (_, p) in parameters.items()})

    def watched(*tensors: Tensor) -> tuple[Tensor, ...]:
        with _WatchCalls(), watch:
            return step(*tensors)

    with last_site() as site, _named_failure(site), _same_generators(), pyro.validation_enabled(False):
        graph = make_fx(watched)(*inputs)
    _plain_output(graph)
    _lift_parameters(graph, parameters)
    constants = _lift_constants(graph, len(inputs))
    watch.put_back(constants)
    _simplify_noise(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return Traced(graph, constants)


@contextmanager
def _same_generators() -> Iterator[None]:
    """Put the random state back; refuse draws from generators that do not go through torch."""
    before = pyro.util.get_rng_state()
    try:
        yield
        after = pyro.util.get_rng_state()
        if repr(after["random"]) != repr(before["random"]) or repr(after["numpy"]) != repr(before["numpy"]):
            raise _Refusal(RANDOM)
    finally:
        pyro.util.set_rng_state(before)


@contextmanager
def _named_failure(site: list[str]) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # an operation can fail to be recorded in any way
        reason = str(error) if isinstance(error, _Refusal) else f"an operation that cannot be recorded: {error}"
        where = f"at or after site {site[-1]!r}" if site else "before the first site"
        raise Untraceable(
            f"the step cannot be traced: {where} it met {reason}. Expected tensor operations whose shapes do not "
            "depend on values: use torch.where or masks instead of branches, pass what changes as a tensor argument, "
            "or train with compile=False (mode=False)."
        ) from error


class _Watch(TorchDispatchMode):
    """Refuse operations that would be baked into the graph; remember tensors before they are changed in place."""

    def __init__(self, parameters: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.parameters = parameters
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.dynamic_output_shape in func.tags and not _is_plain_index(func, args):
            raise _Refusal(SHAPE)
        if torch.Tag.data_dependent_output in func.tags:
            return self._read(func, args, kwargs or {})
        if func._schema.is_mutable:
            self._remember(args[0])
        return func(*args, **(kwargs or {}))

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        if any(id(x) in self.parameters for x in args):
            raise _Refusal(BRANCH)
        try:
            return func(*args, **kwargs)  # allowed for constants of the program
        except RuntimeError as error:
            raise _Refusal(BRANCH) from error

    def _remember(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and id(tensor) not in self.before:
            with _disable_current_modes():
                self.before[id(tensor)] = (tensor, tensor.detach().clone())

    def put_back(self, tensors: Sequence[Tensor]) -> None:
        """Undo what recording did to these tensors."""
        with torch.no_grad():
            for tensor in tensors:
                if id(tensor) in self.before:
                    tensor.copy_(self.before[id(tensor)][1])


def _is_plain_index(func: Any, args: Any) -> bool:
    """Whether an operation indexes with integers, whose number does not depend on their values."""
    if not func.name().startswith(("aten::index.", "aten::index_put")):
        return False
    return not any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


class _WatchCalls(TorchFunctionMode):
    """Refuse calls that read a tensor's memory without an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            raise _Refusal(BRANCH)
        return func(*args, **(kwargs or {}))


def _plain_output(graph: fx.GraphModule) -> None:
    """Make the graph a function of positional tensors that returns a tuple."""
    output = next(n for n in graph.graph.nodes if n.op == "output")
    output.args = (tuple(torch.utils._pytree.tree_leaves(output.args)),)
    graph.graph.set_codegen(CodeGen())


def _tensor_constants(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, Tensor]]:
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and isinstance(value := getattr(graph, str(node.target), None), Tensor):
            yield node, value


def _lift_parameters(graph: fx.GraphModule, parameters: Mapping[int, tuple[int, Tensor]]) -> None:
    """Make parameters, which are constants of the graph, slices of its first input."""
    places = [n for n in graph.graph.nodes if n.op == "placeholder"]
    views: dict[int, fx.Node] = {}
    for node, value in _tensor_constants(graph):
        if id(value) in parameters:
            if id(value) not in views:
                views[id(value)] = _slice(graph.graph, places, parameters[id(value)])
            node.replace_all_uses_with(views[id(value)])
            graph.graph.erase_node(node)


def _slice(graph: fx.Graph, places: Sequence[fx.Node], where: tuple[int, Tensor]) -> fx.Node:
    start, p = where
    with graph.inserting_after(places[-1]):
        part = graph.call_function(aten.slice.Tensor, (places[0], 0, start, start + p.numel()))
    with graph.inserting_after(part):
        return graph.call_function(aten.view.default, (part, list(p.shape)))


def _lift_constants(graph: fx.GraphModule, num_inputs: int) -> tuple[Tensor, ...]:
    """Make the other constants inputs too: one compiled program then serves every restart."""
    found: dict[int, tuple[fx.Node, Tensor]] = {}
    place = [n for n in graph.graph.nodes if n.op == "placeholder"][num_inputs - 1]
    for node, value in _tensor_constants(graph):
        if id(value) not in found:
            with graph.graph.inserting_after(place):
                place = graph.graph.placeholder(f"constant_{len(found)}")
            found[id(value)] = (place, value)
        node.replace_all_uses_with(found[id(value)][0])
        graph.graph.erase_node(node)
    return tuple(value.detach() for _, value in found.values())


def _is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _simplify_noise(graph: fx.Graph) -> None:
    """``empty().normal_()`` becomes ``randn()``: the same numbers from one operation, which a compiler can fuse."""
    for node in list(graph.nodes):
        standard = node.target is aten.normal_.default and len(node.args) == 1 and not node.kwargs
        if standard and node.args[0].target is aten.empty.memory_format and len(node.args[0].users) == 1:
            empty = node.args[0]
            options = {k: v for k, v in empty.kwargs.items() if k in ("dtype", "device")}
            with graph.inserting_before(node):
                noise = graph.call_function(aten.randn.default, (empty.args[0],), options)
            node.replace_all_uses_with(noise)
            graph.erase_node(node)
            graph.erase_node(empty)
