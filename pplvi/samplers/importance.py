"""Samplers: where the weighted steps come from.

A sampler runs the programs and yields :class:`pplvi.objectives.Step` s. Any objective works on any sampler whose draws
it can use; a sampler says with ``proposal`` whether it draws from the guide or from the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pplvi.objectives.step import Routing, Step
from pplvi.programs.joint import Exact, execute, guide_run
from pplvi.programs.single import carried_path
from pplvi.programs.sites import is_delta, latent_sites
from pplvi.programs.traces import Run
from pplvi.samplers.base import Request
from pplvi.samplers.divergences import divergences, without
from pplvi.samplers.score_terms import score_terms
from pplvi.types import Program


class Importance:
    """Importance sampling: draws of the guide, weighted for the model by ``log p(x, z) - log q(z)``. One step."""

    proposal: ClassVar[str] = "guide"

    def __call__(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], request: Request
    ) -> Iterator[Step]:
        """Yield one step of ``request.num_particles`` particles."""
        step = _frozen_step if request.routing.freeze else _live_step
        found, _ = step(model, guide, args, kwargs, request)
        yield found


def step_of(run: Run, log_target: Tensor, log_forward: Tensor, **more: Tensor | None) -> Step:
    """The step of a run with these densities, ``(num_particles, *batch)``, with the run's scales."""
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


def _live_step(model: Program, guide: Program, args: Any, kwargs: Any, request: Request) -> tuple[Step, Run]:
    routing = request.routing
    run = execute(
        model,
        guide,
        args,
        kwargs,
        num_particles=request.num_particles,
        detach=routing.detach,
        vectorize=request.vectorize,
        exact=_exact(routing),
    )
    log_target, log_forward = _densities(run, routing)
    log_score = run.log_score(detached=routing.detach)
    if run.guide_enumerated and log_score is not None:
        raise ValueError(
            "the guide enumerates some sites and draws others that cannot be reparameterised: expected one or the "
            "other. Enumerate all discrete sites of the guide, or none."
        )
    step = step_of(run, log_target, log_forward, log_score=log_score)
    return (_with_draws(step, run, routing) if routing.per_draw else step), run


def _with_draws(step: Step, run: Run, routing: Routing) -> Step:
    terms = score_terms(run, routing)
    return step if terms is None else replace(step, score=terms.score, below=terms.below, score_path=terms.path)


def _exact(routing: Routing) -> Exact | None:
    if routing.analytic_kl:
        return "divergence"
    return "entropy" if routing.exact_entropy else None


def _densities(run: Run, routing: Routing) -> tuple[Tensor, Tensor]:
    """``log p`` and ``log q``; the second, or at some sites their difference, by its expectation."""
    if routing.exact_entropy:
        return run.log_target(), -sum(exact_entropies(run).values(), run.zeros())
    if not routing.analytic_kl:
        return run.log_target(), run.log_forward()
    known = divergences(run)
    log_target, log_forward = (sum(without(run.log_probs(t), known), run.zeros()) for t in (run.model, run.guide))
    return log_target, sum(known.values(), log_forward)


def _frozen_step(model: Program, guide: Program, args: Any, kwargs: Any, request: Request) -> tuple[Step, Run]:
    """A step whose guide densities carry the path of the draws but none of their own parameters.

    The pair is run again with the draws as leaves; the path enters to first order, ``<grad_z log q, z - sg(z)>``, which
    has the value and the gradient of the density under frozen parameters, whatever kind of parameters they are.
    """
    drawn = guide_run(model, guide, args, kwargs, request.num_particles, None, request.vectorize)
    leaves = _leaves(drawn)
    values = {**drawn.subsample_indices(), **leaves}
    run = execute(
        model, guide, args, kwargs, num_particles=request.num_particles, values=values, vectorize=request.vectorize
    )
    densities = run.log_probs(run.guide)
    zero = run.zeros()
    # What a deterministic guide site adds is a Jacobian, not the density of a draw: it moves with its parameters and
    # belongs to the target as a function of the draws.
    jacobian = sum((d for name, d in densities.items() if name not in leaves), zero)
    log_target_fixed = run.log_target() - jacobian
    log_forward = sum((densities[name] for name in leaves), zero)
    paths = {name: drawn.guide.nodes[name]["value"] for name in leaves}
    step = step_of(
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
