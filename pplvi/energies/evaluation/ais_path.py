"""Machines between a base-rate model and a machine, as the path of a walk with block Gibbs moves.

Every field of a machine between is ``(1 - beta) f_base + beta f``, so that at one end the units are independent. One
colour class of layers is annealed, the other one is summed out; weights and moves need two products with each weight
matrix a level. The walk, its weights and its resampling are those of :class:`pplvi.samplers.Annealed`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.hamiltonian import HamiltonianMachine, hamiltonian_move
from pplvi.energies.machines.measures import BaseMeasure
from pplvi.kernels.invariant import Frame, InvariantMove
from pplvi.objectives.step import Routing
from pplvi.programs.lone import Broadcasting
from pplvi.programs.plates import data_plate
from pplvi.samplers.annealed import Annealed
from pplvi.samplers.base import Request
from pplvi.samplers.paths import Plan
from pplvi.types import Values

Ends = tuple[Tensor, Tensor]


class Levels(ABC):
    """Machines between one that is normalised and another one, over the layers that are annealed.

    :ivar machine: the machine at the end.
    """

    machine: Any
    known: list[Any]

    @property
    def kept(self) -> tuple[str, ...]:
        """The layers that are annealed."""
        found: tuple[str, ...] = self.machine.classes[0]
        return found

    @property
    def count(self) -> int | None:
        """How many data have a path of their own; none where all have the same."""
        return None

    @abstractmethod
    def log_density(self, values: Values, beta: float) -> Tensor:
        """Log density of the kept layers, ``(*batch)``, unnormalised, in nats and float64."""

    @abstractmethod
    def sweep(self, values: Values, beta: float) -> dict[str, Tensor]:
        """A move of the kept layers that leaves a machine between invariant."""

    @abstractmethod
    def log_base(self) -> Tensor:
        """``log Z`` at the start, exact."""

    @abstractmethod
    def base(self, layer: str) -> Any:
        """The distribution of a layer at the start."""

    def program(self, beta: float, count: int | None = None, start: Callable[..., Any] | None = None) -> None:
        """The machine at an inverse temperature, as a program of its kept layers, with a plate of ``count`` data."""
        shape = () if count is None else (count,)
        with _plate(count):
            values = {}
            for layer in self.kept:
                draw = None if start is None else partial(start, layer)
                measure = BaseMeasure(self.machine.layers[layer], shape, self.machine.like(), draw=draw)
                values[layer] = pyro.sample(layer, measure)
            pyro.factor("energy" if start is None else "start", self.log_density(values, beta))

    def base_program(self) -> None:
        """The start, normalised."""
        with _plate(self.count):
            for layer in self.kept:
                pyro.sample(layer, self.base(layer))


def _plate(count: int | None) -> Any:
    return nullcontext() if count is None else data_plate(count, None)


@dataclass
class EnergiesBetween(Levels):
    """``E_0 + beta (E - E_0)``, with ``E_0`` the Gaussian part of a machine's energy; Hamiltonian Monte Carlo moves."""

    machine: HamiltonianMachine
    known: list[Any] = field(default_factory=list)

    def log_density(self, values: Values, beta: float) -> Tensor:
        """Log density of the visible layer, ``(*batch)``, in nats and float64."""
        return -torch.lerp(self.machine.base_energy(values), self.machine.energy(values), beta).double()

    def sweep(self, values: Values, beta: float) -> dict[str, Tensor]:
        """One move, with the machine's step size."""
        machine = self.machine
        moved = hamiltonian_move(
            lambda v: self.log_density({"v": v}, beta), values["v"], machine.kept("step_size"), machine.num_leapfrog
        )
        return {"v": moved}

    def log_base(self) -> Tensor:
        """``log Z`` of the Gaussian part."""
        mean = self.machine.like().double()
        return (mean**2).sum() / 2 + len(mean) * math.log(2 * math.pi) / 2

    def base(self, layer: str) -> Any:
        """The Gaussian part."""
        mean = self.machine.like()
        return dist.Normal(mean, torch.ones_like(mean)).to_event(1)


