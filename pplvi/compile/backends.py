"""Turning a recorded step into something fast: run it as it is, compile it, or compile a loop of many steps.

A step is a graph from ``(*carried, rate, *data, *constants)`` to ``(*carried, loss)``: what is carried from step to
step are the parameters, the optimiser's state, and buffers that the programs change. Programs write the new values into
the carried tensors and return losses. Everything that a step needs is an input, so that one compiled program serves all
runs with the same graph.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pplvi.compile.packing import packed
from pplvi.compile.tracing import Traced, one_fake_mode
from pplvi.types import Program

# Assertions about strides in the generated code cost as much as a small kernel.
_OPTIONS = {"size_asserts": False, "alignment_asserts": False}
# On the CPU a step is one C++ file. Precompiled headers and trial programs for each instruction set take longer than it
# does, and inductor's caches keep pickles that take a second to read.
_CPU_OPTIONS = {
    **_OPTIONS,
    "cpp_wrapper": True,
    "cpp_cache_precompile_headers": False,
    "cpp.vec_isa_ok": True,
    "fx_graph_cache": False,
}
_MAX_PROGRAMS = 64
_PROGRAMS: OrderedDict[str, Program] = OrderedDict()


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's garbage collector, which takes a third of the time of tracing, compiling and their imports."""
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if active:
            gc.enable()


def in_place(step: Program, num_carried: int) -> Program:
    """A step that writes what is carried into its inputs and returns the loss."""

    def program(*inputs: Tensor) -> Tensor:
        *new, loss = step(*inputs)
        for old, value in zip(inputs[:num_carried], new, strict=True):
            old.copy_(value)
        return loss

    return program


def as_is(traced: Traced, num_carried: int) -> Program:
    """The recorded operations one after another, without a compiler."""
    program = in_place(traced.graph, num_carried)
    return lambda *inputs: program(*inputs, *traced.constants)


def compiled(traced: Traced, num_carried: int, inputs: Sequence[Tensor]) -> Program:
    """One step, compiled by inductor.

    :raises ValueError: if there is no compiler, or the graph cannot be compiled.
    """

    packs = packed(traced.graph, num_carried)
    step = in_place(packs.graph, num_carried)
    program = _shared(packs.graph, "step", lambda *x: (step(*x),), packs.given([*inputs, *traced.constants]))
    return lambda *inputs: program(*packs.given([*inputs, *traced.constants]))[0]


def looped(traced: Traced, num_carried: int, inputs: Sequence[Tensor], chunk: int, stacked: int = 0) -> Program:
    """Up to ``chunk`` steps in one call, compiled by inductor with the loop inside.

    The program takes ``(*carried, rates, count, *data)``: a rate for each step and how many steps to take.

    :param stacked: how many of the data tensors hold one batch for each step, along their first dimension.
    :raises ValueError: if there is no compiler, or the graph cannot be compiled.
    """

    def loop(*inputs: Tensor) -> tuple[Tensor]:
        from torch._higher_order_ops.while_loop import while_loop_op

        carried, (rates, count, *data) = inputs[:num_carried], inputs[num_carried:]

        def more(i: Tensor, losses: Tensor, *rest: Tensor) -> Tensor:
            return i < rest[num_carried + 1]

        def body(i: Tensor, losses: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            carried, (rates, _, *data) = rest[:num_carried], rest[num_carried:]
            now = [_at(x, i) if j < stacked else x for j, x in enumerate(data)]
            *new, loss = traced.graph(*carried, _at(rates, i), *now)
            here = torch.arange(chunk, device=losses.device) == i
            return (i + 1, torch.where(here, loss, losses), *new)

        begin: Any = (torch.zeros_like(count), inputs[0].new_zeros(chunk), *carried)
        _, losses, *new = while_loop_op(more, body, begin, (rates, count, *data))
        for old, value in zip(carried, new, strict=True):
            old.copy_(value)
        return (losses,)

    program = _shared(traced.graph, f"{chunk} {stacked}", loop, [*inputs, *traced.constants])
    return lambda *inputs: program(*inputs, *traced.constants)[0]


def _at(stack: Tensor, i: Tensor) -> Tensor:
    return stack.index_select(0, i.reshape(1)).squeeze(0)


def _shared(graph: fx.GraphModule, kind: str, function: Program, inputs: Sequence[Tensor]) -> Program:
    """Compile, or take the program that was compiled for the same graph: of another restart, say, or another run."""
    key = _key(kind, graph.code, tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs))
    if key not in _PROGRAMS:
        state = pyro.util.get_rng_state()
        with _named_failure(), torch.no_grad():
            on_cpu = all(x.device.type == "cpu" for x in inputs)
            _PROGRAMS[key] = _kept(key, function, inputs) if on_cpu else _compiled(function, inputs)
        pyro.util.set_rng_state(state)
    _PROGRAMS.move_to_end(key)
    while len(_PROGRAMS) > _MAX_PROGRAMS:
        _PROGRAMS.popitem(last=False)
    return _PROGRAMS[key]


