"""How what a model dreams reaches the guide: in the place of the data that the model observed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pplvi.programs import autoguides, dreams
from pplvi.programs.carrying import BROADCAST, Given, Way, lanes_of, run_model_all
from pplvi.programs.first_run import layout_of
from pplvi.programs.handlers import Supply, Uncondition, last_site
from pplvi.programs.memo import remember
from pplvi.programs.running import How, run_guide, trace_within
from pplvi.programs.sharding import sharded
from pplvi.programs.sites import (
    is_deterministic,
    is_factor,
    is_subsample,
    latent_sites,
    sample_sites,
    separately,
    site_plates,
)
from pplvi.programs.state import rng_state, set_rng_state
from pplvi.programs.traces import Run
from pplvi.programs.ways import Vectorize, named, way_for
from pplvi.types import Program


def observed(trace: Any) -> dict[str, Any]:
    """What the observed sites of a model held, which were drawn in this trace and now have it as ``infer["obs"]``.

    :raises ValueError: for factors, without which draws are not the model's.
    """
    if factors := [name for name, site in sample_sites(trace) if is_factor(site) and not is_deterministic(site)]:
        raise ValueError(
            f"the model cannot dream: it has the factors {factors}, so that running it forward does not draw from it. "
            "Expected sample sites only; train without a sleep phase, such as ReweightedWakeSleep(insomnia=1.0)."
        )
    return {name: site["infer"].pop("obs") for name, site in sample_sites(trace) if "obs" in site["infer"]}


def arguments(
    trace: Any,
    observed: Mapping[str, Any],
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the guide with every observed value replaced by its dream, which is among the values.

    Dreams go into the keyword argument ``observations``, a dict from site name to value, if there is one; otherwise
    they replace the arguments that are, by identity, observed values.

    :raises ValueError: for dreams that have no way to the guide.
    """
    if "observations" in kwargs:
        given = kwargs["observations"] or {}
        placed = {name: _placed(trace, name, values[name], given.get(name)) for name in observed}
        return args, {**kwargs, "observations": {**given, **placed}}
    dream_of = {id(value): values[name] for name, value in observed.items()}
    tensors = {id(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
    if lost := sorted(name for name, value in observed.items() if id(value) not in tensors):
        raise ValueError(
            f"the dreams of {lost} cannot reach the guide: expected the data of these sites to be arguments of the "
            "model themselves (not copies, attributes or slices such as x[index] of a minibatch), or to come in its "
            "keyword argument `observations`, a dict from site name to value."
        )
    replaced = {name: dream_of.get(id(value), value) for name, value in kwargs.items()}
    return tuple(dream_of.get(id(value), value) for value in args), replaced


def _placed(trace: Any, name: str, dream: Tensor, given: Any) -> Tensor:
    """A dream in the shape of the given data: that of a minibatch lies at its indices in them."""
    site = trace.nodes[name]
    if not isinstance(given, Tensor) or given.shape == dream.shape:
        return dream
    parts = [p for p in site_plates(site) if p.size != p.full_size]
    event = site["fn"].event_dim
    if len(parts) == 1 and _without(given, dim := parts[0].dim - event) == _without(dream, dim):
        index = trace.nodes[parts[0].name]["value"]
        return torch.index_copy(given.to(dream.dtype), dim, index, dream)
    raise ValueError(
        f"observations[{name!r}] has shape {tuple(given.shape)}, but the model dreams it in shape "
        f"{tuple(dream.shape)}: expected the same shape, or that of the full data of one subsampled plate."
    )


def _without(tensor: Tensor, dim: int) -> list[int]:
    shape = list(tensor.shape)
    del shape[dim]
    return shape


def dream(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], num_dreams: int = 1
) -> tuple[list[Run], Tensor]:
    """Draw latents and data from the model, without gradient, and score the guide on these draws.

    The model dreams in the way in which it runs several particles, the guide is mapped over the dreams (``torch.vmap``)
    and sees each in the size of the data. Programs with which that fails, once, dream one after another.

    :returns: runs with all dreams as their particles, and the guide's log density at each, ``(num_dreams, *batch)``.
    :raises ValueError: if the model cannot be drawn from, if the dreamed data have no way to reach the guide, or if the
        guide cannot be scored at them.
    """
    layout = layout_of(model, guide, args, kwargs)
    if num_dreams > 1 and layout.dreams_together:
        way, layout = way_for(model, guide, args, kwargs, layout, None)
        state = rng_state()
        try:
            run, log_forward = _dream(model, guide, args, kwargs, How(num_dreams, layout.nesting), way)
            return [run], log_forward
        except Exception:  # a mistake in the programs is met again below
            set_rng_state(state)
    made = len(pyro.get_param_store())
    alone = [_dream(model, guide, args, kwargs, How(1, layout.nesting)) for _ in range(num_dreams)]
    if num_dreams > 1 and len(pyro.get_param_store()) == made:  # no parameter can be made under vmap
        remember(model, guide, args, kwargs, replace(layout, dreams_together=False))
    return [run for run, _ in alone], torch.cat([log_forward for _, log_forward in alone])


def _dream(
    model: Program, guide: Program, args: Any, kwargs: Any, how: How, way: Way = BROADCAST
) -> tuple[Run, Tensor]:
    trace = _dreamt(model, args, kwargs, how, way)
    observed, latents = dreams.observed(trace), latent_sites(trace)
    indices: dict[str, Any] = {n: s["value"] for n, s in trace.nodes.items() if is_subsample(s)}
    guide_traces: list[Trace] = []

    def score(values: Mapping[str, Tensor]) -> Tensor:
        drawn = {name: values[name] for name in latents}
        supplied = {**indices, **drawn, **autoguides.auxiliary_values(guide, drawn)}
        arguments = dreams.arguments(trace, observed, values, args, kwargs)
        with Supply(supplied, but_delta=True):
            guide_traces.append(run_guide(guide, *arguments, How()))
        autoguides.check_scored(guide, latent_sites(guide_traces[-1]), latents)
        return Run(guide_traces[-1], trace, 1, how.nesting).log_forward()[0]

    sites: dict[str, Any] = {name: trace.nodes[name] for name in (*latents, *observed)}
    if how.num_particles == 1:
        log_forward = score({name: site["value"] for name, site in sites.items()}).unsqueeze(0)
    else:
        with pyro.validation_enabled(False):  # its checks branch on values
            each = {n: separately(site, how.num_particles, how.nesting) for n, site in sites.items()}
            log_forward = torch.vmap(score, randomness="different")(each)
    return Run(guide_traces[-1], trace, how.num_particles, how.nesting), log_forward


def _dreamt(model: Program, args: Any, kwargs: Any, how: How, way: Way) -> Trace:
    """A trace of draws of the model, with its observed sites drawn too; what was observed is their ``infer["obs"]``."""
    with last_site() as met:
        try:
            with torch.no_grad(), Uncondition():
                run = partial(_forward, model, args, kwargs)
                trace = _of_all(run, how, way, Given())
        except NotImplementedError as error:
            raise ValueError(
                f"the model cannot dream: its site {met[-1:]} cannot be drawn from. Expected distributions with a "
                "sampler; train without a sleep phase, such as ReweightedWakeSleep(insomnia=1.0)."
            ) from error
    for _, site in sample_sites(trace):
        site["is_observed"] |= bool(site["infer"].pop("was_observed", False))
    return trace


def _forward(model: Program, args: Any, kwargs: Any, values: Mapping[str, Tensor], how: How) -> Trace:
    return trace_within(model, args, kwargs, how.particles())


def prior_run(
    model: Program,
    guide: Program,
    args: Any,
    kwargs: Any,
    num_particles: int,
    values: Mapping[str, Tensor],
    vectorize: Vectorize = None,
) -> Run:
    """Run the model in the place of the guide: latents are drawn from it, or the given values; data stay."""
    layout = layout_of(model, guide, args, kwargs)
    how, way = How(num_particles, layout.nesting, values=values), BROADCAST
    if num_particles > 1:
        way, layout = way_for(model, guide, args, kwargs, layout, named(vectorize))

    def run(values: Mapping[str, Tensor], how: How) -> Trace:
        with Supply(values):
            return trace_within(model, args, kwargs, how.particles())

    trace = _of_all(run, how, way, Given(layout.indices, frozenset(values)))
    return sharded(Run(trace, trace, num_particles, layout.nesting))


def _of_all(run: Callable[[Mapping[str, Tensor], How], Trace], how: How, way: Way, given: Given) -> Trace:
    """The trace of a model with all particles, run in this way."""
    if way.model or how.num_particles == 1:
        return run(how.values or {}, how)
    lanes, rest = lanes_of(how, given)
    trace: Trace = run_model_all(lambda values, how: run({**rest, **values}, how), lanes, how, way, given).model
    return trace
