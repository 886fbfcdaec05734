"""Sequential Monte Carlo over time: particles are extended, weighted and resampled, one step at each time step.

The target of step ``t`` is the model up to it times a look-ahead factor of the draws so far,
``log gamma[t] = log p(x[0..t], z[0..t]) + log psi[t](z[0..t])``, with nothing to look ahead to after the last step.
Draws of earlier steps stay as they are, so that there is no reverse kernel. FIVO, VSMC and NASMC differ in objective
and resampling only. Nothing branches on a tensor's value.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from pplvi.objectives.step import Routing, Step
from pplvi.programs.carrying import BROADCAST, LOOP, Way, ways_of_rows
from pplvi.programs.checks import check_close
from pplvi.programs.lone import Own, depths_of, each_own, run_each
from pplvi.programs.memo import Memo, argument_shapes
from pplvi.programs.running import isolated
from pplvi.programs.sites import latent_sites, sample_sites
from pplvi.programs.state import is_recording
from pplvi.programs.traces import Run
from pplvi.programs.ways import Vectorize, named
from pplvi.samplers.annealed import check_levels
from pplvi.samplers.base import Request
from pplvi.samplers.particles import DrawPaths, Particles, draws_of
from pplvi.samplers.state_space import Course, Memory, Plates, course_of, plates_of, warn_of_untrained
from pplvi.types import MutableValues, Program, Values
from pplvi.weights.resampling import Resampling


@runtime_checkable
class Filtered(Protocol):
    """A guide that is made of a particle filter: it is filtered with, not sampled from."""

    @property
    def filtered(self) -> tuple[Any, Any]:
        """The model and the proposal of the filter, in time steps."""
        ...


class Filtering:
    """Run a particle filter, one :class:`pplvi.objectives.Step` a time step.

    Model and guide (the proposal) are objects with ``init`` and ``step`` or programs with a ``pyro.markov`` loop, see
    :mod:`pplvi.samplers.state_space`; the plates around all their sites, such as one over sequences, have weights of
    their own and are resampled on their own. A proposal may have a method
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

        :raises ValueError: for an objective that is not one of levels, programs that do not fit together, or draws that
            an objective cannot follow.
        """
        check_levels(request)
        if isinstance(guide, Filtered):
            model, guide = guide.filtered
        course = course_of(model, guide, args, kwargs)
        plates = plates_found(model, guide, course)
        particles = Particles(request.num_particles, plates.nesting, plates.batch, request.routing)
        way = way_of(model, guide, course, plates, request.num_particles, request.vectorize)
        yield from Filter(course, particles, way, learn_look_ahead=self.learn_look_ahead).steps(self.resampling)


_PLATES = Memo[Plates]()


def plates_found(model: Any, guide: Any, course: Course) -> Plates:
    """The plates of a pair, found once for arguments of these shapes."""
    programs, key = (guide, model), argument_shapes(course.args, course.kwargs)
    if (known := _PLATES.recall(programs, key)) is not None:
        return known
    found = plates_of(course)
    warn_of_untrained(course, model, guide)
    return _PLATES.keep(programs, key, found)


_WAYS = Memo[Way]()


def way_of(
    model: Any, guide: Any, course: Course, plates: Plates, num_particles: int, vectorize: Vectorize = None
) -> Way:
    """The way in which the particles of a filter are run, found once by its first two steps.

    Particles that are carried or looped have states in the shapes of one, whose plates cannot be told apart unless they
    are around everything.

    :raises ValueError: if the way that is named cannot run these programs.
    """
    word = named(vectorize)
    key = argument_shapes(course.args, course.kwargs), word, plates
    if num_particles == 1:
        return BROADCAST
    if (known := _WAYS.recall((guide, model), key)) is not None:
        return known
    if is_recording():  # nothing can be tried now
        return BROADCAST
    errors: list[Exception] = []
    trial = _Trial(course, plates)
    for way in ways_of_rows(word):
        if not (way.model or plates.apart):
            continue
        if way == LOOP or (error := trial.failure(way)) is None:
            return _WAYS.keep((guide, model), key, way)
        errors.append(error)
    if errors:
        raise errors[0]
    raise ValueError(
        f"vectorize_particles={vectorize!r}: a filter whose plates are not all around every site needs one call for "
        "all particles: expected programs that broadcast. Drop the option."
    )


@dataclass(frozen=True)
class _Trial:
    """The first two steps of a course, to be run in different ways and compared."""

    course: Course
    plates: Plates

    def failure(self, way: Way) -> Exception | None:
        """What goes wrong when two particles are run in this way."""
        try:
            with isolated(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._compare(way)
        except Exception as error:  # an error of the programs' own is met again when they are run
            return error
        return None

    def _compare(self, way: Way) -> None:
        _, drawn = self._steps(2, way, {})
        both, _ = self._steps(2, way, drawn)
        for particle in range(2):
            own = {step: {name: value[particle] for name, value in sites.items()} for step, sites in drawn.items()}
            (alone, _), (again, _) = (self._steps(1, BROADCAST, own) for _ in range(2))
            for ours, theirs, repeated in zip(both, alone, again, strict=True):
                if torch.equal(theirs, repeated):
                    check_close(ours[particle], theirs[0])

    def _steps(
        self, count: int, way: Way, given: Mapping[int, Values]
    ) -> tuple[list[Tensor], dict[int, MutableValues]]:
        particles = Particles(count, self.plates.nesting, self.plates.batch, Routing(detach=True, local=True))
        passed = Filter(self.course, particles, way, visits=[], given=given)
        steps = list(islice(passed.steps(Resampling(False)), 2))
        drawn = {v.step: {name: site["value"] for name, site in v.sites.items()} for v in passed.visits or []}
        return [density for step in steps for density in (step.log_target, step.log_forward)], drawn


@dataclass
class FilterState:
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
class Filter:
    """One pass of all particles over a course.

    :ivar way: how its particles are run.
    :ivar visits: a list to be filled as steps are made, or ``None``.
    :ivar last: the particles after the last step.
    :ivar given: draws of the proposal in each step, if they are made already.
    """

    course: Course
    particles: Particles
    way: Way = BROADCAST
    learn_look_ahead: bool = True
    visits: list[Visit] | None = None
    last: FilterState | None = None
    given: Mapping[int, Values] = field(default_factory=dict)

    def steps(self, resampling: Resampling) -> Iterator[Step]:
        """The steps of all times at which something is drawn or observed."""
        zero = torch.zeros(())
        state = FilterState({}, zero, zero, zero)
        for number in range(self.course.num_steps):
            drawn, state, step = self._advance(number, state)
            if step is None:
                continue
            last = number == self.course.num_steps - 1
            found = None if last else resampling.indices(state.log_weight)
            if self.visits is not None:
                self.visits.append(Visit(number, latent_sites(drawn.model), None if found is None else found[0]))
            yield step
            state = state if found is None else self._resampled(state, *found)
        self.last = state

    def _advance(self, number: int, state: FilterState) -> tuple[Run, FilterState, Step | None]:
        """Draw, then score the model at the draws; no step if the model has no site at this time."""
        propose, given = partial(self.course.propose, number), self.given.get(number, {})
        drawn, _ = self._run(propose, state.memory, given, detach=self.particles.routing.detach)
        self.particles.indices = {**drawn.subsample_indices(of_model=True), **self.particles.indices}
        paths = DrawPaths.of(self.particles, drawn, self._draws(drawn))
        scored, memory = self._run(partial(self.course.score, number), state.memory, paths.at)
        self._check_cover(number, paths.live, latent_sites(scored.model))
        indices = scored.subsample_indices(of_model=True)
        memory = self.course.remember(memory, {**self._remembered(drawn, paths.at), **indices})
        if not any(sample_sites(scored.model)):
            return drawn, replace(state, memory=memory), None
        self.particles.note(scored)
        move = _Move(number, state.memory, memory, propose, paths)
        return drawn, *self._weighted(move, state, self.particles.density(scored))

    def _weighted(self, move: _Move, state: FilterState, factor: Tensor) -> tuple[FilterState, Step]:
        """The step of a move under a model whose log density of the step is ``factor``, ``(num_particles, *batch)``."""
        ahead = self._look_ahead(move.number, move.memory, factor)
        joint = state.log_joint + factor
        step = Step.from_move(
            log_weight_in=state.log_weight.expand_as(factor),
            log_target=joint + ahead + move.paths(factor + ahead),
            log_target_fixed=joint + ahead,
            log_initial=state.log_target.expand_as(factor),
            log_forward=self._log_forward(move, factor),
            **self.particles.accounts,
        )
        after = step.log_weight if self.particles.routing.local else step.log_weight_out
        return FilterState(move.memory, after, joint, joint + ahead), step

    def _log_forward(self, move: _Move, like: Tensor) -> Tensor:
        """The proposal's log density; with frozen parameters where there are leaves."""
        if not move.paths.live:
            return torch.zeros_like(like)
        return move.paths.log_forward(lambda: self._run(move.propose, move.before, move.paths.at)[0]).expand_as(like)

    @property
    def _together(self) -> bool:
        """Whether one call runs all particles, so that the memory has them in all its tensors."""
        return self.way.model or self.particles.num_particles == 1

    def _run(
        self, build: Callable[[Memory], Program], memory: Memory, values: Values, *, detach: bool = False
    ) -> tuple[Run, Memory]:
        """Run a part of the course: the run, and the memory as it has left it."""
        alone = self.particles.alone(values, detach=detach)
        if not self._together:
            return run_each(build, memory, alone, self.way)
        memory = dict(memory)
        return alone.run(build(memory)), memory

    def _remembered(self, drawn: Run, at: Values) -> Mapping[str, Any]:
        """Draws as later steps read them, in the shapes that they have where they are read."""
        if self._together:
            return at
        depths = depths_of(drawn)
        return {n: Own(v.reshape(len(v), *v.shape[v.dim() - depths[n] :])) for n, v in at.items()}

    def _draws(self, run: Run) -> MutableValues:
        sites = latent_sites(run.model)
        blind = sorted(name for name, site in sites.items() if not getattr(site["fn"], "has_rsample", False))
        if blind and self.particles.followed:
            raise ValueError(
                f"sites {blind} cannot be reparameterised, but this objective follows draws: expected sites with "
                "has_rsample. Use objective='forward_kl', which needs no path, or enumerate them in the model."
            )
        return draws_of(run)

    def _check_cover(self, number: int, drawn: MutableValues, wanted: Mapping[str, Any]) -> None:
        if drawn.keys() != wanted.keys():
            raise ValueError(
                f"at time step {number} the proposal draws {sorted(drawn)}, but the model's latent sites are "
                f"{sorted(wanted)}: expected the same. Sample each latent of the step once, under the same name."
            )

    def _look_ahead(self, number: int, memory: Memory, like: Tensor) -> Tensor:
        last = number == self.course.num_steps - 1
        if last or (found := self._factor(number, memory)) is None:
            return torch.zeros_like(like)
        if not self.learn_look_ahead and torch.is_grad_enabled():
            self._check_fixed(number, memory)
        return self.particles.total(found, 0).expand_as(like)

    def _factor(self, number: int, memory: Memory) -> Tensor | None:
        """The course's look-ahead factor, ``(num_particles, *plates)``."""
        if self._together:
            return self.course.look_ahead(number, memory)

        def build(box: Memory) -> Program:
            def part() -> None:
                box["found"] = self.course.look_ahead(number, box["memory"])

            return part

        box = run_each(build, {"memory": memory, "found": None}, self.particles.alone({}), self.way)[1]
        if not isinstance(own := box["found"], Own):
            return own
        outer = [1] * (self.particles.nesting + 1 - own.value.dim())
        return own.value.reshape(len(own.value), *outer, *own.value.shape[1:])

    def _check_fixed(self, number: int, memory: Memory) -> None:
        detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in memory.items()}
        found = self._factor(number, each_own(detached, torch.detach))
        if found is not None and found.requires_grad:
            raise ValueError(
                "the look-ahead factor has parameters, but this objective has no gradient for them: expected "
                "NestedForwardKL or NestedReverseKL (pplvi.objectives.nested) as objective, or a factor with detached "
                "parameters."
            )

    def _resampled(self, state: FilterState, chosen: Tensor, log_weight: Tensor) -> FilterState:
        joint, target = (torch.take_along_dim(x, chosen, 0) for x in (state.log_joint, state.log_target))
        if self._together:
            memory = {key: self._kept(key, value, chosen) for key, value in state.memory.items()}
        else:
            memory = each_own(state.memory, lambda value: self._taken("of a particle", value, chosen))
        return FilterState(memory, log_weight, joint, target)

    def _kept(self, key: str, value: Any, chosen: Tensor) -> Any:
        """An entry of the memory for the particles that go on; what has no particles stays as it is."""
        particles = self.particles
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != particles.num_particles:
            return value
        return value if key in particles.indices else self._taken(key, value, chosen)

    def _taken(self, key: str, value: Tensor, chosen: Tensor) -> Tensor:
        particles = self.particles
        if not (particles.dims or self._together):
            return value[chosen]  # whatever plates there are, no weight is theirs
        if value.dim() <= particles.nesting:
            raise ValueError(
                f"state[{key!r}] has shape {tuple(value.shape)}: expected particles, {particles.nesting} dimensions "
                "of plates, and event dimensions. Keep dimensions when reducing over a plate (keepdim=True)."
            )
        return particles.take(value, chosen)


@dataclass(frozen=True)
class _Move:
    """The draws of one time step."""

    number: int
    before: Memory
    memory: Memory
    propose: Callable[[Memory], Program]
    paths: DrawPaths
