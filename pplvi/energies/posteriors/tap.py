"""Mean field with a correction of second order: the equations of Thouless, Anderson and Palmer."""

from __future__ import annotations

import torch
from torch import Tensor

from pplvi.energies.machines.couplings import DenseCoupling
from pplvi.energies.machines.training_step import active_step
from pplvi.energies.machines.units import BernoulliUnits
from pplvi.energies.posteriors.mean_field import MeanFieldGuide
from pplvi.energies.posteriors.problem import MeanField, Problem
from pplvi.types import Values


class TAPGuide(MeanFieldGuide):
    r"""Marginals of the hidden layers by the TAP equations: mean field that knows how a unit acts back on itself.

    .. math:: \mu_i = \sigma\Big(b_i + \sum_j W_{ij} \mu_j - (\mu_i - \tfrac12) \sum_j W_{ij}^2 \mu_j (1 - \mu_j)\Big),
        \qquad \log p(v) + \log Z \approx -E(v, \mu) + H(\mu) + \tfrac12 \sum_{(i, j)} W_{ij}^2 \mu_i (1 - \mu_i) \mu_j
        (1 - \mu_j)

    over pairs :math:`(i, j)`, each counted once. The marginals are better than those of mean field where couplings are
    weak, and :meth:`bound` is an estimate then, of one order more, but no bound. As a guide it draws the units
    independently, so that its ELBO is a bound (and less than mean field's). Under
    :class:`pplvi.BoltzmannELBO` the correction is part of the positive phase: its gradient is there.

    :param machine: a machine whose hidden units are Bernoulli.
    :param iterations: sweeps.
    :param tol: outside training stop when no mean moves by more than this.
    :param parallel: update all layers at once; needed where layers have lateral connections.
    :param damping: weight of the old fields in an update, in ``[0, 1)``.
    :raises ValueError: for other units, or lateral connections without parallel updates.

    Source: Thouless, Anderson & Palmer (1977); Gabrié, Tramel & Krzakala (2015), "Training restricted Boltzmann
    machines via the Thouless-Anderson-Palmer free energy".

    >>> from pplvi.energies import DeepBoltzmannMachine
    >>> dbm = DeepBoltzmannMachine([4, 3, 2], init_scale=0.2)
    >>> exact = -dbm.free_energy(torch.ones(1, 4))
    >>> errors = [abs(exact - guide(dbm, 20).bound(torch.ones(1, 4))).item() for guide in (MeanFieldGuide, TAPGuide)]
    >>> errors[1] < errors[0]
    True
    """

    def _check(self) -> None:
        machine = self.machine
        if other := [layer for layer in machine.hidden if not isinstance(machine.layers[layer], BernoulliUnits)]:
            raise ValueError(f"the TAP equations here are for Bernoulli units, but layers {other} have others.")
        if dense := [edge for edge, coupling in machine.couplings.items() if not isinstance(coupling, DenseCoupling)]:
            raise ValueError(f"couplings {dense} are no matrices of weights: expected DenseCoupling between layers.")
        lateral = [layer for layer in machine.layers if machine.is_lateral(layer)]
        if lateral and not self.parallel:
            raise ValueError(f"layers {lateral} have lateral connections: expected parallel=True, with damping.")

    def field(self, problem: Problem, layer: str, values: Values) -> Tensor:
        """Field of a layer less its reaction on itself, ``(*batch, width)``."""
        reaction = torch.zeros(())
        for other in self.machine.neighbours(layer):
            if other in problem.free:
                squared = self.machine.weight(other, layer) ** 2
                reaction = reaction + _variance(values[other], problem.masks.get(other)) @ squared
        return problem.field(layer, values) - (values[layer] - 0.5) * reaction

    def entropy(self, found: MeanField) -> Tensor:
        """Entropy and the correction of second order, ``(*batch)``, in nats, with its gradient in training."""
        with torch.set_grad_enabled(active_step() is not None):
            return super().entropy(found) + self._correction(found)

    def _correction(self, found: MeanField) -> Tensor:
        variance = {layer: _variance(found.values[layer], found.masks.get(layer)) for layer in found.fields}
        total = torch.zeros(())
        for a, b in self.machine.connections:
            if a in variance and b in variance:
                squared = self.machine.weight(a, b) ** 2
                total = total + ((variance[a] @ squared) * variance[b]).sum(-1) / (4 if a == b else 2)
        return total


def _variance(mean: Tensor, mask: Tensor | None) -> Tensor:
    variance = mean * (1 - mean)
    return variance if mask is None else variance.masked_fill(mask, 0.0)
