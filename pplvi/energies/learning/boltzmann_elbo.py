"""Training undirected models: the evidence lower bound with the gradient of log Z, as a Pyro ELBO."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pplvi.energies.learning.chains import NAMED_CHAINS, Chains, Negative, num_data_dims
from pplvi.energies.learning.statistics import has_statistics, joint_log_densities
from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.couplings import GIVEN
from pplvi.energies.machines.energy import EnergyModel
from pplvi.energies.machines.exact_posterior import FactorisedGuide
from pplvi.energies.machines.training_step import training_step
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Rate
from pplvi.losses.base import Loss
from pplvi.objectives.bounds import RenyiBound
from pplvi.objectives.forward_kl import LogPartition
from pplvi.objectives.step import Estimator, Objective, Step
from pplvi.programs.joint import execute
from pplvi.programs.plates import full_size
from pplvi.programs.sharding import data_scale, mean_of_ranks, own_noise
from pplvi.programs.single import run_alone
from pplvi.programs.sites import latent_sites
from pplvi.programs.state import preserved_rng
from pplvi.programs.traces import Run
from pplvi.types import Program, Values


@dataclass(frozen=True)
class _Term:
    """A factor ``exp(-E)`` of a model: its machine, the values it had, and how many copies of log Z it stands for.

    Of a conditional machine, how many of each datum's own, ``(*batch)``.
    """

    machine: EnergyModel
    values: dict[str, Tensor]
    copies: Tensor | float


@checked
class BoltzmannELBO(Loss):
    r"""Stochastic maximum likelihood for undirected models, by variational inference for their hidden layers.

    .. math:: -\log p(v) \le -E_q[-E(v, h)] - H(q) + \log Z

    The positive phase is the ordinary ELBO of the program, whose log density ``-E`` is not normalised; with a guide
    that declares its factorised posterior (:class:`pplvi.energies.FactorisedGuide`) it is exact, for the energy is
    linear in every unit, and the posterior gets no gradient. The negative phase adds the gradient of ``log Z`` of every
    energy in the model, ``E_p[grad -E]``, on chains that only training steps move: never ``loss``. A surrogate: the
    value is the bound less ``log Z`` plus the mean log density of the chains, and bounds nothing (``monitor`` is
    ``None``). Losses are in nats per datum, so that learning rates are those of the literature.

    :param num_chains: Markov chains of the negative phase.
    :param sweeps: Gibbs sweeps of the chains in a step.
    :param negative: ``"persistent"`` (PCD, SML), ``"contrastive"`` (CD-k), ``"fast"`` (fast PCD), ``"tempered"``
        (parallel tempering), ``"mean_field"`` (mean-field CD), ``"exact"`` (every state, of a tiny machine), or an
        object of :class:`pplvi.energies.Chains` with options of its own. Conditional machines (``given=``), of which
        every datum has its own distribution, need ``"contrastive"``, ``"mean_field"`` or ``"exact"``.
    :param num_particles: draws of a guide that does not declare its posterior.
    :param estimator: of the guide's gradient then, as in :class:`pplvi.ELBO`.
    :param offset_rate: least rate at which the offsets of centered machines follow the data and posterior means.
    :param per_datum: divide the loss by the number of data; otherwise it is the sum over the data set.
    :raises ValueError: for another ``negative``, or numbers below 1.

    Source: Younes (1989); Tieleman (2008); Salakhutdinov & Hinton (2009).

    >>> import pyro
    >>> from pplvi.energies import RestrictedBoltzmannMachine
    >>> rbm = RestrictedBoltzmannMachine(4, 2)
    >>> svi = pyro.infer.SVI(rbm.model, rbm.guide, pyro.optim.SGD({"lr": 0.1}), BoltzmannELBO(num_chains=20, sweeps=1))
    >>> for _ in range(100):
    ...     loss = svi.step(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    >>> bool(rbm.distribution().log_prob(torch.tensor([1.0, 1.0, 0.0, 0.0])) > -1.0)
    True
    """

    def __init__(
        self,
        num_chains: Count = 100,
        sweeps: Count = 5,
        *,
        negative: Negative | Chains = "persistent",
        num_particles: Count = 2,
        estimator: Estimator | None = None,
        offset_rate: Rate = 0.01,
        per_datum: bool = True,
    ) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.negative = negative if isinstance(negative, Chains) else NAMED_CHAINS[negative](num_chains, sweeps)
        self.objective: Objective = RenyiBound(1.0, estimator)
        self.offset_rate, self.per_datum = offset_rate, per_datum

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, in nats: with gradients switched on this is a training step, which advances the chains.

        :raises ValueError: if the model has no energy.
        """
        with training_step():
            given = kwargs.get(GIVEN)
            known = given is None or not given.requires_grad
            if known and isinstance(guide, FactorisedGuide) and (machine := _own_program(model)) is not None:
                return self._closed_form(machine, guide, *args, **kwargs)
            run, step = self._positive(model, guide, args, kwargs)
            total = step.scale * _differentiable(self.objective, step).sum()
            terms = list(_energies(run))
            if not terms:
                raise ValueError(
                    "the model has no energy: expected a program such as machine.model, or one with "
                    "machine.energy_site(...). Use pplvi.ELBO for normalised models."
                )
            for term in terms:
                total = total + self._negative(term)
        return self._reduced(total, *mean_of_ranks(step.scale * math.prod(run.shape[1:])))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss; its gradients are added to the parameters' ``grad``."""
        with training_step(in_place=True):
            return super().loss_and_grads(model, guide, *args, **kwargs)

    def prepare(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> None:
        """Make the chains of all machines in the model, without moving them."""
        with preserved_rng():
            self.loss(model, guide, *args, **kwargs)

    def _reduced(self, total: Tensor, num_data: float) -> Tensor:
        return total / num_data if self.per_datum else total

    def _closed_form(
        self, machine: BoltzmannMachine, guide: FactorisedGuide, v: Any, *, size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """The loss of a machine's own program, without running it: the same value and gradient at half the cost."""
        machine.announce()
        observed = machine.checked(machine.joined(v, kwargs.get(GIVEN)), kwargs.get("mask"))
        with torch.no_grad():
            posterior = guide.factorised(v, size=size, **kwargs)
        data = {**observed, **posterior.means}
        partly = machine.masks(kwargs.get("mask"), observed).keys()
        _check_complete(posterior.means, partly | (machine.layers.keys() - observed.keys()))
        with own_noise():
            draws = self.negative.move(machine, data, torch.is_grad_enabled())
        log_data, log_draws = joint_log_densities(machine, [data, draws])
        self._follow(machine, data)
        scale = data_scale(len(log_data), full_size(len(log_data), size))
        positive = Step.from_proposal(log_data.unsqueeze(0), -posterior.entropy.unsqueeze(0), scale=scale)
        negative = self.negative.step(log_draws, num_data_dims(machine, draws))
        (num_data,) = mean_of_ranks(scale * len(log_data))
        each = machine.given is not None
        normaliser = _normalisers(
            negative, torch.full_like(log_data, scale).detach() if each else scale * len(log_data)
        )
        total = scale * _differentiable(self.objective, positive).sum() + normaliser
        return self._reduced(total, num_data)

    def _follow(self, machine: EnergyModel, values: Values) -> None:
        """Let the offsets of a centered machine follow, in a training step."""
        if torch.is_grad_enabled() and machine.centered:
            machine.move_offsets(values, self.offset_rate)

    def _positive(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Run, Step]:
        """The ordinary step of the unnormalised model, on means where the guide declares them."""
        if isinstance(guide, FactorisedGuide):
            with torch.no_grad():
                posterior = guide.factorised(*args, **kwargs)
            run = run_alone(model, args, kwargs, num_particles=1, nesting=0, values=posterior.means)
            run = replace(run, nesting=run.deepest)
            if drawn := sorted(latent_sites(run.model).keys() - posterior.means.keys()):
                raise ValueError(
                    f"the guide declares means of {sorted(posterior.means)}, but the model has {drawn} too."
                )
            return run, _step(run, -posterior.entropy.expand(run.shape))
        run = execute(model, guide, args, kwargs, num_particles=self.num_particles)
        return run, _step(run, run.log_forward(), run.log_score(detached=False))

    def _negative(self, term: _Term) -> Tensor:
        """``log Z`` as often as the factor counts; its gradient is that of the negative phase."""
        with own_noise():
            step = self.negative(term.machine, term.values, advance=torch.is_grad_enabled())
        self._follow(term.machine, term.values)
        return _normalisers(step, term.copies)

    def __repr__(self) -> str:
        return f"BoltzmannELBO(negative={self.negative!r})"


def _normalisers(step: Step, copies: Any) -> Tensor:
    """``log Z`` as often as it counts, on all ranks together; of a conditional machine that of each datum of this one.

    :param copies: how many, or how many of each datum.
    """
    each = _differentiable(LogPartition(), step)
    if each.dim():
        return (copies * each).sum()
    (mean,) = mean_of_ranks(copies)
    total: Tensor = _share(step, mean) * each
    return total


def _share(step: Step, copies: Any) -> Any:
    """As how many normalisers the chains of a step count: by their number, where there are others on other ranks."""
    (mean,) = mean_of_ranks(step.num_particles)
    return copies * (step.num_particles / mean)


def _own_program(model: Program) -> BoltzmannMachine | None:
    """The machine whose own program this is, if its gradient is known in closed form."""
    machine = getattr(model, "__self__", None)
    own = getattr(model, "__func__", None) is EnergyModel.model
    return machine if own and has_statistics(machine) else None


def _check_complete(means: Values, latents: Set[str]) -> None:
    if missing := sorted(latents - means.keys()):
        raise ValueError(
            f"the guide declares means of {sorted(means)}, but the model has the latent sites {missing} too: expected "
            "means of all. Use a guide without factorised() for such a model."
        )


def _step(run: Run, log_forward: Tensor, log_score: Tensor | None = None) -> Step:
    target = run.log_target()
    return Step.from_proposal(target, log_forward, log_score=log_score, scale=run.scale, subsampled=run.subsampled)


def _differentiable(objective: Objective, step: Step) -> Tensor:
    """The objective's value with the gradient of its surrogate."""
    value, surrogate = objective(step)
    return value.detach() + (surrogate - surrogate.detach())


def _energies(run: Run) -> Iterator[_Term]:
    """The energies of a run's model, each with the number of normalisers in its plates, subsample scales included."""
    for site in run.model.nodes.values():
        if site["type"] == "sample" and (machine := site["infer"].get("energy")) is not None:
            factors, values = site["fn"].log_factor, site["infer"]["values"]
            if machine.given is not None:
                each = torch.ones_like(factors) if site["mask"] is None else site["mask"] * torch.ones_like(factors)
                each = each.reshape(-1, *values[GIVEN].shape[:-1]).sum(0)
                yield _Term(machine, values, site["scale"] * each / run.num_particles)
                continue
            copies = site["scale"] * (factors.numel() / run.num_particles)
            if site["mask"] is not None:
                copies = copies * torch.as_tensor(site["mask"]).expand(factors.shape).to(factors.dtype).mean()
            yield _Term(machine, values, copies)
