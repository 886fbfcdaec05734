"""Running probabilistic programs: with :mod:`pplvi.handlers`, where the inference core touches ``pyro.poutine``.

A model and a guide are run together, with all particles at once, and leave a :class:`pplvi.runs.Run`: two traces whose
log densities can be read per particle and per independent element of the data. Draws are detached at the sample site,
before a later site can use them. No state of a program is kept but a hint of how deep its plates nest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pplvi import autoguides, checks, dreams
from pplvi.environment import preserved_buffers, preserved_parameters, preserved_rng, rng_state, set_rng_state
from pplvi.handlers import Detach, Somewhere, SubsampleRecorder, Supply, Uncondition, last_site
from pplvi.layouts import Layout, recall, remember
from pplvi.masks import balance_missing
from pplvi.runs import (
    PARTICLES,
    Run,
    is_subsample,
    latent_sites,
    sample_sites,
    spread,
)
from pplvi.types import Program


def execute(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    num_particles: int = 1,
    detach: bool = False,
    values: Mapping[str, Tensor] | None = None,
) -> Run:
    """Run the guide, then the model on the guide's draws, all particles in one call.

    :param detach: detach every draw at its site.
    :param values: values for guide sites to use instead of drawing (subsample indices too).
    :raises ValueError: if model and guide do not fit together (checked on the first run of the pair).

    >>> import pyro, pyro.distributions as dist
    >>> def program():
    ...     with pyro.plate("data", 3):
    ...         pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> run = execute(program, program, (), {}, num_particles=2)
    >>> run.shape, bool((run.log_target() == run.log_forward()).all())
    ((2, 3), True)
    """
    layout = _layout(model, guide, args, kwargs)

    def attempt(layout: Layout) -> Run:
        supplied = _supplied(model, args, kwargs, layout, values)
        how = _How(num_particles, layout.nesting, layout.enumerated, detach, supplied)
        return _execute(model, guide, args, kwargs, how)

    try:
        run = attempt(layout)
    except Exception as error:
        run = attempt(layout := _renewed(model, guide, args, kwargs, layout, num_particles, error))
    while (needed := _needed(run, layout)) != layout:
        remember(model, guide, args, kwargs, layout := needed)
        run = attempt(layout)
    checks.check_run(run)
    uncompared = num_particles > 1 and not layout.compared and not _recording()
    # Programs that cannot be remembered would be compared at every step.
    if uncompared and recall(model, guide, args, kwargs) is not None:
        _compare_particles(model, guide, args, kwargs, layout)
        remember(model, guide, args, kwargs, replace(layout, compared=True))
    return run


def _compare_particles(model: Program, guide: Program, args: Any, kwargs: Any, layout: Layout) -> None:
    """Check once that particles do not meet inside the programs, which shapes alone cannot show.

    :raises ValueError: if two particles in one call have other densities than each by itself.
    """
    with isolated(), preserved_buffers(model=model, guide=guide):
        how = _How(2, layout.nesting, layout.enumerated, values=_supplied(model, args, kwargs, layout, None))
        both = _execute(model, guide, args, kwargs, how)
        if both.guide_enumerated:  # its later draws have a dimension for each enumerated value: none is one particle's
            return
        for particle in range(2):
            values = {**both.subsample_indices(), **both.draws_of(particle)}
            by_itself = replace(how, num_particles=1, values=values)
            with Supply(both.subsample_indices(of_model=True)):
                alone, again = (_execute(model, guide, args, kwargs, by_itself) for _ in range(2))
            if checks.differing_site(alone, again, 0) is None:  # else programs draw random numbers of their own
                checks.check_alone(both, alone, particle)


def _needed(run: Run, layout: Layout) -> Layout:
    """The layout with room for what a run has shown, such as plates that nest deeper than at the first run."""
    own = layout.own_subsamples | (run.given_subsamples & frozenset(run.subsample_indices()))
    nesting, enumerated = max(layout.nesting, run.deepest), layout.enumerated or checks.enumerates(run)
    return replace(layout, nesting=nesting, enumerated=enumerated, own_subsamples=own)


def _renewed(
    model: Program, guide: Program, args: Any, kwargs: Any, layout: Layout, num_particles: int, error: Exception
) -> Layout:
    """After an error in a run: the layout for these arguments, if they are what has changed.

    :raises ValueError: what is wrong with them, or with running all particles in one call.
    """
    if _recording():
        raise error
    fresh = inspect(model, guide, args, kwargs)
    fresh = replace(fresh, compared=layout.compared, dreams_together=layout.dreams_together)
    if fresh != layout:
        remember(model, guide, args, kwargs, fresh)
        return fresh
    shapes = isinstance(error, RuntimeError | IndexError) or "Shape mismatch" in str(error)
    if num_particles > 1 and shapes:
        raise ValueError(
            f"the programs run alone, but not with {num_particles} particles in one call: {error}\nExpected tensors "
            "that broadcast over one more dimension on the left (index dimensions from the right). Rewrite the program "
            "that way, or run particles one after another: vectorize_particles=False (objectives), vectorize=False."
        ) from error
    raise error


def guide_run(
    model: Program, guide: Program, args: Any, kwargs: Any, num_particles: int, values: Mapping[str, Tensor] | None
) -> Run:
    """Run the guide alone; the model's trace is empty."""
    layout = _layout(model, guide, args, kwargs)
    how = _How(num_particles, layout.nesting, layout.enumerated, values=_supplied(model, args, kwargs, layout, values))
    return Run(_run_guide(guide, args, kwargs, how), poutine.Trace(), num_particles, layout.nesting, layout.enumerated)


