"""The first run of a program: what is learnt and checked before any step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor

from pplvi.programs import checks
from pplvi.programs.autoguides import check_local_sizes
from pplvi.programs.handlers import SubsampleRecorder, Supply
from pplvi.programs.memo import Layout, recall, remember
from pplvi.programs.running import _execute, _How, _plain_run, _recording, isolated, plain_run
from pplvi.programs.state import preserved_buffers
from pplvi.programs.traces import Run
from pplvi.types import Program


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
        check_local_sizes(guide)
        if checks.is_minibatch(run):
            checks.check_minibatch(run, plain_run(model, args, kwargs))
        if own:
            given = given_subsamples(model, args, kwargs)
            torch.rand(())  # from here on other random numbers
            checks.check_subsamples(given, given_subsamples(model, args, kwargs), own)
    return Layout(run.nesting, checks.enumerates(run), own)


def first_bad_site(model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Name of the first site, guide before model, whose value or log density is not finite in a plain run.

    Validation is off meanwhile, so that a NaN parameter is found at the site that uses it instead of raising there.
    """
    with pyro.validation_enabled(False):
        return checks.bad_site_of(_plain_run(model, guide, args, kwargs))
