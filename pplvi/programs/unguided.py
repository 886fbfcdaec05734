"""A model by itself, without a guide: at given latents, or drawn, with all particles in the way that is right."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pplvi.programs import checks
from pplvi.programs.carrying import BROADCAST, LOOP, Given, Way, WayName, one_sound, run_model_all, ways_of_rows
from pplvi.programs.errors import lacks_memory
from pplvi.programs.factorising import SeparateFactors
from pplvi.programs.handlers import Supply, Uncondition
from pplvi.programs.memo import Layout, recall, remember
from pplvi.programs.running import How, isolated, no_guide, plain_run, trace_within
from pplvi.programs.sites import is_enumerated, latent_sites
from pplvi.programs.state import preserved_buffers
from pplvi.programs.traces import Run, spread
from pplvi.programs.ways import OutsideState, Vectorize, held_by, named
from pplvi.types import Program


def run_model(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    num_particles: int = 1,
    latents: Mapping[str, Tensor] | None = None,
    sample_observed: bool = False,
    vectorize: Vectorize = None,
) -> Run:
    """Run a model without a guide: latents are the given ones, ``(num_particles, *plates, *event)``, or drawn.

    :param sample_observed: draw the observed sites too, instead of keeping their data.
    :param vectorize: the way of running particles; the fastest that is right unless named.
    :raises ValueError: if a given latent does not have the shape that the model has for these arguments.
    """
    plain = plain_run(model, args, kwargs)
    single = _Model(model, args, kwargs, sample_observed)
    enumerated = checks.enumerates(plain) and not sample_observed
    how = How(num_particles, plain.nesting, enumerated, values=spread(latents or {}, plain))
    if num_particles == 1:
        return single.run(how, BROADCAST)
    return _first_right(single, how, plain, named(vectorize))


@dataclass(frozen=True)
class _Model:
    """A model and its call."""

    model: Program
    args: Any
    kwargs: Mapping[str, Any]
    sample_observed: bool

    def trace(self, values: Mapping[str, Tensor], how: How) -> Trace:
        observing = Uncondition() if self.sample_observed else nullcontext()
        with observing, Supply(values):
            return trace_within(self.model, self.args, self.kwargs, how.enumerating(first=True), how.particles())

    def run(self, how: How, way: Way) -> Run:
        if how.num_particles == 1:
            return one_sound(lambda: self._together(how), drawing=self.sample_observed)
        if way.model:
            return self._together(how)
        return run_model_all(self.trace, dict(how.values or {}), how, way, Given(densities=not self.sample_observed))

    def _together(self, how: How) -> Run:
        return Run(Trace(), self.trace(how.values or {}, how), how.num_particles, how.nesting, how.enumerated)

    def failure(self, how: How, way: Way, *, wanted: bool) -> Exception | None:
        """What goes wrong when two particles are run in this way, with the data as they are."""
        kept = replace(self, sample_observed=False)
        try:
            with isolated(), preserved_buffers(model=self.model), warnings.catch_warnings():
                kept.compare(how, way, wanted=wanted)
        except Exception as error:  # an error of the model's own was met in the plain run before
            return error
        return None

    def compare(self, how: How, way: Way, *, wanted: bool) -> None:
        values = {name: value[:2] for name, value in (how.values or {}).items()}
        how = replace(how, num_particles=2, values=values)
        with OutsideState() as outside, SeparateFactors(2, active=way.model and not wanted):
            both = self.run(how, way)
        both = self.run(replace(how, values={**values, **_drawn(both)}), way)
        outside.check(way)
        if held := list(held_by(self.model)):
            raise checks.DiffersError(
                f"the model keeps draws in {held}, which would be those of all particles at once."
            )
        for particle in range(2):
            own = {name: value[particle] for name, value in _drawn(both).items()}
            alone, again = (self.run(replace(how, num_particles=1, values=own), BROADCAST) for _ in range(2))
            checks.check_alone(both, alone, again, particle)


def _drawn(run: Run) -> dict[str, Tensor]:
    return {name: site["value"].clone() for name, site in latent_sites(run.model).items() if not is_enumerated(site)}


def _first_right(single: _Model, how: How, plain: Run, word: WayName | None) -> Run:
    known = recall(single.model, no_guide, single.args, single.kwargs)
    layout = known or Layout(how.nesting, how.enumerated, frozenset())
    key = f"{word}, {single.sample_observed}"
    if key in layout.ways:
        return single.run(how, layout.ways[key])
    errors: list[Exception] = []
    for way in ways_of_rows(word):
        if way != LOOP and (error := single.failure(how, way, wanted=word is not None)) is not None:
            errors.append(error)
            continue
        run = _tried(single, how, way, errors)
        if run is not None:
            remember(
                single.model, no_guide, single.args, single.kwargs, replace(layout, ways={**layout.ways, key: way})
            )
            return run
    raise errors[0]


def _tried(single: _Model, how: How, way: Way, errors: list[Exception]) -> Run | None:
    try:
        return single.run(how, way)
    except Exception as error:
        if way == LOOP or lacks_memory(error):
            raise
        errors.append(error)
        return None
