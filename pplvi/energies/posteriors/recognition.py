"""Amortised posteriors of Boltzmann machines: a network that goes bottom up once, and mean field refined from it."""

from __future__ import annotations

import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.couplings import DenseCoupling
from pplvi.energies.machines.energy import Fixed, Mask, Shown
from pplvi.energies.machines.exact_posterior import Factorised
from pplvi.energies.machines.training_step import active_step
from pplvi.energies.posteriors.mean_field import FactorisedInference, MeanFieldGuide
from pplvi.energies.posteriors.problem import MeanField
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Natural, Positive
from pplvi.types import Values


@checked
class RecognitionNetwork(PyroModule):
    r"""One bottom-up pass with weights of its own, ``nu_l = mean(c_l + nu_(l-1) R_l)``.

    It starts as the machine's own first pass, with what comes from below counted twice where there is a layer above.

    :param machine: a machine without lateral connections between hidden units.
    :raises ValueError: for lateral connections of a hidden layer.

    Source: Salakhutdinov & Larochelle (2010), "Efficient learning of deep Boltzmann machines".

    >>> from pplvi.energies import DeepBoltzmannMachine
    >>> network = RecognitionNetwork(DeepBoltzmannMachine([4, 3, 2]))
    >>> [name for name, _ in network.named_parameters()]
    ['bias_h1', 'weight_v_h1', 'bias_h2', 'weight_h1_h2']
    """

    def __init__(self, machine: BoltzmannMachine) -> None:
        super().__init__()
        if other := [edge for edge, coupling in machine.couplings.items() if not isinstance(coupling, DenseCoupling)]:
            raise ValueError(f"couplings {other} are no matrices of weights: expected DenseCoupling between layers.")
        if machine.given is not None:
            raise ValueError(f"a recognition network of a machine with given={machine.given}: use MeanFieldGuide.")
        if lateral := [layer for layer in machine.hidden if machine.is_lateral(layer)]:
            raise ValueError(f"hidden layers {lateral} have lateral connections: expected layers of independent units.")
        self.units = {layer: machine.layers[layer] for layer in machine.layers}
        self.below: dict[str, tuple[str, ...]] = {}
        for layer in machine.hidden:
            self._begin(layer, machine)

    def _begin(self, layer: str, machine: BoltzmannMachine) -> None:
        """Weights and biases with which the network does what the machine's first pass does."""
        order = list(machine.layers)
        below = tuple(n for n in machine.neighbours(layer) if order.index(n) < order.index(layer))
        above = [n for n in machine.neighbours(layer) if n not in below]
        bias, times = machine.bias(layer).detach().clone(), 2 if above else 1
        if machine.centered:
            for other in (*above, *below):
                sign = 1 if other in above else 1 - times
                bias += sign * machine.offset(other) @ machine.weight(other, layer).detach()
        self.register_parameter(f"bias_{layer}", torch.nn.Parameter(bias))
        for other in below:
            weight = times * machine.weight(other, layer).detach()
            self.register_parameter(f"weight_{other}_{layer}", torch.nn.Parameter(weight.clone()))
        self.below[layer] = below

    @pyro_method
    def guess(self, observed: Values) -> MeanField:
        """Means and fields of the layers that are not observed, ``(*batch, width)``.

        :raises ValueError: if layers at the bottom are missing.
        """
        values, fields = dict(observed), {}
        for layer, below in self.below.items():
            if layer in values:
                continue
            if missing := [other for other in below if other not in values]:
                raise ValueError(f"the recognition network got no values of {missing}: expected data.")
            fields[layer] = getattr(self, f"bias_{layer}")
            for other in below:
                statistic = self.units[other].statistic(values[other])
                fields[layer] = fields[layer] + statistic @ getattr(self, f"weight_{other}_{layer}")
            values[layer] = self.units[layer].mean(fields[layer])
        return MeanField(values, fields)


