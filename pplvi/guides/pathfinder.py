"""Pathfinder: Gaussians from the paths of a quasi-Newton optimiser, as a guide and as the start of other guides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous, init_to_median, init_to_value
from pyro.infer.autoguide.guides import prototype_hide_fn
from torch import Tensor
from torch.distributions import biject_to

from pplvi.environment import preserved_rng
from pplvi.guides._base import ContinuousGuide
from pplvi.guides._density import UnconstrainedDensity, is_summed, outside_of_handlers
from pplvi.guides._gaussians import Gaussian, GaussianMixture, stack
from pplvi.guides._lbfgs import Options, minimise
from pplvi.guides._matching import match_moments
from pplvi.guides._scouts import Path, Scout, check_proper, improper
from pplvi.seeding import random_state

__all__ = ["AutoPathfinder", "Path", "init_to_pathfinder"]

_PARTS = Gaussian._fields
_TRIES = 100


class AutoPathfinder(ContinuousGuide):
    r"""Pathfinder: the best local Gaussian of each of several quasi-Newton paths, mixed with equal weights.

    .. math:: q(z) = \frac1I \sum_{i=1}^I \mathrm{Normal}(z; \mu_i, H_i^{-1}), \qquad
        \mu = z_l + H^{-1} \nabla \log p(z_l), \quad
        l = \arg\max_l \frac1K \sum_{k=1}^K \log p(x, z_k) - \log q_l(z_k)

    with ``z`` the latents packed into ``(latent_dim,)`` after Pyro's ``biject_to``, densities in nats. L-BFGS climbs
    the unconstrained log density from random starts, all paths in one run of the model under the particle plate; every
    iterate has a Gaussian whose covariance is the factored inverse Hessian, diagonal plus rank ``2 * history``; the
    ELBOs of a path share their noise. It costs about one evaluation of model and gradient for each iteration and
    ``elbo_draws`` evaluations without gradient for each iterate.

    There is nothing to train: the first call runs it, :meth:`run` runs it again, for new data. The density is that of
    the whole mixture, so that importance weights are right: ``Posterior(model, guide, args)`` has k-hat, evidence and,
    by ``resample``, the Pareto-smoothed draws of multi-path Pathfinder. Enumerated sites
    (``pyro.infer.config_enumerate(model)``) are summed out. Use float64 where posteriors are narrow.
    ``num_evaluations`` counts the rows that went through the model in the last run, ``num_gradients`` those with a
    gradient. With ``exact_hessian=False, moment_matching=0`` it is the paper's multi-path Pathfinder with Stan's
    settings; the two additions make it exact for Gaussian posteriors and raise the effective sample size elsewhere.

    Args:
        model: a Pyro model; its latent sites are continuous or enumerated, its plates are not subsampled.
        num_paths: how many paths; one gives a Gaussian.
        history: how many pairs the inverse Hessian keeps.
        max_iterations: the most iterations of a path.
        elbo_draws: draws ``K`` behind each ELBO.
        exact_hessian: give a converged path one Gaussian more, that of the exact Hessian at its end, in up to 100
            dimensions. ``False`` is the paper.
        moment_matching: rounds of adaptive importance sampling, from the mixture of the paths to the Gaussian with the
            moments of the posterior, in up to 100 dimensions; the result replaces the mixture only where it has more
            effective draws. 0 is the paper.
        init_radius: starts are uniform on ``(-init_radius, init_radius)`` in every unconstrained coordinate.
        init_loc_fn: start from this instead, any of Pyro's ``init_to_*``, called anew for each path.
        tolerances: Stan's settings ``tol_obj``, ``tol_rel_obj``, ``tol_grad``, ``tol_rel_grad``, ``tol_param`` and
            ``init_alpha``, in place of its defaults.
        seed: makes runs reproducible and leaves the global random state as it was.
        vectorize: run paths and draws in one call of the model; ``False`` for models that allow no other way.

    Raises:
        ValueError: for settings out of range; on the first run, for a model without latent sites, with discrete ones
            that are not enumerated, with subsampled plates, whose log density is not finite at any start (with the
            first bad site), or whose posterior is improper as far as the paths can tell.

    References:
        Zhang, Carpenter, Gelman and Vehtari 2022, Pathfinder: Parallel quasi-Newton variational inference, JMLR
        23(306).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> guide = AutoPathfinder(model, seed=0).run(torch.tensor([1.0, -2.0, 3.0, -1.0]))
        >>> round(guide.median()["scale"].item(), 1), [path.reason for path in guide.paths]
        (2.0, ['converged', 'converged', 'converged', 'converged'])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_paths: int = 4,
        history: int = 6,
        max_iterations: int = 1000,
        elbo_draws: int = 25,
        exact_hessian: bool = True,
        moment_matching: int = 10,
        init_radius: float = 2.0,
        init_loc_fn: Callable[..., Any] | None = None,
        tolerances: Mapping[str, float] | None = None,
        seed: int | None = None,
        vectorize: bool = True,
    ) -> None:
        if isinstance(moment_matching, bool) or not isinstance(moment_matching, int) or moment_matching < 0:
            raise ValueError(f"moment_matching is {moment_matching!r}; expected a number of rounds, 0 for none")
        _check_counts(num_paths=num_paths, history=history, max_iterations=max_iterations, elbo_draws=elbo_draws)
        if isinstance(init_radius, bool) or not 0 < float(init_radius) < math.inf:
            raise ValueError(f"init_radius is {init_radius!r}; expected a positive finite number, for example 2.0")
        super().__init__(model, init_loc_fn=partial(_init_site, init_loc_fn or _init_to_zero))
        self._model: Any = (self._model[0], model)  # shared by copies, left out by pickle
        self._options = _options(history, max_iterations, tolerances or {})
        self._num_paths, self._elbo_draws, self._init_radius = num_paths, elbo_draws, float(init_radius)
        self._exact_hessian, self._moment_matching = exact_hessian, moment_matching
        self._init_loc_fn, self._seed, self._vectorize = init_loc_fn, seed, vectorize
        self._paths: tuple[Path, ...] = ()
        self.num_gradients = self.num_evaluations = 0

    # ------------------------------------------------------------------ running

    def run(self, *args: Any, **kwargs: Any) -> AutoPathfinder:
        """Search for the posterior given the model's arguments, anew if it ran before.

        Returns:
            The guide itself.

        Raises:
            ValueError: see the class.
        """
        for name in _PARTS:
            self._buffers.pop(name, None)
        self._setup_prototype(*args, **kwargs)
        return self

    @staticmethod
    def _prototype_hide_fn(msg: Any) -> bool:
        return bool(prototype_hide_fn(msg)) or is_summed(msg)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            with preserved_rng(active=self._seed is not None):
                self._read_model(*args, **kwargs)
            if "loc" not in self._buffers:  # else its result was loaded by load_state_dict
                with random_state(self._seed), outside_of_handlers():
                    self._search(args, kwargs)
            self._check_size()
        except BaseException:
            self.prototype_trace = None  # the next run starts over instead of finding half a guide
            raise

    @property
    def _target(self) -> Callable[..., Any]:
        model: Callable[..., Any] = self._model[1]
        return model

    def _check_size(self) -> None:
        if self.loc.shape[-1] != self.latent_dim:
            raise ValueError(
                f"this {type(self).__name__} holds a posterior of {self.loc.shape[-1]} unconstrained coordinates, but "
                f"the model has {self.latent_dim} for these arguments; call guide.run(*args) to fit it to them"
            )

    def _search(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        wrapped, model = self.model, self._target
        density = UnconstrainedDensity(model, args, kwargs, prototype=wrapped, vectorize=self._vectorize)
        options = Options(**self._options, precision=torch.finfo(density.dtype).eps)
        starts = self._starts(density)
        scouts = [Scout(density, options.history, self._elbo_draws) for _ in starts]
        trails = minimise(density.descent, starts, options, [scout.is_past for scout in scouts])
        pairs = zip(scouts, trails, strict=True)
        found = [scout.finish(trail, exact=self._exact_hessian) for scout, trail in pairs]
        self._paths = tuple(path for path, _ in found)
        kept = {scout: gaussian for scout, (_, gaussian) in zip(scouts, found, strict=True) if gaussian is not None}
        if not kept:
            raise improper(f"none of {len(trails)} paths has a Gaussian: they ended by {[t.reason for t in trails]}")
        peak = max(-point.value for trail in trails for point in trail.points)
        for scout, gaussian in kept.items():
            check_proper(density, gaussian, scout.hessian, peak)
        ordered = [kept[scout] for scout in sorted(kept, key=lambda scout: -scout.elbos[scout.best])]  # best first
        matched = match_moments(density, stack(ordered), self._moment_matching)
        for name, value in zip(_PARTS, matched, strict=True):
            self.register_buffer(name, value.to(density.device, density.dtype))
        self.num_gradients, self.num_evaluations = density.gradients, density.rows

    def _starts(self, density: UnconstrainedDensity) -> list[Tensor]:
        starts = torch.stack([self._start(density) for _ in range(self._num_paths)])
        for _ in range(_TRIES):
            value, gradient = density.value_and_gradient(starts)
            bad = ~(value.isfinite() & gradient.isfinite().all(1))
            if not bool(bad.any()):
                still = gradient.norm(dim=1) < self._options.get("tol_grad", Options.tol_grad)
                starts[still] += 0.05 * torch.stack([self._uniform(density) for _ in starts])[still]
                return list(starts.double())  # from a stationary point there would be no path, and no curvature
            last = starts[bad][0]
            starts[bad] = torch.stack([self._start(density) for _ in range(int(bad.sum()))])
        site = density.bad_site(last)
        where = f"the first bad site is {site!r}" if site else "every site is finite, but the gradient is not"
        raise ValueError(
            f"{type(self).__name__} found no start with a finite log density in {_TRIES} tries; {where}. Expected a "
            "finite density near the start: look for NaN in the data and values outside of a support, use a smaller "
            "init_radius, or name a start by init_loc_fn=init_to_value(values={...})."
        )

    def _uniform(self, density: UnconstrainedDensity) -> Tensor:
        return self._init_radius * (2 * torch.rand(density.dim, dtype=density.dtype, device=density.device) - 1)

    def _start(self, density: UnconstrainedDensity) -> Tensor:
        if self._init_loc_fn is None:
            return self._uniform(density)
        trace = self.prototype_trace
        with torch.no_grad():
            values = {n: self._init_loc_fn(site) for n, site in trace.iter_stochastic_nodes()}  # type: ignore[union-attr]
        return density.pack(values)

    # ------------------------------------------------------------------ results

    @property
    def paths(self) -> tuple[Path, ...]:
        """What each path found; empty before the first run and after ``load_state_dict``."""
        return self._paths

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site of the model; same arguments as the model. The first call runs the paths."""
        return AutoContinuous.forward(self, *args, **kwargs)

    def get_posterior(self, *args: Any, **kwargs: Any) -> GaussianMixture:
        """The mixture over the packed unconstrained latents.

        Raises:
            ValueError: the guide has not run yet.
        """
        return GaussianMixture(self._gaussians)

    @property
    def _gaussians(self) -> Gaussian:
        self._need_prototype("density")
        return Gaussian(*(self._buffers[name] for name in _PARTS))  # type: ignore[arg-type]

    def _latent_draws(self, *args: Any, **kwargs: Any) -> Tensor:
        mixture = GaussianMixture(self._gaussians)
        noise = torch.cat(list(self._base_draws()))
        pairs = torch.arange(len(noise) // 2, device=noise.device) % len(self.loc)  # both of a pair in one component
        return mixture.transport(noise, pairs.repeat(2))

    def best_values(self) -> dict[str, Tensor]:
        """Constrained values of the sites at the mean of the Gaussian with the best ELBO.

        Raises:
            ValueError: the guide has not run yet.
        """
        parts = self._gaussians
        return {name: biject_to(fn.support)(z[0]) for name, fn, z in self._split(parts.loc[:1])}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_init_loc_fn": None}  # without a model it cannot run again

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for (
            name
        ) in _PARTS:  # a guide that has not run, or ran with other numbers of paths, takes the shapes it is given
            if prefix + name in state_dict:
                self.register_buffer(name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args)


def init_to_pathfinder(
    model: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """An ``init_loc_fn`` for any guide: the mean of the best Gaussian that Pathfinder finds. It runs at once.

    Args:
        model: the model that the guide is for.
        args: the positional arguments to fit it to.
        kwargs: the keyword arguments.
        **options: options of :class:`AutoPathfinder`.

    Returns:
        A function from a site to its initial value, of the shape of the site, constrained; sites that the model does
        not have are started by ``init_to_median``.

    Raises:
        ValueError: where :class:`AutoPathfinder` does.

    References:
        Zhang, Carpenter, Gelman and Vehtari 2022, Pathfinder, JMLR 23(306), section 4.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("x", dist.Normal(5.0, 0.1))
        >>> guide = AutoNormal(model, init_loc_fn=init_to_pathfinder(model, seed=0))
        >>> guide()["x"].shape, round(guide.median()["x"].item(), 2)
        (torch.Size([]), 5.0)
    """
    guide = AutoPathfinder(model, **options).run(*args, **(kwargs or {}))
    return init_to_value(values=guide.best_values(), fallback=init_to_median)


def _init_site(init: Callable[..., Any], site: Any) -> Any:
    return site["fn"].sample() if is_summed(site) else init(site)


def _init_to_zero(site: Any) -> Tensor:
    """The value at zero in unconstrained space, which also exists where nothing can be drawn (improper priors)."""
    transform, fn = biject_to(site["fn"].support), site["fn"]
    return transform(torch.zeros(transform.inverse_shape(fn.shape()))).expand(fn.shape())


def _options(history: int, max_iterations: int, tolerances: Mapping[str, float]) -> dict[str, Any]:
    known = [f.name for f in fields(Options) if f.name.startswith("tol_")] + ["init_alpha"]
    wrong = {name: value for name, value in tolerances.items() if name not in known or not 0 <= value < math.inf}
    if wrong:
        raise ValueError(f"tolerances has {wrong}; expected numbers of at least 0 for some of {sorted(known)}")
    return {"history": history, "max_iterations": max_iterations, **tolerances}


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
