"""Divergences between guide and prior that are known in closed form, site by site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pplvi.programs import checks
from pplvi.programs.sites import Site, is_delta, latent_sites
from pplvi.programs.traces import Run


def divergences(run: Run) -> dict[str, Tensor]:
    """``KL(q(z[s] | ...) || p(z[s] | ...))`` given earlier sites' draws, ``(num_particles, *batch)`` each, in nats.

    For the sites where this is exact and its average over draws is that of ``log q - log p``: their two distributions
    have a closed form (:func:`torch.distributions.kl_divergence`), are scaled and masked alike, and every site that
    comes before them in the model comes before them in the guide. A ``Delta`` of the guide, such as the second half
    of an automatic guide's draw, has none, whatever Pyro's table says: its log density would be lost.

    :raises ValueError: for models with enumerated sites, whose densities do not separate.

    >>> import pyro, pyro.distributions as dist
    >>> from pplvi.programs.joint import execute
    >>> def program(loc=0.0):
    ...     pyro.sample("z", dist.Normal(loc, 1.0))
    >>> divergences(execute(program, lambda: program(2.0), (), {}))
    {'z': tensor([2.])}
    """
    model = latent_sites(run.model)
    return {n: run.scaled_to_batch(n, model[n], kl) for n, kl in divergent_sites(run).items()}


def divergent_sites(run: Run) -> dict[str, Tensor]:
    """As :func:`divergences`, neither scaled nor summed: one number for each element of a site's plates.

    :raises ValueError: for models with enumerated sites.
    """
    checks.check_divergences(enumerated=run.enumerated)
    model, guide = latent_sites(run.model), latent_sites(run.guide)
    found = {n: _divergence(guide[n], model[n]) for n in _in_order(list(model), list(guide))}
    return {n: kl for n, kl in found.items() if kl is not None}


def _in_order(model: list[str], guide: list[str]) -> list[str]:
    """Sites whose predecessors in the model are all predecessors in the guide: none of them depends on their draw."""
    place = {name: i for i, name in enumerate(guide)}
    latest, found = -1, []
    for name in model:
        here = place.get(name, len(guide))
        if latest < here < len(guide):
            found.append(name)
        latest = max(latest, here)
    return found


def _divergence(guide: Site, model: Site) -> Tensor | None:
    if is_delta(guide) or not all(_same(guide[key], model[key]) for key in ("scale", "mask")):
        return None
    if any(getattr(site["fn"], "_mask", None) is not None for site in (guide, model)):
        return None
    try:
        kl = torch.as_tensor(kl_divergence(guide["fn"], model["fn"]))
    except NotImplementedError:
        return None
    return kl.expand(torch.broadcast_shapes(kl.shape, guide["fn"].batch_shape, model["fn"].batch_shape))


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b))


def without(densities: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> list[Tensor]:
    """The densities of sites that have no divergence."""
    return [density for name, density in densities.items() if name not in names]
