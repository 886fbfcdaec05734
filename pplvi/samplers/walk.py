"""One walk of all particles along the path of a plan: draws are moved and weighted level by level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pplvi.kernels.invariant import Frame, InvariantMove
from pplvi.objectives.step import Step
from pplvi.programs.sharding import own_noise
from pplvi.programs.sites import is_delta, latent_sites
from pplvi.programs.traces import Run
from pplvi.samplers.particles import DrawPaths, Particles, draws_of
from pplvi.samplers.paths import Plan, Planned, sites_of_target
from pplvi.types import MutableValues, Program, Values
from pplvi.weights.algebra import logmeanexp
from pplvi.weights.rejection import Rejection
from pplvi.weights.resampling import Resampling, resample


@dataclass
class WalkState:
    """Weighted draws for one target: ``log_density`` at (detached) values, its parameters live."""

    values: MutableValues
    log_weight: Tensor
    log_density: Tensor


@dataclass
class Walk:
    """One walk of all particles, along the path of a plan to the model.

    :ivar model: the last target.
    :ivar plan: path and kernels.
    :ivar particles: how draws lie in tensors, and what is known of the plates.
    :ivar rejection: whether moves are tried again.
    :ivar state: where the walk has come to.
    """

    model: Program
    plan: Plan
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    particles: Particles
    rejection: Rejection | None = None
    state: WalkState | None = None

    def steps(self, resampling: Resampling) -> Iterator[Step]:
        """The steps of all levels."""
        if isinstance(self.plan.initial, Planned):
            inner = self._nested(self.plan.initial)
            yield from inner.steps(resampling)
            self._adopt(inner.particles)
            self.state = self._picked(inner)
        else:
            self.state = self.start()
        for level in range(1, self.plan.path.num_steps + 1):
            if level > 1:
                self.state = self._resampled(resampling, self.state)
            step, self.state = self.move(level, self.state)
            yield step

    def _nested(self, guide: Planned) -> Walk:
        """The walk of a guide whose weighted draws are the proposal of this one."""
        plan = guide.plan(self.args, self.kwargs)
        (target,) = plan.path.programs(plan.path.num_steps)
        count = self.particles.num_particles * self.plan.num_inner
        particles = replace(self.particles, num_particles=count, subsampled=frozenset())
        return replace(self, model=target, plan=plan, particles=particles)

    def _adopt(self, inner: Particles) -> None:
        self.particles = replace(self.particles, indices=inner.indices, dims=inner.dims, scale=inner.scale)

    def _picked(self, inner: Walk) -> WalkState:
        """One of every ``num_inner`` draws, in proportion to their weights; its weight is their mean."""
        state, count = inner.state, self.particles.num_particles
        assert state is not None
        if len(state.log_weight) == count:  # none to choose from, or as many as are wanted already
            return state
        groups = state.log_weight.reshape(count, -1, *state.log_weight.shape[1:])
        first = torch.arange(count, device=groups.device) * groups.shape[1]
        first = first.reshape(-1, *[1] * (groups.dim() - 2))
        chosen = resample(groups, 1, dim=1).squeeze(1) + first
        return self.taken(state, chosen, logmeanexp(groups, 1))

    def start(self) -> WalkState:
        """The first draws, all of one weight; the plates that are met are noted."""
        routing = self.particles.routing
        run = self.run(self.plan.initial, {}, detach=routing.detach or bool(routing.local))
        self.particles.indices = run.subsample_indices(of_model=True)
        self.particles.note(run)
        log_density = self.plan.path(0, [self.particles.density(run)])
        return WalkState(self.draws(run), torch.zeros_like(log_density), log_density)

    def move(self, level: int, state: WalkState) -> tuple[Step, WalkState]:
        """Move draws to the target of a level: the step, and where it leads.

        :raises ValueError: for a kernel whose sites are not those of the draws, or whose draws no gradient can follow.
        """
        return self._moved(level, state) if self.rejection is None else self._tried(level, state, self.rejection)

    def _tried(self, level: int, state: WalkState, rejection: Rejection) -> tuple[Step, WalkState]:
        """Move several copies of each particle, and go on with one that is accepted.

        The step's incoming weights make pairs of draws, before and after, proper for the extended proposal.
        """
        if isinstance(kernel := self.kernel(level), InvariantMove):
            raise ValueError(
                f"{kernel.kernel} leaves its target invariant: a weight does not depend on where a draw is moved, and "
                "nothing can be rejected for it. Use another kernel, or no rejection."
            )
        count, draws = self.particles.num_particles, rejection.num_draws
        own = torch.arange(count, device=state.log_weight.device)
        own = own.reshape(-1, *[1] * (state.log_weight.dim() - 1)).expand_as(state.log_weight)
        every = own.repeat(draws, *[1] * (own.dim() - 1))
        many, reached = self._moved(level, self.taken(state, every, torch.take_along_dim(state.log_weight, every, 0)))
        with own_noise(self.particles.batch):
            chosen, log_factor = rejection.choose(many.log_increment.detach().unflatten(0, (draws, count)))
        kept = chosen * count + own
        terms = {f.name: getattr(many, f.name) for f in fields(many)}
        terms = {n: torch.take_along_dim(x, kept, 0) for n, x in terms.items() if isinstance(x, Tensor)}
        weights = {name: terms.pop(name) + log_factor for name in ("log_weight_in", "log_weight")}
        step = replace(many, **terms, **weights)
        return step, self.taken(reached, kept, step.log_weight)

    def _moved(self, level: int, state: WalkState) -> tuple[Step, WalkState]:
        if isinstance(kernel := self.kernel(level), InvariantMove):
            return self._move_invariantly(level, state, kernel)
        drawn = self.draw(level, state, detach=self.particles.routing.detach)
        paths = DrawPaths.of(self.particles, drawn, self._covering(drawn, state.values))
        fixed, reverse = self._target(level, paths.at), self._reverse(level, paths.at, state.values)
        step = Step.from_move(
            log_weight_in=state.log_weight,
            log_target=fixed + paths(fixed),
            log_target_fixed=fixed,
            log_reverse=reverse + paths(reverse),
            log_reverse_fixed=reverse,
            log_initial=state.log_density,
            log_forward=paths.log_forward(lambda: self.run(kernel, paths.at, state.values, complete=True)),
            **self.particles.accounts,
        )
        return step, self._reached(step, paths.live)

    def _reached(self, step: Step, live: MutableValues) -> WalkState:
        if self.particles.routing.local:
            return WalkState({n: v.detach() for n, v in live.items()}, step.log_weight, step.log_target_fixed)
        return WalkState(live, step.log_weight_out, step.log_target)

    def _move_invariantly(self, level: int, state: WalkState, kernel: InvariantMove) -> tuple[Step, WalkState]:
        """Weight draws for the level's target where they are, then move them under it."""
        here = self._target(level, state.values)
        step = Step.from_move(
            log_weight_in=state.log_weight, log_target=here, log_initial=state.log_density, **self.particles.accounts
        )
        particles = self.particles
        frame = Frame(lambda values: self._target(level, values), particles.total, particles.align)
        moved = kernel.move(state.values, frame)
        return step, WalkState(moved, step.log_weight, self._target(level, moved))

    def draw(self, level: int, state: WalkState, *, detach: bool = False) -> Run:
        """Run the forward kernel of a level from the draws of the level before."""
        return self.run(self.kernel(level), {}, state.values, detach=detach)

    def drawn(self, level: int, state: WalkState) -> MutableValues:
        """Draws of a level without their weights."""
        return self._covering(self.draw(level, state), state.values)

    def _covering(self, drawn: Run, previous: Values) -> MutableValues:
        live = self.draws(drawn)
        if sites_of_target(live) != sites_of_target(previous):
            raise ValueError(
                f"a forward kernel samples {sorted(live)}, but the draws that it moves have sites "
                f"{sorted(previous)}: expected the same sites at every level. Sample each site of the model once."
            )
        return live

    def targets(self, level: int) -> tuple[Program, ...]:
        """Programs whose log densities make up the target of a level; the model itself is the last."""
        path = self.plan.path
        return (self.model,) if level == path.num_steps else path.programs(level)

    def kernel(self, level: int) -> Program:
        """The forward kernel of a level."""
        return self.plan.forward[level - 1]

    def _target(self, level: int, at: Values) -> Tensor:
        runs = [self.run(program, at, complete=True) for program in self.targets(level)]
        return self.plan.path(level, [self.particles.density(run) for run in runs])

    def _reverse(self, level: int, at: MutableValues, previous: MutableValues) -> Tensor:
        return self.particles.density(self.run(self.plan.reverse[level - 1], previous, at, complete=True))

    def run(self, program: Program, values: Values, *given: Values, copies: int = 1, **how: Any) -> Run:
        """Run a program at values, called with what is given and the arguments of the model.

        :param given: values that a kernel starts from.
        :param copies: run several copies of the particles side by side.
        """
        return self.particles.run(program, self.args, self.kwargs, values, given, copies, **how)

    def draws(self, run: Run) -> MutableValues:
        """What a program drew.

        :raises ValueError: for draws that an objective cannot follow.
        """
        if self.particles.followed and (fixed := _without_path(latent_sites(run.model))):
            raise ValueError(
                f"sites {fixed} are deterministic or cannot be reparameterised, but this objective follows draws: "
                "expected kernels with has_rsample. Use divergence='forward_kl', which needs no path."
            )
        return draws_of(run)

    def _resampled(self, resampling: Resampling, state: WalkState) -> WalkState:
        with own_noise(self.particles.batch):
            found = resampling.indices(state.log_weight.detach())
        return state if found is None else self.taken(state, *found)

    def taken(self, state: WalkState, chosen: Tensor, log_weight: Tensor) -> WalkState:
        """Some of the draws, ``chosen`` of shape ``(num_taken, *batch)``, with new weights of that shape."""
        self.particles.num_particles = len(chosen)
        values = {name: self.particles.take(value, chosen) for name, value in state.values.items()}
        if len(chosen) == 1:  # one particle runs programs without a dimension for it
            values = {name: value.squeeze(0) for name, value in values.items()}
        return WalkState(values, log_weight, torch.take_along_dim(state.log_density, chosen, 0))


def _without_path(sites: Mapping[str, Any]) -> list[str]:
    return sorted(n for n, s in sites.items() if is_delta(s) or not getattr(s["fn"], "has_rsample", False))
