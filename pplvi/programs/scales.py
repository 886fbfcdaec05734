"""``poutine.scale`` around programs: a pair that is trained under one is not weighed under it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger

from pplvi.programs.handlers import within
from pplvi.programs.running import plain_run_of_pair
from pplvi.programs.sites import PARTICLES, Site, is_subsample, sample_sites
from pplvi.types import Program

_CLOSE = 1e-5  # of single precision


def plate_scale(site: Site) -> float:
    """The scale that the plates of a site give it: full sizes by sizes of minibatches, sequential plates too."""
    frames = [f for f in site["cond_indep_stack"] if f.name != PARTICLES and f.full_size is not None and f.size > 0]
    return math.prod(float(f.full_size) / float(f.size) for f in frames)


def is_scaled(site: Site) -> bool:
    """Whether a site stands under ``poutine.scale``."""
    expected = plate_scale(site)
    scale = torch.as_tensor(site["scale"], dtype=torch.float64)
    return not torch.allclose(scale, torch.full_like(scale, expected), rtol=_CLOSE, atol=0.0)


class Unscale(Messenger):
    """Undo every ``poutine.scale`` of the program inside, and leave the scales of its plates."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["scale"] = plate_scale(msg)


class LatentWeight(Messenger):
    """Multiply log densities of latent sites inside, of model and guide alike, by a weight.

    >>> import pyro, pyro.distributions as dist
    >>> with LatentWeight(4.0), poutine.trace() as recorder:
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> recorder.trace.nodes["z"]["scale"]
    4.0
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not is_subsample(msg):
            msg["scale"] = msg["scale"] * self.weight


def without_scale(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Program, Program]:
    r"""A pair as it would be without ``poutine.scale``, where any site of the guide stands under one.

    Such a scale changes the loss that a pair is trained with (a KL term that is warmed up, an ELBO by datum), not the
    posterior: with :math:`c \log p - c \log q` in place of :math:`\log p - \log q`, weights would be another density's.
    A scale in the model alone is a part of the target, and is left; so are the scales of plates.

    :raises ValueError: for guides that are handlers of their model and inherit its scales.

    >>> import pyro, pyro.distributions as dist
    >>> from pplvi.programs.joint import execute
    >>> def program():
    ...     pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
    >>> scaled = poutine.scale(program, 0.1)
    >>> [bool((run := execute(*pair, (), {})).log_target() == run.log_forward())
    ...  for pair in ((program, scaled), without_scale(program, scaled, (), {}))]
    [False, True]
    """
    found = [
        name for name, site in sample_sites(plain_run_of_pair(model, guide, args, kwargs).guide) if is_scaled(site)
    ]
    if not found:
        return model, guide
    if isinstance(poutine.unwrap(guide), GuideMessenger):
        raise ValueError(
            f"the sites {found} of {type(poutine.unwrap(guide)).__name__} stand under poutine.scale, which it takes "
            "from its model: the weights would be those of another density. Expected programs without poutine.scale "
            "(the parameters stay the same), or a guide of another class."
        )
    return within(Unscale, model), within(Unscale, guide)