def _key(*graph: Any) -> str:
    """A name for a program: equal for equal graphs under equal settings, in every process."""
    from torch._inductor import config

    settings = (torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    versions = (torch.__version__, torch.backends.cpu.get_cpu_capability(), Path(__file__).read_text())
    return sha256(repr((graph, settings, versions, sorted(config.save_config_portable().items()))).encode()).hexdigest()


def _kept(key: str, function: Program, inputs: Sequence[Tensor]) -> Program:
    """The program for the CPU with this name, from inductor's folder on the disk, or compiled and put there."""
    import torch._functorch.config
    from torch._inductor import config
    from torch._inductor.codecache import PyCodeCache, write_atomic
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    path = Path(cache_dir(), "pplvi", f"{key}.py")
    with config.patch(_CPU_OPTIONS), torch._functorch.config.patch(enable_autograd_cache=False):
        get_cpp_compiler()  # asked first: the error is the same, but it comes at once
        if path.exists():
            module = PyCodeCache.load(path.read_text())
        else:
            _compiled(function, inputs)
            module = PyCodeCache.modules[-1]
            if not any(isinstance(value, Tensor) for value in vars(module).values()):  # constants are not in its text
                write_atomic(str(path), Path(str(module.__file__)).read_text(), make_dirs=True)
    return lambda *tensors: module.call([*tensors])


def _compiled(function: Program, inputs: Sequence[Tensor]) -> Program:
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Inductor keeps compiled programs on the disk only where there is an environment of symbolic shapes.
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    copies: list[Any] = [_same_layout(x) for x in inputs]
    graph = _recorded(function, copies)
    with tracing(TracingContext(fake)), warnings.catch_warnings(), _without_notes():
        warnings.simplefilter("ignore", FutureWarning)  # of inductor about itself
        program: Program = torch._inductor.compile(graph, copies, options=_OPTIONS)
    return program


@contextmanager
def _without_notes() -> Iterator[None]:
    """Without inductor's notes on operations that its C++ code calls through Python, such as Cholesky's."""
    log = logging.getLogger("torch._inductor.ir")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _same_layout(x: Tensor) -> Tensor:
    """A copy with the same strides. What is expanded would lose them, but cannot be written to, and needs no copy."""
    copy = x.detach().clone(memory_format=torch.preserve_format)
    return copy if copy.stride() == x.stride() else x.detach()


def _recorded(function: Program, inputs: Sequence[Tensor]) -> fx.GraphModule:
    with one_fake_mode():
        graph = make_fx(function)(*inputs)
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:  # notes about tensors of another fake mode
                node.meta.pop("val", None)
                node.meta.pop("tensor_meta", None)
    return graph


@contextmanager
def _named_failure() -> Iterator[None]:
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        yield
    except Exception as error:  # inductor wraps what went wrong in several layers
        chain = list(_causes(error))
        if any(isinstance(e, InvalidCxxCompiler) or "InvalidCxxCompiler" in str(e) for e in chain):
            raise ValueError(
                "there is no working C++ compiler on this machine, which compile=True and 'max' need: install g++ or "
                "clang (or set CXX), or use compile='trace', which needs none."
            ) from error
        raise ValueError(
            f"inductor could not compile the step ({type(error).__name__}: {error}). Use compile='trace', which runs "
            "the same graph without a compiler."
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
