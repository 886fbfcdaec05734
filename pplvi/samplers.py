"""Samplers: where the weighted steps come from.

A sampler runs the programs and yields :class:`pplvi.objectives.step.Step` s. Any objective works on any sampler whose draws
it can use; a sampler says with ``proposal`` whether it draws from the guide or from the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pplvi.divergences import divergences, without
from pplvi.objectives.step import Routing, Step
from pplvi.programs.dreams import dream, prior_run
from pplvi.programs.joint import execute, guide_run
from pplvi.programs.single import carried_path
from pplvi.programs.sites import is_delta, latent_sites
from pplvi.programs.traces import Run
from pplvi.types import Program

_Values = Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Request:
    """How many particles an objective wants, at once or one after another, and how gradients are routed."""

    num_particles: int = 1
    vectorize: bool = True
    routing: Routing = field(default_factory=Routing)


class Sampler(Protocol):
    """Anything that runs a model and a guide and yields weighted steps."""

    proposal: ClassVar[str]

    def __call__(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], request: Request
    ) -> Iterator[Step]:
        """Yield the steps of one evaluation."""
        ...


class Importance:
    """Importance sampling: draws of the guide, weighted for the model by ``log p(x, z) - log q(z)``. One step."""

    proposal: ClassVar[str] = "guide"

    def __call__(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], request: Request
    ) -> Iterator[Step]:
        """Yield one step of ``request.num_particles`` particles."""
        step = _frozen_step if request.routing.freeze else _live_step
        counts = [request.num_particles] if request.vectorize else [1] * request.num_particles
        parts: list[Step] = []
        shared: Mapping[str, Tensor] | None = None
        for count in counts:
            part, run = step(model, guide, args, kwargs, count, request.routing, shared)
            shared = run.subsample_indices()  # one minibatch for all: a bound compares weights of the same data
            parts.append(part)
        yield Step.concatenate(parts)


class Ancestral:
    """Ancestral sampling: the model dreams latents and data together, and the guide is scored on its dreams.

    One step of exact draws with equal weights, for the sleep phase (Hinton et al. 1995). Dreams reach the guide in the
    place of the data: through Pyro's ``observations=`` keyword, or for an argument that *is* an observed value.
    """

    proposal: ClassVar[str] = "model"

    def __call__(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], request: Request
    ) -> Iterator[Step]:
        """Yield one step of ``request.num_particles`` dreams, each of the size of the data, in one call if possible."""
        counts = [request.num_particles] if request.vectorize else [1] * request.num_particles
        parts = [dream(model, guide, args, kwargs, count) for count in counts]
        runs = [run for together, _ in parts for run in together]
        log_target = torch.cat([run.log_target().detach() for run in runs])
        step = _as_step(runs[0], log_target, torch.cat([log_forward for _, log_forward in parts]))
        yield replace(step, log_weight=torch.zeros_like(log_target))  # exact draws: equal weights


@dataclass(frozen=True)
class DefensiveMixture:
    """Importance sampling from ``(1 - weight) q(z | x) + weight c(z)``: a guide that cannot forget what is possible.

    Guides that learn from their own draws prune: what they stop drawing they never learn again. Draws of another
    component keep it alive (Hesterberg 1995; in wake-sleep Le et al. 2019, whose component is uniform). Each particle
    of each datum comes from the component with probability ``weight``, systematically over particles. Weights are for
    the density of the mixture; ``log_forward`` is the guide's own, which is to be trained. One step.

    :param weight: probability of the other component.
    :param component: a program with the arguments and the latent sites of the model; the model's own prior unless
        given.
    :raises ValueError: for a weight that is not between 0 and 1.

    >>> DefensiveMixture(0.2)
    DefensiveMixture(weight=0.2, component=None)
    """

    proposal: ClassVar[str] = "mixture"
    weight: float = 0.2
    component: Program | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < 1:
            raise ValueError(f"mixture weight {self.weight!r}: expected a number between 0 and 1, such as 0.2.")

    def __call__(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], request: Request
    ) -> Iterator[Step]:
        """Yield one step of ``request.num_particles`` particles."""
        counts = [request.num_particles] if request.vectorize else [1] * request.num_particles
        parts: list[Step] = []
        shared: _Values = None
        for count in counts:
            call = (args, kwargs, count)
            with torch.no_grad():
                values, shared = self._drawn(model, guide, *call, shared)
            run = execute(model, guide, args, kwargs, num_particles=count, values={**shared, **values})
            log_target, log_forward = run.log_target(), run.log_forward()
            own, other = math.log1p(-self.weight), math.log(self.weight)
            mixture = torch.logaddexp(own + log_forward, other + self._log_component(run, model, *call)).detach()
            step = _as_step(run, log_target, log_forward)
            parts.append(replace(step, log_weight=log_target.detach() - mixture))
        yield Step.concatenate(parts)

    def _drawn(
        self, model: Program, guide: Program, args: Any, kwargs: Any, count: int, shared: _Values
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values for the guide's sites, and the indices of the minibatch that they belong to."""
        own = guide_run(model, guide, args, kwargs, count, shared)
        indices, sites = own.subsample_indices(), latent_sites(own.guide)
        if self.component is None:
            other = prior_run(model, guide, args, kwargs, count, indices)
        else:
            other = execute(model, self.component, args, kwargs, num_particles=count, values=indices)
        theirs = latent_sites(other.guide)
        if without := [name for name, site in sites.items() if is_delta(site) or name not in theirs]:
            raise ValueError(
                f"draws of a mixture cannot be put into the guide: its sites {without} are deterministic or auxiliary, "
                "as in all automatic guides. Expected one stochastic site for each latent site of the model."
            )
        both = replace(other, guide=own.guide)
        chosen = both.align(_systematic(self.weight, both.zeros()))
        return {name: _mixed(chosen, site, theirs[name]["value"]) for name, site in sites.items()}, indices

    def _log_component(self, run: Run, model: Program, args: Any, kwargs: Any, count: int) -> Tensor:
        """Log density of the component at the run's draws."""
        sites = latent_sites(run.guide)
        if self.component is None:
            if run.enumerated:
                raise ValueError(
                    "the mixture's component is the prior, but the model enumerates sites, so that the others have no "
                    "density of their own: expected DefensiveMixture(weight, component) with a program of yours."
                )
            densities = run.log_probs(run.model)
        else:
            values = {**run.subsample_indices(), **{name: site["value"] for name, site in sites.items()}}
            densities = run.log_probs(guide_run(model, self.component, args, kwargs, count, values).guide)
        return sum((d for name, d in densities.items() if name in sites), run.zeros())


