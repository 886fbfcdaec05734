"""Does a model fit its guide? Asked once for each pair, before the first step, never inside one."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import dropwhile
from typing import Any

import torch
from torch import Tensor

from pplvi.programs.errors import warn
from pplvi.programs.masks import seen
from pplvi.programs.sites import (
    Site,
    common_plates,
    is_delta,
    is_deterministic,
    is_factor,
    latent_sites,
    sample_sites,
    site_plates,
)
from pplvi.programs.traces import Run


def enumerates(run: Run) -> bool:
    """Whether any latent site asks for parallel enumeration."""
    return any(
        s["infer"].get("enumerate") == "parallel" for t in (run.model, run.guide) for s in latent_sites(t).values()
    )


def check_pair(run: Run) -> None:
    """Check sites, shapes, supports, plates and data of one plain run.

    :raises ValueError: with the site, what came, what was expected and what to do.
    """
    check_run(run)
    for name, site in latent_sites(run.model).items():
        if name in run.guide.nodes:
            _check_shapes(name, site, run.guide.nodes[name])
            _check_support(name, site, run.guide.nodes[name])
            _check_masks(name, site, run.guide.nodes[name])
    for trace in (run.guide, run.model):
        for name, site in sample_sites(trace):
            _check_enumeration(name, site)
            _check_data(name, site)
            _check_declared(name, site)
    _warn_of_joint_factors(run)


def check_model_run(run: Run) -> None:
    """Check a run of a model alone, as the model of a pair is checked.

    :raises ValueError: with the site, what came, what was expected and what to do.
    """
    if not latent_sites(run.model):
        raise ValueError(
            "the model has no latent sites, so there is nothing to draw: expected at least one pyro.sample without "
            "obs=. For maximum likelihood train a guide without sites, such as `lambda *args: None`."
        )
    for name, site in sample_sites(run.model):
        _check_data(name, site)
        _check_declared(name, site)


def has_data(run: Run) -> bool:
    """Whether a model has an observed site or a factor."""
    found = (s for _, s in sample_sites(run.model) if s["is_observed"])
    return any(is_factor(site) or not is_deterministic(site) for site in found)


def check_run(run: Run) -> None:
    """Check what may differ from run to run and needs no tensor's value: names of sites, and shared plates.

    :raises ValueError: for sites that are in only one of the two, and plates of different size or dimension.
    """
    _check_names(run)
    _check_plates(run)


def _check_plates(run: Run) -> None:
    guide, model = ({p.name: p for _, s in sample_sites(t) for p in site_plates(s)} for t in (run.guide, run.model))
    for name in guide.keys() & model.keys():
        ours, theirs = ((p.full_size, p.dim) for p in (model[name], guide[name]))
        if ours != theirs:
            raise ValueError(
                f"plate {name!r} has size {theirs[0]} at dimension {theirs[1]} in the guide, expected the model's "
                f"{ours[0]} at {ours[1]}. Give it the same size and dim= on both sides, or two names."
            )


def is_minibatch(run: Run) -> bool:
    """Whether the guide draws from a part of a plate only."""
    return any(p.size < p.full_size for _, s in sample_sites(run.guide) for p in site_plates(s))


def check_minibatch(run: Run, alone: Run) -> None:
    """Check that a plate of which the guide has a part is not whole in the model, which follows the guide's indices.

    :param alone: a run of the model without the guide.
    :raises ValueError: for a guide that goes on drawing the minibatch that it was set up with.
    """
    whole = {p.name: p.size for _, s in sample_sites(alone.model) for p in site_plates(s) if p.size == p.full_size}
    for name, site in sample_sites(run.guide):
        for p in site_plates(site):
            if p.size < whole.get(p.name, 0):
                raise ValueError(
                    f"the guide has {p.size} of {p.full_size} elements of plate {p.name!r} (site {name!r}), but the "
                    f"model with these arguments has all {whole[p.name]}, of which it would use the guide's alone. An "
                    "automatic guide keeps the plates of its first run: set it up on the full data, "
                    "guide(*full_args), or with create_plates=, or subsample the model in the same way."
                )


def _is_auxiliary(site: Site) -> bool:
    return bool(site["infer"].get("is_auxiliary"))


def _check_names(run: Run) -> None:
    model, guide = latent_sites(run.model), latent_sites(run.guide)
    enumerated = {n for n, s in model.items() if s["infer"].get("enumerate") == "parallel"}
    if missing := set(model) - set(guide) - enumerated:
        raise ValueError(
            f"latent sites of the model are missing in the guide: {sorted(missing)}; the guide has {sorted(guide)}. "
            "Sample them in the guide, condition on them, or enumerate them with pyro.infer.config_enumerate(model)."
        )
    if extra := {n for n, s in guide.items() if not _is_auxiliary(s)} - set(model):
        raise ValueError(
            f"sites of the guide are not latent sites of the model: {sorted(extra)}; the model has {sorted(model)}. "
            "Rename them, or mark helper draws with infer={'is_auxiliary': True}."
        )


def _check_shapes(name: str, model: Site, guide: Site) -> None:
    ours, theirs = (_shape(site) for site in (model, guide))
    if ours != theirs:
        raise ValueError(
            f"site {name!r} has shape {theirs} (batch | event) in the guide, expected the model's {ours}. "
            "Check plates, .expand() and .to_event() on both sides."
        )


def _shape(site: Site) -> str:
    batch = tuple(dropwhile(lambda size: size == 1, site["fn"].batch_shape))
    return f"{batch} | {tuple(site['fn'].event_shape)}"


def _check_support(name: str, model: Site, guide: Site) -> None:
    draws = guide["value"] if is_delta(guide) else guide["fn"].sample(torch.Size([64]))
    try:
        inside = bool(model["fn"].support.check(draws).all())
    except NotImplementedError:
        return
    if not inside:
        raise ValueError(
            f"site {name!r}: the guide's {type(guide['fn']).__name__} draws values outside the model's support "
            f"{model['fn'].support}. Use a guide distribution with the same support."
        )


def _check_masks(name: str, model: Site, guide: Site) -> None:
    """Where some elements of a latent are masked in the model alone, the guide's density there has no counterpart."""
    ours, theirs = (seen(site, site["value"]) for site in (model, guide))
    if bool(ours.any()) and bool((theirs & ~ours).any()):
        raise ValueError(
            f"latent site {name!r} is masked at some elements in the model but not in the guide, so that the ELBO "
            "would grow with the guide's entropy there. Mask only what is observed and let the latents of all "
            "elements have their prior, or sample it under the same poutine.mask in a guide of your own."
        )


