"""Sequential Monte Carlo over time: particles are extended, weighted and resampled, one step at each time step.

The target of step ``t`` is the model up to it times a look-ahead factor of the draws so far,
``log gamma[t] = log p(x[0..t], z[0..t]) + log psi[t](z[0..t])``, with nothing to look ahead to after the last step.
Draws of earlier steps stay as they are, so that there is no reverse kernel. FIVO, VSMC and NASMC differ in objective
and resampling only. Nothing branches on a tensor's value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pplvi.objectives.step import Routing, Step
from pplvi.programs.single import carried_path, rescored, run_alone
from pplvi.programs.sites import latent_sites, sample_sites
from pplvi.programs.traces import Run
from pplvi.samplers.annealed import check_levels
from pplvi.samplers.base import Request
from pplvi.samplers.state_space import Course, Memory, Plates, course_of, plates_of, warn_of_untrained
from pplvi.types import MutableValues, Program
from pplvi.weights.resampling import Resampling


class Filtering:
    """Run a particle filter, one :class:`pplvi.objectives.Step` a time step.

    Model and guide (the proposal) are objects with ``init`` and ``step`` or programs with a ``pyro.markov`` loop, see
    :mod:`pplvi.samplers.state_space`; the plates around all their sites, such as one over sequences, have weights of
    their own and are resampled on their own. All particles run in one call. A proposal may have a method
    ``look_ahead``.

    :param resampling: when and how to resample between time steps; never after the last.
    :param learn_look_ahead: whether the objective has a use for gradients of the look-ahead factors.
    :raises ValueError: for resampling that changes the number of particles.
    """

    proposal: ClassVar[str] = "guide"

    def __init__(self, resampling: Resampling | None = None, *, learn_look_ahead: bool = True) -> None:
        self.resampling = Resampling() if resampling is None else resampling
        if self.resampling.num_particles is not None:
            raise ValueError(
                f"{self.resampling}: a filter keeps its number of particles: expected num_particles=None. Say how many "
                "in FilteringELBO(num_particles)."
            )
        self.learn_look_ahead = learn_look_ahead

    def __call__(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], request: Request
    ) -> Iterator[Step]:
        """Yield the steps of one pass over the data.

        :raises ValueError: for an objective that is not one of levels, programs that do not fit together, draws that an
            objective cannot follow, or particles that are wanted one after another.
        """
        check_levels(request)
        model, guide = getattr(guide, "filtered", (model, guide))
        course = course_of(model, guide, args, kwargs)
        plates = plates_found(model, guide, course)
        particles = Particles(course, plates, request.num_particles, request.routing)
        particles.learn_look_ahead = self.learn_look_ahead
        yield from particles.steps(self.resampling)


_Shapes = tuple[tuple[int, ...] | None, ...]
_PLATES: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[_Shapes, Plates]]] = WeakKeyDictionary()


def plates_found(model: Any, guide: Any, course: Course) -> Plates:
    """The plates of a pair, found once for arguments of these shapes."""
    given = (*course.args, *course.kwargs.values())
    key = tuple(tuple(arg.shape) if isinstance(arg, Tensor) else None for arg in given)
    with suppress(KeyError, TypeError):
        return _PLATES[guide][model][key]
    found = plates_of(course)
    warn_of_untrained(course, model, guide)
    with suppress(TypeError):
        _PLATES.setdefault(guide, WeakKeyDictionary()).setdefault(model, {})[key] = found
    return found


@dataclass
class _State:
    """Weighted particles at a time: what is remembered of their draws, and their densities."""

    memory: Memory
    log_weight: Tensor
    log_joint: Tensor  # log p(x, z) so far
    log_target: Tensor  # with the look-ahead factor


@dataclass(frozen=True)
class Visit:
    """What a time step leaves for tracing particles back.

    :ivar step: its number.
    :ivar sites: what the proposal has drawn, before resampling.
    :ivar chosen: which of them went on, ``(num_particles, *batch)``; ``None`` if all did.
    """

    step: int
    sites: Mapping[str, Any]
    chosen: Tensor | None


@dataclass
class Particles:
    """One pass of all particles over a course.

    :ivar visits: a list to be filled as steps are made, or ``None``.
    :ivar last: the particles after the last step.
    """

    course: Course
    plates: Plates
    num_particles: int
    routing: Routing
    indices: MutableValues = field(default_factory=dict)
    dims: tuple[int, ...] = ()
    scale: float = 1.0
    subsampled: frozenset[str] = frozenset()
    learn_look_ahead: bool = True
    visits: list[Visit] | None = None
    last: _State | None = None

    def steps(self, resampling: Resampling) -> Iterator[Step]:
        """The steps of all times at which something is drawn or observed."""
        zero = torch.zeros(())
        state = _State({}, zero, zero, zero)
        for number in range(self.course.num_steps):
            drawn, state, step = self._advance(number, state)
            if step is None:
                continue
            yield step
            last = number == self.course.num_steps - 1
            found = None if last else resampling.indices(state.log_weight)
            if self.visits is not None:
                self.visits.append(Visit(number, latent_sites(drawn.model), None if found is None else found[0]))
            state = state if found is None else self._resampled(state, *found)
        self.last = state

    def _advance(self, number: int, state: _State) -> tuple[Run, _State, Step | None]:
        """Draw, then score the model at the draws; no step if the model has no site at this time."""
        propose = self.course.propose(number, state.memory)
        drawn = self._run(propose, {}, detach=self.routing.detach)
        self.indices = {**drawn.subsample_indices(of_model=True), **self.indices}
        live = self._draws(drawn)
        frozen = self.routing.freeze and torch.is_grad_enabled() and bool(live)
        at = {name: value.detach().requires_grad_() for name, value in live.items()} if frozen else live
        memory = dict(state.memory)
        scored = self._run(self.course.score(number, memory), at)
        self._check_cover(number, live, latent_sites(scored.model))
        memory = self.course.remember(memory, {**at, **scored.subsample_indices(of_model=True)})
        if not any(sample_sites(scored.model)):
            return drawn, replace(state, memory=memory), None
        self._note(scored)
        move = _Move(self, number, memory, drawn, live, at, propose)
        return drawn, *self._weighted(move, state, self._density(scored))

    def _weighted(self, move: _Move, state: _State, factor: Tensor) -> tuple[_State, Step]:
        """The step of a move under a model whose log density of the step is ``factor``, ``(num_particles, *batch)``."""
        ahead = self._look_ahead(move.number, move.memory, factor)
        joint = state.log_joint + factor
        log_weight = state.log_weight.expand_as(factor)
        step = Step(
            log_weight_in=log_weight,
            log_weight=log_weight,
            log_target=joint + ahead + move.path(factor + ahead),
            log_target_fixed=joint + ahead,
            log_reverse=torch.zeros_like(factor),
            log_initial=state.log_target.expand_as(factor),
            log_forward=move.log_forward(factor),
            scale=self.scale,
            subsampled=tuple(sorted(self.subsampled)),
        )
        after = log_weight + step.log_increment
        step = replace(step, log_weight=after.detach())
        after = step.log_weight if self.routing.local else after
        return _State(move.memory, after, joint, joint + ahead), step

    def _run(self, program: Program, values: MutableValues, *, detach: bool = False) -> Run:
        return run_alone(
            program,
            (),
            {},
            num_particles=self.num_particles,
            nesting=self.plates.nesting,
            values={**self.indices, **values},
            detach=detach,
        )

    def _note(self, run: Run) -> None:
        """Note the batch plates, which are the same at every step."""
        plates = [plate for plate in run.batch if plate.name in self.plates.batch]
        self.dims = tuple(plate.dim for plate in plates)
        self.scale = math.prod(plate.scale for plate in plates)

    def _draws(self, run: Run) -> MutableValues:
        sites = latent_sites(run.model)
        blind = sorted(name for name, site in sites.items() if not getattr(site["fn"], "has_rsample", False))
        if blind and not self.routing.detach and torch.is_grad_enabled():
            raise ValueError(
                f"sites {blind} cannot be reparameterised, but this objective follows draws: expected sites with "
                "has_rsample. Use objective='forward_kl', which needs no path, or enumerate them in the model."
            )
        return {name: site["value"] for name, site in sites.items()}

    def _check_cover(self, number: int, drawn: MutableValues, wanted: Mapping[str, Any]) -> None:
        if drawn.keys() != wanted.keys():
            raise ValueError(
                f"at time step {number} the proposal draws {sorted(drawn)}, but the model's latent sites are "
                f"{sorted(wanted)}: expected the same. Sample each latent of the step once, under the same name."
            )

    def _density(self, run: Run) -> Tensor:
        """A program's log density, ``(num_particles, *batch)``, the batch plates' scale left out."""
        more = [plate for plate in run.batch if plate.name not in self.plates.batch]
        scaled = {*run.subsampled, *(plate.name for plate in more if plate.scale != 1.0)}
        self.subsampled |= scaled - self.plates.batch
        summed = [index for index, plate in enumerate(run.batch, 1) if plate.name not in self.plates.batch]
        density = run.log_target()
        return (density.sum(summed) if summed else density) * math.prod(plate.scale for plate in more)

    def _look_ahead(self, number: int, memory: Memory, like: Tensor) -> Tensor:
        last = number == self.course.num_steps - 1
        if last or (found := self.course.look_ahead(number, memory)) is None:
            return torch.zeros_like(like)
        if not self.learn_look_ahead and torch.is_grad_enabled():
            self._check_fixed(number, memory)
        return self._total(found, 0).expand_as(like)

    def _check_fixed(self, number: int, memory: Memory) -> None:
        found = self.course.look_ahead(
            number, {k: v.detach() if isinstance(v, Tensor) else v for k, v in memory.items()}
        )
        if found is not None and found.requires_grad:
            raise ValueError(
                "the look-ahead factor has parameters, but this objective has no gradient for them: expected "
                "NestedForwardKL or NestedReverseKL (pplvi.objectives.nested) as objective, or a factor with detached "
                "parameters."
            )

    def _total(self, tensor: Tensor, events: int) -> Tensor:
        """Sum over event dimensions and all plates outside the batch: ``(num_particles, *batch)`` is left."""
        nesting = self.plates.nesting
        tensor = tensor.sum(list(range(-events, 0))) if events else tensor
        tensor = tensor.reshape((1,) * (nesting + 1 - tensor.dim()) + tuple(tensor.shape))
        summed = [dim for dim in range(-nesting, 0) if dim not in self.dims]
        return tensor.sum(summed) if summed else tensor

    def _resampled(self, state: _State, chosen: Tensor, log_weight: Tensor) -> _State:
        joint, target = (torch.take_along_dim(x, chosen, 0) for x in (state.log_joint, state.log_target))
        memory = {key: self._kept(key, value, chosen) for key, value in state.memory.items()}
        return _State(memory, log_weight, joint, target)

    def _kept(self, key: str, value: Any, chosen: Tensor) -> Any:
        """An entry of the memory for the particles that go on; what has no particles stays as it is."""
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != self.num_particles:
            return value
        if key in self.indices:
            return value
        if value.dim() <= self.plates.nesting:
            raise ValueError(
                f"state[{key!r}] has shape {tuple(value.shape)}: expected particles, {self.plates.nesting} dimensions "
                "of plates, and event dimensions. Keep dimensions when reducing over a plate (keepdim=True)."
            )
        return self.take(value, chosen)

    def take(self, value: Tensor, chosen: Tensor) -> Tensor:
        """Particles of a site's value, ``(num_particles, *plates, *event)``, each batch element by its own indices."""
        sizes = dict(zip(self.dims, chosen.shape[1:], strict=True))
        nesting = self.plates.nesting
        plates = [sizes.get(dim, 1) for dim in range(-nesting, 0)]
        chosen = chosen.reshape(len(chosen), *plates, *[1] * (value.dim() - nesting - 1))
        wanted = [max(a, b) for a, b in zip(value.shape[1:], chosen.shape[1:], strict=True)]
        return torch.take_along_dim(value.expand(len(value), *wanted), chosen.expand(len(chosen), *wanted), 0)


@dataclass(frozen=True)
class _Move:
    """The draws of one time step, and where densities are computed at leaves in their place."""

    particles: Particles
    number: int
    memory: Memory
    drawn: Run
    live: MutableValues
    at: MutableValues
    propose: Program

    def log_forward(self, like: Tensor) -> Tensor:
        """The proposal's log density; with frozen parameters where there are leaves."""
        if not self.live:
            return torch.zeros_like(like)
        if self.at is self.live:
            return self.particles._density(self.drawn).expand_as(like)
        # a site whose distribution depends on no other draw of this step is not run again
        again = rescored(self.drawn, self.at) if len(self.at) == 1 else self.particles._run(self.propose, self.at)
        density = self.particles._density(again).expand_as(like)
        return density.detach() + self.path(density)

    def path(self, density: Tensor) -> Tensor:
        """The gradient path of the draws through a density at leaves."""
        return carried_path(density, self.at, self.live, self._total)

    def _total(self, name: str, product: Tensor) -> Tensor:
        return self.particles._total(product, self.drawn.model.nodes[name]["fn"].event_dim)