def _systematic(probability: float, like: Tensor) -> Tensor:
    """True with this probability for each particle of each batch element, as evenly over particles as possible."""
    steps = torch.arange(len(like) + 1, device=like.device).reshape(-1, *[1] * (like.dim() - 1))
    counts = torch.floor(probability * steps + torch.rand_like(like[:1]))
    return counts[1:] > counts[:-1]


def _mixed(chosen: Tensor, site: Any, other: Tensor) -> Tensor:
    own: Tensor = site["value"]
    mixed = torch.where(chosen.reshape(chosen.shape + (1,) * site["fn"].event_dim), other, own)
    return mixed.reshape(own.shape) if len(chosen) == 1 else mixed


def _as_step(run: Run, log_target: Tensor, log_forward: Tensor, **more: Tensor | None) -> Step:
    return Step.from_proposal(
        log_target, log_forward, scale=run.scale, subsampled=run.subsampled, averaged=run.guide_enumerated, **more
    )


def exact_entropies(run: Run) -> dict[str, Tensor]:
    """Exact entropy of each guide site given the draws above it, each ``(num_particles, *batch)``.

    :raises ValueError: if the guide enumerates sites, whose expected ``log q`` is exact already.
    """
    if run.guide_enumerated:
        raise ValueError(
            "entropy='exact' with guide sites that are enumerated: expected drawn sites. Drop entropy='exact'; the "
            "entropy of enumerated sites is always exact."
        )
    return run.entropies()


