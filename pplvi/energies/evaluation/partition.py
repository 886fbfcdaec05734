"""Partition functions by annealed importance sampling: estimates, bounds from both sides, likelihoods of data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pplvi.energies.evaluation.ais_path import Between, EnergiesBetween, Levels, MachineWalk
from pplvi.energies.evaluation.moment_paths import Route, averaged_machines, base_fields
from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.exact_posterior import FactorisedGuide
from pplvi.energies.machines.hamiltonian import HamiltonianMachine
from pplvi.energies.machines.measures import BaseMeasure
from pplvi.energies.machines.spike_slab import SpikeSlabUnits
from pplvi.energies.machines.units import GaussianUnits
from pplvi.energies.posteriors.mean_field import MeanFieldGuide
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Natural, Plural, Seed
from pplvi.programs.errors import warn
from pplvi.programs.plates import data_plate
from pplvi.programs.state import random_state
from pplvi.types import Values
from pplvi.weights.algebra import effective_sample_size, log_evidence

__all__ = ["PartitionEstimate", "annealed_importance_sampling", "raise_bound"]

_PILOT_CHAINS, _PILOT_BETAS = 100, 200
_MEAN_FIELD_SWEEPS = 50


@checked
@dataclass(frozen=True)
class PartitionEstimate:
    """An estimate of a machine's ``log Z`` and of the likelihood of data, in nats.

    A conditional machine has a ``log Z`` for each datum: the numbers are means over data, the weights have them apart.

    :ivar log_z: the estimate. Z is estimated without bias, so that ``log Z`` is too small on average, and likelihoods
        come out too high.
    :ivar interval: ``log`` of the estimate of Z minus and plus three standard errors.
    :ivar ess: effective sample size of the chains.
    :ivar log_weights: log weight of every chain, ``(num_chains,)``, float64; ``(num_chains, num_data)`` if conditional.
    :ivar upper_bound: from exact samples of the machine, by the reverse chains: too large on average. ``None`` without.
    :ivar log_likelihood: mean over data of ``log p(v)`` under the estimate, with its standard error over data; with
        hidden layers that are not independent, of a variational bound of it. ``None`` without data.
    :ivar log_likelihood_bound: the same by RAISE, without the estimate of ``log Z``: on average a lower bound of the
        log likelihood of the *annealed model*, the directed one that a walk forward through the path samples from. The
        machine itself may be less likely to have the data: the bound can lie above ``log p(v)``, and approaches it
        with more betas.
    """

    log_z: float
    interval: tuple[float, float]
    ess: float
    log_weights: Tensor
    upper_bound: float | None = None
    log_likelihood: tuple[float, float] | None = None
    log_likelihood_bound: tuple[float, float] | None = None

    def __str__(self) -> str:
        low, high = self.interval
        return f"log Z = {self.log_z:.3f} [{low:.3f}, {high:.3f}], ESS {self.ess:.0f} of {len(self.log_weights)} chains"


@checked
def annealed_importance_sampling(
    machine: BoltzmannMachine | HamiltonianMachine,
    num_chains: Plural = 100,
    num_betas: Plural = 1000,
    *,
    base_rate: Tensor | None = None,
    betas: Tensor | Literal["adaptive"] | None = None,
    data: Tensor | Values | None = None,
    samples: Tensor | Values | None = None,
    guide: FactorisedGuide | None = None,
    num_raise_chains: Natural = 10,
    path: Literal["geometric", "moment_averaged"] = "geometric",
    knots: tuple[Plural, Plural] = (9, 1000),
    seed: Seed | None = None,
) -> PartitionEstimate:
    """Estimate ``log Z`` of a machine by annealed importance sampling (Neal 2001; Salakhutdinov & Murray 2008).

    :param machine: a machine whose layers fall into two groups without connections inside, such as a restricted or a
        deep machine; or one of real units whose chains are Hamiltonian, from the Gaussian part of its energy.
    :param num_chains: number of chains, at least 2.
    :param num_betas: number of inverse temperatures from the base-rate model to the machine.
    :param base_rate: means of the visible units under the base-rate model, ``(width,)``; by default the offsets of
        centered training, which follow the data's mean.
    :param betas: increasing inverse temperatures from 0 to 1; evenly spaced by default. ``"adaptive"``: so that the
        weights' increments vary equally, by a short run first.
    :param data: data ``(num_data, width)``, whose likelihood is estimated too. For a conditional machine values by
        name, ``{"v": v, "given": x}``, or what it is given alone: every datum has chains of its own then.
    :param samples: exact samples of the visible layer of the machine, ``(num_chains, width)``, or of all kept layers,
        for reverse chains. They bound log Z from above only if they are exact.
    :param guide: for ``data`` where hidden layers are not independent given the visible one: the guide whose bound
        stands for the likelihood, and from which the chains of RAISE start; mean field unless given. Without it, the
        likelihood of a machine that is small enough to sum out the rest is exact.
    :param num_raise_chains: chains of each datum for its RAISE bound; with 0 there is none.
    :param path: ``"geometric"``, or ``"moment_averaged"``: through machines whose mean statistics lie evenly between
        those of the base-rate model and of the machine (Grosse, Maddison & Salakhutdinov 2013).
    :param knots: of the latter: number of machines between, from one to the next of which the path is geometric, and
        training steps of each of them.
    :param seed: seed of the chains; the process's random state stays as it was.
    :returns: the estimate, with its interval and its effective sample size. It warns where a few chains dominate.
    :raises ValueError: for fewer than two chains or betas, betas that do not go from 0 to 1, lateral connections,
        data outside the support, or a conditional machine without what it is given.

    Source: Burda, Grosse & Salakhutdinov (2015) for the reverse chains of data (RAISE); Grosse, Ghahramani & Adams
    (2015) for bounds from both sides.

    >>> from pplvi.energies import RestrictedBoltzmannMachine
    >>> _ = torch.manual_seed(0)
    >>> rbm = RestrictedBoltzmannMachine(6, 4, init_scale=0.5)
    >>> estimate = annealed_importance_sampling(rbm, num_chains=100, num_betas=100, seed=0)
    >>> abs(estimate.log_z - rbm.log_partition().item()) < 0.05
    True
    """
    _check(machine)
    values = {} if data is None else machine.checked(data)
    with random_state(seed), torch.no_grad():
        base = _base(machine, values, base_rate)
        chosen = _betas(base, num_betas, betas)
        route = Route.through(base, () if path == "geometric" else averaged_machines(_pairwise(base), *knots))
        log_weights = MachineWalk(base.base_program, route.levels(chosen[1:]), base.count).walk(num_chains)[-1][1]
        upper = None if samples is None else _upper_bound(route, chosen, samples)
        found = _estimate(log_weights, upper)
        if machine.visible not in values:
            return found
        likelihood = _log_likelihood(machine, values, log_evidence(log_weights)[0], guide)
        if not num_raise_chains:
            return replace(found, log_likelihood=_mean(likelihood))
        bound = _raise(route, chosen, values, num_raise_chains, guide)
    return replace(found, log_likelihood=_mean(likelihood), log_likelihood_bound=_mean(bound))


@checked
def raise_bound(
    machine: BoltzmannMachine | HamiltonianMachine,
    data: Tensor | Values,
    num_chains: Count = 10,
    num_betas: Plural = 1000,
    *,
    base_rate: Tensor | None = None,
    guide: FactorisedGuide | None = None,
    seed: Seed | None = None,
) -> Tensor:
    """RAISE: what the annealed model of a machine makes of each datum, on average from below, ``(num_data,)``, in nats.

    The machine is replaced by the directed model that annealing it forward is; the likelihood of that model is
    estimated without bias by chains that go back from the datum (Burda, Grosse & Salakhutdinov 2015), so that its log
    is a lower bound on average: of the annealed model's log likelihood, not of the machine's. With few betas the
    annealed model is smoother than the machine and may like the data better: on a 784-20 machine the bound lay 0.9 to
    1.5 nats above the exact ``log p(v)``. It approaches that as betas are added.

    :param data: data ``(num_data, width)``, or values by name, ``"given"`` among them for a conditional machine.
    :param num_chains: chains of each datum.
    :param num_betas: number of inverse temperatures.
    :param base_rate: as for :func:`annealed_importance_sampling`.
    :param guide: where hidden layers are not independent given the visible one: the guide that chains start from;
        mean field unless given.
    :param seed: seed of the chains.
    :raises ValueError: as :func:`annealed_importance_sampling` does.

    >>> from pplvi.energies import RestrictedBoltzmannMachine
    >>> _ = torch.manual_seed(0)
    >>> rbm = RestrictedBoltzmannMachine(4, 3, init_scale=0.5)
    >>> v = torch.ones(1, 4)
    >>> exact = -rbm.free_energy(v) - rbm.log_partition()
    >>> bool(((raise_bound(rbm, v, num_chains=200, num_betas=50, seed=0) - exact).abs() < 0.1).all())
    True
    """
    _check(machine)
    values = machine.checked(data)
    if machine.visible not in values:
        raise ValueError(f"data of the layers {sorted(values)}: expected values of {machine.visible!r} among them.")
    with random_state(seed), torch.no_grad():
        base = _base(machine, values, base_rate)
        return _raise(Route.through(base, ()), _betas(base, num_betas, None), values, num_chains, guide)


def _pairwise(levels: Levels) -> Between:
    if not isinstance(levels, Between):
        raise ValueError(f"path='moment_averaged' of {type(levels.machine).__name__}: expected 'geometric' there.")
    return levels


def _base(machine: BoltzmannMachine | HamiltonianMachine, values: Values, base_rate: Tensor | None) -> Levels:
    if isinstance(machine, HamiltonianMachine):
        if base_rate is not None:
            raise ValueError(f"base_rate= of {type(machine).__name__}: leave it, its path begins at the Gaussian part.")
        return EnergiesBetween(machine)
    given = machine.conditions(values)
    return Between(machine, base_fields(machine, base_rate, given), given=given)


def _check(machine: BoltzmannMachine | HamiltonianMachine) -> None:
    if isinstance(machine, HamiltonianMachine):
        return
    _check_normalisable(machine)
    lateral = [layer for layer in machine.layers if machine.is_lateral(layer)]
    if lateral or len(machine.classes) != 2:
        raise ValueError(
            f"the layers {list(machine.layers)} fall into the groups {list(machine.classes)}"
            f"{f', with lateral connections in {lateral}' if lateral else ''}: expected two groups of layers without "
            "connections inside, as in restricted and deep machines."
        )


def _check_normalisable(machine: BoltzmannMachine) -> None:
    """Refuse slabs so wide that a density of Gaussian units is none, with all of them on."""
    v, real = machine.layers[machine.visible], [n for n, u in machine.layers.items() if isinstance(u, SpikeSlabUnits)]
    if not (real and isinstance(v, GaussianUnits)):
        return
    precision = torch.diag(v.precision.detach())
    for layer in real:
        reach = v.precision.unsqueeze(-1) * machine.weight(machine.visible, layer).detach()
        precision = precision - reach / machine.layers[layer].precision.detach() @ reach.T
    if not bool(torch.linalg.eigvalsh(precision).min() > 0):
        raise ValueError(
            "a machine of Gaussian and spike-and-slab units whose density has no finite normaliser with all units on: "
            "expected smaller weights or larger precisions of the slabs. Train with weight decay or limit_norms()."
        )


def _betas(between: Levels, num_betas: int, given: Tensor | str | None) -> tuple[float, ...]:
    if isinstance(given, str):
        return _adapted(between, num_betas)
    found = torch.linspace(0, 1, num_betas, dtype=torch.float64) if given is None else torch.as_tensor(given).double()
    if found.dim() != 1 or len(found) < 2:
        raise ValueError(f"betas of shape {tuple(found.shape)}: expected two numbers at least, from 0 to 1.")
    if found[0] != 0 or found[-1] != 1 or not bool((found.diff() > 0).all()):
        raise ValueError(f"betas from {found[0]:g} to {found[-1]:g}: expected increasing numbers from 0 to 1.")
    return tuple(found.tolist())


def _adapted(between: Levels, num_betas: int) -> tuple[float, ...]:
    """Betas at equal distances in the standard deviation of the log weight's derivative, from a short run."""
    pilot = torch.linspace(0, 1, min(num_betas, _PILOT_BETAS), dtype=torch.float64)
    levels = tuple((between, beta) for beta in pilot.tolist()[1:])
    steps = MachineWalk(between.base_program, levels, between.count).walk(_PILOT_CHAINS)
    spread = torch.stack([(after - before).std(0).mean() for before, after in steps])
    length = torch.cat([spread.new_zeros(1), (spread + 1e-3 * spread.mean() + 1e-12).cumsum(0)])
    wanted = torch.linspace(0, 1, num_betas, dtype=torch.float64) * length[-1]
    right = torch.searchsorted(length, wanted).clamp(1, len(length) - 1)
    share = (wanted - length[right - 1]) / (length[right] - length[right - 1])
    found = torch.lerp(pilot[right - 1], pilot[right], share)
    found[0], found[-1] = 0.0, 1.0
    return tuple(found.tolist())


