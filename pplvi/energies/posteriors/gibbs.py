"""Gibbs draws of the hidden layers as a guide."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pyro
import torch
from torch import Tensor

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.energy import Fixed, Mask, Shown
from pplvi.energies.machines.exact_posterior import Factorised
from pplvi.energies.machines.measures import BaseMeasure
from pplvi.energies.posteriors.mean_field import FactorisedInference, MeanFieldGuide
from pplvi.energies.posteriors.problem import MeanField
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Natural
from pplvi.programs.plates import data_plate
from pplvi.types import Values


@checked
class GibbsGuide(FactorisedInference):
    r"""The posterior of the hidden layers by Gibbs sampling with the data clamped, from draws of mean field.

    Of the layers that are drawn last, which are independent given the others, the exact conditional is known: as means
    it takes the draws of the other layers and the conditional means of those. What :meth:`bound` and losses report,

    .. math:: E[\log p(v, h_{\text{drawn}})] + \log Z \le \log p(v) + \log Z,

    is a bound, for hidden units are discrete, but a loose one: the entropy of what is drawn is missing. The gradient
    of the positive phase is that of the likelihood itself, once the chains have mixed.

    :param machine: a machine with discrete hidden units.
    :param num_sweeps: Gibbs sweeps.
    :param iterations: sweeps of mean field before the first draw.
    :raises ValueError: for hidden units with a continuum of values, or fewer than one sweep.

    Source: Salakhutdinov (2009), "Learning in Markov random fields using tempered transitions"; Ackley, Hinton &
    Sejnowski (1985).

    >>> from pplvi.energies import DeepBoltzmannMachine
    >>> guide = GibbsGuide(DeepBoltzmannMachine([4, 3, 2]), num_sweeps=2)
    >>> {layer: tuple(mean.shape) for layer, mean in guide.factorised(torch.ones(5, 4)).means.items()}
    {'h1': (5, 3), 'h2': (5, 2)}
    """

    def __init__(self, machine: BoltzmannMachine, num_sweeps: Count = 5, *, iterations: Natural = 1) -> None:
        if real := [layer for layer in machine.hidden if machine.layers[layer].num_states is None]:
            raise ValueError(f"hidden layers {real} have a continuum of values: expected discrete units.")
        self.machine, self.num_sweeps, self.tol = machine, num_sweeps, None
        self.starts = MeanFieldGuide(machine, iterations)

    def posterior(
        self, v: Tensor | Values | None, num_draws: int = 1, *, mask: Mask = None, tol: float | None = None
    ) -> MeanField:
        """Draws of all layers but those that are drawn last, whose fields and means are given."""
        observed = self.machine.observed(v, mask)
        with torch.no_grad():
            start = self.starts.posterior(v, num_draws, mask=mask)
            return self._drawn(observed, start, next(iter(start.values.values())).shape[:-1])

    def _drawn(self, observed: Values, start: MeanField, shape: tuple[int, ...]) -> MeanField:
        machine = self.machine
        clamped: dict[str, Tensor | None] = dict.fromkeys(observed)
        values = {layer: value.expand(*shape, value.shape[-1]) for layer, value in observed.items()}
        for layer, field in start.fields.items():
            drawn = machine.layers[layer].sample(field.expand(*shape, field.shape[-1]))
            if layer in start.masks:
                clamped[layer] = start.masks[layer]
                drawn = torch.where(start.masks[layer], values[layer], drawn)
            values[layer] = drawn
        values = machine.gibbs(values, self.num_sweeps, clamped=clamped)
        last = [layer for layer in self._last(observed) if layer not in observed]
        fields = {layer: machine.field(layer, values) for layer in last}
        means = {n: machine.layers[n].mean(f) for n, f in fields.items()}
        return MeanField({**values, **means}, fields)

    def _last(self, observed: Values) -> list[str]:
        """Layers that are independent given the others and are drawn last, unless they have lateral connections."""
        groups = [[n for n in group if n not in observed] for group in self.machine.classes]
        last = next((group for group in reversed(groups) if group), [])
        return [] if any(self.machine.is_lateral(layer) for layer in last) else last

    def factorised(
        self, v: Shown = None, *, mask: Mask = None, size: int | None = None, num_draws: int = 1, given: Fixed = None
    ) -> Factorised:
        """Draws, and conditional means of the layers drawn last, with the entropy of these."""
        v = self.machine.joined(v, given)
        observed = self.machine.observed(v, mask)
        known = observed.keys() - self.machine.masks(mask, observed)
        found = self.posterior(v, num_draws, mask=mask)
        return Factorised({n: x for n, x in found.values.items() if n not in known}, self.entropy(found))

    def __call__(
        self, v: Shown = None, *, mask: Mask = None, size: int | None = None, num_draws: int = 1, given: Fixed = None
    ) -> None:
        """Sample sites of the layers that are not, or only partly, observed, in plate ``"data"``.

        The sites of layers that are drawn have log density 0, an upper bound of their own.
        """
        v = self.machine.joined(v, given)
        observed = self.machine.observed(v, mask)
        with torch.no_grad():
            start = self.starts.posterior(v, num_draws, mask=mask)
        drawing, values = _JointDraw(lambda shape: self._drawn(observed, start, shape)), dict(observed)
        last, count = self._last(observed), len(next(iter(start.values.values())))
        with data_plate(count, size):
            for layer in (layer for layer in start.fields if layer not in last):
                units, draw = self.machine.layers[layer], partial(drawing, layer)
                values[layer] = pyro.sample(layer, BaseMeasure(units, (count,), self.machine.like(), draw=draw))
            for layer in last:
                pyro.sample(layer, self.machine.conditional(layer, values))


class _JointDraw:
    """One draw of all layers together, made when the first of them is asked for."""

    def __init__(self, draw: Callable[[tuple[int, ...]], MeanField]) -> None:
        self.draw = draw
        self.found: MeanField | None = None

    def __call__(self, layer: str, shape: tuple[int, ...]) -> Tensor:
        """Values of one layer."""
        if self.found is None:
            self.found = self.draw(shape)
        return self.found.values[layer]
