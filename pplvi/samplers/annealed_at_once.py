"""All levels of a path at once: drawn one after another without gradient, then scored together.

Objectives of one level are local: given the draws, no level needs another. So the draws are made first, and one graph
is built over levels and particles: each target is run once with the particles of all its levels side by side, and
kernels that differ only in their parameters are run once with these stacked. What comes out is one step, whose batch
has the levels on its first dimension. Noise is kept: a draw gets its gradient path from the distribution it came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from torch import Tensor

from pplvi.objectives.step import Step
from pplvi.programs.memo import Memo
from pplvi.programs.sharding import current_shard, own_noise
from pplvi.programs.single import parameter_names, run_stacked
from pplvi.samplers.particles import draws_of, leaves, run_at
from pplvi.samplers.paths import Planned
from pplvi.samplers.walk import Walk
from pplvi.types import MutableValues, Program
from pplvi.weights.resampling import Resampling


@runtime_checkable
class Stackable(Protocol):
    """A kernel that can be run for several levels at once."""

    @property
    def alike(self) -> object:
        """What makes the program besides its parameters: programs that are equal in it differ in nothing else.

        These parameters are asked for by ``PyroParam`` or ``pyro.param``; draws are shifted, scaled or transformed
        normal noise.
        """
        ...


def wanted(choice: bool | None, walk: Walk, resampling: Resampling) -> bool:
    """Whether to build all levels at once.

    :raises ValueError: if that was asked for, and cannot be done.
    """
    if choice is False:
        return False
    if reason := _hindrance(walk, resampling):
        if choice:
            raise ValueError(f"vectorize_levels=True, but {reason}. Use vectorize_levels=None or False.")
        return False
    return True


def _hindrance(walk: Walk, resampling: Resampling) -> str:
    if not walk.particles.routing.local:
        return "the objective is not local: expected one whose levels pass no gradient to each other"
    if walk.rejection is not None:
        return "moves may be rejected: expected none that are"
    if walk.particles.num_particles == 1:
        return "there is one particle: expected at least 2"
    if resampling.num_particles not in (None, walk.particles.num_particles):
        return "the number of particles changes: expected the same at every level"
    if (shard := current_shard()) is not None and shard.plates.isdisjoint(walk.particles.batch):
        return "weights are joint over several ranks: expected latents inside the plate of the data"
    if isinstance(walk.plan.initial, Planned):
        return "the first draws come from a walk of their own: expected a base that is a program"
    others = [k for k in (*walk.plan.forward, *walk.plan.reverse) if not isinstance(k, Stackable)]
    if others:
        return f"{type(others[0]).__name__} has no property 'alike': expected kernels such as those of ResidualKernel"
    return ""


@dataclass
class _Draws:
    """What the walk without gradient leaves: one entry a level.

    :ivar start: log density of the first target at the first draws, its parameters live.
    :ivar weights: log weights that come in, known where they were needed in order to resample.
    :ivar chosen: after each level, the particles that resampling took.
    """

    start: Tensor
    previous: list[MutableValues] = field(default_factory=list)
    reached: list[MutableValues] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)


def _drawn(walk: Walk, resampling: Resampling) -> _Draws:
    state = walk.start()
    draws, last = _Draws(state.log_density), walk.plan.path.num_steps
    with torch.no_grad():
        for level in range(1, last + 1):
            draws.previous.append(state.values)
            draws.weights.append(state.log_weight)
            if resampling.when is False or level == last:  # weights are not needed before all levels are scored
                state = replace(state, values=walk.drawn(level, state))
            else:
                _, state = walk.move(level, state)
            draws.reached.append(state.values)
            with own_noise(walk.particles.batch):
                found = resampling.indices(state.log_weight) if level < last else None
            if found is not None:
                draws.chosen.append(found[0])
                state = walk.taken(state, *found)
    return draws


def all_levels(walk: Walk, resampling: Resampling) -> Step:
    """The steps of all levels as one; its batch is ``(num_steps, *batch)``."""
    draws = _drawn(walk, resampling)
    freeze = walk.particles.frozen
    reached, previous = _stacked(draws.reached), _stacked(draws.previous)
    points = [leaves(reached) if freeze else reached for _ in range(3)]  # of their own, to tell gradients apart
    fixed = _targets(walk, points[0])
    forward, reverse, live = _kernels(walk, previous, points, freeze)
    initial, weight_in = _initial(draws, fixed), _weights(draws, fixed, reverse, forward)
    paths = _paths(walk, live, points, (fixed, reverse, forward)) if freeze else [torch.zeros_like(fixed)] * 3
    return Step(
        log_weight_in=weight_in.movedim(0, 1),
        log_weight=(weight_in + fixed + reverse - initial - forward).detach().movedim(0, 1),
        log_target=(fixed + paths[0]).movedim(0, 1),
        log_target_fixed=fixed.movedim(0, 1),
        log_reverse=(reverse + paths[1]).movedim(0, 1),
        log_reverse_fixed=reverse.movedim(0, 1),
        log_initial=initial.movedim(0, 1),
        log_forward=((forward.detach() if freeze else forward) + paths[2]).movedim(0, 1),
        **walk.particles.accounts,
    )


def _stacked(levels: Sequence[MutableValues]) -> MutableValues:
    return {name: torch.stack([values[name] for values in levels]) for name in levels[0]}


def _initial(draws: _Draws, fixed: Tensor) -> Tensor:
    """Log density of the target before each level at the draws that the level starts from."""
    before = fixed[:-1]
    if draws.chosen:
        before = torch.take_along_dim(before, torch.stack(draws.chosen), 1)
    return torch.cat([draws.start.unsqueeze(0), before])


def _weights(draws: _Draws, fixed: Tensor, reverse: Tensor, forward: Tensor) -> Tensor:
    """Log weights that come into each level."""
    if draws.chosen:
        return torch.stack(draws.weights)
    after = (fixed + reverse - _initial(draws, fixed) - forward).detach().cumsum(0)
    return torch.cat([torch.zeros_like(after[:1]), after[:-1]])


def _paths(
    walk: Walk, live: MutableValues, points: Sequence[MutableValues], densities: Sequence[Tensor]
) -> list[Tensor]:
    """The gradient path of the draws through each density, ``<grad_z density, z - sg(z)>``, zero in value."""
    inputs = [leaf for values in points for leaf in values.values()]
    total = sum((density.sum() for density in densities), torch.zeros(()))
    found = iter(torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True))
    change = {name: value - value.detach() for name, value in live.items()}
    return [
        sum((_along(walk, change[name], next(found)) for name in values), torch.zeros_like(densities[0]))
        for values in points
    ]


def _along(walk: Walk, change: Tensor, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return change.new_zeros(())
    return walk.particles.total(gradient * change, change.dim() - walk.particles.nesting - 2)


# ---------------------------------------------------------------- targets


def _targets(walk: Walk, at: MutableValues) -> Tensor:
    """Log density of every level's target, ``(num_steps, num_particles, *batch)``."""
    path = walk.plan.path
    programs = {level: walk.targets(level) for level in range(1, path.num_steps + 1)}
    used: dict[Program, list[int]] = {}
    for level, own in programs.items():
        for program in own:
            used.setdefault(program, []).append(level)
    scored = {program: _scored_at(walk, program, at, levels) for program, levels in used.items()}
    parts = []
    for own, group in groupby(programs, key=lambda level: programs[level]):
        levels = list(group)
        spans = [_rows(scored[program], used[program], levels) for program in own]
        parts.append(_assembled(path, levels, spans))
    return torch.cat(parts)


