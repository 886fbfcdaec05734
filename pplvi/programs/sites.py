"""Sites and plates of a trace: which are latent, observed, computed, and which plates they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Site = dict[str, Any]


PARTICLES = "all draws in one call"  # messages of Pyro show it


@dataclass(frozen=True)
class Plate:
    """A ``pyro.plate`` as a sample site sees it; ``scale`` is ``full_size / size``."""

    name: str
    dim: int
    size: int
    full_size: int

    @property
    def scale(self) -> float:
        """``full_size / size``."""
        return self.full_size / self.size


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


def is_delta(site: Any) -> bool:
    """Whether the site is a deterministic value (``Delta``), such as the second half of every autoguide's draw."""
    return type(base_distribution(site["fn"])).__name__ == "Delta"


def is_computed(site: Any) -> bool:
    """Whether the site's value is computed from other draws, by a kernel that is a map, and not drawn."""
    return bool(getattr(base_distribution(site["fn"]), "computed", False))


def is_subsample(site: Any) -> bool:
    """Whether the site is the index draw of a subsampled plate."""
    return site["type"] == "sample" and type(site["fn"]).__name__ == "_Subsample"


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
    return type(site["fn"]).__name__ == "Unit"


def is_enumerated(site: Site) -> bool:
    """Whether the site's values are enumerated in parallel instead of drawn."""
    return site["infer"].get("_enumerate_dim") is not None


def site_plates(site: Site) -> tuple[Plate, ...]:
    """The vectorised plates around a site, left to right, without the particle plate."""
    frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
    return tuple(
        Plate(f.name, f.dim, int(f.size), int(f.full_size or f.size)) for f in sorted(frames, key=lambda f: f.dim)
    )


def _subsampled_plates(site: Site) -> set[str]:
    frames = site["cond_indep_stack"]
    return {f.name for f in frames if f.full_size is not None and f.full_size != f.size}


def common_plates(sites: list[Site]) -> tuple[Plate, ...]:
    """The plates around every one of the sites, left to right."""
    if not sites:
        return ()
    names = set.intersection(*({p.name for p in site_plates(s)} for s in sites))
    return tuple(p for p in site_plates(sites[0]) if p.name in names)
