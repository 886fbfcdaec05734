"""Recording a training step as a graph of tensor operations, or saying why it cannot be recorded.

The step runs once on real tensors and every operation is written down. What does not pass through tensor
operations is written down with today's value: a branch on a tensor, a shape that follows from data, a number from
Python's or NumPy's generator. Such steps are refused here instead of being repeated wrongly, but for what follows from
arguments alone: that is a constant of the recording, and :mod:`pplvi.compile.reading` keeps what it depends on. Python
values that a program reads or counts itself (closures, attributes, global variables) stay as they were when the step
was recorded.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Distribution

from pplvi.compile.listing import listed
from pplvi.compile.reading import MANY, Guard
from pplvi.compile.watching import Refusal, Varying, VaryingCalls, Writes, written_by
from pplvi.kinds.checked import checked
from pplvi.programs.handlers import last_site

aten = torch.ops.aten

RANDOM = "numbers from Python's or NumPy's random generator, which would be the same at every step"
FUSED_NOISE = 32  # most random numbers that are drawn inside a fused loop
_NOT_USERS = {"torch", "pyro", "pplvi", "contextlib", "functools"}


class Untraceable(ValueError):
    """A step cannot be recorded: the message names the site and the reason."""


@dataclass(frozen=True)
class Traced:
    """A recorded step.

    :ivar graph: from ``(*carried, *state, *inputs, *constants)`` to ``(*carried, *state, *outputs)``; nothing but
        tensor operations, none of which writes to what it is given.
    :ivar constants: tensors that the programs reached by themselves: closures, numbers of the priors.
    :ivar state: those among them that the programs change in place, such as the running means of batch normalisation
        or persistent chains: the graph takes their values and returns the new ones.
    :ivar guard: what the programs have read of the arguments, which the recording holds for.
    """

    graph: fx.GraphModule
    constants: tuple[Tensor, ...]
    state: tuple[Tensor, ...] = ()
    guard: Guard = field(default_factory=Guard)


@checked
def record(
    step: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    parameters: Mapping[Any, tuple[int, Tensor]],
    num_carried: int = 0,
    num_arguments: int = 0,
) -> Traced:
    """Record a step.

    :param step: a function of the inputs that returns a tuple of tensors. The random state and every buffer that it
        changes are put back.
    :param inputs: tensors to record it with; the first is the vector that holds all parameters.
    :param parameters: by the identity of a parameter that the programs reach by themselves: where it starts in that
        vector, and the parameter.
    :param num_carried: how many of the first inputs come back, changed, as the first outputs.
    :param num_arguments: how many of the last inputs are arguments of the programs, which may read their values.
    :raises Untraceable: with the last site that was met, the reason, and the line of the program.

    >>> offset = torch.tensor(1.0)
    >>> traced = record(lambda x: (x * 2 + offset,), [torch.ones(3)], {})
    >>> traced.graph(torch.zeros(3), *traced.constants)
    (tensor([1., 1., 1.]),)
    """
    watch = Varying(p for _, p in parameters.values())

    def watched(*tensors: Tensor) -> tuple[Tensor, ...]:
        watch.mark(tensors[: len(tensors) - num_arguments])
        watch.tape.start(tensors[len(tensors) - num_arguments :])
        with VaryingCalls(watch), watch:
            return step(*tensors)

    with last_site() as site, _named_failure(site), _same_generators(), unchecked():
        graph = listed(watched, inputs)
    _lift_parameters(graph, parameters)
    watch.put_back()
    state = _lift_state(graph, watch.wrote, num_carried)
    constants = lift_constants(graph, len(state) + len(inputs))
    _simplify_noise(graph.graph)
    graph.graph.eliminate_dead_code(_has_effect)
    graph.recompile()
    values = [tuple(x.detach() for x in tensors) for tensors in (constants, state)]
    return Traced(graph, values[0], values[1], watch.tape.guard())


def check_variants(others: int) -> None:
    """Check that a step was not recorded too often because of what it reads of its arguments.

    :raises Untraceable: if there are so many recordings for arguments of the same shapes.
    """
    if others >= MANY:
        raise Untraceable(
            f"the step was recorded for {others} different values of what the programs read of their arguments (a "
            "branch, .item(), a boolean index), and met others: expected values that seldom change. Use torch.where or "
            "masks of fixed shape, or train with compile=False (mode=False)."
        )


@contextmanager
def unchanged() -> Iterator[None]:
    """Put every tensor that is written to in place inside the block back afterwards."""
    watch = Writes()
    try:
        with watch:
            yield
    finally:
        watch.put_back()


@contextmanager
def one_fake_mode() -> Iterator[None]:
    """``make_fx`` notes the shape of every value in a mode that it makes anew each time, which takes half the time of a
    recording, unless there is one already."""
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        yield


@contextmanager
def unchecked() -> Iterator[None]:
    """Switch off the checks of Pyro and torch that branch on values, also those of distributions that exist already."""
    checks = Distribution._validate_sample
    try:
        Distribution._validate_sample = lambda self, value: None  # type: ignore[method-assign]
        with pyro.validation_enabled(False):
            yield
    finally:
        Distribution._validate_sample = checks  # type: ignore[method-assign]


@contextmanager
def _same_generators() -> Iterator[None]:
    """Put the random state back; refuse draws from generators that do not go through torch."""
    before = pyro.util.get_rng_state()
    try:
        yield
        after = pyro.util.get_rng_state()
        if repr(after["random"]) != repr(before["random"]) or repr(after["numpy"]) != repr(before["numpy"]):
            raise Refusal(RANDOM)
    finally:
        pyro.util.set_rng_state(before)


@contextmanager
def _named_failure(site: list[str]) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise
    except (Exception, Refusal) as error:  # an operation can fail to be recorded in any way
        reason = str(error) if isinstance(error, Refusal) else f"an operation that cannot be recorded: {error}"
        where = f"at or after site {site[-1]!r}" if site else "before the first site"
        raise Untraceable(
            f"the step cannot be traced: {where} it met {reason}{_place_of(error)}. Expected tensor operations whose "
            "shapes do not depend on values: use torch.where or masks instead of branches, pass what changes as a "
            "tensor argument, or train with compile=False (mode=False)."
        ) from error


def _place_of(error: BaseException) -> str:
    """File and line of the user's program that an error went through last."""
    found = [(frame.f_code.co_filename, line, frame) for frame, line in traceback.walk_tb(error.__traceback__)]
    for file, line, frame in reversed(found):
        if str(frame.f_globals.get("__name__")).split(".")[0] not in _NOT_USERS and not file.startswith("<frozen"):
            return f', in "{file}", line {line}'
    return ""


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


