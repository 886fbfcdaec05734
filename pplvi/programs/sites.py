"""Sites and plates of a trace: which are latent, observed, computed, and which plates they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Distribution

Site = dict[str, Any]


PARTICLES = "all draws in one call"  # messages of Pyro show it


@dataclass(frozen=True)
class Plate:
    """A ``pyro.plate`` as a sample site sees it.

    :ivar stands_for: how many elements those here stand for, where that is no whole number, as on one of several ranks.
    """

    name: str
    dim: int
    size: int
    full_size: int
    stands_for: float | None = None

    @property
    def scale(self) -> float:
        """What an element stands for, ``full_size / size``."""
        return (self.full_size if self.stands_for is None else self.stands_for) / self.size


def base_distribution(fn: Any) -> Any:
    """The distribution inside what makes it independent, masked or expanded.

    >>> import torch, pyro.distributions as dist
    >>> type(base_distribution(dist.Normal(torch.zeros(3), 1.0).to_event(1).mask(False))).__name__
    'Normal'
    """
    while hasattr(fn, "base_dist") and type(fn).__name__ in (
        "Independent",
        "MaskedDistribution",
        "ExpandedDistribution",
    ):
        fn = fn.base_dist
    return fn


def can_draw(fn: Any) -> bool:
    """Whether a distribution has draws, and not only a density.

    >>> import pyro.distributions as dist
    >>> class Density(dist.TorchDistribution):
    ...     arg_constraints = {}
    >>> can_draw(dist.Normal(0.0, 1.0).expand([3])), can_draw(Density(validate_args=False))
    (True, False)
    """
    kind = type(base_distribution(fn))
    return any(getattr(kind, name, None) is not getattr(Distribution, name) for name in ("sample", "rsample"))


def kind_of(fn: Any) -> str:
    """Name of the family of a distribution, without what expands, masks or reshapes it."""
    base = base_distribution(fn)
    return str(getattr(base, "kind", type(base).__name__))


def is_delta(site: Any) -> bool:
    """Whether the site is a deterministic value (``Delta``), such as the second half of every autoguide's draw."""
    return kind_of(site["fn"]) == "Delta"


def is_computed(site: Any) -> bool:
    """Whether the site's value is computed from other draws, by a kernel that is a map, and not drawn."""
    return bool(getattr(base_distribution(site["fn"]), "computed", False))


def is_subsample(site: Any) -> bool:
    """Whether the site is the index draw of a subsampled plate."""
    return site["type"] == "sample" and isinstance(site["fn"], _Subsample)


def sample_sites(trace: Any) -> Iterator[tuple[str, Site]]:
    """The sample sites of a trace, without the index draws of subsampled plates."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not is_subsample(site):
            yield name, site


def latent_sites(trace: Any) -> dict[str, Site]:
    """The unobserved sample sites of a trace."""
    return {name: site for name, site in sample_sites(trace) if not site["is_observed"]}


def is_deterministic(site: Any) -> bool:
    """Whether the site came from ``pyro.deterministic``, or is what ``poutine.reparam`` left of a latent site."""
    left_over = site["is_observed"] and getattr(site["fn"], "_mask", None) is False and is_delta(site)
    return bool(site["infer"].get("_deterministic")) or left_over


def is_factor(site: Site) -> bool:
    """Whether the site came from ``pyro.factor``."""
    return kind_of(site["fn"]) == "Unit"


def is_enumerated(site: Site) -> bool:
    """Whether the site's values are enumerated in parallel instead of drawn."""
    return site["infer"].get("_enumerate_dim") is not None


def site_plates(site: Site) -> tuple[Plate, ...]:
    """The vectorised plates around a site, left to right, without the particle plate."""
    if not site["cond_indep_stack"]:
        return ()
    frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
    return tuple(_plate(f, site) for f in sorted(frames, key=lambda f: f.dim))


