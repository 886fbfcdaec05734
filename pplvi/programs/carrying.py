"""Particles one by one: under ``torch.func.vmap``, which carries all of them through one run, or in a loop.

``vmap`` stands around one run of one particle, and nothing but tensors leaves it (:mod:`pplvi.programs.stacked`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.distributions import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pplvi.programs import stacked
from pplvi.programs.factorising import run_sound
from pplvi.programs.handlers import without_padding
from pplvi.programs.masks import balance_missing
from pplvi.programs.minibatches import OneMinibatch
from pplvi.programs.randomness import OutOfPlace, carried
from pplvi.programs.running import How, run_guide, run_pair, trace_within
from pplvi.programs.sites import is_enumerated, is_subsample
from pplvi.programs.state import is_recording
from pplvi.programs.traces import Run
from pplvi.types import Program

Lanes = dict[str, Tensor]
One = Callable[[Lanes, How], Run]


class CannotCarry(RuntimeError):
    """``vmap`` runs a program, but not as its particles would run alone."""


class _NewParameter(Exception):
    """A parameter is made inside ``vmap``: programs have to be run alone before."""


WayName = Literal["broadcast", "vmap", "loop"]
"""What a user may call a way."""


@dataclass(frozen=True)
class Way:
    """How a pair of programs runs several particles.

    :ivar word: what a user calls it.
    :ivar guide: whether the guide is run once under a plate of the particles.
    :ivar model: the same of the model; programs that are not are run once for each particle, carried or looped.
    :ivar written: whether draws are written into tensors that the program makes, which are then one of each particle.
    """

    word: WayName
    guide: bool = False
    model: bool = False
    written: bool = False


BROADCAST = Way("broadcast", guide=True, model=True)
LOOP = Way("loop")
CARRIED = (
    Way("vmap", guide=True),
    Way("vmap"),
    Way("vmap", guide=True, written=True),
    Way("vmap", written=True),
)
LOOPED_MODEL = Way("loop", guide=True)


@dataclass(frozen=True)
class Given:
    """What a run of all particles is given beside the programs.

    :ivar indices: names of the values that are indices of minibatches: they are no particle's own.
    :ivar exact: whether entropies and divergences of the guide's sites are wanted.
    :ivar spoil: whether random numbers written in place may leave NaN behind, to be seen by a check.
    :ivar densities: whether log densities are wanted.
    :ivar supplied: names of sites that have one given value for all particles.
    """

    indices: frozenset[str] = frozenset()
    supplied: frozenset[str] = frozenset()
    exact: bool = False
    spoil: bool = False
    densities: bool = True


def run_particles(model: Program, guide: Program, args: Any, kwargs: Any, how: How, way: Way, given: Given) -> Run:
    """Run guide and model with all particles in this way.

    :raises CannotCarry: if particles carried by ``vmap`` would not be independent.
    """
    if how.num_particles == 1:
        return one_sound(lambda: run_pair(model, guide, args, kwargs, how), exact=given.exact)
    if way.model:
        return run_pair(model, guide, args, kwargs, how)
    if not way.guide:
        return _both(model, guide, args, kwargs, how, way, given)
    guide_trace = run_guide(guide, args, kwargs, how)
    return model_at(model, args, kwargs, how, way, given, guide_trace)


def one_sound(run: Callable[[], Run], *, exact: bool = False, drawing: bool = False) -> Run:
    """The run of one particle, whose model has a density of zero if a matrix cannot be factorised in it.

    :param exact: entropies and divergences of the guide's sites are wanted.
    :param drawing: draws are wanted, which are NaN then, and no densities.
    """
    found, failed = run_sound(run, guarded=is_recording(), drawing=drawing)
    if failed is None or drawing:
        return found
    one, records = stacked.take_apart(found, exact=exact)
    outputs = stacked.stack_outputs([one])
    _fail(outputs["model"], records["model"], failed[None])
    guide, model = (stacked.rebuild(records[role], outputs[role], 1, found.nesting) for role in ("guide", "model"))
    return replace(found, guide=guide, model=model)


def _both(model: Program, guide: Program, args: Any, kwargs: Any, how: How, way: Way, given: Given) -> Run:
    lanes, rest = lanes_of(how, given)

    def one(values: Lanes, single: How) -> Run:
        return run_pair(model, guide, args, kwargs, replace(single, values={**rest, **values}))

    return gathered(one, lanes, how, way, replace(given, supplied=frozenset(rest)))


def guide_all(guide: Program, args: Any, kwargs: Any, how: How, way: Way, given: Given) -> Run:
    """Run the guide alone with all particles in this way; the model's trace is empty."""
    if way.guide or how.num_particles == 1:
        trace = run_guide(guide, args, kwargs, how)
        return Run(trace, Trace(), how.num_particles, how.nesting, how.enumerated)
    lanes, rest = lanes_of(how, given)

    def one(values: Lanes, single: How) -> Run:
        trace = run_guide(guide, args, kwargs, replace(single, values={**rest, **values}))
        return Run(trace, Trace(), 1, how.nesting, how.enumerated)

    return gathered(one, lanes, how, way, replace(given, supplied=frozenset(rest)))


