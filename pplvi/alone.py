"""Running one program by itself inside a larger computation: the levels of a path, and densities inside kernels.

The sibling of :mod:`pplvi.programs`, which runs pairs: a level runs a kernel on the draws of the level before, or
scores a target at draws that something else has made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pplvi.handlers import Supply
from pplvi.programs import _How, _trace
from pplvi.runs import Run, is_enumerated, latent_sites

Program = Callable[..., Any]


def run_alone(
    program: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    num_particles: int,
    nesting: int,
    values: Mapping[str, Tensor],
    complete: bool = False,
    detach: bool = False,
) -> Run:
    """Run one program, all particles in one call, as the model of a run without a guide.

    :param nesting: how deep plates nest: the particles are one dimension further left.
    :param values: values that its latents and plates' indices take instead of being drawn.
    :param complete: every latent has to be among ``values``.
    :param detach: detach every draw at its site.
    :raises ValueError: if a latent that should have been given is not, or one is enumerated.

    >>> import pyro, pyro.distributions as dist
    >>> def program():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> run_alone(program, (), {}, num_particles=2, nesting=0, values={"z": torch.zeros(2)}).log_target()
    tensor([-0.9189, -0.9189])
    """
    how = _How(num_particles, nesting, detach=detach)
    with how.drawing(), Supply(values):
        trace = _trace(program, args, kwargs, how.particles())
    run = Run(poutine.Trace(), trace, num_particles, nesting)
    latents = latent_sites(trace)
    if complete and (drawn := sorted(latents.keys() - values.keys())):
        raise ValueError(
            f"a program of the path has latent sites {drawn} that the draws {sorted(values)} do not have: expected "
            "every target to have the same sites. Rename them, or let the kernels and the base draw them too."
        )
    if enumerated := sorted(name for name, site in latents.items() if is_enumerated(site)):
        raise ValueError(
            f"sites {enumerated} are enumerated: expected drawn sites on a path. Draw them in the kernels."
        )
    return run


def rescored(run: Run, values: Mapping[str, Tensor]) -> Run:
    """The same run of a program with other values at its sites, under the distributions that they were drawn from.

    That is the program at these values only if no distribution depends on a site that is changed.
    """
    trace = run.model.copy()
    trace.nodes.update({name: {**trace.nodes[name], "value": value} for name, value in values.items()})
    return Run(run.guide, trace, run.num_particles, run.nesting)


def log_density_of(
    program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], values: Mapping[str, Tensor]
) -> Tensor:
    """Log density of a program at given values, summed over everything: for gradients in the values.

    Sample statements are hidden from whatever handlers run around; parameters are not, so that they are trained.

    >>> import pyro, pyro.distributions as dist
    >>> def program():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> log_density_of(program, (), {}, {"z": torch.zeros(2)})
    tensor(-1.8379)
    """
    with poutine.block(hide_fn=lambda msg: msg["type"] == "sample"), Supply(values):
        return torch.as_tensor(poutine.trace(program).get_trace(*args, **kwargs).log_prob_sum())
