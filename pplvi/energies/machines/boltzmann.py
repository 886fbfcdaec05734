"""Pairwise Boltzmann machines: named layers of units, and weights between layers.

One class for all of them, whose kinds are choices of a graph: two layers make a restricted machine, a chain of layers a
deep one, a layer connected with itself a semi-restricted or a general one. With ``phi`` the statistic of a layer's
units (the value itself, but for Gaussian ones) and ``base`` the part of the energy that is not linear in it,

    E(s) = sum_l base_l(s_l) - sum_l b_l . phi(s_l) - sum_(l,m) phi(s_l)^T W_lm phi(s_m),      p(s) = exp(-E(s)) / Z.

Everything here is in nats, and is made of three things: fields, the layers' closed forms, and colour classes (groups of
layers that are independent given the others).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from pplvi.energies.machines.couplings import DenseCoupling, Edge, Products, check_graph, colour_classes
from pplvi.energies.machines.energy import Clamped, EnergyModel
from pplvi.energies.machines.training_step import active_step
from pplvi.energies.machines.units import Beta, Units, check_beta
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Natural, NonNegative, Positive
from pplvi.types import Values

MAX_BITS = 20
_CHUNK = 2**13


@checked
class BoltzmannMachine(EnergyModel):
    r"""A pairwise Boltzmann machine over named layers.

    .. math:: E(s) = \sum_l \text{base}_l(s_l) - \sum_l b_l \cdot \phi(s_l) - \sum_{(l,m)} \phi(s_l)^T W_{lm} \phi(s_m)

    Values are dictionaries from layer to tensor, ``(*batch, width)``; layers that a method is not given are summed out
    or drawn, as its name says. Energies and log densities have shape ``(*batch)`` and are in nats.

    :param layers: units by name, bottom to top; the first is the visible one.
    :param connections: pairs of names; a pair of one name twice is a lateral connection (symmetric, no self-coupling).
    :param centered: give training the centered gradient, with offsets that follow the data and posterior means.
    :param name: prefix of the parameters' names: machines that live in one parameter store need names of their own.
    :param init_scale: standard deviation of the weights at the start.
    :raises ValueError: for connections of unknown layers, given twice, or without a normalisable energy.

    Source: Ackley, Hinton & Sejnowski (1985); Salakhutdinov & Hinton (2009); Montavon & Mueller (2012) for centering.

    >>> from pplvi.energies import BernoulliUnits
    >>> machine = BoltzmannMachine({"v": BernoulliUnits(3), "h": BernoulliUnits(2)}, [("v", "h")], init_scale=0.0)
    >>> abs(machine.energy({"v": torch.ones(3), "h": torch.ones(2)}).item()), round(machine.log_partition().item(), 4)
    (0.0, 3.4657)
    """

    def __init__(
        self,
        layers: Mapping[str, Units],
        connections: Sequence[Edge],
        *,
        centered: bool = True,
        name: str = "",
        init_scale: NonNegative = 0.01,
    ) -> None:
        check_graph(layers, connections)
        super().__init__(layers, centered=centered, name=name)
        self.connections: tuple[Edge, ...] = tuple((a, b) for a, b in connections)
        for layer, units in layers.items():
            self.register_parameter(f"bias_{layer}", torch.nn.Parameter(torch.zeros(units.width)))
        self.couplings = {(a, b): DenseCoupling((a, b), (layers[a], layers[b])) for a, b in self.connections}
        for (a, b), coupling in self.couplings.items():
            self.register_parameter(f"weight_{a}_{b}", torch.nn.Parameter(coupling.start(init_scale)))
        self.classes = colour_classes(tuple(layers), self.connections)

    # ------------------------------------------------------------------ parameters

    def edges(self) -> dict[Edge, Tensor]:
        """Weights by pair of layers, ``(width, width)``; of a lateral pair only the upper triangle counts."""
        return {(a, b): self._raw(f"weight_{a}_{b}") for a, b in self.connections}

    def biases(self) -> dict[str, Tensor]:
        """Biases by layer, ``(width,)``."""
        return {layer: self._raw(f"bias_{layer}") for layer in self.layers}

    def _raw(self, name: str) -> Tensor:
        return self._found(self._parameters, name)

    def bias(self, layer: str) -> Tensor:
        """Biases of a layer, ``(width,)``."""
        step = active_step()
        return self._raw(f"bias_{layer}") if step is None else step.live(self).parameters[layer]

    def weight(self, a: str, b: str) -> Tensor:
        """Weights from layer to layer, ``(width of a, width of b)``.

        :raises ValueError: if they are not connected.
        """
        coupling = self._coupling(a, b)
        return coupling.weight(a, self._weight(coupling.edge))

    def _coupling(self, a: str, b: str) -> DenseCoupling:
        found = self.couplings.get((a, b)) or self.couplings.get((b, a))
        if found is None:
            raise ValueError(f"layers {a!r} and {b!r} are not connected: expected one of {list(self.connections)}.")
        return found

    def _weight(self, edge: Edge) -> Tensor:
        step = active_step()
        return self._raw(f"weight_{edge[0]}_{edge[1]}") if step is None else step.live(self).parameters[edge]

    @checked
    def limit_norms(self, limit: Positive) -> None:
        """Shrink, in place, the weights into each unit of the upper layer of a pair to a norm of at most ``limit``.

        The max-norm constraint: call it after a training step, such as ``fit(..., callbacks=[lambda run:
        machine.limit_norms(3.0)])``.

        :raises ValueError: for a limit that is not positive.

        Source: Srebro & Shraibman (2005); Srivastava et al. (2014).
        """
        with torch.no_grad():
            for edge, weight in self.edges().items():
                self.couplings[edge].limit(weight, limit)

    def neighbours(self, layer: str) -> tuple[str, ...]:
        """Layers that a layer is connected with, itself among them where there are lateral connections."""
        pairs = [(a, b) if a == layer else (b, a) for a, b in self.connections if layer in (a, b)]
        return tuple(b for _, b in pairs)

    def is_lateral(self, layer: str) -> bool:
        """Whether a layer is connected with itself."""
        return (layer, layer) in self.connections

    # ------------------------------------------------------------------ energy and fields

    def contribution(self, source: str, target: str, value: Tensor) -> Tensor:
        """What values of a layer add to the field of one it is connected with, ``(*batch, width of target)``.

        :raises ValueError: if they are not connected.
        """
        coupling = self._coupling(source, target)
        return coupling.field(source, value, self._weight(coupling.edge), self._products())

    def _products(self) -> Products | None:
        step = active_step()
        return None if step is None else step.live(self).products

    def energy(self, values: Values) -> Tensor:
        """``E(s)``, ``(*batch)``, of values of all layers; means count as values, the energy is linear in each unit.

        :raises ValueError: if a layer is missing.
        """
        if missing := sorted(self.layers.keys() - values.keys()):
            raise ValueError(f"no values for the layers {missing}: expected {list(self.layers)}. See log_marginal().")
        return -self.log_density(values)

    def log_density(self, values: Values) -> Tensor:
        """Minus the terms of the energy that touch only the given layers, ``(*batch)``, in nats."""
        total = torch.zeros(())
        for layer, value in values.items():
            units = self.layers[layer]
            total = total + units.statistic(value) @ self.bias(layer) - units.base_energy(value)
        for (a, b), coupling in self.couplings.items():
            if a in values and b in values:
                ends = values[a], values[b]
                total = total - coupling.energy(ends, self._weight(coupling.edge), self._products())
        return total

    def field(self, layer: str, values: Values) -> Tensor:
        """``b + sum_m phi(s_m) W_ml``, ``(*batch, width)``, of the neighbours among the values."""
        parts = [self.contribution(other, layer, values[other]) for other in self.neighbours(layer) if other in values]
        return sum(parts, self.bias(layer))

    def conditional(self, layer: str, values: Values, beta: Beta = 1.0) -> Any:
        """Distribution of a layer given the others, a ``TorchDistribution`` with one event dimension.

        :raises ValueError: for a layer with lateral connections, whose units are not independent.
        """
        if self.is_lateral(layer):
            raise ValueError(f"the units of layer {layer!r} are connected with each other: draw them with gibbs().")
        return self.layers[layer].conditional(self.field(layer, values), beta)

    # ------------------------------------------------------------------ sums over layers

    def log_marginal(self, values: Values, beta: Beta = 1.0) -> Tensor:
        """``log sum exp(-beta E)`` over the layers that are not given, ``(*batch)``, in nats: exact.

        Layers that are independent given the others are summed out in closed form; if more are missing, the rest of
        them is enumerated. Of a restricted machine's visible layer this is minus the free energy, of nothing log Z.

        :raises ValueError: if more than 20 bits would have to be enumerated.
        """
        check_beta(beta)
        missing = tuple(layer for layer in self.layers if layer not in values)
        listed = self.to_enumerate(missing)
        if not listed:
            return self._closed_form(values, missing, beta)
        like = next(iter(values.values()), self.bias(self.visible))
        batch = next((value.shape[:-1] for value in values.values()), torch.Size())
        terms = []
        for states in self.states(listed, like):
            states = {n: s.reshape(len(s), *(1 for _ in batch), s.shape[-1]) for n, s in states.items()}
            rest = tuple(layer for layer in missing if layer not in states)
            terms.append(self._closed_form({**values, **states}, rest, beta).double().logsumexp(0))
        total: Tensor = torch.stack(terms).logsumexp(0)
        return total.to(like.dtype) if batch else total

    def _closed_form(self, values: Values, missing: Sequence[str], beta: Beta) -> Tensor:
        density = beta * self.log_density(values)
        for layer in missing:
            density = density + self.layers[layer].log_partition(self.field(layer, values), beta)
        return density

    def sums_out(self, layers: Sequence[str]) -> bool:
        """Whether :meth:`log_marginal` can sum out these layers exactly."""
        return self._bits(self._smallest(tuple(layers))) <= MAX_BITS

    def _smallest(self, missing: tuple[str, ...]) -> tuple[str, ...]:
        """The smallest group of layers whose values make the others of the missing ones independent."""
        groups = (g for size in range(len(missing) + 1) for g in combinations(missing, size))
        apart = [g for g in groups if self._independent([layer for layer in missing if layer not in g])]
        return min(apart, key=self._bits)

    def to_enumerate(self, missing: tuple[str, ...]) -> tuple[str, ...]:
        """The fewest of some layers whose states have to be listed to sum all of them out exactly.

        :raises ValueError: if these have more than 20 bits.
        """
        best = self._smallest(missing)
        if self._bits(best) > MAX_BITS:
            raise ValueError(
                f"summing out the layers {list(missing)} exactly would enumerate {list(best)}, {self._bits(best):g} "
                f"bits: expected at most {MAX_BITS}. Estimate log Z by annealed importance sampling instead."
            )
        return best

    def _bits(self, layers: Sequence[str]) -> float:
        return sum((self.layers[layer].log_states for layer in layers), 0.0)

    def _independent(self, layers: Sequence[str]) -> bool:
        return not any(a in layers and b in layers for a, b in self.connections)

    def states(self, layers: Sequence[str], like: Tensor) -> Iterator[dict[str, Tensor]]:
        """All states of some layers together, some thousands at a time, ``(num_states, width)`` by layer.

        :raises ValueError: for a continuum.
        """
        counts = [self.layers[n].count_states() for n in layers]
        total = int(torch.tensor(counts).prod())
        for start in range(0, total, _CHUNK):
            index, states = torch.arange(start, min(start + _CHUNK, total), device=like.device), {}
            for layer, count in zip(layers, counts, strict=True):
                states[layer] = self.layers[layer].states(index % count, like)
                index = index // count
            yield states

    def free_energy(self, v: Tensor, beta: Beta = 1.0) -> Tensor:
        """``F(v) = -log sum_h exp(-beta E(v, h))``, ``(*batch)``, in nats."""
        return -self.log_marginal({self.visible: v}, beta)

    def log_partition(self, beta: Beta = 1.0) -> Tensor:
        """``log Z``, exact, in nats (float64): the smaller side is enumerated, the other summed out.

        :raises ValueError: if the smaller side has more than 20 bits.
        """
        return self.log_marginal({}, beta)

    # ------------------------------------------------------------------ Gibbs sampling

    @checked
    def gibbs(
        self, values: Values, num_sweeps: Natural = 1, *, clamped: Clamped = (), beta: Beta = 1.0
    ) -> dict[str, Tensor]:
        """Sweeps of block Gibbs sampling, one colour class after another; the first one is drawn first.

        :param values: where the chains are, ``(*batch, width)`` of every layer.
        :param clamped: layers to leave as they are, or by layer a mask of the units to leave, ``(*batch, width)`` or
            ``(width,)``; a mask of ``None`` is all units.
        :param beta: inverse temperature, a number or ``(*batch)``.
        :returns: new values of every layer; the given tensors are not changed.
        :raises ValueError: for layers without values, unknown ones among the clamped, or another beta.
        """
        check_beta(beta)
        held = self._held(clamped)
        if missing := sorted(self.layers.keys() - values.keys()):
            raise ValueError(f"no values for the layers {missing}: expected {list(self.layers)}. See draw().")
        state = dict(values)
        with torch.no_grad():
            for _ in range(num_sweeps):
                for layer in (layer for group in self.classes for layer in group):
                    if not (layer in held and held[layer] is None):
                        state[layer] = self.redrawn(layer, state, beta, held=held.get(layer))
        return state

    def _held(self, clamped: Clamped) -> Mapping[str, Tensor | None]:
        held: Mapping[str, Tensor | None] = clamped if isinstance(clamped, Mapping) else dict.fromkeys(clamped)
        if unknown := [layer for layer in held if layer not in self.layers]:
            raise ValueError(f"clamped={unknown}: expected some of the layers {list(self.layers)}.")
        return held

    def redrawn(self, layer: str, values: Values, beta: Beta = 1.0, *, held: Tensor | None = None) -> Tensor:
        """A draw of one layer given the values of the others, ``(*batch, width)``, without gradient.

        :param held: true where units keep the values that they have.
        """
        units = self.layers[layer]
        if not self.is_lateral(layer):
            drawn = units.sample(self.field(layer, values), beta)
            return drawn if held is None else torch.where(held, values[layer], drawn)
        # Units that are connected with each other are drawn one after another.
        others = {name: value for name, value in values.items() if name != layer}
        outer, inner, value = self.field(layer, others), self.weight(layer, layer), values[layer].clone()
        held = None if held is None else held.expand_as(value)
        for i in range(units.width):
            drawn = units.sample((outer[..., i] + value @ inner[:, i]).unsqueeze(-1), beta).squeeze(-1)
            value[..., i] = drawn if held is None else torch.where(held[..., i], value[..., i], drawn)
        return value