@dataclass(frozen=True)
class _How:
    """How to run a pair of programs."""

    num_particles: int = 1
    nesting: int = 0
    enumerated: bool = False
    detach: bool = False
    values: Mapping[str, Tensor] | None = None

    def particles(self) -> AbstractContextManager[Any]:
        # One particle runs the programs as they are: models that cannot be vectorised work too.
        if self.num_particles == 1:
            return nullcontext()
        return pyro.plate(PARTICLES, self.num_particles, dim=-self.nesting - 1)

    def enumerating(self, *, first: bool) -> AbstractContextManager[Any]:
        if not self.enumerated:
            return nullcontext()
        return poutine.enum(first_available_dim=-self.nesting - 2 if first else None)

    def drawing(self) -> AbstractContextManager[Any]:
        return Detach() if self.detach else nullcontext()


def _execute(model: Program, guide: Program, args: Any, kwargs: Any, how: _How) -> Run:
    guide_trace = _run_guide(guide, args, kwargs, how)
    if isinstance(messenger := poutine.unwrap(guide), GuideMessenger):  # it ran the model already
        return Run(guide_trace, messenger.get_traces()[0], how.num_particles, how.nesting, how.enumerated)
    # Replay goes outside enumeration, which has to see every site before it is replaced.
    around = poutine.replay(trace=guide_trace), how.enumerating(first=False), how.particles()
    recorder = SubsampleRecorder()
    model_trace = _trace(recorder(model), args, kwargs, *around)
    balance_missing(model_trace, guide_trace)
    given = frozenset(recorder.given)
    return Run(guide_trace, model_trace, how.num_particles, how.nesting, how.enumerated, given)


def _run_guide(guide: Program, args: Any, kwargs: Any, how: _How) -> Trace:
    with how.drawing(), Supply(how.values or {}):
        trace = _trace(guide, args, kwargs, how.enumerating(first=True), how.particles())
    if not isinstance(messenger := poutine.unwrap(guide), GuideMessenger):
        return trace
    guide_trace = messenger.get_traces()[1]
    guide_trace.nodes.update({name: site for name, site in trace.nodes.items() if is_subsample(site)})
    return guide_trace


def _trace(program: Program, args: Any, kwargs: Any, *contexts: AbstractContextManager[Any]) -> Trace:
    """Trace a program inside contexts, the first outermost."""

    def run() -> None:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            program(*args, **kwargs)

    return poutine.trace(run).get_trace()