def _estimate(log_weights: Tensor, upper: float | None) -> PartitionEstimate:
    each, errors = log_evidence(log_weights)
    log_z, error = each.mean(), errors.square().sum().sqrt() / errors.numel()
    ess = float(effective_sample_size(log_weights).mean())
    if ess < max(min(5.0, 0.2 * len(log_weights)), 0.02 * len(log_weights)):
        warn(
            f"a few of {len(log_weights)} chains dominate the estimate of log Z (ESS {ess:.1f}), which is then too "
            "small, and likelihoods too high: expected more even weights. Raise num_betas, then num_chains.",
        )
    three = 3 * error
    low = float("-inf") if three >= 1 else float(log_z + torch.log1p(-three))
    return PartitionEstimate(float(log_z), (low, float(log_z + torch.log1p(three))), ess, log_weights, upper)


def _mean(values: Tensor) -> tuple[float, float]:
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(float("inf"))
    return float(values.mean()), float(error)


def _upper_bound(route: Route, betas: tuple[float, ...], samples: Tensor | Values) -> float:
    """Reverse chains from samples of the machine: ``log Z_0 - log mean w``."""
    if route.base.count is not None:
        raise ValueError("samples= of a conditional machine, of which every datum has a distribution: leave them out.")
    (last, _), kept = route.at(1.0), route.base.kept
    given = route.base.machine.checked(samples)
    if missing := sorted(set(kept) - set(given)):
        raise ValueError(f"samples lack the layers {missing}: expected all of {list(kept)}.")
    start = partial(last.program, 1.0, None, lambda layer, shape: given[layer] if shape else given[layer][0])
    log_weights = MachineWalk(start, route.levels(betas[-2::-1])).walk(len(given[kept[0]]))[-1][1]
    return float(route.base.log_base() - log_evidence(log_weights)[0])


