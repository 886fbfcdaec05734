"""The first run of a program: what is learnt and checked before any step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pplvi.programs import checks
from pplvi.programs.autoguides import check_local_sizes
from pplvi.programs.handlers import SubsampleRecorder
from pplvi.programs.memo import Layout, recall, remember
from pplvi.programs.running import isolated, plain_run, plain_run_of_pair
from pplvi.programs.state import is_recording
from pplvi.programs.traces import Run
from pplvi.types import Program


def widened(run: Run, layout: Layout) -> Layout:
    """The layout with room for what a run has shown, such as plates that nest deeper than at the first run."""
    own = layout.own_subsamples | (run.given_subsamples & frozenset(run.subsample_indices()))
    nesting, enumerated = max(layout.nesting, run.deepest), layout.enumerated or checks.enumerates(run)
    found = replace(layout, nesting=nesting, enumerated=enumerated, own_subsamples=own)
    return layout if found == layout else replace(found, ways={})


def renewed(model: Program, guide: Program, args: Any, kwargs: Any, layout: Layout, error: Exception) -> Layout:
    """After an error in a run: the layout for these arguments, if they are what has changed.

    :raises ValueError: what is wrong with them.
    """
    if is_recording():
        raise error
    fresh = inspect(model, guide, args, kwargs)
    if fresh == layout and not layout.ways:
        raise error
    fresh = replace(fresh, dreams_together=layout.dreams_together)
    remember(model, guide, args, kwargs, fresh)
    return fresh


def given_subsamples(model: Program, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Indices that the model gives to its plates itself (``pyro.plate(..., subsample=...)``), by plate name."""
    with isolated(), SubsampleRecorder() as recorder:
        model(*args, **kwargs)
    return recorder.given


def supplied_values(
    model: Program, args: Any, kwargs: Any, layout: Layout, values: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor]:
    """Values for the guide. Indices that the model gives to a plate itself are the guide's too: its local latents
    would otherwise belong to other data."""
    if values or not layout.own_subsamples:
        return values or {}
    given = given_subsamples(model, args, kwargs)
    return {name: given[name] for name in layout.own_subsamples if name in given}


def layout_of(model: Program, guide: Program, args: Any, kwargs: Any) -> Layout:
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
    run = plain_run_of_pair(model, guide, args, kwargs)
    own = run.given_subsamples & frozenset(run.subsample_indices())
    with isolated():
        checks.check_pair(run)
        check_local_sizes(guide)
        if checks.is_minibatch(run) and isinstance(poutine.unwrap(guide), AutoGuide):
            checks.check_minibatch(run, plain_run(model, args, kwargs))  # other guides draw what they are asked for
        if own:
            given = given_subsamples(model, args, kwargs)
            torch.rand(())  # from here on other random numbers
            checks.check_subsamples(given, given_subsamples(model, args, kwargs), own)
    indices = frozenset(run.subsample_indices()) | frozenset(run.subsample_indices(of_model=True))
    return Layout(run.nesting, checks.enumerates(run), own, indices)


def first_bad_site(model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Name of the first site, guide before model, whose value or log density is not finite in a plain run.

    Validation is off meanwhile, so that a NaN parameter is found at the site that uses it instead of raising there.
    """
    with pyro.validation_enabled(False):
        return checks.bad_site_of(plain_run_of_pair(model, guide, args, kwargs))