def differing_site(one: Run, other: Run, particle: int, *, exact: bool = False) -> str | None:
    """Name of the first site whose log density in a particle of one run is not that of another run of it alone.

    Enumerated models are compared as a whole: the name is then that of their last site.

    :param exact: two runs of the same operations are compared, which leave the same numbers to the last digit.
    """
    close = _same if exact else _close
    for ours, theirs in ((one.guide, other.guide), (one.model, other.model)):
        if one.enumerated:
            whole = one.log_target()[particle] - one.log_forward()[particle]
            same = close(whole, other.log_target()[0] - other.log_forward()[0])
            return None if same else list(latent_sites(one.model))[-1]
        mine, alone = one.log_probs(ours), other.log_probs(theirs)
        for name in mine:
            if not close(mine[name][particle], alone[name][0]):
                return name
    return None


class DiffersError(Exception):
    """Several particles that are run in some way have other densities, or other random numbers, than each alone."""


def check_alone(both: Run, alone: Run, again: Run, particle: int) -> None:
    """Check that a particle in one call with another has the densities that it has alone.

    :param again: a second run of it alone: where the two differ, the programs draw random numbers of their own.
    :raises DiffersError: with the site where it has not.
    """
    if differing_site(alone, again, 0, exact=True) is not None:
        return
    if (name := differing_site(both, alone, particle)) is not None:
        raise DiffersError(f"site {name!r} has another log density with two particles in one call than alone.")


def check_divergences(*, enumerated: bool) -> None:
    """Check that divergences of single sites can be had.

    :raises ValueError: for models with enumerated sites, whose densities do not separate.
    """
    if enumerated:
        raise ValueError(
            "entropy='kl' with enumerated sites: they are summed out jointly, and no divergence is one site's. Use "
            "entropy='sampled' (or 'exact')."
        )