def separately(site: Site, num_particles: int, nesting: int) -> Tensor:
    """Values of a site, ``(num_particles, ...)``, each in the shape that it has without particles.

    >>> import pyro, pyro.distributions as dist
    >>> with pyro.poutine.trace() as found, pyro.plate("particles", 5, dim=-2), pyro.plate("data", 3):
    ...     value = pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    >>> site = found.trace.nodes["y"]
    >>> site = {**site, "cond_indep_stack": site["cond_indep_stack"][-1:]}
    >>> separately(site, 5, nesting=1).shape
    torch.Size([5, 3, 2])
    >>> separately({**site, "value": value[0]}, 5, nesting=1).shape  # one value of all particles
    torch.Size([5, 3, 2])
    >>> separately({**site, "value": value[:1]}, 5, nesting=1).shape
    torch.Size([5, 3, 2])
    """
    value: Tensor = site["value"]
    depth = site["fn"].event_dim + max((-plate.dim for plate in site_plates(site)), default=0)
    if value.dim() <= nesting + site["fn"].event_dim:  # not one for each particle
        return value.expand(num_particles, *value.shape)
    own = value.shape[value.dim() - depth :]
    return value.expand(num_particles, *value.shape[1:]).reshape(num_particles, *own)


def _plate(frame: Any, site: Site) -> Plate:
    if int(frame.size) >= 0:
        full = float(frame.full_size or frame.size)
        return Plate(frame.name, frame.dim, int(frame.size), int(full), None if full.is_integer() else full)
    batch = tuple(site["fn"].batch_shape)  # pyro.plate("data"): as large as what is inside
    size = int(batch[frame.dim]) if len(batch) >= -frame.dim else 1
    return Plate(frame.name, frame.dim, size, size)


def event_dims(site: Site) -> int | None:
    """Event dimensions of a deterministic site inside plates: the declared ones, or else the fewest that leave batch
    dimensions which fit its plates. ``None`` outside of plates, where the whole shape is one event."""
    shape, plates = tuple(site["value"].shape), site_plates(site)
    sizes = {p.dim: p.size for p in plates}
    declared = site["fn"].event_dim
    fewest = 0 if declared == len(shape) else declared
    for event in range(fewest, len(shape) + 1) if plates else ():
        batch = zip(range(-1, -1 - len(shape), -1), reversed(shape[: len(shape) - event]), strict=False)
        if all(size in (1, sizes.get(dim)) for dim, size in batch) and len(shape) - event <= -min(sizes):
            return event
    return None


def batch_plates(site: Site) -> tuple[Plate, ...]:
    """The plates around a site, left to right, and what is right of one and in no plate, as ``y_dim_0`` of site y."""
    plates = {p.dim: p for p in site_plates(site)}
    value, events = site["value"], len(site["fn"].event_shape)
    batch = tuple(torch.broadcast_shapes(site["fn"].batch_shape, value.shape[: value.dim() - events]))
    found: dict[int, Plate] = {}
    for dim in range(min(plates, default=0), 0):
        size = batch[dim] if len(batch) >= -dim else 1
        if dim in plates:
            found[dim] = plates[dim]
        elif size != 1:
            found[dim] = Plate(f"{site['name']}_dim_{len(found) - len(plates.keys() & found.keys())}", dim, size, size)
    return tuple(found[dim] for dim in sorted(found))


def batch_sizes(site: Site) -> dict[int, int]:
    """Sizes of a site's batch dimensions, left to right: its plates, and what is in no plate."""
    batch = tuple(site["fn"].batch_shape)
    undeclared = {dim - len(batch): size for dim, size in enumerate(batch) if size != 1}
    found = {**undeclared, **{p.dim: p.size for p in site_plates(site)}}
    return dict(sorted(found.items()))


def subsampled_plates(site: Site) -> set[str]:
    """Names of the plates around a site that hold fewer elements than they have."""
    frames = site["cond_indep_stack"]
    return {f.name for f in frames if f.full_size is not None and f.full_size != f.size}


def common_plates(sites: list[Site]) -> tuple[Plate, ...]:
    """The plates around every one of the sites, left to right."""
    if not sites:
        return ()
    names = set.intersection(*({p.name for p in site_plates(s)} for s in sites))
    return tuple(p for p in site_plates(sites[0]) if p.name in names)