def model_at(model: Program, args: Any, kwargs: Any, how: How, way: Way, given: Given, guide_trace: Any) -> Run:
    """Run the model for each particle at the draws that one run of the guide has made for all."""
    found = {name: _particle_of(name, site, how) for name, site in guide_trace.nodes.items() if _is_value(site)}
    lanes = {name: value for name, (value, of_each) in found.items() if of_each}
    rest = {name: value for name, (value, of_each) in found.items() if not of_each}

    def one(values: Lanes, single: How) -> Run:
        trace = guide_trace.copy()
        for name, value in {**rest, **values}.items():
            trace.nodes[name] = {**trace.nodes[name], "value": value}
        around = _Replay(trace), single.enumerating(first=False)
        return Run(Trace(), trace_within(model, args, kwargs, *around), 1, how.nesting, how.enumerated)

    run = gathered(one, lanes, how, way, replace(given, supplied=frozenset(found)))
    balance_missing(run.model, guide_trace)
    return replace(run, guide=guide_trace)


def _is_value(site: Any) -> bool:
    return site["type"] == "sample" and not is_subsample(site) and isinstance(site["value"], Tensor)


def _particle_of(name: str, site: Any, how: How) -> tuple[Tensor, bool]:
    """A guide's value with the particles at the front, and whether it has any; enumerated dimensions stay in place."""
    value, events = site["value"], site["fn"].event_dim
    place = value.dim() - events - how.nesting - 1
    if place < 0 or value.shape[place] == 1:
        return value, False
    lanes = value.movedim(place, 0)
    return (lanes.unsqueeze(1 + place) if place else lanes), True


class _Replay(poutine.replay_messenger.ReplayMessenger):
    """Replay a guide's values in the shapes that the model has for one particle."""

    def _pyro_sample(self, msg: Any) -> None:
        before = msg["done"]
        super()._pyro_sample(msg)
        if msg["done"] and not before and not is_enumerated(msg):
            msg["value"] = without_padding(msg["value"], msg["fn"])


def lanes_of(how: How, given: Given) -> tuple[Lanes, Lanes]:
    """Values of each particle, and those that all share."""
    values = dict(how.values or {})
    shared = {n: v for n, v in values.items() if n in given.indices or not _has_particles(v, how.num_particles)}
    return {n: v for n, v in values.items() if n not in shared}, shared


