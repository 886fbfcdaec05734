"""Annealed and nested sampling: draws that are moved and re-weighted from target to target, one step a level.

Annealed importance sampling, sequential Monte Carlo samplers, nested variational inference and the filtering objectives
differ in path, kernels, resampling and objective; the walk is this one. Draws have one weight per particle and per
independent element of the data, and are resampled per element. Nothing branches on a tensor's value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pplvi.kernels.invariant import Frame, InvariantMove
from pplvi.objectives.step import Routing, Step
from pplvi.programs.joint import execute
from pplvi.programs.memo import Key
from pplvi.programs.memo import _key as key_of
from pplvi.programs.running import isolated
from pplvi.programs.single import carried_path, rescored, run_alone
from pplvi.programs.sites import is_delta, latent_sites
from pplvi.programs.traces import Run
from pplvi.samplers import annealed_at_once
from pplvi.samplers.base import Request
from pplvi.samplers.importance import Importance
from pplvi.samplers.paths import Plan, sites_of_target
from pplvi.types import MutableValues, Program
from pplvi.weights.algebra import logmeanexp
from pplvi.weights.resampling import Resampling as Resampling
from pplvi.weights.resampling import resample


@runtime_checkable
class Planned(Protocol):
    """A guide that moves draws along a path: it can be walked level by level."""

    def plan(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
        """Path and kernels for these arguments of the model."""
        ...


class Annealed:
    """Walk along the path of a guide, ``num_steps`` steps from its first target to the model.

    With a guide that has no path this is importance sampling, one step. The model itself is always the last target.
    Each level runs the forward kernel, the reverse kernel and every program of the level's target once, all particles
    together (a kernel of several sites twice where its density is frozen).

    :param resampling: when and how to resample between levels; never after the last.
    :param vectorize_levels: for objectives of one level: draw without gradient first, then score all levels at once,
        each program in one run over levels and particles, as one step whose batch has the levels first. Results are
        the same. ``None``: where forward and reverse kernels allow it; ``False``: level by level, which needs no more
        memory for more levels.

    >>> import pyro, pyro.distributions as dist
    >>> from pplvi.guides import NestedGuide
    >>> def start():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> def kernel(previous):
    ...     pyro.sample("z", dist.Normal(0.6 * previous["z"], 0.8))
    >>> guide = NestedGuide(start, [(start, kernel, kernel)])  # a kernel and its own reversal: all weights are one
    >>> (step,) = Annealed()(start, guide, (), {}, Request(3, routing=Routing(detach=True, local=True)))
    >>> bool((step.log_weight.abs() < 1e-6).all())
    True
    """

    proposal: ClassVar[str] = "guide"

    def __init__(self, resampling: Resampling | None = None, *, vectorize_levels: bool | None = False) -> None:
        self.resampling = Resampling() if resampling is None else resampling
        self.vectorize_levels = vectorize_levels

    def __call__(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], request: Request
    ) -> Iterator[Step]:
        """Yield the steps of one walk, level by level.

        :raises ValueError: for an objective that is not one of levels, programs that do not fit together, or particles
            that are wanted one after another.
        """
        if not isinstance(guide, Planned):
            yield from Importance()(model, guide, args, kwargs, request)
            return
        check_levels(request)
        nesting, batch = _layout(model, guide, args, kwargs)
        walk = _Walk(
            model, guide.plan(args, kwargs), args, kwargs, request.num_particles, nesting, batch, request.routing
        )
        if annealed_at_once.wanted(self.vectorize_levels, walk, self.resampling):
            yield annealed_at_once.all_levels(walk, self.resampling)
        else:
            yield from walk.steps(self.resampling)


def check_levels(request: Request) -> None:
    """Check that an objective is one of levels and wants all particles at once."""
    if request.routing.local is None:
        raise ValueError(
            "this objective sees a single step, but the sampler walks along a path: expected an objective of levels "
            "(pplvi.objectives.nested). For bounds "
            "of the whole path use the guide with the ordinary importance sampler."
        )
    if len(request.counts) > 1:
        raise ValueError(
            "vectorize_particles=False: particles of a path are weighted and resampled together. Expected programs "
            "that run all particles in one call; drop the option."
        )


_Layout = tuple[int, frozenset[str]]
_LAYOUTS: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Key, _Layout]]] = WeakKeyDictionary()


def _layout(model: Program, guide: Any, args: Any, kwargs: Any) -> _Layout:
    """How deep plates nest, and the names of those common to all sites, from one run on the extended space."""
    with suppress(KeyError, TypeError):
        return _LAYOUTS[guide][model][key_of(args, kwargs)]
    plan = guide.plan(args, kwargs)
    start, nested = plan.initial, isinstance(plan.initial, Planned)
    while isinstance(start, Planned):
        start = start.plan(args, kwargs).initial
    invariant = any(isinstance(kernel, InvariantMove) for kernel in plan.forward)
    with isolated():
        run = execute(model, start if invariant or nested else guide, args, kwargs)
        if not nested:
            plan.check_supports(args, kwargs)
    found = run.nesting, frozenset(plate.name for plate in run.batch)
    with suppress(TypeError):
        known = _LAYOUTS.setdefault(guide, WeakKeyDictionary()).setdefault(model, {})
        known[key_of(args, kwargs)] = found
    return found


@dataclass
class _State:
    """Weighted draws for one target: ``log_density`` at (detached) values, its parameters live."""

    values: MutableValues
    log_weight: Tensor
    log_density: Tensor


@dataclass
class _Walk:
    """One walk of all particles."""

    model: Program
    plan: Plan
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    num_particles: int
    nesting: int
    batch: frozenset[str]
    routing: Routing
    indices: MutableValues = field(default_factory=dict)
    scale: float = 1.0
    subsampled: frozenset[str] = frozenset()
    dims: tuple[int, ...] = ()
    state: _State | None = None

    def steps(self, resampling: Resampling) -> Iterator[Step]:
        """The steps of all levels."""
        if isinstance(self.plan.initial, Planned):
            inner = self._nested(self.plan.initial)
            yield from inner.steps(resampling)
            self.indices, self.scale, self.dims = inner.indices, inner.scale, inner.dims
            self.state = self._picked(inner)
        else:
            self.state = self._start()
        for level in range(1, self.plan.path.num_steps + 1):
            if level > 1:
                self.state = self._resampled(resampling, self.state)
            step, self.state = self._move(level, self.state)
            yield step

    def _nested(self, guide: Planned) -> _Walk:
        """The walk of a guide whose weighted draws are the proposal of this one."""
        plan = guide.plan(self.args, self.kwargs)
        (target,) = plan.path.programs(plan.path.num_steps)
        count = self.num_particles * self.plan.num_inner
        return replace(self, model=target, plan=plan, num_particles=count, subsampled=frozenset())

    def _picked(self, inner: _Walk) -> _State:
        """One of every ``num_inner`` draws, in proportion to their weights; its weight is their mean."""
        state = inner.state
        assert state is not None
        if len(state.log_weight) == self.num_particles:  # none to choose from, or as many as are wanted already
            return state
        groups = state.log_weight.reshape(self.num_particles, -1, *state.log_weight.shape[1:])
        first = torch.arange(self.num_particles, device=groups.device) * groups.shape[1]
        first = first.reshape(-1, *[1] * (groups.dim() - 2))
        chosen = resample(groups, 1, dim=1).squeeze(1) + first
        return self._taken(state, chosen, logmeanexp(groups, 1))

    def _start(self) -> _State:
        run = self._run(self.plan.initial, {}, detach=self.routing.detach or bool(self.routing.local))
        self.indices = run.subsample_indices(of_model=True)
        plates = [plate for plate in run.batch if plate.name in self.batch]
        self.scale = math.prod(plate.scale for plate in plates)
        self.dims = tuple(plate.dim for plate in plates)
        log_density = self.plan.path(0, [self._density(run)])
        return _State(self._draws(run), torch.zeros_like(log_density), log_density)

    def _move(self, level: int, state: _State) -> tuple[Step, _State]:
        if isinstance(kernel := self._kernel(level), InvariantMove):
            return self._move_invariantly(level, state, kernel)
        drawn = self._run(self._kernel(level), self.indices, state.values, detach=self.routing.detach)
        live = self._draws(drawn)
        self._check_cover(live, state.values)
        frozen = self.routing.freeze and torch.is_grad_enabled()
        at = {name: value.detach().requires_grad_() for name, value in live.items()} if frozen else live
        fixed, reverse = self._target(level, at), self._reverse(level, at, state.values)
        paths = _Paths(self, drawn, live, at)
        step = Step(
            log_weight_in=state.log_weight,
            log_weight=torch.zeros_like(fixed),
            log_target=fixed + paths(fixed),
            log_target_fixed=fixed,
            log_reverse=reverse + paths(reverse),
            log_initial=state.log_density,
            log_forward=self._frozen(level, state, at, paths) if frozen else self._density(drawn),
            scale=self.scale,
            subsampled=tuple(sorted(self.subsampled)),
        )
        return self._weighted(step, live)

    def _move_invariantly(self, level: int, state: _State, kernel: InvariantMove) -> tuple[Step, _State]:
        """Weight draws for the level's target where they are, then move them under it."""
        here, zero = self._target(level, state.values), torch.zeros_like(state.log_weight)
        log_weight = (state.log_weight + here - state.log_density).detach()
        step = Step(
            state.log_weight,
            log_weight,
            here,
            here,
            zero,
            state.log_density,
            zero,
            scale=self.scale,
            subsampled=tuple(sorted(self.subsampled)),
        )
        frame = Frame(lambda values: self._target(level, dict(values)), self._total, self._align)
        moved = kernel.move(state.values, frame)
        return step, _State(moved, log_weight, self._target(level, moved))

    def _total(self, tensor: Tensor, events: int) -> Tensor:
        """Sum over event dimensions and all plates outside the batch."""
        tensor = tensor.sum(list(range(-events, 0))) if events else tensor
        tensor = tensor.reshape((1,) * (self.nesting + 1 - tensor.dim()) + tuple(tensor.shape))
        summed = [dim for dim in range(-self.nesting, 0) if dim not in self.dims]
        return tensor.sum(summed) if summed else tensor

    def _weighted(self, step: Step, live: MutableValues) -> tuple[Step, _State]:
        log_weight = step.log_weight_in + step.log_increment
        step = Step(**{**vars(step), "log_weight": log_weight.detach()})
        if self.routing.local:
            return step, _State({n: v.detach() for n, v in live.items()}, step.log_weight, step.log_target_fixed)
        return step, _State(live, log_weight, step.log_target)

    def _frozen(self, level: int, state: _State, at: MutableValues, paths: _Paths) -> Tensor:
        if len(at) == 1:  # a site whose distribution depends on no other draw of this level is not run again
            run = rescored(paths.drawn, at)
        else:
            run = self._run(self._kernel(level), {**self.indices, **at}, state.values, complete=True)
        density = self._density(run)
        return density.detach() + paths(density)

    def _target(self, level: int, at: MutableValues) -> Tensor:
        path = self.plan.path
        programs = (self.model,) if level == path.num_steps else path.programs(level)
        runs = [self._run(program, {**self.indices, **at}, complete=True) for program in programs]
        return path(level, [self._density(run) for run in runs])

    def _reverse(self, level: int, at: MutableValues, previous: MutableValues) -> Tensor:
        kernel = self.plan.reverse[level - 1]
        return self._density(self._run(kernel, {**self.indices, **previous}, at, complete=True))

    def _kernel(self, level: int) -> Program:
        return self.plan.forward[level - 1]

    def _run(self, program: Program, values: MutableValues, *given: MutableValues, copies: int = 1, **how: Any) -> Run:
        """Run a program at values, for all particles or for several copies of them."""
        count = self.num_particles * copies
        args = (*given, *self.args)
        return run_alone(program, args, self.kwargs, num_particles=count, nesting=self.nesting, values=values, **how)

    def _draws(self, run: Run) -> MutableValues:
        sites = latent_sites(run.model)
        if not self.routing.detach and torch.is_grad_enabled() and (fixed := _without_path(sites)):
            raise ValueError(
                f"sites {fixed} are deterministic or cannot be reparameterised, but this objective follows draws: "
                "expected kernels with has_rsample. Use divergence='forward_kl', which needs no path."
            )
        return {name: site["value"] for name, site in sites.items()}

    def _check_cover(self, reached: MutableValues, previous: MutableValues) -> None:
        if sites_of_target(reached) != sites_of_target(previous):
            raise ValueError(
                f"a forward kernel samples {sorted(reached)}, but the draws that it moves have sites "
                f"{sorted(previous)}: expected the same sites at every level. Sample each site of the model once."
            )

    def _density(self, run: Run) -> Tensor:
        """A program's log density, ``(num_particles, *batch)``, the batch plates' scale left out."""
        more = [plate for plate in run.batch if plate.name not in self.batch]
        self.subsampled |= {*run.subsampled, *(plate.name for plate in more if plate.scale != 1.0)} - self.batch
        return self._to_batch(run, run.log_target()) * math.prod(plate.scale for plate in more)

    def _to_batch(self, run: Run, density: Tensor) -> Tensor:
        summed = [index for index, plate in enumerate(run.batch, 1) if plate.name not in self.batch]
        return density.sum(summed) if summed else density

    def _resampled(self, resampling: Resampling, state: _State) -> _State:
        if (found := resampling.indices(state.log_weight.detach())) is None:
            return state
        return self._taken(state, *found)

    def _taken(self, state: _State, chosen: Tensor, log_weight: Tensor) -> _State:
        self.num_particles = len(chosen)
        log_density = torch.take_along_dim(state.log_density, chosen, 0)
        return _State({n: self._take(v, chosen) for n, v in state.values.items()}, log_weight, log_density)

    def _take(self, value: Tensor, chosen: Tensor) -> Tensor:
        """Particles of a site's value, each batch element by its own indices."""
        indices = self._align(chosen, value.dim() - self.nesting - 1)
        return torch.take_along_dim(value, indices.expand(-1, *value.shape[1:]), 0)

    def _align(self, tensor: Tensor, events: int) -> Tensor:
        """Give a tensor ``(num_particles, *batch)`` the dimensions of a site's value."""
        sizes = dict(zip(self.dims, tensor.shape[1:], strict=True))
        particles = [] if len(tensor) == 1 else [len(tensor)]  # one particle runs programs without a dimension for it
        shape = [*particles, *(sizes.get(dim, 1) for dim in range(-self.nesting, 0)), *[1] * events]
        return tensor.reshape(shape)


def _without_path(sites: Mapping[str, Any]) -> list[str]:
    return sorted(n for n, s in sites.items() if is_delta(s) or not getattr(s["fn"], "has_rsample", False))


@dataclass(frozen=True)
class _Paths:
    """The gradient path of a level's draws through densities that were computed at leaves in their place."""

    walk: _Walk
    drawn: Run
    live: MutableValues
    at: MutableValues

    def __call__(self, density: Tensor) -> Tensor:
        return carried_path(density, self.at, self.live, self._total)

    def _total(self, name: str, product: Tensor) -> Tensor:
        return self.walk._total(product, self.drawn.model.nodes[name]["fn"].event_dim)
