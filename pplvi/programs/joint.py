"""Running probabilistic programs: with :mod:`pplvi.programs.handlers`, where the inference core touches
``pyro.poutine``.

A model and a guide are run together, with all particles at once, and leave a :class:`pplvi.programs.Run`: two traces
whose log densities can be read per particle and per independent element of the data. Draws are detached at the sample
site, before a later site can use them. No state of a program is kept but a hint of how deep its plates nest.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from pyro import poutine
from torch import Tensor

from pplvi.programs import checks
from pplvi.programs.first_run import _compare_particles, _layout, _needed, _renewed, _supplied
from pplvi.programs.handlers import Supply, Uncondition
from pplvi.programs.memo import Layout, recall, remember
from pplvi.programs.running import _execute, _How, _recording, _run_guide, _trace, plain_run
from pplvi.programs.traces import Run, spread
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


def guide_run(
    model: Program, guide: Program, args: Any, kwargs: Any, num_particles: int, values: Mapping[str, Tensor] | None
) -> Run:
    """Run the guide alone; the model's trace is empty."""
    layout = _layout(model, guide, args, kwargs)
    how = _How(num_particles, layout.nesting, layout.enumerated, values=_supplied(model, args, kwargs, layout, values))
    return Run(_run_guide(guide, args, kwargs, how), poutine.Trace(), num_particles, layout.nesting, layout.enumerated)


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