def lift_constants(graph: fx.GraphModule, num_inputs: int) -> tuple[Tensor, ...]:
    """Make the other constants inputs too: one compiled program then serves every restart."""
    return tuple(_lift(graph, list(_tensor_constants(graph)), num_inputs, "constant")[1])


def _lift_state(graph: fx.GraphModule, wrote: Callable[[Tensor], bool], num_carried: int) -> tuple[Tensor, ...]:
    """Make constants that are written to inputs and outputs: the graph writes to copies of its own."""
    written = [(node, constant) for node, constant in _tensor_constants(graph) if wrote(constant)]
    places, state = _lift(graph, written, num_carried, "state")
    last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
    copies: list[fx.Node] = []
    for place in reversed(places):
        with graph.graph.inserting_after(last):
            copies.insert(0, copy := graph.graph.call_function(aten.clone.default))
        place.replace_all_uses_with(copy)
        copy.args = (place,)
    output = next(n for n in graph.graph.nodes if n.op == "output")
    output.args = ((*output.args[0][:num_carried], *copies, *output.args[0][num_carried:]),)
    return tuple(state)


def _lift(
    graph: fx.GraphModule, nodes: Sequence[tuple[fx.Node, Tensor]], after: int, name: str
) -> tuple[list[fx.Node], list[Tensor]]:
    """Make constants inputs, behind so many others."""
    found: dict[int, tuple[fx.Node, Tensor]] = {}
    places = [n for n in graph.graph.nodes if n.op == "placeholder"]
    for node, value in nodes:
        if id(value) not in found:
            where = graph.graph.inserting_after(places[after - 1]) if after else graph.graph.inserting_before()
            with where:
                place = graph.graph.placeholder(f"{name}_{len(found)}")
            places.insert(after, place)
            after += 1
            found[id(value)] = (place, value)
        node.replace_all_uses_with(found[id(value)][0])
        graph.graph.erase_node(node)
    return [place for place, _ in found.values()], [value for _, value in found.values()]


def _has_effect(node: fx.Node) -> bool:
    """Whether a node matters although nobody uses its result; noise that is not used does not."""
    return node.op in ("placeholder", "output") or bool(written_by(node.target))


def _simplify_noise(graph: fx.Graph) -> None:
    """A few ``empty().normal_()`` become ``randn()``: the same numbers from one operation, which a compiler can fuse.

    Many are faster as they are: torch's own generator is vectorised, inductor's is not.
    """
    for node in list(graph.nodes):
        standard = node.target is aten.normal_.default and len(node.args) == 1 and not node.kwargs
        if standard and node.args[0].target is aten.empty.memory_format and len(node.args[0].users) == 1:
            if math.prod(node.args[0].args[0]) > FUSED_NOISE:
                continue
            empty = node.args[0]
            options = {k: v for k, v in empty.kwargs.items() if k in ("dtype", "device")}
            with graph.inserting_before(node):
                noise = graph.call_function(aten.randn.default, (empty.args[0],), options)
            node.replace_all_uses_with(noise)
            graph.erase_node(node)
            graph.erase_node(empty)