@contextmanager
def isolated() -> Iterator[None]:
    """Run a program for inspection: no gradient, no new parameter in the store (its initial value would depend on who
    inspected first), and a random state that is neither advanced nor used twice."""
    with preserved_rng(), preserved_parameters(), torch.no_grad():
        if not _recording():
            pyro.set_rng_seed(int(torch.randint(2**31, ())))
        yield


def _recording() -> bool:
    """Whether operations are being written down (``make_fx``): values cannot be looked at then."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def given_subsamples(model: Program, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Indices that the model gives to its plates itself (``pyro.plate(..., subsample=...)``), by plate name."""
    with isolated(), SubsampleRecorder() as recorder:
        model(*args, **kwargs)
    return recorder.given


def _supplied(
    model: Program, args: Any, kwargs: Any, layout: Layout, values: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor]:
    """Values for the guide. Indices that the model gives to a plate itself are the guide's too: its local latents
    would otherwise belong to other data."""
    if values or not layout.own_subsamples:
        return values or {}
    given = given_subsamples(model, args, kwargs)
    return {name: given[name] for name in layout.own_subsamples if name in given}


def _layout(model: Program, guide: Program, args: Any, kwargs: Any) -> Layout:
    """The layout of a pair, inspected and checked on its first run with arguments like these."""
    if (known := recall(model, guide, args, kwargs)) is not None:
        return known
    layout = inspect(model, guide, args, kwargs)
    remember(model, guide, args, kwargs, layout)
    return layout


