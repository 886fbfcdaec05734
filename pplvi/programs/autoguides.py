"""The one place that knows how Pyro's automatic guides store their draws."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDiscreteParallel,
    AutoGaussian,
    AutoGuide,
    AutoGuideList,
    AutoNormal,
    AutoStructured,
)
from torch import Tensor
from torch.distributions import biject_to

from pplvi.programs.sites import is_delta

_SIZED_BY_FIRST_RUN = (AutoContinuous, AutoDiscreteParallel, AutoGaussian, AutoStructured)


def check_local_sizes(guide: Any) -> None:
    """Check that no automatic guide has parameters for a minibatch in place of those for all data.

    Most of Pyro's have one for each element that their first run has met: with ``subsample_size=`` those of one
    minibatch, which every other minibatch would share.

    :raises ValueError: with the plate.
    """
    guide = poutine.unwrap(guide)
    for part in guide if isinstance(guide, AutoGuideList) else ():
        check_local_sizes(part)
    if not isinstance(guide, _SIZED_BY_FIRST_RUN) or getattr(guide, "prototype_trace", None) is None:
        return
    frames = [*guide._prototype_frames.values()]
    frames += [f for plates in getattr(guide, "_plates", {}).values() for f in plates]  # of data: AutoGaussian
    for frame in frames:
        if frame.full_size is not None and frame.size < frame.full_size:
            raise ValueError(
                f"{type(guide).__name__} has parameters for {frame.size} elements of plate {frame.name!r}, which has "
                f"{frame.full_size}: every minibatch would share those of one. Expected a guide with parameters for "
                "all of them, such as AutoNormal, or one whose size does not grow with the data, such as "
                "pplvi.AutoAmortized; or train on the full data."
            )


def auxiliary_values(guide: Any, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of an automatic guide's auxiliary sites that give these latents (constrained, without particles).

    An automatic guide draws unconstrained auxiliary sites and maps them to the latents by ``Delta`` sites, so that its
    density at given latents is that of the auxiliary values behind them.

    :returns: values by site name; nothing for a guide that is not automatic.
    :raises ValueError: for automatic guides that cannot be inverted.
    """
    if hasattr(guide, "auxiliary_values"):  # a guide that knows how to invert itself
        return dict(guide.auxiliary_values(latents))
    if isinstance(guide, AutoGuideList):
        return {n: v for part in guide for n, v in auxiliary_values(part, latents).items()}
    if isinstance(guide, AutoContinuous):
        return {f"_{guide._pyro_name}_latent": _packed(guide, latents)}
    if isinstance(guide, AutoNormal):
        return {f"{name}_unconstrained": _unconstrained(site, latents) for name, site in _latents_of(guide)}
    if isinstance(guide, AutoGuide):
        raise ValueError(
            f"{type(guide).__name__} cannot be scored at draws of the model: expected AutoNormal, a guide derived from "
            "AutoContinuous, or a guide of your own with a density at its latent sites."
        )
    return {}


def check_scored(guide: Any, sites: Mapping[str, Any], latents: Collection[str]) -> None:
    """Check that a guide of the user's own has a density at the model's draws, and nothing besides to draw.

    :param sites: the guide's unobserved sites; the keys of ``latents`` are the sites whose values the model gave.
    :raises ValueError: for deterministic and auxiliary sites, which would be scored at draws of the guide instead.
    """
    own = [name for name, site in sites.items() if is_delta(site) or name not in latents]
    if own and not isinstance(guide, AutoGuide):
        raise ValueError(
            f"the guide cannot be scored at draws of the model: its sites {own} are deterministic or auxiliary, so the "
            "draws cannot be put in. Expected one stochastic site for each latent site of the model; write "
            "z = transform(noise) as a TransformedDistribution."
        )


def _latents_of(guide: AutoGuide) -> list[tuple[str, Any]]:
    prototype: Any = guide.prototype_trace
    return list(prototype.iter_stochastic_nodes())


def _unconstrained(site: Any, latents: Mapping[str, Tensor]) -> Tensor:
    return biject_to(site["fn"].support).inv(latents[site["name"]])


def _packed(guide: AutoContinuous, latents: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([_unconstrained(site, latents).reshape(-1) for _, site in _latents_of(guide)])
