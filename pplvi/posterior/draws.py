"""Draws of a program as plain tensors: values, densities and plates, ready for a posterior or ArviZ.

The draw dimension is leftmost, then a site's plates from left to right, then its event dimensions; no padding is left.
Nothing here carries a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.programs import enumeration
from pplvi.programs.errors import warn
from pplvi.programs.joint import execute
from pplvi.programs.running import plain_run
from pplvi.programs.sites import (
    Plate,
    Site,
    batch_plates,
    event_dims,
    is_delta,
    is_deterministic,
    is_enumerated,
    is_factor,
    kind_of,
    latent_sites,
    sample_sites,
    site_plates,
)
from pplvi.programs.traces import Run
from pplvi.programs.unguided import run_model
from pplvi.programs.ways import Vectorize
from pplvi.types import Call, Program


@checked
@dataclass(frozen=True)
class Draws:
    """``S`` draws of a program.

    :ivar latents: latent sites of the model, constrained, ``(S, *plates, *event)``.
    :ivar deterministics: ``pyro.deterministic`` sites, ``(S, *shape)``.
    :ivar observed: observed values ``(*plates, *event)``; in predictions sampled ones, ``(S, *plates, *event)``.
    :ivar log_likelihood: log density of each observed site, ``(S, *plates)``, nats: event dimensions summed, scales
        left out, masked entries 0, enumerated variables summed out.
    :ivar log_p: log joint density of the model, ``(S, *batch)``, nats.
    :ivar log_q: log density of the guide, ``(S, *batch)``, nats; ``None`` without a guide.
    :ivar batch: the plates of ``batch``: common to all sites.
    :ivar plates: each site's plates, left to right.
    :ivar factors: names of ``pyro.factor`` sites of the model.
    :ivar random: whether the guide has a random latent site at all (a point estimate has none).
    :ivar log_factors: log density of each ``pyro.factor`` of the model, as in ``log_likelihood``; none where sites are
        enumerated.
    """

    latents: dict[str, Tensor]
    deterministics: dict[str, Tensor]
    observed: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]
    log_p: Tensor | None
    log_q: Tensor | None
    batch: tuple[Plate, ...]
    plates: dict[str, tuple[Plate, ...]]
    factors: frozenset[str]
    random: bool = True
    log_factors: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        fields = ("latents", "deterministics", "observed")
        shapes = {field: {n: tuple(v.shape) for n, v in getattr(self, field).items()} for field in fields}
        return f"Draws({', '.join(f'{field}={shown}' for field, shown in shapes.items() if shown)})"

    @property
    def num_draws(self) -> int:
        """Number of draws ``S``."""
        if self.log_p is not None:
            return len(self.log_p)
        return len(next(iter({**self.latents, **self.deterministics, **self.observed}.values())))


@torch.no_grad()
def draw(
    model: Program,
    guide: Program,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_draws: int,
    vectorize: Vectorize = None,
) -> Draws:
    """Draws of a guide, scored by the model: ``log_p - log_q`` is the log importance weight, ``(S, *batch)``, nats.

    :param num_draws: ``S``.
    :param vectorize: the way of running draws, ``"broadcast"``, ``"vmap"`` or ``"loop"``; the fastest that is right
        unless named.
    :raises ValueError: if model and guide do not fit together, or if the guide enumerates a site.

    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(0.5))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(0.25, 0.5**0.5))
    >>> found = draw(model, guide, num_draws=3)
    >>> found.latents["z"].shape, found.log_p - found.log_q  # the guide is exact: the weights are log p(y)
    (torch.Size([3]), tensor([-1.3280, -1.3280, -1.3280]))
    """
    kwargs = kwargs or {}

    def run(size: int) -> Run:
        found = execute(model, guide, args, kwargs, num_particles=size, vectorize=vectorize)
        if found.guide_enumerated:
            names = sorted(name for name, site in latent_sites(found.guide).items() if is_enumerated(site))
            raise ValueError(
                f"the guide enumerates {names}, which averages over their values instead of drawing them: expected a "
                "guide to draw from. Pass the guide without config_enumerate (its parameters stay the same)."
            )
        return found

    shapes = _Shapes(model, args, kwargs)
    return _read(run(_checked(num_draws)), shapes)


@torch.no_grad()
def predict(
    model: Program,
    latents: Mapping[str, Tensor] | None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_draws: int,
    vectorize: Vectorize = None,
) -> Draws:
    """Draws of the model given latent draws (or prior ones, ``latents=None``); observed sites are sampled too.

    :param latents: ``(num_draws, *plates, *event)`` each; sites left out are drawn from the model.
    :returns: :class:`Draws` whose ``observed`` are the predictions and that have no densities.
    :raises ValueError: if a latent does not have the shape that its site has for these arguments.

    >>> import pyro, pyro.distributions as dist
    >>> def model(y):
    ...     pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1e-3), obs=y)
    >>> found = predict(model, {"z": torch.tensor([1.0, 2.0])}, (torch.tensor(0.5),), num_draws=2)
    >>> found.observed["y"].round()
    tensor([1., 2.])
    """
    return _model_draws(model, latents, args, kwargs or {}, num_draws, vectorize, sample_observed=True)


@torch.no_grad()
def score(
    model: Program,
    latents: Mapping[str, Tensor],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_draws: int,
    vectorize: Vectorize = None,
) -> Draws:
    """Score given latent draws, such as those of MCMC, under the model: densities and deterministic sites.

    :param latents: ``(num_draws, *plates, *event)`` each.
    :raises ValueError: if a latent does not have the shape that its site has for these arguments.

    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     pyro.deterministic("double", 2.0 * pyro.sample("z", dist.Normal(0.0, 1.0)))
    >>> found = score(model, {"z": torch.tensor([0.0, 1.0])}, num_draws=2)
    >>> found.log_p, found.deterministics["double"]
    (tensor([-0.9189, -1.4189]), tensor([0., 2.]))
    """
    return _model_draws(model, latents, args, kwargs or {}, num_draws, vectorize, sample_observed=False)


@torch.no_grad()
def log_prior(
    model: Program, call: Call, latents: Mapping[str, Tensor], num_draws: int, vectorize: Vectorize = None
) -> dict[str, Tensor]:
    """Log density of every latent site given those that it depends on, ``(num_draws, *plates)`` each, in nats.

    Nothing where sites are enumerated: what depends on them has no density for one draw.

    >>> import pyro, pyro.distributions as dist
    >>> log_prior(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), ((), {}), {"z": torch.tensor([0.0, 1.0])}, 2)
    {'z': tensor([-0.9189, -1.4189])}
    """
    run = run_model(model, *call, num_particles=num_draws, latents=latents, vectorize=vectorize)
    sites = {n: s for n, s in sample_sites(run.model) if _kind(s) == "latent" and not is_delta(s)}
    return {} if run.enumerated else _log_likelihoods(run, sites)


def _model_draws(
    model: Program,
    latents: Mapping[str, Tensor] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_draws: int,
    vectorize: Vectorize,
    *,
    sample_observed: bool,
) -> Draws:
    shapes, size = _Shapes(model, args, kwargs), _checked(num_draws)
    run = run_model(
        model,
        args,
        kwargs,
        num_particles=size,
        latents=latents,
        sample_observed=sample_observed,
        vectorize=vectorize,
    )
    return _read(run, shapes, predicted=sample_observed)


def _checked(num_draws: int) -> int:
    if num_draws < 1:
        raise ValueError(f"num_draws={num_draws}: expected at least one draw.")
    return num_draws


class _Shapes:
    """Shapes of the deterministic sites, which are plain to see only in a run without particles."""

    def __init__(self, model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._call = model, args, kwargs

    @cached_property
    def plain(self) -> dict[str, Site]:
        """The sites in such a run."""
        run = plain_run(*self._call)
        return {name: site for name, site in sample_sites(run.model) if is_deterministic(site)}

    def compact(self, sites: Mapping[str, Site], run: Run) -> dict[str, Tensor]:
        """Values of the deterministic sites; those that depend on an enumerated one have none for each draw."""
        found = {}
        for name, site in sites.items():
            plain = self.plain.get(name, site)
            event = event_dims(plain)
            width = run.nesting + 1 + (plain["value"].dim() if event is None else event)
            if run.enumerated and site["value"].dim() > width:
                warn(f"deterministic site {name!r} depends on an enumerated site: left out.")
            elif event is None:
                found[name] = _as_plain(site["value"].detach().clone(), tuple(plain["value"].shape), run.num_particles)
            else:
                found[name] = _without_padding(site, run, event, with_draws=True)
        return found


def _as_plain(value: Tensor, shape: tuple[int, ...], num_draws: int) -> Tensor:
    padded = value.dim() > len(shape) and value.shape[0] == num_draws
    return value.reshape(num_draws, *shape) if padded else value.expand(num_draws, *shape)


def _read(run: Run, shapes: _Shapes, *, predicted: bool = False) -> Draws:
    sites = dict(sample_sites(run.model))
    kinds: dict[str, dict[str, Site]] = {"latent": {}, "deterministic": {}, "observed": {}, "factor": {}}
    for name, site in sites.items():
        kinds[_kind(site)][name] = site
    if predicted:
        kinds["observed"] = _drawn(kinds["observed"])
    observed = {n: _compact(s, run, with_draws=predicted) for n, s in kinds["observed"].items()}
    return Draws(
        latents={n: _compact(s, run, with_draws=True) for n, s in kinds["latent"].items()},
        deterministics=shapes.compact(kinds["deterministic"], run),
        observed=observed,
        log_likelihood={} if predicted else _log_likelihoods(run, kinds["observed"]),
        log_p=None if predicted else run.log_target(),
        log_q=run.log_forward() if run.guide.nodes else None,
        batch=run.batch,
        plates={n: _plates(s) for n, s in sites.items()},
        factors=frozenset(kinds["factor"]),
        random=any(not is_delta(s) for s in latent_sites(run.guide).values()),
        log_factors={} if predicted or run.enumerated else _log_likelihoods(run, kinds["factor"]),
    )


def _drawn(sites: Mapping[str, Site]) -> dict[str, Site]:
    """Predicted sites without those that have a density and no draws, whose data stayed as they are."""
    for name, site in sites.items():
        if site["is_observed"]:
            warn(f"site {name!r} is left out of the predictions: {kind_of(site['fn'])} has no sample() to draw with.")
    return {name: site for name, site in sites.items() if not site["is_observed"]}


def _plates(site: Site) -> tuple[Plate, ...]:
    plain = is_deterministic(site) or is_enumerated(site) or not isinstance(site["value"], Tensor)
    return site_plates(site) if plain else batch_plates(site)


def _kind(site: Site) -> str:
    if is_deterministic(site):
        return "deterministic"
    if is_factor(site):
        return "factor"
    if is_enumerated(site):
        return "factor"  # summed out: it has no draws
    return "observed" if site["is_observed"] or site["infer"].get("was_observed") else "latent"


def _compact(site: Site, run: Run, *, with_draws: bool) -> Tensor:
    """A site's value without padding: ``(S, *plates, *event)``, or without ``S`` for data."""
    event = site["value"].dim() if not hasattr(site["fn"], "event_dim") else site["fn"].event_dim
    return _without_padding(site, run, event, with_draws)


