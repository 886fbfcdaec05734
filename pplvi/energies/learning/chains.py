"""Where the negative phase comes from: steps of Markov chains that leave a machine's distribution invariant.

Each kind of chain yields one :class:`pplvi.objectives.Step` of equally weighted particles, for
:class:`pplvi.objectives.LogPartition`. What a chain has to remember are buffers of its machine, made on first use and
moved in place only where ``advance`` is true: that is in training steps. Of the colour class that was drawn last the
exact conditional mean is used instead of the draw (Rao-Blackwell), which costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.energy import EnergyModel
from pplvi.energies.machines.training_step import Live, active_step
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Fraction, Plural, Positive
from pplvi.objectives.step import Step
from pplvi.programs.state import preserved_rng
from pplvi.types import Values


@checked
@dataclass(frozen=True)
class Chains:
    """Chains of block Gibbs sampling; subclasses say where they start and what is kept.

    :ivar num_chains: number of chains, where it is not that of the data.
    :ivar sweeps: Gibbs sweeps in a step.
    """

    proposal: ClassVar[str] = "chains"
    num_chains: Count = 100
    sweeps: Count = 1

    def __call__(self, machine: EnergyModel, data: Values, *, advance: bool = False) -> Step:
        """One step of the chains.

        :param data: values of all layers under the data, ``(*batch, width)``.
        :param advance: keep where the chains go.
        """
        values = self.move(machine, data, advance)
        return self.step(machine.log_marginal(values), num_data_dims(machine, values))

    def move(self, machine: EnergyModel, data: Values, advance: bool) -> dict[str, Tensor]:
        """Where the chains go: values of all layers but those that are to be summed out, ``(*chains, width)``."""
        raise NotImplementedError

    def step(self, log_density: Tensor, batch: int = 0) -> Step:
        """The step of chains with these log densities, ``(*chains)``: draws of the target before and after it.

        :param batch: how many of the last dimensions are data that have distributions of their own.
        """
        return Step.equally_weighted(_chains_first(log_density, batch))

    def kept(self, machine: EnergyModel, start: Callable[[], Values], prefix: str = "chain") -> dict[str, Tensor]:
        """The chains of a machine, as buffers, one for each layer; made by ``start`` at the first use.

        :raises ValueError: if there are chains of another number or kind, or if the machine is conditional.
        """
        if machine.given is not None:
            raise ValueError(
                f"{self} of a machine with given={machine.given}: every datum has its own distribution, and no chain "
                "goes on from one to another. Use negative='contrastive', or 'exact' for a tiny machine."
            )
        names = {layer: f"{prefix}_{layer}" for layer in machine.layers}
        if any(not machine.remembers(name) for name in names.values()):
            with preserved_rng():  # a step draws the same numbers whether its chains were there before or not
                for layer, value in start().items():
                    machine.register_buffer(names[layer], value)
        found = {layer: machine.kept(name) for layer, name in names.items()}
        expected = self._shape(machine)
        for layer, value in found.items():
            if tuple(value.shape[:-1]) != expected:
                raise ValueError(
                    f"the machine has chains of shape {tuple(value.shape[:-1])} in layer {layer!r}, expected "
                    f"{expected} for {self}. Use one kind and number of chains, or start anew: machine.forget_chains()."
                )
        return found

    def _shape(self, machine: EnergyModel) -> tuple[int, ...]:
        return (self.num_chains,)


def keep(chains: Values, values: Values) -> None:
    """Write new values into the buffers of chains."""
    with torch.no_grad():
        for layer, value in chains.items():
            value.copy_(values[layer])


def num_data_dims(machine: EnergyModel, values: Values) -> int:
    """Dimensions of the data that have a ``log Z`` each: those of what a conditional machine is given."""
    return sum(value.dim() - 1 for value in machine.conditions(values).values())


def _chains_first(log_density: Tensor, batch: int) -> Tensor:
    return log_density.reshape(-1, *log_density.shape[log_density.dim() - batch :])


def settled(machine: EnergyModel, values: Values) -> dict[str, Tensor]:
    """Values at the ends of chains without the layers that were drawn last, where these are independent."""
    last = machine.classes[-1]
    alone = isinstance(machine, BoltzmannMachine) and any(machine.is_lateral(layer) for layer in last)
    return {n: v for n, v in values.items() if alone or n not in last}


def _pairwise(machine: EnergyModel, chains: Chains) -> BoltzmannMachine:
    if not isinstance(machine, BoltzmannMachine):
        raise ValueError(
            f"{type(chains).__name__} of {type(machine).__name__}, which has no layers with weights between them: "
            "expected a BoltzmannMachine. Use PersistentChains(), which needs only its Gibbs sweeps."
        )
    return machine


@checked
@dataclass(frozen=True)
class PersistentChains(Chains):
    """Persistent contrastive divergence, stochastic maximum likelihood: chains go on from step to step.

    Source: Younes (1989); Tieleman (2008).

    >>> from pplvi.energies import RestrictedBoltzmannMachine
    >>> rbm = RestrictedBoltzmannMachine(3, 2)
    >>> PersistentChains(num_chains=5)(rbm, {}).log_weight
    tensor([0., 0., 0., 0., 0.])
    """

    def move(self, machine: EnergyModel, data: Values, advance: bool) -> dict[str, Tensor]:
        """One step of ``sweeps`` sweeps."""
        chains = self.kept(machine, lambda: machine.draw((self.num_chains,)))
        moved = machine.gibbs(chains, self.sweeps)
        if advance:
            keep(chains, moved)
        return settled(machine, moved)


@checked
@dataclass(frozen=True)
class EveryState(Chains):
    """The exact negative phase of a tiny machine: every state of its smaller side, weighted by its probability.

    ``num_chains`` and ``sweeps`` are ignored.

    >>> from pplvi.energies import RestrictedBoltzmannMachine
    >>> rbm = RestrictedBoltzmannMachine(3, 2, init_scale=0.0)
    >>> EveryState()(rbm, {}).log_weight
    tensor([2.0794, 2.0794, 2.0794, 2.0794])
    """

    def move(self, machine: EnergyModel, data: Values, advance: bool) -> dict[str, Tensor]:
        """One step of all states.

        :raises ValueError: if there are more than 20 bits of them, or for a machine without fields.
        """
        machine = _pairwise(machine, self)
        listed = machine.to_enumerate(tuple(machine.layers))
        parts, given = list(machine.states(listed, machine.like())), machine.conditions(data)
        apart = [1] * num_data_dims(machine, given)
        states = {layer: torch.cat([part[layer] for part in parts]) for layer in listed}
        return {**{n: s.reshape(len(s), *apart, s.shape[-1]) for n, s in states.items()}, **given}

    def step(self, log_density: Tensor, batch: int = 0) -> Step:
        """The step of states that are weighted by their probability."""
        weight = _chains_first(log_density.detach(), batch)
        return replace(super().step(log_density, batch), log_weight_in=weight, log_weight=weight)


@checked
@dataclass(frozen=True)
class ContrastiveDivergence(Chains):
    """Contrastive divergence, CD-k: chains start at the data, with hidden layers drawn given them.

    ``num_chains`` is ignored: there is a chain for each datum. The hidden layers of a machine that is not restricted
    are drawn by ``sweeps`` Gibbs sweeps with the data clamped.

    Source: Hinton (2002), "Training products of experts by minimizing contrastive divergence".
    """

    def move(self, machine: EnergyModel, data: Values, advance: bool) -> dict[str, Tensor]:
        """One step of ``sweeps`` sweeps from the data."""
        v = data[machine.visible].detach()
        start = {**machine.draw(tuple(v.shape[:-1])), machine.visible: v, **machine.conditions(data)}
        start = machine.gibbs(start, 1 if len(machine.hidden) == 1 else self.sweeps, clamped=(machine.visible,))
        return settled(machine, machine.gibbs(start, self.sweeps))


@checked
@dataclass(frozen=True)
class MeanFieldContrastiveDivergence(Chains):
    """Mean-field contrastive divergence: conditional means instead of draws, from the data and their posterior means.

    Nothing is random; the gradient is that of no likelihood.

    Source: Welling & Hinton (2002), "A new learning algorithm for mean field Boltzmann machines".
    """

    def move(self, machine: EnergyModel, data: Values, advance: bool) -> dict[str, Tensor]:
        """One step of ``sweeps`` sweeps of means from the data.

        :raises ValueError: for a machine without fields.
        """
        machine = _pairwise(machine, self)
        values = {layer: value.detach() for layer, value in data.items()}
        with torch.no_grad():
            for _ in range(self.sweeps):
                for layer in (layer for group in machine.classes for layer in group):
                    values[layer] = machine.layers[layer].mean(machine.field(layer, values))
        return settled(machine, {**values, **machine.conditions(data)})


@checked
@dataclass(frozen=True)
class TemperedChains(Chains):
    """Parallel tempering: chains at several inverse temperatures that exchange their states.

    After the sweeps, neighbours ``b, b'`` are exchanged with probability ``min(1, exp((b - b') (E - E')))``, the even
    pairs and then the odd ones. The chains at ``beta = 1`` are the step.

    :ivar num_temperatures: number of inverse temperatures, evenly spaced from ``lowest`` to 1.
    :ivar lowest: the smallest inverse temperature.

    Real units have no distribution at ``beta = 0``: machines that have such need ``lowest`` above 0.

    Source: Swendsen & Wang (1986); Desjardins et al. (2010); Cho, Raiko & Ilin (2010).
    """

    num_temperatures: Plural = 10
    lowest: Fraction = 0.0

    def _shape(self, machine: EnergyModel) -> tuple[int, ...]:
        return self.num_temperatures, self.num_chains

    def betas(self, like: Tensor) -> Tensor:
        """The inverse temperatures, ``(num_temperatures,)``, the coldest last."""
        return torch.linspace(self.lowest, 1.0, self.num_temperatures, dtype=like.dtype, device=like.device)

    def move(self, machine: EnergyModel, data: Values, advance: bool) -> dict[str, Tensor]:
        """One step of ``sweeps`` sweeps and an exchange.

        :raises ValueError: for units with a continuum of values, if the lowest inverse temperature is 0.
        """
        if self.lowest == 0 and (real := [n for n, units in machine.layers.items() if units.num_states is None]):
            raise ValueError(
                f"tempering down to lowest=0 with layers {real} that have a continuum of values, and no distribution "
                "there: expected a larger one, such as negative=TemperedChains(lowest=0.5)."
            )
        chains = self.kept(machine, lambda: machine.draw(self._shape(machine)))
        betas = self.betas(machine.like())
        with torch.no_grad():
            moved = machine.gibbs(chains, self.sweeps, beta=betas.unsqueeze(-1))
            for first in (0, 1):
                moved = self._exchanged(machine, moved, betas, first)
        if advance:
            keep(chains, moved)
        return settled(machine, {n: v[-1] for n, v in moved.items()})

    def _exchanged(self, machine: EnergyModel, values: Values, betas: Tensor, first: int) -> dict[str, Tensor]:
        energy = machine.energy(values)
        order = torch.arange(self.num_temperatures, device=energy.device).unsqueeze(-1).expand_as(energy)
        pairs = torch.arange(first, self.num_temperatures - 1, 2, device=energy.device)
        gain = (betas[pairs] - betas[pairs + 1]).unsqueeze(-1) * (energy[pairs] - energy[pairs + 1])
        swap = torch.log(torch.rand_like(gain)) < gain
        source = order.clone()
        source[pairs] = torch.where(swap, order[pairs + 1], order[pairs])
        source[pairs + 1] = torch.where(swap, order[pairs], order[pairs + 1])
        return {n: v.gather(0, source.unsqueeze(-1).expand_as(v)) for n, v in values.items()}


@checked
@dataclass(frozen=True)
class FastPersistentChains(Chains):
    """Fast persistent contrastive divergence: the chains see weights that also have a fast, forgetful part.

    With ``g`` the gradient of the log likelihood, ``W_fast <- decay W_fast + fast_rate g``. Chains are moved under
    ``W + W_fast``, which drives them away from where they have been; statistics are taken under ``W``.

    :ivar fast_rate: learning rate of the fast parameters.
    :ivar decay: what is left of the fast parameters after a step.

    Source: Tieleman & Hinton (2009), "Using fast weights to improve persistent contrastive divergence".
    """

    fast_rate: Positive = 0.01
    decay: Fraction = 0.95

    def move(self, machine: EnergyModel, data: Values, advance: bool) -> dict[str, Tensor]:
        """One step of ``sweeps`` sweeps under the fast weights.

        :raises ValueError: outside a training step, or for a machine without weights between layers.
        """
        machine = _pairwise(machine, self)
        chains = self.kept(machine, lambda: machine.draw((self.num_chains,)))
        slow: dict[Any, Tensor] = {**machine.edges(), **machine.biases()}
        fast = {key: self._fast(machine, key, value) for key, value in slow.items()}
        step = active_step()
        with torch.no_grad():
            if step is None:
                raise ValueError(f"{self} outside a training step: expected pplvi.BoltzmannELBO(negative=...).")
            with step.replaced(machine, Live({key: slow[key] + fast[key] for key in slow})):
                moved = machine.gibbs(chains, self.sweeps)
        if advance:
            density = machine.log_marginal(settled(machine, moved))
            keep(chains, moved)
            with torch.enable_grad():
                gain = machine.energy({n: v.detach() for n, v in data.items()}).mean() + density.mean()
                keys = [key for key in slow if slow[key].requires_grad]
                moves = torch.autograd.grad(-gain, [slow[key] for key in keys], retain_graph=True)
            with torch.no_grad():
                for key, move in zip(keys, moves, strict=True):
                    fast[key].mul_(self.decay).add_(move, alpha=self.fast_rate)
        return settled(machine, moved)

    @staticmethod
    def _fast(machine: BoltzmannMachine, key: str | tuple[str, str], value: Tensor) -> Tensor:
        name = f"fast_{key if isinstance(key, str) else '_'.join(key)}"
        if not machine.remembers(name):
            machine.register_buffer(name, torch.zeros_like(value))
        return machine.kept(name)


Negative = Literal["persistent", "contrastive", "fast", "tempered", "mean_field", "exact"]

NAMED_CHAINS: dict[str, type[Chains]] = {
    "persistent": PersistentChains,
    "contrastive": ContrastiveDivergence,
    "fast": FastPersistentChains,
    "tempered": TemperedChains,
    "mean_field": MeanFieldContrastiveDivergence,
    "exact": EveryState,
}