def check_close(ours: Tensor, theirs: Tensor) -> None:
    """Check that two densities are equal but for rounding.

    :raises DiffersError: if they are not.
    """
    if not _close(ours, theirs):
        raise DiffersError("the log density of a particle in one call with another is not the one that it has alone.")


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two densities are equal but for rounding, which grows with the largest term of a sum."""
    theirs = theirs.to(ours.dtype)
    size = theirs[theirs.isfinite()].abs()
    atol = 1e-3 * max(1.0, float(size.max()) if size.numel() else 1.0)
    return torch.allclose(ours, theirs, rtol=1e-3, atol=atol, equal_nan=True)


def _check_enumeration(name: str, site: Site) -> None:
    if not site["is_observed"] and site["infer"].get("enumerate") == "sequential":
        raise ValueError(
            f"site {name!r} asks for sequential enumeration: expected infer={{'enumerate': 'parallel'}} "
            "(config_enumerate(fn, default='parallel'))."
        )
    if not site["is_observed"] and site["infer"].get("num_samples") is not None:
        raise ValueError(
            f"site {name!r} asks for local multiple sampling (num_samples=...), which has no weights per particle: "
            "drop num_samples and use num_particles of the objective."
        )


def _check_data(name: str, site: Site) -> None:
    value = site["value"]
    if not site["is_observed"] or is_factor(site) or is_deterministic(site) or not isinstance(value, Tensor):
        return
    if value.is_floating_point() and bool((value.isnan() & seen(site, value)).any()):
        raise ValueError(
            f"the data at site {name!r} contain NaN: expected finite values. Mask missing entries with obs_mask= or "
            "poutine.mask, or drop them."
        )


def check_subsamples(once: Mapping[str, Tensor], again: Mapping[str, Tensor], names: frozenset[str]) -> None:
    """Check that a model gives these plates the same indices at two calls with the same arguments.

    :raises ValueError: if not: the guide could not know which data its local draws belong to.
    """
    for name in names:
        if not torch.equal(torch.as_tensor(once[name]), torch.as_tensor(again[name])):
            raise ValueError(
                f"the model draws new indices for plate {name!r} by itself (subsample=...) at every call: expected "
                "indices that follow from its arguments. Pass them as an argument, or use subsample_size=."
            )


def _check_declared(name: str, site: Site) -> None:
    """Every batch dimension of a site has to be a plate, or to the right of one, where it is summed over as in Pyro."""
    sizes = {p.dim: p.size for p in site_plates(site)}
    leftmost = min(sizes, default=0)
    batch = _batch_shape(name, site)
    for dim, size in zip(range(-1, -1 - len(batch), -1), reversed(batch), strict=True):
        if size != 1 and sizes.get(dim, size if dim > leftmost else None) != size:
            raise ValueError(
                f"site {name!r} has batch shape {batch}, but plates "
                f"{ {p.name: (p.dim, p.size) for p in site_plates(site)} }: expected a plate of size {size} at "
                f"dimension {dim}. Enclose it in pyro.plate, or make the dimension part of one event with .to_event()."
            )


def _batch_shape(name: str, site: Site) -> tuple[int, ...]:
    """Batch shape of a site's log density: that of the distribution and the value together."""
    fn, value = site["fn"], site["value"]
    if is_deterministic(site) or not isinstance(value, Tensor):
        return tuple(fn.batch_shape)
    split = value.dim() - fn.event_dim
    try:
        if split < 0 or value.shape[split:] != torch.broadcast_shapes(value.shape[split:], fn.event_shape):
            raise RuntimeError
        return tuple(torch.broadcast_shapes(fn.batch_shape, value.shape[:split]))
    except RuntimeError as error:
        raise ValueError(
            f"site {name!r} has a value of shape {tuple(value.shape)}, expected {tuple(fn.batch_shape)} | "
            f"{tuple(fn.event_shape)} (batch | event), the shape of its {type(fn).__name__}. Check the data against "
            "the plates and .to_event() of the model."
        ) from error


def _warn_of_joint_factors(run: Run) -> None:
    sites = {n: s for t in (run.model, run.guide) for n, s in sample_sites(t) if not is_deterministic(s)}
    rest = [s for s in sites.values() if not is_factor(s)]
    outside = [n for n, s in sites.items() if is_factor(s) and not site_plates(s)]
    if outside and not run.batch and (lost := common_plates(rest)):
        warn(
            f"the factors {outside} stand outside the plates {[p.name for p in lost]}, so importance weights are joint "
            "over all data instead of one per datum. Move them into the plate if they belong to single data.",
        )


def bad_site_of(run: Run) -> str | None:
    """Name of the first site, guide before model, whose value or log density is not finite, or ``None``."""
    for trace in (run.guide, run.model):
        for name, site in sample_sites(trace):
            if not is_deterministic(site) and _is_bad(run, name, site):
                return name
    return None


def _is_bad(run: Run, name: str, site: Site) -> bool:
    value: Any = site["value"]
    if isinstance(value, Tensor) and value.is_floating_point() and bool((~value.isfinite() & seen(site, value)).any()):
        return True
    try:
        return not bool(run.site_log_prob(name, site).isfinite().all())
    except ValueError:
        return True