def _has_particles(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == count


def run_model_all(program: Callable[[Lanes, How], Trace], lanes: Lanes, how: How, way: Way, given: Given) -> Run:
    """Run one program for each particle, with values of its own; it is the model of a run without a guide."""

    def one(values: Lanes, single: How) -> Run:
        return Run(Trace(), program(values, single), 1, how.nesting, how.enumerated)

    return gathered(one, lanes, how, way, given)


def gathered(one: One, lanes: Lanes, how: How, way: Way, given: Given) -> Run:
    """Run every particle and put what they leave into one run."""
    single = replace(how, num_particles=1, values=None)
    gather = _looped if way.word == "loop" else _carried
    with OneMinibatch():
        try:
            outputs, records, run = gather(one, lanes, how.num_particles, single, way, given)
        except _NewParameter:
            one({name: value[0] for name, value in lanes.items()}, single)
            outputs, records, run = gather(one, lanes, how.num_particles, single, way, given)
    guide, model = (
        stacked.rebuild(records[role], outputs[role], how.num_particles, how.nesting) for role in ("guide", "model")
    )
    kept = outputs["kept"][""]
    return Run(guide, model, how.num_particles, how.nesting, how.enumerated, run.given_subsamples, kept)


def _carried(
    one: One, lanes: Lanes, count: int, single: How, way: Way, given: Given
) -> tuple[stacked.Outputs, stacked.Records, Run]:
    left: list[Any] = []
    mode = OutOfPlace(spoil=given.spoil, drawing=not given.densities)
    validated = is_validation_enabled() and given.densities and not is_recording()

    def particle(token: Tensor, values: Lanes) -> Any:
        mode.token = token if way.written else None
        with _Parameters():
            run = one(values, single)
        if shared := [name for name in stacked.shared_draws(run) if name not in given.supplied]:
            raise CannotCarry(f"sites {shared} would have one draw for all particles.")
        if validated:
            stacked.check_observed(run)
        outputs, records = stacked.take_apart(run, densities=given.densities, exact=given.exact)
        left[:] = records, run
        failed, mode.token, mode.failed = mode.failed, None, None
        return outputs, {} if failed is None else {"failed": failed}

    device = next((value.device for value in lanes.values()), None)
    with carried(mode):
        outputs, failed = torch.func.vmap(particle, randomness="different")(torch.zeros(count, device=device), lanes)
    if failed:
        _fail(outputs["model"], left[0]["model"], failed["failed"])
    return outputs, *left


def _fail(outputs: dict[str, dict[str, Tensor]], records: Mapping[str, Any], failed: Tensor) -> None:
    """Give particles in which a factorisation failed a density of zero, at every site that is not enumerated."""
    for name, numbers in outputs.items():
        if "log_prob" in numbers and not is_enumerated(records[name].site):
            density = numbers["log_prob"]
            bad = failed.reshape(-1, *(1,) * (density.dim() - 1))
            numbers["log_prob"] = density.masked_fill(bad, -torch.inf)


def _looped(
    one: One, lanes: Lanes, count: int, single: How, way: Way, given: Given
) -> tuple[stacked.Outputs, stacked.Records, Run]:
    parts, failures = [], []
    for particle in range(count):
        own = {name: value[particle] for name, value in lanes.items()}
        run, failed = run_sound(partial(one, own, single), guarded=is_recording(), drawing=not given.densities)
        outputs, records = stacked.take_apart(run, densities=given.densities, exact=given.exact)
        parts.append(outputs)
        failures.append(failed)
    together = stacked.stack_outputs(parts)
    if any(failed is not None for failed in failures):
        which = [torch.tensor(False) if failed is None else failed for failed in failures]
        _fail(together["model"], records["model"], torch.stack(which))
    return together, records, run


class _Parameters(Messenger):
    """Let no parameter be made: it would be one of each particle."""

    def _pyro_param(self, msg: Any) -> None:
        made = msg["value"] is None and msg["name"] not in pyro.get_param_store()
        if made and not pyro.settings.get("module_local_params"):
            raise _NewParameter(msg["name"])


def ways_of_rows(word: str | None) -> list[Way]:
    """The ways of running a model at rows of given values that a word allows, the fastest first."""
    ways = (BROADCAST, *(way for way in CARRIED if not way.guide), LOOP)
    return [way for way in ways if word in (None, way.word)]


def for_each(function: Callable[[Tensor], Tensor], rows: Tensor, *, written: bool) -> Tensor:
    """A function of one row that runs a program, at every row, by ``vmap``; minus infinity where a factorisation fails.

    :param written: the program writes draws into tensors that it makes.
    """
    mode = OutOfPlace()

    def one(row: Tensor) -> tuple[Tensor, Tensor]:
        mode.token = row[0] if written else None
        with OneMinibatch(), _Parameters():
            value = function(row)
        failed, mode.token, mode.failed = mode.failed, None, None
        return value, torch.zeros_like(value, dtype=torch.bool) if failed is None else failed

    with carried(mode):
        values, failed = torch.func.vmap(one, randomness="different")(rows)
    return values.masked_fill(failed, -torch.inf)