def _scored_at(walk: Walk, program: Program, at: MutableValues, levels: list[int]) -> Tensor:
    """A program's log density at the draws of several levels, from one run of all their particles."""
    rows = {name: _rows(value, range(1, len(value) + 1), levels).flatten(0, 1) for name, value in at.items()}
    density = walk.particles.density(walk.run(program, rows, copies=len(levels), complete=True))
    return density.reshape(len(levels), walk.particles.num_particles, *density.shape[1:])


def _rows(tensor: Tensor, of: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Some rows of a tensor whose rows belong to these levels."""
    places = [of.index(level) for level in wanted]
    if places == list(range(places[0], places[0] + len(places))):
        return tensor[places[0] : places[0] + len(places)]
    return tensor[places]


def _assembled(path: Any, levels: list[int], densities: Sequence[Tensor]) -> Tensor:
    if getattr(path, "slices", False):
        target: Tensor = path(slice(levels[0], levels[-1] + 1), densities)
        return target
    return torch.stack([path(level, [d[i] for d in densities]) for i, level in enumerate(levels)])


# ---------------------------------------------------------------- kernels


def _kernels(
    walk: Walk, previous: MutableValues, points: Sequence[MutableValues], freeze: bool
) -> tuple[Tensor, Tensor, MutableValues]:
    """Log densities of forward and reverse kernels and, where these are frozen, the draws with their paths."""
    ahead, back, (_, at_reverse, at_forward) = walk.plan.forward, walk.plan.reverse, points
    if freeze and len(previous) > 1:
        forward, live = _scored(walk, ahead, previous, at_forward, redraw=True)
        reverse, _ = _scored(walk, back, at_reverse, previous, redraw=False)
        return forward, reverse, live
    given = {name: torch.cat([previous[name], at_reverse[name]]) for name in previous}
    values = {name: torch.cat([at_forward[name], previous[name]]) for name in previous}
    both, live = _scored(walk, (*ahead, *back), given, values, redraw=freeze)
    count = len(ahead)
    return both[:count], both[count:], {name: value[:count] for name, value in live.items()}


def _scored(
    walk: Walk, kernels: Sequence[Any], given: MutableValues, values: MutableValues, *, redraw: bool
) -> tuple[Tensor, MutableValues]:
    """Log densities of kernels at stacked values, one run for those that are alike."""
    groups: list[list[int]] = []
    for index, kernel in enumerate(kernels):
        same = next((group for group in groups if kernels[group[0]].alike == kernel.alike), None)
        groups.append([index]) if same is None else same.append(index)
    parts = [_scored_alike(walk, [kernels[i] for i in g], _of(given, g), _of(values, g), redraw) for g in groups]
    order = [index for group in groups for index in group]
    back = sorted(range(len(order)), key=order.__getitem__)
    joined = {name: torch.cat([live[name] for _, live in parts]) for name in parts[0][1]}
    return _ordered(torch.cat([density for density, _ in parts]), back), {
        n: _ordered(v, back) for n, v in joined.items()
    }


def _ordered(tensor: Tensor, places: list[int]) -> Tensor:
    return tensor if places == list(range(len(places))) else tensor[places]


def _of(values: MutableValues, rows: list[int]) -> MutableValues:
    return {name: value if len(value) == len(rows) else value[rows] for name, value in values.items()}


def _scored_alike(
    walk: Walk, kernels: Sequence[Any], given: MutableValues, values: MutableValues, redraw: bool
) -> tuple[Tensor, MutableValues]:
    def read(kernel: Program, both: Any) -> tuple[Tensor, MutableValues]:
        start, end = both
        if not redraw:
            return walk.particles.density(walk.run(kernel, end, start, complete=True)), {}
        kept = {name: value.detach() for name, value in end.items()}
        run = walk.run(kernel, kept, start, complete=True, redraw=True)
        again = run_at(run, end, lambda: walk.run(kernel, end, start, complete=True))
        return walk.particles.density(again), draws_of(run)

    names = [
        _names(kernel, ({n: v[i] for n, v in given.items()}, *walk.args), walk.kwargs)
        for i, kernel in enumerate(kernels)
    ]
    return run_stacked(kernels[0], names, (given, values), read)


_NAMES = Memo[tuple[str, ...]]()


def _names(kernel: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a kernel's parameters, all of which are in the store."""
    store, known = pyro.get_param_store(), _NAMES.recall((kernel,))
    if known is None or any(name not in store for name in known):
        return _NAMES.keep((kernel,), None, parameter_names(kernel, args, kwargs))
    return known
