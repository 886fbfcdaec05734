"""Masked data: which entries of a site's value count, and values that are safe to put in the place of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pplvi.programs.sites import Site


def seen(site: Site, value: Tensor) -> Tensor:
    """Which entries of an observed value count, ``value.shape``: those under no false mask."""
    mask = site["mask"] if isinstance(site["mask"], Tensor) else torch.tensor(site["mask"] is not False)
    inner = getattr(site["fn"], "_mask", None)
    if inner is not None:
        mask = mask & torch.as_tensor(inner)
    mask = mask.to(value.device).reshape(tuple(mask.shape) + (1,) * site["fn"].event_dim)
    return mask.expand(torch.broadcast_shapes(mask.shape, value.shape))


def without_missing(site: Site) -> Tensor:
    """A site's value with what no density is for (NaN or a code such as -1, under a mask) replaced by possible values.

    The density there is masked out, but distributions refuse such values, and its gradient would be ``0 * NaN``.
    """
    value: Tensor = site["value"]
    if not (site["is_observed"] and _is_masked(site) and isinstance(value, Tensor)):
        return value
    wrong = ~_possible(site["fn"], value) & ~seen(site, value)
    return torch.where(wrong, _inside(site["fn"], value), value)


def _possible(fn: Any, value: Tensor) -> Tensor:
    """Which entries of a value lie in the support, with as many dimensions as the value."""
    try:
        inside: Tensor = fn.support.check(value)
        return inside.reshape(tuple(inside.shape) + (1,) * fn.support.event_dim)
    except NotImplementedError:
        return ~value.isnan()


def balance_missing(model: Any, guide: Any) -> None:
    """Score what ``obs_mask`` leaves to be drawn, the ``*_unobserved`` sites, under the mask of the guide's draw.

    Pyro masks the prior at the entries that are observed. A guide draws all entries, so that its density there would
    stand against nothing, and the ELBO would rise without bound with its entropy. A prior that is scored there sums to
    one: the evidence stays that of the data.
    """
    for name, site in model.nodes.items():
        stem = name.removesuffix("_unobserved")
        if site["type"] == "sample" and stem != name and f"{stem}_observed" in model.nodes and not site["is_observed"]:
            site["mask"] = guide.nodes[name]["mask"] if name in guide.nodes else None


def _is_masked(site: Site) -> bool:
    return site["mask"] is not None or getattr(site["fn"], "_mask", None) is not None


def _inside(fn: Any, value: Tensor) -> Tensor:
    """A point of the support: the image of zero, or zero itself for whole numbers."""
    zero = torch.zeros_like(value)
    try:
        inverse = biject_to(fn.support)
        return inverse(torch.zeros_like(inverse.inv(zero)))
    except (NotImplementedError, ValueError, RuntimeError):
        return zero
