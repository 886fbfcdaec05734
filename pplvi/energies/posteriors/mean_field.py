"""Mean-field posteriors of Boltzmann machines, found by coordinate ascent.

Under a factorised ``q`` the expected energy is the energy at the means, so that the bound

    log p(v) + log Z  >=  -E(v, mu) + H(mu)

is exact, and maximal in the means of one layer, the others held, at ``mu_l = mean(field of the others)``. Layers that
are not connected with each other are updated together: odd and even layers in turn raise the bound at every sweep.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from torch import Tensor

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.energy import Fixed, Mask, Shown
from pplvi.energies.machines.exact_posterior import Factorised
from pplvi.energies.machines.measures import PartlyObserved
from pplvi.energies.machines.training_step import active_step
from pplvi.energies.posteriors.problem import MeanField, Problem
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Fraction, Natural, Positive
from pplvi.programs.plates import data_plate
from pplvi.types import Values


class FactorisedInference:
    """What guides with a factorised posterior have in common; subclasses say which :meth:`posterior`.

    :ivar machine: the machine.
    :ivar tol: tolerance outside training, or ``None``.
    """

    machine: BoltzmannMachine
    tol: float | None

    def posterior(
        self, v: Tensor | Values | None, num_draws: int = 1, *, mask: Mask = None, tol: float | None = None
    ) -> MeanField:
        """The posterior given data, ``(*batch, width)``, or values of several layers by name."""
        raise NotImplementedError

    # ------------------------------------------------------------------ as a guide

    def factorised(
        self, v: Shown = None, *, mask: Mask = None, size: int | None = None, num_draws: int = 1, given: Fixed = None
    ) -> Factorised:
        """The posterior for the arguments of the model, without gradient but, in training, of units' parameters."""
        found = self._answer(self.machine.joined(v, given), mask, num_draws)
        with torch.set_grad_enabled(active_step() is not None):
            return Factorised(found.means(), self.entropy(found))

    def __call__(
        self, v: Shown = None, *, mask: Mask = None, size: int | None = None, num_draws: int = 1, given: Fixed = None
    ) -> None:
        """Sample sites of the layers that are not, or only partly, observed, in plate ``"data"``."""
        self.emit(self._answer(self.machine.joined(v, given), mask, num_draws), size)

    def _answer(self, v: Tensor | Values | None, mask: Mask, num_draws: int) -> MeanField:
        """The posterior without gradient."""
        tol = self._tolerance()
        with torch.no_grad():
            return self.posterior(v, num_draws, mask=mask, tol=tol)

    def _tolerance(self) -> float | None:
        """In training all sweeps are made."""
        training = torch.is_grad_enabled() or active_step() is not None
        return None if training else self.tol

    def emit(self, found: MeanField, size: int | None) -> None:
        """Sample sites of a posterior's layers, in plate ``"data"``."""
        with data_plate(len(next(iter(found.values.values()))), size):
            for layer, field in found.fields.items():
                units = self.machine.layers[layer]
                density = units.conditional(field)
                if layer in found.masks:
                    density = PartlyObserved(units, field, found.masks[layer], found.values[layer])
                pyro.sample(layer, density)

    # ------------------------------------------------------------------ what users ask for

    def means(
        self, v: Tensor | Values | None = None, *, mask: Mask = None, given: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Means of all layers, ``(*batch, width)`` by name; what is observed is as it was given.

        :param v: data, ``(*batch, width)``, or values of several layers by name.
        :param mask: true where units of the visible layer are observed, ``(*batch, width)`` or ``(width,)``, or such
            masks of several layers by name; the other units are mean-field units, whose values in ``v`` are not used.
        :param given: what a conditional machine is given, ``(*batch, given)``; or ``"given"`` among the values.
        :raises ValueError: for values outside the support.
        """
        return self._found(self.machine.joined(v, given), mask).values

    def bound(
        self,
        v: Tensor | Values | None = None,
        *,
        mask: Mask = None,
        log_z: Tensor | float = 0.0,
        given: Tensor | None = None,
    ) -> Tensor:
        """``-E(mu) + H(mu) - log Z``, ``(*batch)``, in nats: a lower bound of the log evidence of what is observed.

        :param log_z: the machine's log partition function; without it the bound is one of ``log p + log Z``.
        """
        found = self._found(self.machine.joined(v, given), mask)
        with torch.no_grad():
            return -self.machine.energy(found.values) + self.entropy(found) - log_z

    def fill_in(self, v: Tensor, mask: Tensor, given: Tensor | None = None) -> Tensor:
        """Data whose missing units, where the mask is false, have their posterior means, ``(*batch, width)``."""
        return self.means(v, mask=mask, given=given)[self.machine.visible]

    def _found(self, v: Tensor | Values | None, mask: Mask) -> MeanField:
        self.machine.checked(v, mask)
        with torch.no_grad():
            return self.posterior(v, mask=mask, tol=self.tol)

    def entropy(self, found: MeanField) -> Tensor:
        """Entropy of a posterior, ``(*batch)``, in nats, as :class:`pplvi.energies.Factorised` has it."""
        total = torch.zeros(())
        for layer in found.fields:
            units, mean = self.machine.layers[layer], found.values[layer]
            if layer in found.masks:
                total = total + units.entropies(mean).masked_fill(found.masks[layer], 0.0).sum(-1)
            else:
                total = total + units.field_entropy(found.fields[layer], mean)
        return total


@checked
class MeanFieldGuide(FactorisedInference):
    r"""The mean-field posterior of a machine's hidden layers, for the data that it is called with.

    .. math:: \mu_l = E[s_l \mid \text{field } b_l + \sum_m \phi(\mu_m)^T W_{ml}], \qquad
        \log p(v) \ge -E(v, \mu) + H(\mu) - \log Z

    A Pyro guide for ``machine.model`` without parameters: it samples a site for every layer that is not observed. The
    first pass goes bottom up; a layer whose upper neighbour is not known yet counts what comes from below twice, around
    the offsets of a centered machine. Then odd and even layers take turns, so that the bound rises at every sweep; the
    units of a layer with lateral connections take turns too. Without data it is a mean field of the whole machine,
    whose ELBO is a lower bound of ``log Z``.

    :param machine: any pairwise machine.
    :param iterations: sweeps; always as many where gradients are on, so that a training step has a fixed length.
    :param tol: outside training stop when no mean moves by more than this.
    :param parallel: update all layers at once instead, which may oscillate.
    :param damping: weight of the old fields in a parallel update, in ``[0, 1)``.
    :raises ValueError: for numbers outside their ranges, or damping without parallel updates.

    Source: Salakhutdinov & Hinton (2009), "Deep Boltzmann machines"; Goodfellow, Bengio & Courville (2016), 20.4.2.

    >>> from pplvi.energies import DeepBoltzmannMachine
    >>> guide = MeanFieldGuide(DeepBoltzmannMachine([4, 3, 2], init_scale=0.0))
    >>> guide.means(torch.ones(1, 4))["h2"], guide.bound(torch.ones(1, 4), log_z=9 * torch.log(torch.tensor(2.0)))
    (tensor([[0.5000, 0.5000]]), tensor([-2.7726]))
    """

    def __init__(
        self,
        machine: BoltzmannMachine,
        iterations: Natural = 10,
        *,
        tol: Positive | None = None,
        parallel: bool = False,
        damping: Fraction = 0.0,
    ) -> None:
        self.machine, self.iterations, self.tol = machine, iterations, tol
        self.parallel, self.damping = parallel, damping
        self._check()

    def _check(self) -> None:
        """Refuse what these sweeps are not for."""
        if self.damping and not self.parallel:
            raise ValueError(
                f"damping={self.damping} slows alternating updates, which raise the bound as they are, and mends "
                "nothing: expected parallel=True with it."
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.machine).__name__}, iterations={self.iterations})"

    def posterior(
        self, v: Tensor | Values | None, num_draws: int = 1, *, mask: Mask = None, tol: float | None = None
    ) -> MeanField:
        """The posterior after the sweeps; differentiable in the parameters where gradients are on."""
        return self.solve(self.machine.observed(v, mask), mask=mask, tol=tol, num_draws=num_draws)

    # ------------------------------------------------------------------ the sweeps

    def solve(
        self,
        observed: Mapping[str, Tensor],
        *,
        mask: Mask = None,
        start: MeanField | None = None,
        iterations: int | None = None,
        tol: float | None = None,
        num_draws: int = 1,
    ) -> MeanField:
        """Sweep from a start, or from the bottom-up pass. Differentiable in the parameters where gradients are on."""
        problem = Problem(self.machine, observed, mask, num_draws)
        found = problem.first_pass() if start is None else start
        for _ in range(self.iterations if iterations is None else iterations):
            new = self._sweep(problem, found)
            settled = tol is not None and bool(_largest_change(found, new) < tol)
            found = new
            if settled:
                break
        return found

    def _sweep(self, problem: Problem, old: MeanField) -> MeanField:
        if self.parallel:
            values, fields = dict(old.values), {}
            for layer in old.fields:
                fields[layer] = self._damped(self.field(problem, layer, old.values), old.fields[layer])
                values[layer] = problem.mean(layer, fields[layer])
            return MeanField(values, fields, old.masks)
        values, fields = dict(old.values), dict(old.fields)
        for layer in problem.order:
            fields[layer], values[layer] = self._updated(problem, layer, values, old.fields[layer])
        return MeanField(values, fields, old.masks)

    def _updated(self, problem: Problem, layer: str, values: Values, old: Tensor) -> tuple[Tensor, Tensor]:
        if self.machine.is_lateral(layer):
            return problem.one_by_one(layer, values)
        field = self._damped(self.field(problem, layer, values), old)
        return field, problem.mean(layer, field)

    def _damped(self, new: Tensor, old: Tensor) -> Tensor:
        return torch.lerp(new, old, self.damping) if self.damping else new

    def field(self, problem: Problem, layer: str, values: Values) -> Tensor:
        """The field that a layer's mean is worked out from, ``(*batch, width)``."""
        return problem.field(layer, values)


def _largest_change(old: MeanField, new: MeanField) -> Tensor:
    changes = [(new.values[layer] - old.values[layer]).abs().max() for layer in new.fields]
    return torch.stack(changes).max() if changes else torch.zeros(())
