"""Pairwise Boltzmann machines: named layers of units, and weights between layers.

One class for all of them, whose kinds are choices of a graph: two layers make a restricted machine, a chain of layers a
deep one, a layer connected with itself a semi-restricted or a general one. With ``phi`` the statistic of a layer's
units (the value itself, but for Gaussian ones) and ``base`` the part of the energy that is not linear in it,

    E(s) = sum_l base_l(s_l) - sum_l b_l . phi(s_l) - sum_(l,m) phi(s_l)^T W_lm phi(s_m),      p(s) = exp(-E(s)) / Z.

Everything here is in nats, and is made of three things: fields, the layers' closed forms, and colour classes (groups of
layers that are independent given the others).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from pplvi.energies.machines.couplings import (
    GIVEN,
    Coupling,
    DenseCoupling,
    Edge,
    Products,
    check_centering,
    check_graph,
    colour_classes,
)
from pplvi.energies.machines.energy import Clamped, EnergyModel
from pplvi.energies.machines.training_step import active_step
from pplvi.energies.machines.units import Beta, Units, check_beta
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Natural, NonNegative, Positive
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
    :param given: width of what the machine is conditional on, which has weights to the layers that ``connections`` pair
        with ``"given"``, or to all layers. Every datum has its own ``log Z`` then. It is not centered.
    :raises ValueError: for connections of unknown layers, given twice, or without a normalisable energy; for centered
        ones that are not dense.

    Source: Ackley, Hinton & Sejnowski (1985); Salakhutdinov & Hinton (2009); Montavon & Mueller (2012) for centering.

    >>> from pplvi.energies import BernoulliUnits
    >>> machine = BoltzmannMachine({"v": BernoulliUnits(3), "h": BernoulliUnits(2)}, [("v", "h")], init_scale=0.0)
    >>> abs(machine.energy({"v": torch.ones(3), "h": torch.ones(2)}).item()), round(machine.log_partition().item(), 4)
    (0.0, 3.4657)
    """

    def __init__(
        self,
        layers: Mapping[str, Units],
        connections: Sequence[tuple[str, str] | Coupling],
        *,
        centered: bool = True,
        name: str = "",
        init_scale: NonNegative = 0.01,
        given: Count | None = None,
    ) -> None:
        super().__init__(layers, centered=centered, name=name, given=given)
        couplings = list(connections)
        if given is not None and not any(GIVEN in _edge(connection) for connection in couplings):
            couplings += [(GIVEN, layer) for layer in layers]
        self.connections = tuple(_edge(connection) for connection in couplings)
        check_graph(layers, self.connections, given)
        widths = {GIVEN: given or 0, **{layer: units.width for layer, units in layers.items()}}
        self.couplings = {_edge(c): _coupling(c, widths) for c in couplings}
        check_centering(self.couplings, centered)
        for layer, units in layers.items():
            self.register_parameter(f"bias_{layer}", torch.nn.Parameter(torch.zeros(units.num_biases)))
        for edge, coupling in self.couplings.items():
            self.register_parameter(f"weight_{'_'.join(edge)}", torch.nn.Parameter(coupling.start(init_scale)))
        self.classes = colour_classes(tuple(layers), self.connections)

    # ------------------------------------------------------------------ parameters

    def edges(self) -> dict[Edge, Tensor]:
        """Parameters of the couplings by their layers: weights ``(width, width)``, of a lateral pair an upper triangle.

        Other couplings than :class:`DenseCoupling` have parameters of other shapes.
        """
        return {edge: self._raw(f"weight_{'_'.join(edge)}") for edge in self.connections}

    def biases(self) -> dict[str, Tensor]:
        """Parameters of the biases by layer, ``(num_biases,)``: of most units ``(width,)``."""
        return {layer: self._raw(f"bias_{layer}") for layer in self.layers}

    def _raw(self, name: str) -> Tensor:
        return self._found(self._parameters, name)

    def bias(self, layer: str) -> Tensor:
        """Biases of a layer, ``(width,)``."""
        step = active_step()
        bias = self._raw(f"bias_{layer}") if step is None else step.live(self).parameters[layer]
        shared = self.layers[layer].width // len(bias)
        return bias if shared == 1 else bias.unsqueeze(-1).expand(-1, shared).reshape(-1)

    def weight(self, a: str, b: str) -> Tensor:
        """Weights from layer to layer, ``(width of a, width of b)``.

        :raises ValueError: if they are not connected.
        """
        coupling = self.coupling(a, b)
        return coupling.weight(a, self._weight(coupling.edge))

    def filters(self, a: str, b: str) -> Tensor:
        """What each unit of layer ``b`` (each map, of a convolution) looks at in layer ``a``, ``(num_units, size)``."""
        coupling = self.coupling(a, b)
        return coupling.filters(self._weight(coupling.edge))

    def coupling(self, a: str, b: str) -> Coupling:
        """The coupling of two layers.

        :raises ValueError: if they are not connected.
        """
        found = self.couplings.get((a, b)) or self.couplings.get((b, a))
        if found is None:
            raise ValueError(f"layers {a!r} and {b!r} are not connected: expected one of {list(self.connections)}.")
        return found

    def _weight(self, edge: Edge) -> Tensor:
        step = active_step()
        return self._raw(f"weight_{'_'.join(edge)}") if step is None else step.live(self).parameters[edge]

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
        pulls = (coupling.others(layer) for edge, coupling in self.couplings.items() if layer in edge)
        near = {other: None for others in pulls for other in self.layers if other in others}
        return tuple(near)

    def is_lateral(self, layer: str) -> bool:
        """Whether a layer is connected with itself."""
        return (layer, layer) in self.connections

    # ------------------------------------------------------------------ energy and fields

    def contributions(
        self, layer: str, values: Values, known: Collection[str] = ()
    ) -> Iterator[tuple[frozenset[str], Tensor]]:
        """What couplings add to the field of a layer, ``(*batch, width)``, with the layers whose values make it.

        Couplings that some of the layers have no values of add nothing.

        :param known: layers that are counted elsewhere: couplings with nothing but these are left out.
        """
        for edge, coupling in self.couplings.items():
            others = coupling.others(layer)
            if layer in edge and others <= values.keys() and not others <= set(known):
                statistics = {other: self._statistic(other, values[other]) for other in others}
                yield others, coupling.field(layer, statistics, self._weight(edge), self._products())

    def _statistic(self, layer: str, value: Tensor) -> Tensor:
        return value if layer == GIVEN else self.layers[layer].statistic(value)

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
        total, statistics = torch.zeros(()), self.conditions(values)
        for layer in (layer for layer in values if layer in self.layers):
            units, value = self.layers[layer], values[layer]
            statistics[layer] = units.statistic(value)
            total = total + statistics[layer] @ self.bias(layer) - units.base_energy(value)
        for edge, coupling in self.couplings.items():
            if statistics.keys() >= set(edge):
                total = total - coupling.energy(statistics, self._weight(edge), self._products())
        return total

    def field(self, layer: str, values: Values) -> Tensor:
        """``b + sum_m phi(s_m) W_ml``, ``(*batch, width)``, of the neighbours among the values."""
        self.conditions(values)
        return sum((part for _, part in self.contributions(layer, values)), self.bias(layer))

    def with_means(self, values: Values) -> dict[str, Tensor]:
        """Values with the means of the other layers, where these are independent given them; without gradient."""
        missing = [layer for layer in self.layers if layer not in values]
        if not self._independent(missing):
            return dict(values)
        with torch.no_grad():
            return {**values, **{n: self.layers[n].mean(self.field(n, values)) for n in missing}}

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
        return not any(sum(name in layers for name in edge) > 1 for edge in self.connections)

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

    def free_energy(self, v: Tensor, beta: Beta = 1.0, *, given: Tensor | None = None) -> Tensor:
        """``F(v) = -log sum_h exp(-beta E(v, h))``, ``(*batch)``, in nats."""
        return -self.log_marginal({self.visible: v, **({} if given is None else {GIVEN: given})}, beta)

    def log_partition(self, beta: Beta = 1.0, *, given: Tensor | None = None) -> Tensor:
        """``log Z``, exact, in nats (float64): the smaller side is enumerated, the other summed out.

        :param given: what a conditional machine is given, ``(*batch, given)``, of which each has its own ``log Z``.
        :raises ValueError: if the smaller side has more than 20 bits.
        """
        return self.log_marginal({} if given is None else {GIVEN: given}, beta)

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


def _edge(connection: tuple[str, str] | Coupling) -> Edge:
    return connection.edge if isinstance(connection, Coupling) else (connection[0], connection[1])


def _coupling(connection: tuple[str, str] | Coupling, widths: Mapping[str, int]) -> Coupling:
    if isinstance(connection, Coupling):
        return connection
    a, b = connection
    return DenseCoupling((a, b), (widths[a], widths[b]))
