"""Running probabilistic programs: with :mod:`pplvi.programs.handlers`, where the inference core touches
``pyro.poutine``.

A model and a guide are run together, with all particles at once, and leave a :class:`pplvi.programs.Run`: two traces
whose log densities can be read per particle and per independent element of the data. Draws are detached at the sample
site, before a later site can use them. No state of a program is kept but a hint of how deep its plates nest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.programs import checks
from pplvi.programs.carrying import BROADCAST, Given, Way, guide_all, run_particles
from pplvi.programs.first_run import layout_of, renewed, supplied_values, widened
from pplvi.programs.memo import Layout, remember
from pplvi.programs.running import How
from pplvi.programs.sharding import sharded
from pplvi.programs.traces import Run
from pplvi.programs.ways import Vectorize, named, way_for
from pplvi.types import Program

Exact = Literal["entropy", "divergence"]


@checked
def execute(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    num_particles: Count = 1,
    detach: bool = False,
    values: Mapping[str, Tensor] | None = None,
    vectorize: Vectorize = None,
    exact: Exact | None = None,
) -> Run:
    """Run the guide, then the model on the guide's draws, with all particles.

    :param detach: detach every draw at its site.
    :param values: values for guide sites to use instead of drawing (subsample indices too).
    :param vectorize: the way of running particles; the fastest that is right unless named.
    :param exact: entropies of the guide's sites will be asked for, or their divergences too.
    :raises ValueError: if model and guide do not fit together (checked on the first run of the pair).

    >>> import pyro, pyro.distributions as dist
    >>> def program():
    ...     with pyro.plate("data", 3):
    ...         pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> run = execute(program, program, (), {}, num_particles=2)
    >>> run.shape, bool((run.log_target() == run.log_forward()).all())
    ((2, 3), True)
    """
    layout, word = layout_of(model, guide, args, kwargs), named(vectorize)

    def attempt(layout: Layout) -> Run:
        checks.check_divergences(enumerated=layout.enumerated and exact == "divergence")
        way, layout = (BROADCAST, layout) if num_particles == 1 else way_for(model, guide, args, kwargs, layout, word)
        supplied = supplied_values(model, args, kwargs, layout, values)
        how = How(num_particles, layout.nesting, layout.enumerated, detach, supplied)
        return run_particles(
            model, guide, args, kwargs, how, _for(exact, way), Given(layout.indices, exact=exact is not None)
        )

    try:
        run = attempt(layout)
    except Exception as error:
        run = attempt(layout := renewed(model, guide, args, kwargs, layout, error))
    while (needed := widened(run, layout)) != layout:
        remember(model, guide, args, kwargs, layout := needed)
        run = attempt(layout)
    checks.check_run(run)
    return sharded(run)


def _for(exact: Exact | None, way: Way) -> Way:
    """A divergence needs both distributions in one particle's run."""
    return replace(way, guide=False) if exact == "divergence" and not way.model else way


def guide_run(
    model: Program,
    guide: Program,
    args: Any,
    kwargs: Any,
    num_particles: int,
    values: Mapping[str, Tensor] | None,
    vectorize: Vectorize = None,
) -> Run:
    """Run the guide alone; the model's trace is empty."""
    layout, way = layout_of(model, guide, args, kwargs), BROADCAST
    if num_particles > 1:
        way, layout = way_for(model, guide, args, kwargs, layout, named(vectorize))
    how = How(
        num_particles, layout.nesting, layout.enumerated, values=supplied_values(model, args, kwargs, layout, values)
    )
    return guide_all(guide, args, kwargs, how, way, Given(layout.indices))
