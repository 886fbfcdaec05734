"""Draws of a defensive mixture of guide and model (Owen & Zhou 2000)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Probability
from pplvi.objectives.step import Step
from pplvi.programs.dreams import prior_run
from pplvi.programs.joint import execute, guide_run
from pplvi.programs.sites import is_delta, latent_sites
from pplvi.programs.traces import Run
from pplvi.programs.ways import Vectorize
from pplvi.samplers.base import Request
from pplvi.samplers.importance import step_of
from pplvi.types import Program


@checked
@dataclass(frozen=True)
class DefensiveMixture:
    """Importance sampling from ``(1 - weight) q(z | x) + weight c(z)``: a guide that cannot forget what is possible.

    Guides that learn from their own draws prune: what they stop drawing they never learn again. Draws of another
    component keep it alive (Hesterberg 1995; in wake-sleep Le et al. 2019, whose component is uniform). Each particle
    of each datum comes from the component with probability ``weight``, systematically over particles. Weights are for
    the density of the mixture; ``log_forward`` is the guide's own, which is to be trained. One step.

    :param weight: probability of the other component.
    :param component: a program with the arguments and the latent sites of the model; the model's own prior unless
        given.
    :raises ValueError: for a weight that is not between 0 and 1.

    >>> DefensiveMixture(0.2)
    DefensiveMixture(weight=0.2, component=None)
    """

    proposal: ClassVar[str] = "mixture"
    weight: Probability = 0.2
    component: Program | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < 1:
            raise ValueError(f"mixture weight {self.weight!r}: expected a number between 0 and 1, such as 0.2.")

    def __call__(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], request: Request
    ) -> Iterator[Step]:
        """Yield one step of ``request.num_particles`` particles."""
        call = args, kwargs, request.num_particles
        with torch.no_grad():
            values = self._drawn(model, guide, *call, request.vectorize)
        run = execute(model, guide, args, kwargs, num_particles=call[2], values=values, vectorize=request.vectorize)
        log_target, log_forward = run.log_target(), run.log_forward()
        own, other = math.log1p(-self.weight), math.log(self.weight)
        log_component = self._log_component(run, model, *call, request.vectorize)
        mixture = torch.logaddexp(own + log_forward, other + log_component).detach()
        yield replace(step_of(run, log_target, log_forward), log_weight=log_target.detach() - mixture)

    def _drawn(
        self, model: Program, guide: Program, args: Any, kwargs: Any, count: int, vectorize: Vectorize
    ) -> dict[str, Tensor]:
        """Values for the guide's sites, with the indices of the minibatch that they belong to."""
        own = guide_run(model, guide, args, kwargs, count, None, vectorize)
        indices, sites = own.subsample_indices(), latent_sites(own.guide)
        if self.component is None:
            other = prior_run(model, guide, args, kwargs, count, indices, vectorize)
        else:
            other = execute(
                model, self.component, args, kwargs, num_particles=count, values=indices, vectorize=vectorize
            )
        theirs = latent_sites(other.guide)
        if without := [name for name, site in sites.items() if is_delta(site) or name not in theirs]:
            raise ValueError(
                f"draws of a mixture cannot be put into the guide: its sites {without} are deterministic or auxiliary, "
                "as in all automatic guides. Expected one stochastic site for each latent site of the model."
            )
        both = replace(other, guide=own.guide)
        chosen = both.align(_systematic(self.weight, both.zeros()))
        return {**indices, **{name: _mixed(chosen, site, theirs[name]["value"]) for name, site in sites.items()}}

    def _log_component(
        self, run: Run, model: Program, args: Any, kwargs: Any, count: int, vectorize: Vectorize
    ) -> Tensor:
        """Log density of the component at the run's draws."""
        sites = latent_sites(run.guide)
        if self.component is None:
            if run.enumerated:
                raise ValueError(
                    "the mixture's component is the prior, but the model enumerates sites, so that the others have no "
                    "density of their own: expected DefensiveMixture(weight, component) with a program of yours."
                )
            densities = run.log_probs(run.model)
        else:
            values = {**run.subsample_indices(), **{name: site["value"] for name, site in sites.items()}}
            component = guide_run(model, self.component, args, kwargs, count, values, vectorize)
            densities = run.log_probs(component.guide)
        return sum((d for name, d in densities.items() if name in sites), run.zeros())


def _systematic(probability: float, like: Tensor) -> Tensor:
    """True with this probability for each particle of each batch element, as evenly over particles as possible."""
    steps = torch.arange(len(like) + 1, device=like.device).reshape(-1, *[1] * (like.dim() - 1))
    counts = torch.floor(probability * steps + torch.rand_like(like[:1]))
    return counts[1:] > counts[:-1]


def _mixed(chosen: Tensor, site: Any, other: Tensor) -> Tensor:
    own: Tensor = site["value"]
    mixed = torch.where(chosen.reshape(chosen.shape + (1,) * site["fn"].event_dim), other, own)
    return mixed.reshape(own.shape) if len(chosen) == 1 else mixed
