"""Samplers: where the weighted steps come from.

A sampler runs the programs and yields :class:`pplvi.objectives.Step` s. Any objective works on any sampler whose draws
it can use; a sampler says with ``proposal`` whether it draws from the guide or from the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pplvi.autoguides import check_scored
from pplvi.objectives import Routing, Step
from pplvi.programs import dream, execute, guide_run
from pplvi.runs import Run, is_delta, latent_sites

Program = Callable[..., Any]


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
        """Yield one step of ``request.num_particles`` dreams, each of the size of the data."""
        steps = []
        for _ in range(request.num_particles):
            run = dream(model, guide, args, kwargs)
            check_scored(guide, latent_sites(run.guide), latent_sites(run.model))
            step = _as_step(run, run.log_target().detach(), run.log_forward())
            steps.append(replace(step, log_weight=run.zeros()))  # exact draws: equal weights
        yield Step.concatenate(steps)


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


_Values = Mapping[str, Tensor] | None


def _live_step(
    model: Program, guide: Program, args: Any, kwargs: Any, num_particles: int, routing: Routing, shared: _Values
) -> tuple[Step, Run]:
    run = execute(model, guide, args, kwargs, num_particles=num_particles, detach=routing.detach, values=shared)
    log_forward = -sum(exact_entropies(run).values(), run.zeros()) if routing.exact_entropy else run.log_forward()
    log_score = run.log_score(detached=routing.detach)
    if run.guide_enumerated and log_score is not None:
        raise ValueError(
            "the guide enumerates some sites and draws others that cannot be reparameterised: expected one or the "
            "other. Enumerate all discrete sites of the guide, or none."
        )
    return _as_step(run, run.log_target(), log_forward, log_score=log_score), run


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
    zero = run.zeros()
    if not (torch.is_grad_enabled() and density.requires_grad and leaves):
        return zero
    gradients = torch.autograd.grad(density.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
    for (name, value), gradient in zip(paths.items(), gradients, strict=True):
        if gradient is not None:
            moved = gradient.detach() * (value - value.detach())
            event = range(-run.guide.nodes[name]["fn"].event_dim, 0)
            zero = zero + run.to_batch(moved.sum(list(event)) if len(event) else moved, name)
    return zero