def inspect(model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout:
    """Run a pair once without particles, check that it fits together, and read off its layout.

    :raises ValueError: for sites that are in only one of the two, disagreeing shapes or supports, undeclared batch
        dimensions, NaN in the data, empty plates.
    """
    run = _plain_run(model, guide, args, kwargs)
    own = run.given_subsamples & frozenset(run.subsample_indices())
    with isolated():
        checks.check_pair(run)
        if checks.is_minibatch(run):
            checks.check_minibatch(run, plain_run(model, args, kwargs))
        if own:
            given = given_subsamples(model, args, kwargs)
            torch.rand(())  # from here on other random numbers
            checks.check_subsamples(given, given_subsamples(model, args, kwargs), own)
    return Layout(run.nesting, checks.enumerates(run), own)


def _plain_run(model: Program, guide: Program, args: Any, kwargs: Any) -> Run:
    with isolated(), preserved_buffers(model=model, guide=guide), checks.named_errors():
        run = _execute(model, guide, args, kwargs, _How())
    return replace(run, nesting=run.deepest)


def plain_run(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    """One run of a model alone, without particles, that leaves the random state as it was."""
    with Somewhere():
        return _plain_run(model, _no_guide, args, kwargs)


def _no_guide(*args: Any, **kwargs: Any) -> None:
    """A guide without sites."""


def run_model(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    num_particles: int = 1,
    latents: Mapping[str, Tensor] | None = None,
    sample_observed: bool = False,
) -> Run:
    """Run a model without a guide: latents are the given ones, ``(num_particles, *plates, *event)``, or drawn.

    :param sample_observed: draw the observed sites too, instead of keeping their data.
    :raises ValueError: if a given latent does not have the shape that the model has for these arguments.
    """
    plain = plain_run(model, args, kwargs)
    enumerated = checks.enumerates(plain) and not sample_observed
    how = _How(num_particles, plain.nesting, enumerated, values=spread(latents or {}, plain))
    observing = Uncondition() if sample_observed else nullcontext()
    with observing, Supply(how.values or {}):
        trace = _trace(model, args, kwargs, how.enumerating(first=True), how.particles())
    return Run(poutine.Trace(), trace, num_particles, plain.nesting, enumerated)


def dream(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], num_dreams: int = 1
) -> tuple[list[Run], Tensor]:
    """Draw latents and data from the model, without gradient, and score the guide on these draws.

    The model dreams in one call, the guide is mapped over the dreams (``torch.vmap``) and sees each in the size of the
    data. Programs with which that fails, once, dream one after another.

    :returns: runs with all dreams as their particles, and the guide's log density at each, ``(num_dreams, *batch)``.
    :raises ValueError: if the model cannot be drawn from, if the dreamed data have no way to reach the guide, or if the
        guide cannot be scored at them.
    """
    layout = _layout(model, guide, args, kwargs)
    if num_dreams > 1 and layout.dreams_together:
        state = rng_state()
        try:
            run, log_forward = _dream(model, guide, args, kwargs, _How(num_dreams, layout.nesting))
            return [run], log_forward
        except Exception:  # a mistake in the programs is met again below
            set_rng_state(state)
    made = len(pyro.get_param_store())
    alone = [_dream(model, guide, args, kwargs, _How(1, layout.nesting)) for _ in range(num_dreams)]
    if num_dreams > 1 and len(pyro.get_param_store()) == made:  # no parameter can be made under vmap
        remember(model, guide, args, kwargs, replace(layout, dreams_together=False))
    return [run for run, _ in alone], torch.cat([log_forward for _, log_forward in alone])


def _dream(model: Program, guide: Program, args: Any, kwargs: Any, how: _How) -> tuple[Run, Tensor]:
    trace = _dreamt(model, args, kwargs, how)
    observed, latents = dreams.observed(trace), latent_sites(trace)
    indices: dict[str, Any] = {n: s["value"] for n, s in trace.nodes.items() if is_subsample(s)}
    guide_traces: list[Trace] = []

    def score(values: Mapping[str, Tensor]) -> Tensor:
        drawn = {name: values[name] for name in latents}
        supplied = {**indices, **drawn, **autoguides.auxiliary_values(guide, drawn)}
        arguments = dreams.arguments(trace, observed, values, args, kwargs)
        with Supply(supplied, but_delta=True):
            guide_traces.append(_run_guide(guide, *arguments, _How()))
        autoguides.check_scored(guide, latent_sites(guide_traces[-1]), latents)
        return Run(guide_traces[-1], trace, 1, how.nesting).log_forward()[0]

    sites: dict[str, Any] = {name: trace.nodes[name] for name in (*latents, *observed)}
    if how.num_particles == 1:
        log_forward = score({name: site["value"] for name, site in sites.items()}).unsqueeze(0)
    else:
        with pyro.validation_enabled(False):  # its checks branch on values
            each = {n: dreams.separately(site, how.num_particles, how.nesting) for n, site in sites.items()}
            log_forward = torch.vmap(score, randomness="different")(each)
    return Run(guide_traces[-1], trace, how.num_particles, how.nesting), log_forward


def _dreamt(model: Program, args: Any, kwargs: Any, how: _How) -> Trace:
    """A trace of draws of the model, with its observed sites drawn too; what was observed is their ``infer["obs"]``."""
    with last_site() as met:
        try:
            with torch.no_grad(), Uncondition():
                trace = _trace(model, args, kwargs, how.particles())
        except NotImplementedError as error:
            raise ValueError(
                f"the model cannot dream: its site {met[-1:]} cannot be drawn from. Expected distributions with a "
                "sampler; train without a sleep phase, such as ReweightedWakeSleep(insomnia=1.0)."
            ) from error
    for _, site in sample_sites(trace):
        site["is_observed"] |= bool(site["infer"].pop("was_observed", False))
    return trace


def prior_run(
    model: Program, guide: Program, args: Any, kwargs: Any, num_particles: int, values: Mapping[str, Tensor]
) -> Run:
    """Run the model in the place of the guide: latents are drawn from it, or the given values; data stay."""
    layout = _layout(model, guide, args, kwargs)
    with Supply(values):
        trace = _trace(model, args, kwargs, _How(num_particles, layout.nesting).particles())
    return Run(trace, trace, num_particles, layout.nesting)


def first_bad_site(model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Name of the first site, guide before model, whose value or log density is not finite in a plain run.

    Validation is off meanwhile, so that a NaN parameter is found at the site that uses it instead of raising there.
    """
    with pyro.validation_enabled(False):
        return checks.first_bad_site(_plain_run(model, guide, args, kwargs))
