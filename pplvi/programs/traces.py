"""What one joint run of a model and a guide leaves behind: log densities per particle and per independent datum.

A :class:`Run` holds the two traces. Its densities have shape ``(num_particles, *batch)``, where ``batch`` are the
plates common to every sample site, latent and observed, of model and guide, and are in nats. A batch plate's subsample
scale never enters a density: it is reported as :attr:`Run.scale`, to multiply the objective.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pplvi.programs import enumeration
from pplvi.programs.masks import without_missing
from pplvi.programs.shard import Shard
from pplvi.programs.sites import (
    Plate,
    Site,
    batch_sizes,
    common_plates,
    is_delta,
    is_deterministic,
    is_enumerated,
    is_factor,
    is_subsample,
    latent_sites,
    sample_sites,
    site_plates,
    subsampled_plates,
)


@dataclass(frozen=True)
class Run:
    """One joint run of guide and model with ``num_particles`` particles.

    All densities have shape ``(num_particles, *batch)``, are in nats, and leave the subsample scale of the batch
    plates out; that scale is :attr:`scale`.

    :ivar kept: what a program left beside its sites, with the particles in front.
    :ivar shard: the part of a plate that is here, where others are on other ranks; densities are those of all.
    """

    guide: Any
    model: Any
    num_particles: int
    nesting: int
    enumerated: bool = False
    given_subsamples: frozenset[str] = frozenset()
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    shard: Shard | None = None

    @cached_property
    def batch(self) -> tuple[Plate, ...]:
        """Plates common to every sample site of model and guide, left to right."""
        sites = [s for trace in (self.model, self.guide) for _, s in sample_sites(trace) if not is_deterministic(s)]
        return common_plates(sites)

    @property
    def deepest(self) -> int:
        """How deep the plates of the two traces nest."""
        traces = (self.guide, self.model)
        return -min((p.dim for t in traces for _, site in sample_sites(t) for p in site_plates(site)), default=0)

    def subsample_indices(self, *, of_model: bool = False) -> dict[str, Tensor]:
        """The guide's (or the model's) index draws of its plates, to be passed on as ``values`` of another run."""
        nodes = (self.model if of_model else self.guide).nodes
        return {n: s["value"] for n, s in nodes.items() if is_subsample(s) and s["value"] is not None}

    def draws_of(self, particle: int) -> dict[str, Tensor]:
        """What the guide drew for one particle, in the shapes of a run without particles."""
        found = {}
        for name, site in latent_sites(self.guide).items():
            if not (is_delta(site) or is_enumerated(site)):
                depth = max((-p.dim for p in site_plates(site)), default=0)
                event = site["fn"].event_dim
                value = site["value"] if site["value"].dim() <= self.nesting + event else site["value"][particle]
                found[name] = value.reshape(value.shape[max(0, value.dim() - event - depth) :])
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """``(num_particles, *batch)``."""
        return (self.num_particles, *(p.size for p in self.batch))

    @property
    def scale(self) -> float:
        """Product of the batch plates' subsample scales: the factor of the objective."""
        return math.prod(p.scale for p in self.batch)

    @property
    def subsampled(self) -> tuple[str, ...]:
        """Names of subsampled plates that are not batch plates: their scale sits inside the densities."""
        found = {n for trace in (self.model, self.guide) for _, s in sample_sites(trace) for n in subsampled_plates(s)}
        whole = self.shard.whole if self.shard is not None else set()
        return tuple(sorted(found - whole - {p.name for p in self.batch}))

    @property
    def guide_enumerated(self) -> bool:
        """Whether the guide enumerates a site: densities are then expectations, not particles."""
        return any(is_enumerated(site) for site in latent_sites(self.guide).values())

    def to_batch(self, density: Tensor, name: str = "") -> Tensor:
        """Sum a site's log density, aligned right on plate dimensions, to ``(num_particles, *batch)``."""
        width = self.nesting + 1
        if density.dim() > width:
            raise ValueError(
                f"site {name!r} has a log density of shape {tuple(density.shape)}: expected at most {width} "
                "dimensions, the particles and the plates. Declare the others with pyro.plate or .to_event()."
            )
        density = density.reshape((1,) * (width - density.dim()) + tuple(density.shape))
        kept = {p.dim for p in self.batch}
        summed = [dim for dim in range(-self.nesting, 0) if dim not in kept]
        return (density.sum(summed) if summed else density).expand(self.shape)

    def align(self, tensor: Tensor) -> Tensor:
        """Give a tensor ``(num_particles, *batch)`` the dimensions of a density under plates, 1 where there is none."""
        sizes = {p.dim: p.size for p in self.batch}
        return tensor.reshape(len(tensor), *(sizes.get(dim, 1) for dim in range(-self.nesting, 0)))

    def site_log_prob(self, name: str, site: Site) -> Tensor:
        """Log density of one site, scaled and masked as Pyro defines it, without the batch plates' scale."""
        return self.scaled(site, unscaled_log_prob(name, site))

    def drawn_log_prob(self, name: str, site: Site) -> Tensor:
        """Log density of one site as it was drawn: masked, but not scaled."""
        shard = self.joint_shard
        copies = shard.share if shard is not None and shard.splits(site) else 1.0
        return scale_and_mask(unscaled_log_prob(name, site), copies, site["mask"])

    def scaled(self, site: Site, values: Tensor) -> Tensor:
        """Values of a site's elements, scaled and masked as its log density is."""
        return scale_and_mask(values, self._scale_of(site), site["mask"])

    def _scale_of(self, site: Site) -> Any:
        return site["scale"] / self.scale if self.scale != 1.0 else site["scale"]

    def log_probs(self, trace: Any) -> dict[str, Tensor]:
        """Log density of every site of a trace that is not enumerated, each ``(num_particles, *batch)``."""
        sites = ((n, s) for n, s in sample_sites(trace) if not is_deterministic(s))
        return {name: self._site_to_batch(name, site, self.site_log_prob(name, site)) for name, site in sites}

    def scaled_to_batch(self, name: str, site: Site, values: Tensor) -> Tensor:
        """What stands for a site's log density, such as its entropy, scaled, masked and summed as that is."""
        return self._site_to_batch(name, site, self.scaled(site, values))

    def _site_to_batch(self, name: str, site: Site, density: Tensor) -> Tensor:
        """As :meth:`to_batch`, once sure that every dimension is one of the site's plates or the particles."""
        sizes = {p.dim: p.size for p in site_plates(site)}
        leftmost = min(sizes, default=0)
        sizes[-self.nesting - 1] = self.num_particles
        for dim, size in zip(range(-1, -1 - density.dim(), -1), reversed(density.shape), strict=True):
            if size != 1 and sizes.get(dim, size if dim > leftmost else None) != size:
                raise ValueError(
                    f"site {name!r} has a log density of shape {tuple(density.shape)}, but only the dimensions {sizes} "
                    "(of its plates and the particles) may differ from 1. Declare the others with pyro.plate or "
                    ".to_event(), keep dimensions when reducing over a plate (keepdim=True), or index from the right."
                )
        return self._of_all_ranks(self.to_batch(density, name), {f.name for f in site["cond_indep_stack"]})

    def _of_all_ranks(self, density: Tensor, plates: Set[str]) -> Tensor:
        """A density ``(num_particles, *batch)``; its mean over the ranks, if it was summed over a plate that is split.

        :param plates: names of the plates that it is in.
        """
        shard = self.joint_shard
        return density if shard is None or shard.plates.isdisjoint(plates) else shard.mean(density)

    @cached_property
    def joint_shard(self) -> Shard | None:
        """The shard, if its plate is no batch plate, so that weights depend on all ranks."""
        apart = self.shard is None or not self.shard.plates.isdisjoint(p.name for p in self.batch)
        return None if apart else self.shard

    def zeros(self) -> Tensor:
        """Zeros of shape ``(num_particles, *batch)`` on the programs' device."""
        return torch.zeros(self.shape, device=_device_of(self.model, self.guide))

    def _total(self, densities: Mapping[str, Tensor]) -> Tensor:
        return sum(densities.values(), self.zeros())

    @cached_property
    def _enumerated_densities(self) -> tuple[enumeration.PlateTerms, enumeration.PlateTerms]:
        if self.joint_shard is not None:
            self._check_enumerated(self.joint_shard)
        return enumeration.log_densities(self.model, self.guide, self.scale)

    def _check_enumerated(self, shard: Shard) -> None:
        sites = {n: s for trace in (self.model, self.guide) for n, s in sample_sites(trace) if is_enumerated(s)}
        if outside := sorted(name for name, site in sites.items() if not shard.splits(site)):
            raise ValueError(
                f"sites {outside} are enumerated outside of the plates {sorted(shard.plates)}, whose elements are on "
                "several ranks: each would sum over them with its own elements alone. Expected enumerated sites inside "
                "that plate. Draw the others, or use parallel='none'."
            )

    @property
    def enumerated_target(self) -> enumeration.PlateTerms:
        """Terms of the model's log density where sites are enumerated, each with the names of its plates."""
        return self._enumerated_densities[0]

    def log_target(self) -> Tensor:
        """Log joint density of the model at the guide's draws, enumerated model sites summed out."""
        if self.enumerated:
            return self._total_of_terms(self._enumerated_densities[0])
        return self._total(self.log_probs(self.model))

    def _total_of_terms(self, terms: enumeration.PlateTerms) -> Tensor:
        return sum((self._of_all_ranks(self.to_batch(term), plates) for plates, term in terms), self.zeros())

    def expected_counts(self, instead: Mapping[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The log evidence where every latent is enumerated, and how often each entry of the densities counts: see
        :func:`pplvi.programs.enumeration.expected_counts`."""
        return enumeration.expected_counts(self.model, self.guide, instead)

    def log_forward(self) -> Tensor:
        """Log density of the guide at its draws, auxiliary sites included."""
        if self.enumerated:
            return self._total_of_terms(self._enumerated_densities[1])
        return self._total(self.log_probs(self.guide))

    def log_score(self, *, detached: bool) -> Tensor | None:
        """Log density of the draws that carry no path gradient, unscaled; ``None`` if there are none.

        With detached draws these are all sites, otherwise the ones that cannot be reparameterised; never the density of
        a value that was not drawn here, such as that of a reverse kernel.
        """
        scored = self.scored_sites(detached=detached).items()
        parts = {n: self._site_to_batch(n, site, self.drawn_log_prob(n, site)) for n, site in scored}
        return self._total(parts) if parts else None

    def scored_sites(self, *, detached: bool) -> dict[str, Site]:
        """The guide's sites behind :meth:`log_score`. A factor is the density of a random choice made out of sight if
        it says so (``has_rsample=False``), and otherwise no choice at all."""
        return {name: site for name, site in sample_sites(self.guide) if _is_scored(site, detached)}

    def entropies(self) -> dict[str, Tensor]:
        """Entropy of each guide site given the draws above it: exact where the distribution has one, for a ``Delta``
        minus its log density. Scaled and masked as the site is."""
        sites = sample_sites(self.guide)
        return {name: self._site_to_batch(name, site, self.entropy(name, site)) for name, site in sites}

    def entropy(self, name: str, site: Site) -> Tensor:
        """Entropy of one guide site, as :meth:`entropies`, one number for each element of its plates."""
        if is_delta(site) or site["is_observed"]:
            return -self.site_log_prob(name, site)
        return self.scaled(site, _entropy(name, site))


def _is_scored(site: Site, detached: bool) -> bool:
    pathwise = bool(getattr(site["fn"], "has_rsample", False))
    if pathwise and not detached:  # most sites: asked of each at every step
        return False
    if is_factor(site):
        return not pathwise
    return not site["is_observed"] and not is_enumerated(site) and (detached or not pathwise)


def _device_of(*traces: Any) -> torch.device | None:
    for trace in traces:
        for _, site in sample_sites(trace):
            if isinstance(site["value"], Tensor):
                return site["value"].device
    return None


def unscaled_log_prob(name: str, site: Site) -> Tensor:
    """Log density of a site's value, neither scaled nor masked; a value outside the support is named."""
    try:
        return site["fn"].log_prob(without_missing(site), *site["args"], **site["kwargs"])
    except ValueError as error:
        raise ValueError(
            f"the log density at site {name!r} cannot be computed: {error}\nExpected a value inside the support and of "
            "the shape of the distribution; check the data for NaN or out-of-range entries."
        ) from error


def _entropy(name: str, site: Site) -> Tensor:
    try:
        entropy: Tensor = site["fn"].entropy()
    except NotImplementedError as error:
        raise ValueError(
            f"site {name!r} of the guide has no exact entropy ({type(site['fn']).__name__}): use entropy='sampled'."
        ) from error
    return entropy


def spread(latents: Mapping[str, Tensor], plain: Run) -> dict[str, Tensor]:
    """Give compact draws, ``(num_particles, *plates, *event)``, the dimensions that sites have under a particle plate.

    :raises ValueError: if a draw does not have the shape of its site in the plain run.
    """
    spread = {}
    for name, value in latents.items():
        if name in plain.model.nodes:
            site = plain.model.nodes[name]
            shape = _shape_under_particles(name, value, site, plain.nesting)
            spread[name] = value.reshape(shape if len(value) > 1 else site["value"].shape)
    return spread


def _shape_under_particles(name: str, value: Tensor, site: Any, nesting: int) -> list[int]:
    event = tuple(site["fn"].event_shape)
    sizes = batch_sizes(site)
    expected = (*sizes.values(), *event)
    if tuple(value.shape[1:]) != expected:
        raise ValueError(
            f"the draws of latent site {name!r} have shape {tuple(value.shape[1:])}, expected {expected} for these "
            "arguments. Latents inside a plate belong to the data they were fitted to: predict for new data of the "
            "same size, or drop them from the draws so that they are sampled from the prior."
        )
    return [len(value), *(sizes.get(dim, 1) for dim in range(-nesting, 0)), *event]
