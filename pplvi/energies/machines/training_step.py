"""What machines share during one training step: products that are worked out once, and the centered gradient.

While a :class:`TrainingStep` is active, every machine that is used reads its parameters through it. Products of a value
with a weight matrix are kept while the value lives, so that guide, energy and chains do not repeat them, and the
gradient that reaches the parameters is the centered one:

Parameters ``W, a, b`` of ``E = -a.s - b.t - s W t`` are moved as those of ``-(s - c) W (t - d) - a'.(s - c) - b'.(t -
d)`` would be, ``a' = a + W d`` and ``b' = b + W^T c``: with ``G`` the plain gradients, ``G'_W = G_W - c G_b^T - G_a
d^T``, ``G'_a = G_a - G'_W d``, ``G'_b = G_b - G'_W^T c`` (Montavon & Mueller 2012; Melchior, Fischer & Wiskott 2016).
The energy itself has no offsets, so that moving them changes no distribution.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pplvi.energies.machines.couplings import GIVEN, DenseCoupling, Edge, Products


@dataclass(frozen=True)
class Live:
    """One machine's parameters and products during a step.

    :ivar parameters: its weights by edge and biases by layer, the gradient centered behind them.
    :ivar products: products of values with weights, for as long as the values live.
    """

    parameters: Mapping[Any, Tensor]
    products: Products = field(default_factory=lambda: defaultdict(WeakTensorKeyDictionary))


class TrainingStep:
    """The machines that are used in one training step of a Boltzmann objective.

    :ivar in_place: gradients go straight to the parameters' ``grad`` where statistics give them.
    """

    def __init__(self, in_place: bool = False) -> None:
        self.in_place = in_place
        self.machines: dict[tuple[Any, bool], Live] = {}

    def live(self, machine: Any) -> Live:
        """The parameters of a machine, with gradient where gradients are on, and its products."""
        key = machine, torch.is_grad_enabled()
        if key not in self.machines:
            other = self.machines.get((machine, not key[1]))
            plain = Live(centered(machine))
            self.machines[key] = plain if other is None else replace(plain, products=other.products)
        return self.machines[key]

    @contextmanager
    def replaced(self, machine: Any, live: Live) -> Iterator[None]:
        """Let a machine have other parameters inside the block."""
        key = machine, torch.is_grad_enabled()
        before = self.machines.get(key)
        self.machines[key] = live
        try:
            yield
        finally:
            del self.machines[key]
            if before is not None:
                self.machines[key] = before


_ACTIVE: ContextVar[TrainingStep | None] = ContextVar("_ACTIVE", default=None)


def active_step() -> TrainingStep | None:
    """The training step that is going on, if any."""
    return _ACTIVE.get()


@contextmanager
def training_step(*, in_place: bool = False) -> Iterator[TrainingStep]:
    """Make machines share their products, and center their gradients, inside the block; blocks inside are one step."""
    if (outer := _ACTIVE.get()) is not None:
        yield outer
        return
    token = _ACTIVE.set(step := TrainingStep(in_place))
    try:
        yield step
    finally:
        _ACTIVE.reset(token)


def centered(machine: Any) -> Mapping[Any, Tensor]:
    """A machine's weights and biases, through which its centered gradient reaches the parameters."""
    plain: dict[Any, Tensor] = {**machine.edges(), **machine.biases()}
    if not (machine.centered and torch.is_grad_enabled() and any(p.requires_grad for p in plain.values())):
        return plain
    offsets = {name: machine.offset(name).clone() for name in machine.layers}  # the next step may move them in place
    keys, couplings = tuple(plain), {edge: c for edge, c in machine.couplings.items() if GIVEN not in edge}
    return dict(zip(keys, _Centered.apply(keys, couplings, offsets, *plain.values()), strict=True))


class _Centered(torch.autograd.Function):
    """The identity on weights and biases, with the centered gradient behind it."""

    @staticmethod
    def forward(
        ctx: Any,
        keys: tuple[Any, ...],
        couplings: Mapping[Edge, DenseCoupling],
        offsets: Mapping[str, Tensor],
        *values: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.keys, ctx.couplings, ctx.offsets = keys, couplings, offsets
        return tuple(v.view_as(v) for v in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        plain = dict(zip(ctx.keys, gradients, strict=True))
        moved = dict(plain)
        for (a, b), coupling in ctx.couplings.items():
            offsets = ctx.offsets[a], ctx.offsets[b]
            moved[a, b] = coupling.centered(plain[a, b], (plain[a], plain[b]), offsets)
        for (a, b), coupling in ctx.couplings.items():
            to_first, to_second = coupling.shifts(moved[a, b], (ctx.offsets[a], ctx.offsets[b]))
            moved[a] = moved[a] - to_first
            moved[b] = moved[b] - to_second
        return None, None, None, *(moved[key] for key in ctx.keys)


class Reminder(torch.autograd.Function):
    """Zero; calls back when a gradient reaches the parameters that it was given."""

    @staticmethod
    def forward(ctx: Any, call: Any, like: Tensor, *parameters: Tensor) -> Tensor:
        """Zero."""
        ctx.call, ctx.count = call, len(parameters)
        return like.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Call back; nothing is added to the gradients."""
        ctx.call()
        return None, None, *(None for _ in range(ctx.count))