@dataclass
class Between(Levels):
    """The machines between a base-rate model, or a first machine, and a machine, on the layers of one colour class.

    :ivar fields: those of the base-rate model by layer, ``(width,)``, or ``(num_data, width)`` if conditional.
    :ivar first: the machine to begin with in the place of the base-rate model.
    :ivar given: what a conditional machine is given, ``(num_data, given)`` by name; every datum has a path of its own.
    :ivar known: fields and biases' products at the last values, which the next level needs again.
    """

    machine: BoltzmannMachine
    fields: Mapping[str, Tensor]
    first: BoltzmannMachine | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)
    known: list[tuple[tuple[Tensor, ...], dict[str, Ends], Ends]] = field(default_factory=list)

    @property
    def count(self) -> int | None:
        """How many data have a path of their own; none where all have the same."""
        return next((len(value) for value in self.given.values()), None)

    @property
    def summed(self) -> tuple[str, ...]:
        """The layers that are summed out."""
        return tuple(layer for layer in self.machine.layers if layer not in self.kept)

    def _fields(self, layer: str, values: Values) -> Ends:
        """The field of a layer at both ends."""
        last = self.machine.field(layer, {**values, **self.given})
        return self.fields[layer].expand_as(last) if self.first is None else self.first.field(layer, values), last

    def _at(self, values: Values) -> tuple[dict[str, Ends], Ends]:
        """Fields of the other layers, and what is linear in beta, at both ends: worked out once for each value."""
        at = tuple(values[layer] for layer in self.kept)
        for seen, fields, linear in self.known:
            if all(a is b for a, b in zip(seen, at, strict=True)):
                return fields, linear
        given = dict(zip(self.kept, at, strict=True))
        fields = {layer: self._fields(layer, given) for layer in self.summed}
        start = self.fields if self.first is None else {n: self.first.bias(n) for n in given}
        linear = self._linear(given, start), self._linear(given, {n: self.machine.field(n, self.given) for n in given})
        self.known = [(at, fields, linear), *self.known[:1]]
        return fields, linear

    def _linear(self, values: Values, fields: Values) -> Tensor:
        layers = self.machine.layers
        parts = [(layers[n].statistic(v) * fields[n]).sum(-1) - layers[n].base_energy(v) for n, v in values.items()]
        return torch.stack([part.double() for part in parts]).sum(0)

    def log_density(self, values: Values, beta: float) -> Tensor:
        """Log density of the kept layers, the others summed out, ``(*batch)``, unnormalised, in nats and float64."""
        fields, linear = self._at(values)
        total = torch.lerp(*linear, beta)
        for layer, ends in fields.items():
            total = total + self.machine.layers[layer].log_partition(torch.lerp(*ends, beta)).double()
        return total

    def sweep(self, values: Values, beta: float) -> dict[str, Tensor]:
        """One sweep of block Gibbs sampling: the other layers, then the kept ones."""
        layers = self.machine.layers
        fields, _ = self._at(values)
        other = {n: layers[n].sample(torch.lerp(*ends, beta)) for n, ends in fields.items()}
        return {n: layers[n].sample(torch.lerp(*self._fields(n, other), beta)) for n in self.kept}

    def log_base(self) -> Tensor:
        """``log Z`` of the base-rate model, exact, ``()``; of a conditional machine one for each datum."""
        parts = [units.log_partition(self.fields[n]).double() for n, units in self.machine.layers.items()]
        return torch.stack(parts).sum()

    def base(self, layer: str) -> Any:
        """A layer of the base-rate model."""
        return self.machine.layers[layer].conditional(self.fields[layer])


@dataclass(frozen=True)
class _Sweep(InvariantMove):
    """One sweep at an inverse temperature."""

    between: Levels
    beta: float

    @property
    def kernel(self) -> str:
        return "block Gibbs sampling"

    @property
    def names(self) -> set[str]:
        return set(self.between.kept)

    def move(self, previous: Values, frame: Frame) -> dict[str, Tensor]:
        return self.between.sweep(previous, self.beta)


@dataclass(frozen=True)
class MachineWalk:
    """A guide that is only walked: from a start through machines at inverse temperatures.

    :ivar levels: the machines between which a level's target lies, and how far it has come.
    """

    start: Callable[[], None]
    levels: tuple[tuple[Levels, float], ...]
    count: int | None = None

    @property
    def num_steps(self) -> int:
        """Number of transitions."""
        return len(self.levels)

    def programs(self, level: int) -> tuple[Callable[[], None], ...]:
        """The level's own program."""
        return (Broadcasting(self.start) if level == 0 else self.target(level),)

    def target(self, level: int) -> Callable[[], None]:
        """The machine that a level reaches, as a program."""
        between, beta = self.levels[level - 1]
        return Broadcasting(partial(between.program, beta, self.count))

    def plan(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
        """Path and moves."""
        moves = tuple(_Sweep(*level) for level in self.levels)
        return Plan(_Targets(self), moves, moves)

    def __call__(self) -> None:
        """Run the program that the first draws come from."""
        self.start()

    def walk(self, num_chains: int) -> list[tuple[Tensor, Tensor]]:
        """Log weights before and after each level of one walk, each ``(num_chains, *batch)``, without gradient."""
        for between, _ in self.levels:
            between.known.clear()
        request = Request(num_chains, routing=Routing(detach=True, local=True))
        with torch.no_grad():
            steps = Annealed()(self.target(self.num_steps), self, (), {}, request)
            return [(step.log_weight_in, step.log_weight) for step in steps]


@dataclass(frozen=True)
class _Targets:
    """The path of a walk."""

    walk: MachineWalk

    @property
    def num_steps(self) -> int:
        return self.walk.num_steps

    def programs(self, level: int) -> tuple[Callable[[], None], ...]:
        return self.walk.programs(level)

    def __call__(self, level: int, densities: Sequence[Tensor]) -> Tensor:
        return densities[0]