@checked
class RecognitionGuide(PyroModule, FactorisedInference):
    r"""A recognition network, and mean field refined from it by some sweeps.

    .. math:: \mu = \text{sweeps}(\nu(v)), \qquad \min_R \text{KL}(q_\mu \| q_\nu)

    Under :class:`pplvi.BoltzmannELBO` the machine is trained with the refined posterior, and the network towards it, in
    the same step: the network's gradient is that of the divergence. ``iterations=1`` gives one-step targets, 10
    ten-step ones; with 0 the network alone is the posterior, and learns nothing there. Under other losses it is an
    amortised guide, with the gradient that the loss gives it (freeze the machine then).

    :param machine: the machine.
    :param iterations: sweeps from the network's guess.
    :param tol: outside training stop when no mean moves by more than this.
    :param network: the network; a new one unless given. Guides with other ``iterations`` may share it.
    :param name: prefix of the parameters' names.
    :raises ValueError: for numbers outside their ranges, or lateral connections of a hidden layer.

    Source: Salakhutdinov & Larochelle (2010), "Efficient learning of deep Boltzmann machines".

    >>> from pplvi.energies import DeepBoltzmannMachine
    >>> guide = RecognitionGuide(DeepBoltzmannMachine([4, 3, 2], init_scale=0.0), iterations=1)
    >>> guide.means(torch.ones(1, 4))["h2"], guide.divergence(torch.ones(1, 4))
    (tensor([[0.5000, 0.5000]]), tensor([0.], grad_fn=<AddBackward0>))
    """

    def __init__(
        self,
        machine: BoltzmannMachine,
        iterations: Natural = 10,
        *,
        tol: Positive | None = None,
        network: RecognitionNetwork | None = None,
        name: str = "recognition",
    ) -> None:
        super().__init__(name)
        self.sweeper = MeanFieldGuide(machine, iterations, tol=tol)
        self.network = RecognitionNetwork(machine) if network is None else network

    @property
    def machine(self) -> BoltzmannMachine:  # type: ignore[override]
        """The machine."""
        return self.sweeper.machine

    @property
    def tol(self) -> float | None:  # type: ignore[override]
        """Tolerance outside training."""
        return self.sweeper.tol

    def refined(self, iterations: int) -> RecognitionGuide:
        """The same network with another number of sweeps from its guess."""
        return RecognitionGuide(self.machine, iterations, tol=self.tol, network=self.network)

    def forward(
        self, v: Tensor | Values | None = None, *, mask: Mask = None, size: int | None = None, num_draws: int = 1
    ) -> None:
        """Sample sites of the layers that are not, or only partly, observed, in plate ``"data"``."""
        self.emit(self.posterior(v, num_draws, mask=mask, tol=self._tolerance()), size)

    def posterior(
        self, v: Tensor | Values | None, num_draws: int = 1, *, mask: Mask = None, tol: float | None = None
    ) -> MeanField:
        """The posterior after the sweeps; with a mask, for which there is no network, mean field from its own start."""
        if mask is not None:
            return self.sweeper.posterior(v, mask=mask, tol=tol)
        observed = self.machine.observed(v)
        return self.sweeper.solve(observed, start=self.network.guess(observed), tol=tol)

    @pyro_method
    def factorised(
        self, v: Shown = None, *, mask: Mask = None, size: int | None = None, num_draws: int = 1, given: Fixed = None
    ) -> Factorised:
        """The posterior without gradient; in a training step its entropy has the gradient of the divergence.

        With a mask, for which there is no network, it is mean field from its own start, and the network learns nothing.
        """
        if mask is not None:
            return self.sweeper.factorised(v, mask=mask, size=size, num_draws=num_draws)
        v = self.machine.joined(v, given)
        observed = self.machine.observed(v)
        with torch.set_grad_enabled(active_step() is not None):
            guess = self.network.guess(observed)
        with torch.no_grad():
            start = MeanField({n: x.detach() for n, x in guess.values.items()}, guess.fields)
            found = self.sweeper.solve(observed, start=start, tol=self._tolerance())
            entropy = self.entropy(found)
        if active_step() is None:
            return Factorised(found.means(), entropy)
        with torch.enable_grad():
            divergence = self._divergence(found, guess)
            return Factorised(found.means(), entropy - (divergence - divergence.detach()))

    def divergence(self, v: Tensor | Values) -> Tensor:
        """``KL(q_mu || q_nu)`` of the refined posterior to the network's guess, ``(*batch)``, in nats."""
        observed = self.machine.observed(v)
        guess = self.network.guess(observed)
        with torch.no_grad():
            found = self.sweeper.solve(observed, start=guess)
        return self._divergence(found, guess)

    def _divergence(self, found: MeanField, guess: MeanField) -> Tensor:
        total = torch.zeros(())
        for layer, field in guess.fields.items():
            units, target = self.machine.layers[layer], found.fields[layer].detach()
            mean = units.statistic(found.values[layer].detach())
            gap = units.log_partition(field) - units.log_partition(target) + (mean * (target - field)).sum(-1)
            total = total + gap
        return total
