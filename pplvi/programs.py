"""Running probabilistic programs: with :mod:`pplvi.handlers`, where the inference core touches ``pyro.poutine``.

A model and a guide are run together, with all particles at once, and leave a :class:`pplvi.runs.Run`: two traces whose
log densities can be read per particle and per independent element of the data. Draws are detached at the sample site,
before a later site can use them. No state of a program is kept but a hint of how deep its plates nest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pplvi import autoguides, checks
from pplvi.environment import preserved_parameters, preserved_rng
from pplvi.handlers import Detach, SubsampleRecorder, Supply, Uncondition
from pplvi.layouts import Layout, recall, remember
from pplvi.masks import balance_missing
from pplvi.runs import (
    PARTICLES,
    Run,
    is_deterministic,
    is_factor,
    is_subsample,
    latent_sites,
    sample_sites,
    spread,
)

Program = Callable[..., Any]


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
    with isolated():
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
    fresh = replace(inspect(model, guide, args, kwargs), compared=layout.compared)
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
        if own:
            given = given_subsamples(model, args, kwargs)
            torch.rand(())  # from here on other random numbers
            checks.check_subsamples(given, given_subsamples(model, args, kwargs), own)
    return Layout(run.nesting, checks.enumerates(run), own)


def _plain_run(model: Program, guide: Program, args: Any, kwargs: Any) -> Run:
    with isolated(), checks.named_errors():
        run = _execute(model, guide, args, kwargs, _How())
    return replace(run, nesting=run.deepest)


def plain_run(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    """One run of a model alone, without particles, that leaves the random state as it was."""
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


def dream(model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    """Draw latents and data from the model, without gradient, and run the guide on these draws.

    :raises ValueError: if the dreamed data have no way to reach the guide, or the guide cannot be scored at them.
    """
    layout = _layout(model, guide, args, kwargs)
    with torch.no_grad(), Uncondition():
        model_trace = _trace(model, args, kwargs)
    dreamt = {n: s for n, s in sample_sites(model_trace) if s["infer"].pop("was_observed", False)}
    for site in dreamt.values():
        site["is_observed"] = True
    dreams = {n: s["value"] for n, s in dreamt.items() if not (is_deterministic(s) or is_factor(s))}
    args, kwargs = _with_dreams(model, args, kwargs, dreams)
    values = {name: site["value"] for name, site in latent_sites(model_trace).items()}
    indices: dict[str, Any] = {n: s["value"] for n, s in model_trace.nodes.items() if is_subsample(s)}
    with Supply({**indices, **values, **autoguides.auxiliary_values(guide, values)}, but_delta=True):
        guide_trace = _run_guide(guide, args, kwargs, _How())
    return Run(guide_trace, model_trace, 1, layout.nesting)


def _with_dreams(
    model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], dreams: Mapping[str, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the guide with every observed value replaced by its dream."""
    if "observations" in kwargs:
        return args, {**kwargs, "observations": dict(dreams)}
    observed = {n: s["value"] for n, s in sample_sites(plain_run(model, args, kwargs).model) if n in dreams}
    dream_of = {id(value): dreams[name] for name, value in observed.items()}
    given = {id(value) for value in (*args, *kwargs.values())}
    if lost := sorted(name for name, value in observed.items() if id(value) not in given):
        raise ValueError(
            f"the dreams of {lost} cannot reach the guide: expected the data of these sites to be arguments of the "
            "model themselves (not copies, slices or attributes), or to come in its keyword argument `observations`, "
            "a dict from site name to value."
        )
    replaced = {name: dream_of.get(id(value), value) for name, value in kwargs.items()}
    return tuple(dream_of.get(id(value), value) for value in args), replaced


def first_bad_site(model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Name of the first site, guide before model, whose value or log density is not finite in a plain run.

    Validation is off meanwhile, so that a NaN parameter is found at the site that uses it instead of raising there.
    """
    with pyro.validation_enabled(False):
        return checks.first_bad_site(_plain_run(model, guide, args, kwargs))
