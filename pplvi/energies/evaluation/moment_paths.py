"""Ways from a base-rate model to a machine: straight, or through machines with averaged moments.

Between two exponential families the geometric path averages natural parameters. The moment-averaged path averages mean
statistics instead (Grosse, Maddison & Salakhutdinov 2013): its machines are trained by stochastic maximum likelihood to
have ``(1 - beta) E_base[s] + beta E_machine[s]``, at some knots, and from one knot to the next the path is geometric.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pplvi.energies.evaluation.ais_path import Between, Levels
from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.couplings import DenseCoupling
from pplvi.types import Values

__all__ = ["Route", "averaged_machines", "base_fields"]

_CHAINS, _BURN_IN = 500, 200


@dataclass(frozen=True)
class Route:
    """Segments, each geometric, from a base-rate model to a machine.

    :ivar segments: what lies between neighbours; the first begins at the base-rate model.
    """

    base: Levels
    segments: tuple[Levels, ...]

    @classmethod
    def through(cls, base: Levels, knots: Sequence[BoltzmannMachine]) -> Route:
        """The route through some machines; none of them is the geometric path."""
        if not knots or not isinstance(base, Between):
            return cls(base, (base,))
        ends = [*knots, base.machine]
        first = Between(ends[0], base.fields)
        rest = (Between(last, base.fields, before) for before, last in pairwise(ends))
        return cls(base, (first, *rest))

    def at(self, beta: float) -> tuple[Levels, float]:
        """The segment of an inverse temperature, and how far along it that is."""
        count = len(self.segments)
        index = min(int(beta * count), count - 1)
        return self.segments[index], min(max(beta * count - index, 0.0), 1.0)

    def levels(self, betas: Iterable[float]) -> tuple[tuple[Levels, float], ...]:
        """The targets of some inverse temperatures."""
        return tuple(self.at(beta) for beta in betas)


def base_fields(machine: BoltzmannMachine, base_rate: Tensor | None, given: Values) -> dict[str, Tensor]:
    """Fields of the base-rate model: the visible units have the base rates, hidden ones no field.

    Of a conditional machine they are those of each datum with no weights but from what it is given.

    :raises ValueError: for base rates of another width, or of a conditional machine.
    """
    if given and base_rate is not None:
        raise ValueError("base_rate= of a conditional machine, whose base-rate models are what it is given: leave it.")
    if given:
        return {layer: machine.field(layer, given) for layer in machine.layers}
    fields = {layer: torch.zeros_like(machine.bias(layer)) for layer in machine.layers}
    layer, units = machine.visible, machine.layers[machine.visible]
    rate = machine.offset(layer) if base_rate is None else torch.as_tensor(base_rate).to(machine.like())
    if rate.shape != (units.width,):
        raise ValueError(
            f"base_rate has shape {tuple(rate.shape)}: expected the visible units' means, ({units.width},)."
        )
    if units.num_states == 2:
        fields[layer] = torch.logit(rate.clamp(0.01, 0.99))
    elif units.num_states is not None:
        fields[layer] = rate.clamp(min=0.01).log()
    elif base_rate is not None:
        fields[layer] = rate
    return fields


def averaged_machines(base: Between, num_knots: int, num_steps: int) -> list[BoltzmannMachine]:
    """Machines whose mean statistics lie evenly between the base-rate model's and the machine's, from base to machine.

    :raises ValueError: for fewer than one knot or step, or units that are not binary.
    """
    machine = base.machine
    if num_knots < 1 or num_steps < 1:
        raise ValueError(f"knots={(num_knots, num_steps)}: expected numbers of machines and of steps of at least 1.")
    if any(units.num_states != 2 for units in machine.layers.values()):
        raise ValueError("a moment-averaged path between layers that are not all binary: expected Bernoulli units.")
    if machine.given is not None or not all(isinstance(c, DenseCoupling) for c in machine.couplings.values()):
        raise ValueError("a moment-averaged path of a machine that is conditional, or whose couplings are not dense.")
    chains = machine.gibbs(machine.draw((_CHAINS,)), _BURN_IN)
    last = _statistics(machine, chains, num_sweeps=_BURN_IN)
    first = _independent(machine, {layer: torch.sigmoid(f) for layer, f in base.fields.items()})
    knot, found = _emptied(base), []
    values = {layer: torch.bernoulli(torch.sigmoid(f).expand(_CHAINS, -1)) for layer, f in base.fields.items()}
    for number in range(1, num_knots + 1):
        beta = number / (num_knots + 1)
        wanted = {name: torch.lerp(first[name], last[name], beta) for name in first}
        for step in range(num_steps):
            values = knot.gibbs(values)
            present = _statistics(knot, values)
            rate = 0.1 * (1 - step / num_steps)
            for name, parameter in _parameters(knot).items():
                parameter.add_(wanted[name] - present[name], alpha=rate)
        found.append(knot)
        knot = copy.deepcopy(knot)
    return found


def _emptied(base: Between) -> BoltzmannMachine:
    """A machine like it, that is the base-rate model."""
    new = copy.deepcopy(base.machine)
    for name, parameter in _parameters(new).items():
        parameter.copy_(base.fields[name] if isinstance(name, str) else torch.zeros_like(parameter))
    return new


def _parameters(machine: BoltzmannMachine) -> dict[Any, Tensor]:
    return {**machine.biases(), **machine.edges()}


def _independent(machine: BoltzmannMachine, means: dict[str, Tensor]) -> dict[Any, Tensor]:
    return {**means, **{(a, b): torch.outer(means[a], means[b]) for a, b in machine.connections}}


def _statistics(machine: BoltzmannMachine, values: dict[str, Tensor], num_sweeps: int = 1) -> dict[Any, Tensor]:
    """Mean statistics of chains; over several sweeps, averages of those that they come through."""
    total: dict[Any, Tensor] = {}
    for _ in range(num_sweeps):
        values = machine.gibbs(values) if num_sweeps > 1 else values
        count = len(next(iter(values.values())))
        pairs = {(a, b): values[a].T @ values[b] / count for a, b in machine.connections}
        now: dict[Any, Tensor] = {**{n: v.mean(0) for n, v in values.items()}, **pairs}
        total = {name: total.get(name, 0.0) + value / num_sweeps for name, value in now.items()}
    return total
