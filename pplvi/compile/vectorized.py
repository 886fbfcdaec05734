"""Several restarts in one program: a recorded step without its random numbers, vectorised by ``torch.func.vmap``.

Random operations cannot be vectorised so that each restart keeps a stream of its own. So they are taken out of the
graph: their results become inputs, and each restart draws its noise with its own random state, in the order in which
its own step would. What is left is a deterministic function of parameters, optimiser state, buffers, data and noise.

In the order of the file: :func:`without_noise` takes the random numbers out of one step, :func:`vectorized` makes one
step of those of several restarts, and :class:`Together` takes it, with the noise and the parameters of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from pplvi.compile.svi import CompiledSVI
from pplvi.compile.tracing import Traced, one_fake_mode
from pplvi.programs.calls import Arguments
from pplvi.programs.state import preserved_rng, set_torch_rng_state, torch_rng_state
from pplvi.types import Program

aten = torch.ops.aten

Draw = Callable[[Tensor], Any]

_LIKE = {aten.rand_like.default, aten.randn_like.default, aten.randint_like.default, aten.randint_like.low_dtype}
_STANDARD: dict[Any, Draw] = {
    aten.randn.default: Tensor.normal_,
    aten.randn_like.default: Tensor.normal_,
    aten.rand.default: Tensor.uniform_,
    aten.rand_like.default: Tensor.uniform_,
}


class Apart(Exception):
    """Restarts cannot share one program: the message says why."""


@dataclass(frozen=True)
class Quiet:
    """A recorded step whose random numbers are inputs.

    :ivar graph: from ``(*inputs, *noise, *constants)`` to what the step returns.
    :ivar draws: what fills each of them in, from the global random state.
    :ivar example: the noise of some step.
    """

    graph: fx.GraphModule
    draws: tuple[Draw, ...]
    example: tuple[Tensor, ...]

    def fill(self, noise: Sequence[Tensor]) -> None:
        """Draw the random numbers of one step: those that the recorded step would draw itself."""
        for draw, x in zip(self.draws, noise, strict=True):
            draw(x)


def without_noise(traced: Traced, num_inputs: int) -> Quiet:
    """Take the random operations out of a graph.

    :param num_inputs: how many inputs come before its constants.
    :raises Apart: for random numbers whose distribution depends on values, such as those of a gamma distribution.

    >>> from pplvi.compile.tracing import record
    >>> quiet = without_noise(record(lambda x: (x + torch.randn(2),), [torch.zeros(2)], {}), 1)
    >>> quiet.graph(torch.ones(2), torch.tensor([0.5, 1.0])), len(quiet.example)
    ((tensor([1.5000, 2.0000]),), 1)
    """
    graph = fx.GraphModule(traced.graph, fx.Graph())
    graph.graph.output(graph.graph.graph_copy(traced.graph.graph, {}))
    places = [n for n in graph.graph.nodes if n.op == "placeholder"]
    draws, example = [], []
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            draw, some = _draw(node)
            draws.append(draw)
            example.append(some)
            with graph.graph.inserting_after(places[num_inputs + len(draws) - 2]):
                place = graph.graph.placeholder(f"noise_{len(draws)}")
            places.insert(num_inputs + len(draws) - 1, place)
            node.replace_all_uses_with(place)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return Quiet(graph, tuple(draws), tuple(example))


def _draw(node: fx.Node) -> tuple[Draw, Tensor]:
    """What fills a random node's result in, by itself, and an example; values of its tensor arguments must not matter.

    In place where that draws the same numbers: a call for each would cost as much as a small step.
    """
    function: Any = node.target
    first, rest, options = (node.args[0] if node.args else None), node.args[1:], node.kwargs
    others = [x for x in tree_leaves((rest, options)) if isinstance(x, fx.Node)]
    overwrites = str(function).split(".")[1].endswith("_") and isinstance(first, fx.Node) and len(first.users) == 1
    if others or (isinstance(first, fx.Node) and not (overwrites or function in _LIKE)):
        raise Apart(f"the random numbers of {function} depend on values that differ between restarts")
    some = _empty(first) if isinstance(first, fx.Node) else None
    with preserved_rng():
        example = function(*node.args, **options) if some is None else function(some, *rest, **options)
    if overwrites:
        return lambda x: function(x, *rest, **options), example
    if function in _STANDARD:
        return _STANDARD[function], example
    return lambda x: x.copy_(function(*([first] if some is None else [x]), *rest, **options)), example


def _empty(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


@dataclass(frozen=True)
class Vectorized:
    """One step of several restarts.

    :ivar traced: from ``(*carried, rates, *data, *noise, *constants)`` to ``(*carried, losses)``: what is carried, the
        rates, the noise and the losses have one row for each restart.
    :ivar quiet: draws the noise of a restart.
    """

    traced: Traced
    quiet: Quiet


def vectorized(steps: Sequence[Traced], carried: Sequence[Tensor], rates: Tensor, data: Sequence[Tensor]) -> Vectorized:
    """One program for the recorded steps of several restarts.

    :param carried: what is carried from step to step, a row for each restart.
    :param rates: a number for each restart.
    :param data: the arguments that all restarts share.
    :raises Apart: if their steps differ, or cannot be vectorised, with the reason.
    """
    first, count = steps[0], len(carried) + 1 + len(data)
    if any(step.graph.code != first.graph.code for step in steps):
        raise Apart("their programs differ")
    quiet = without_noise(first, count)
    noise = [torch.stack([x] * len(steps)) for x in quiet.example]
    joined = [_joined(values) for values in zip(*(step.constants for step in steps), strict=True)]
    constants, dims = tuple(x for x, _ in joined), tuple(dim for _, dim in joined)
    inputs = (*carried, rates, *data, *noise, *constants)
    in_dims = (*[0] * (len(carried) + 1), *[None] * len(data), *[0] * len(noise), *dims)
    try:
        step = torch.func.vmap(torch.func.functionalize(quiet.graph), in_dims)
        with one_fake_mode():
            graph = make_fx(step)(*inputs)
    except Exception as error:  # an operation that cannot be vectorised may fail in any way
        raise Apart(f"{type(error).__name__}: {error}") from error
    return Vectorized(Traced(graph, constants), quiet)


def _joined(values: tuple[Tensor, ...]) -> tuple[Tensor, int | None]:
    """One constant where all restarts have the same values, else one row for each."""
    if all(torch.equal(value, values[0]) for value in values):
        return values[0], None
    return torch.stack(values), 0


Random = dict[str, Any]
_NOISE, _STEPS = 2**24, 50  # numbers and steps that are drawn ahead at most


class Together:
    """The steps of several :class:`CompiledSVI`, a row of one program for each; modes ``"trace"`` and ``True``.

    Restart ``r`` draws its noise from its own random state, as it would alone in mode ``"trace"``, and takes the step
    that it would take alone up to rounding: a row of vectorised arithmetic may differ in the last digits.

    :param svis: before or after their first steps; parameters exist.
    :param record: records the step of one of them, under its own parameter store.
    :param arguments: of every step.
    :raises Apart: if they cannot share a program, with the reason.
    """

    def __init__(
        self, svis: Sequence[CompiledSVI], record: Callable[[CompiledSVI], Traced], arguments: Arguments
    ) -> None:
        self.svis, self.arguments = svis, arguments
        steps = [record(svi) for svi in svis]
        self.buffers = [step.state for step in steps]
        carried, rates = self._carried(), torch.ones(len(svis), dtype=torch.float64, device=svis[0].state[0].device)
        step = vectorized(steps, carried, rates, arguments.tensors)
        self.quiet: Quiet = step.quiet
        ahead = max(1, min(_STEPS, _NOISE // max(1, len(svis) * sum(x.numel() for x in self.quiet.example))))
        blocks = [x.new_zeros((ahead, len(svis), *x.shape)) for x in self.quiet.example]
        self.noise = [[block[t] for block in blocks] for t in range(ahead)]
        self.rows = [[[block[t, r] for block in blocks] for t in range(ahead)] for r in range(len(svis))]
        inputs = (rates, *arguments.tensors, *self.noise[0])
        self.program: Program = svis[0].backend(step.traced, carried, inputs, None)

    def __call__(self, num_steps: int, random: Mapping[int, Random]) -> tuple[dict[int, Tensor], dict[int, Random]]:
        """Several steps of some of the restarts.

        :param random: by restart, the random state that it starts with; the others stay where they are.
        :returns: by restart, its losses, ``(num_steps,)``, in nats, and its random state afterwards.
        """
        carried = self._carried()
        given = [svi.rates(num_steps if r in random else 0, num_steps) for r, svi in enumerate(self.svis)]
        rates = torch.stack(given, 1)
        losses: list[Tensor] = []
        with torch.no_grad():
            while len(losses) < num_steps:
                noise, random = self._drawn(min(len(self.noise), num_steps - len(losses)), random)
                for now in noise:
                    losses.append(self.program(*carried, rates[len(losses)], *self.arguments.tensors, *now))
            self._write_back(carried, random)
        for r in random:
            self.svis[r].count += num_steps
        rows = torch.stack(losses, 1)
        return {r: rows[r] for r in random}, dict(random)

    def _rows(self) -> list[tuple[Tensor, ...]]:
        return [(*svi.carried(), *state) for svi, state in zip(self.svis, self.buffers, strict=True)]

    def _carried(self) -> list[Tensor]:
        return [torch.stack(column) for column in zip(*self._rows(), strict=True)]

    def _write_back(self, carried: Sequence[Tensor], random: Mapping[int, Random]) -> None:
        for r, row in enumerate(self._rows()):
            if r in random:
                for old, column in zip(row, carried, strict=True):
                    old.copy_(column[r])

    def _drawn(self, num_steps: int, random: Mapping[int, Random]) -> tuple[list[list[Tensor]], dict[int, Random]]:
        """The noise of several steps, a row for each restart, and the random states of the restarts afterwards."""
        after = {}
        for r, state in random.items():
            set_torch_rng_state(state)
            for rows in self.rows[r][:num_steps]:
                self.quiet.fill(rows)
            after[r] = {**state, **torch_rng_state()}
        return self.noise[:num_steps], after