def _without_padding(site: Site, run: Run, event: int, with_draws: bool) -> Tensor:
    value = _pad(site["value"], run.nesting + 1 + event)
    # A copy: a point estimate's value may be its live parameter.
    return _select(value, site, run, tuple(value.shape[value.dim() - event :]), with_draws).detach().clone()


def _pad(value: Tensor, dims: int) -> Tensor:
    return value.reshape((1,) * (dims - value.dim()) + tuple(value.shape))


def _select(value: Tensor, site: Site, run: Run, event: tuple[int, ...], with_draws: bool) -> Tensor:
    sizes = {p.dim: p.size for p in site_plates(site)}
    batch = value.shape[value.dim() - len(event) - run.nesting : value.dim() - len(event)]
    undeclared = {dim: size for dim, size in zip(range(-run.nesting, 0), batch, strict=True) if size != 1}
    sizes = {**undeclared, **sizes}
    full = (run.num_particles if with_draws else 1, *(sizes.get(dim, 1) for dim in range(-run.nesting, 0)), *event)
    compact = (*full[:1], *(sizes[dim] for dim in sorted(sizes)), *event)
    if value.dim() > len(full):
        raise ValueError(
            f"site {site['name']!r} has shape {tuple(value.shape)} with all {run.num_particles} draws in one call, "
            f"expected at most {len(full)} dimensions (draws, plates, event). The program may count them from the "
            "left: count from the right."
        )
    value = value[:1] if not with_draws else value
    return value.expand(full).reshape(compact)[0 if not with_draws else slice(None)]


def _log_likelihoods(run: Run, observed: dict[str, Site]) -> dict[str, Tensor]:
    found = {}
    for name, site in observed.items():
        density = _log_likelihood(run, name, site)
        if density is not None:
            found[name] = _select(_pad(density, run.nesting + 1), site, run, (), with_draws=True)
    return found


def _log_likelihood(run: Run, name: str, site: Site) -> Tensor | None:
    if not run.enumerated:
        return _unscaled(run, name, site)
    density = enumeration.log_likelihood(run.model, run.guide, name)
    if density is None:
        warn(
            f"observed site {name!r} has no log likelihood per element: its elements share an enumerated variable. "
            "It is left out of log_likelihood.",
        )
    return density


def _unscaled(run: Run, name: str, site: Site) -> Tensor:
    """Masked log density of a site without any scale."""
    return run.site_log_prob(name, {**site, "scale": run.scale})