def _log_likelihood(
    machine: BoltzmannMachine | HamiltonianMachine, values: Values, log_z: Tensor, guide: FactorisedGuide | None
) -> Tensor:
    if isinstance(machine, HamiltonianMachine) or (guide is None and machine.sums_out(machine.hidden)):
        return machine.log_marginal(values).double() - log_z
    posterior = (_mean_field(machine) if guide is None else guide).factorised(values)
    energy = machine.energy({**values, **posterior.means})
    return (posterior.entropy - energy).double() - log_z


def _mean_field(machine: BoltzmannMachine) -> FactorisedGuide:
    return MeanFieldGuide(machine, _MEAN_FIELD_SWEEPS, tol=1e-4)


def _raise(
    route: Route, betas: tuple[float, ...], values: Values, num_chains: int, guide: FactorisedGuide | None
) -> Tensor:
    between, machine = route.base, route.base.machine
    data = values[machine.visible]
    if guide is None and between.kept != (machine.visible,):
        guide = _mean_field(machine)
    means = {} if guide is None else dict(guide.factorised(values).means)

    def start() -> None:
        with data_plate(len(data), None):
            for layer in between.kept:
                if layer == machine.visible:
                    pyro.sample(layer, BaseMeasure(machine.layers[layer], (len(data),), data, draw=_fixed(data)))
                else:
                    pyro.sample(layer, _independent(machine, layer, means[layer]))

    log_weights = MachineWalk(start, route.levels(betas[::-1]), len(data)).walk(num_chains)[-1][1]
    return log_evidence(log_weights)[0] - between.log_base()


def _fixed(data: Tensor) -> Callable[[tuple[int, ...]], Tensor]:
    return lambda shape: data.expand(*shape, data.shape[-1])


def _independent(machine: BoltzmannMachine, layer: str, mean: Tensor) -> Any:
    if machine.layers[layer].num_states != 2:
        raise ValueError(f"layer {layer!r} is not binary: expected Bernoulli units to start chains of data from.")
    return dist.Bernoulli(mean.clamp(1e-4, 1 - 1e-4), validate_args=False).to_event(1)