def _live_step(
    model: Program, guide: Program, args: Any, kwargs: Any, num_particles: int, routing: Routing, shared: _Values
) -> tuple[Step, Run]:
    run = execute(model, guide, args, kwargs, num_particles=num_particles, detach=routing.detach, values=shared)
    log_target, log_forward = _densities(run, routing)
    log_score = run.log_score(detached=routing.detach)
    if run.guide_enumerated and log_score is not None:
        raise ValueError(
            "the guide enumerates some sites and draws others that cannot be reparameterised: expected one or the "
            "other. Enumerate all discrete sites of the guide, or none."
        )
    return _as_step(run, log_target, log_forward, log_score=log_score), run


def _densities(run: Run, routing: Routing) -> tuple[Tensor, Tensor]:
    """``log p`` and ``log q``; the second, or at some sites their difference, by its expectation."""
    if routing.exact_entropy:
        return run.log_target(), -sum(exact_entropies(run).values(), run.zeros())
    if not routing.analytic_kl:
        return run.log_target(), run.log_forward()
    known = divergences(run)
    log_target, log_forward = (sum(without(run.log_probs(t), known), run.zeros()) for t in (run.model, run.guide))
    return log_target, sum(known.values(), log_forward)


def _frozen_step(
    model: Program, guide: Program, args: Any, kwargs: Any, num_particles: int, routing: Routing, shared: _Values
) -> tuple[Step, Run]:
    """A step whose guide densities carry the path of the draws but none of their own parameters.

    The pair is run again with the draws as leaves; the path enters to first order, ``<grad_z log q, z - sg(z)>``, which
    has the value and the gradient of the density under frozen parameters, whatever kind of parameters they are.
    """
    drawn = guide_run(model, guide, args, kwargs, num_particles, shared)
    leaves = _leaves(drawn)
    values = {**drawn.subsample_indices(), **leaves}
    run = execute(model, guide, args, kwargs, num_particles=num_particles, values=values)
    densities = run.log_probs(run.guide)
    zero = run.zeros()
    # What a deterministic guide site adds is a Jacobian, not the density of a draw: it moves with its parameters and
    # belongs to the target as a function of the draws.
    jacobian = sum((d for name, d in densities.items() if name not in leaves), zero)
    log_target_fixed = run.log_target() - jacobian
    log_forward = sum((densities[name] for name in leaves), zero)
    paths = {name: drawn.guide.nodes[name]["value"] for name in leaves}
    step = _as_step(
        run,
        log_target_fixed + _path(run, log_target_fixed, leaves, paths),
        log_forward.detach() + _path(run, log_forward, leaves, paths),
        log_target_fixed=log_target_fixed,
    )
    return step, run


def _leaves(run: Run) -> dict[str, Tensor]:
    if run.guide_enumerated or run.log_score(detached=False) is not None:
        raise ValueError(
            "estimator='stl' and 'dreg' need a guide whose sites are all reparameterised; this one has sites that are "
            "enumerated or have no rsample. Use estimator=None."
        )
    drawn = {name: site for name, site in latent_sites(run.guide).items() if not is_delta(site)}
    return {name: site["value"].detach().requires_grad_(torch.is_grad_enabled()) for name, site in drawn.items()}


def _path(run: Run, density: Tensor, leaves: dict[str, Tensor], paths: dict[str, Tensor]) -> Tensor:
    """The gradient path of the draws through a density: zero in value, ``grad_z density`` in each particle's draws."""

    def total(name: str, product: Tensor) -> Tensor:
        events = run.guide.nodes[name]["fn"].event_dim
        return run.to_batch(product.sum(list(range(-events, 0))) if events else product, name)

    return carried_path(density, leaves, paths, total) if leaves else run.zeros()
