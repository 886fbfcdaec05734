"""Pathfinder: Gaussians from the paths of a quasi-Newton optimiser, as a guide and as the start of other guides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from pyro.infer.autoguide import init_to_median, init_to_value
from torch import Tensor

from pplvi.guides.search.base import FoundGuide
from pplvi.guides.search.batch_and_match import LOW_RANK_ABOVE, matched
from pplvi.guides.search.explore import OptimizationPath, explore
from pplvi.guides.search.gaussians import Gaussian, stack_gaussians
from pplvi.guides.search.lbfgs import Options
from pplvi.guides.search.moments import MOST_DIMENSIONS, match_moments
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Natural, Positive, Seed
from pplvi.programs.calls import check_counts
from pplvi.programs.density import UnconstrainedDensity
from pplvi.programs.ways import Vectorize
from pplvi.types import Program

__all__ = ["AutoPathfinder", "OptimizationPath", "init_to_pathfinder"]

_UPDATES = 3  # of batch and match in the place of a round of importance sampling, which many dimensions defeat
_POINTS, _VALLEY = 17, 2.0  # on the way from one mode to another; nats
_AS_HIGH = 10.0  # nats


@checked
class AutoPathfinder(FoundGuide):
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
    settings; the additions make it exact for Gaussian posteriors and raise the effective sample size elsewhere.

    Source: Zhang, Carpenter, Gelman and Vehtari 2022, Pathfinder: Parallel quasi-Newton variational inference, JMLR
    23(306).

    :param model: a Pyro model; its latent sites are continuous or enumerated, its plates are not subsampled.
    :param num_paths: how many paths; one gives a Gaussian.
    :param history: how many pairs the inverse Hessian keeps.
    :param elbo_draws: draws ``K`` behind each ELBO.
    :param exact_hessian: give a converged path one Gaussian more, that of the exact Hessian at its end, and let
        Newton's method end a path of more than 50 iterations, in up to 100 dimensions. ``False`` is the paper.
    :param moment_matching: rounds of adaptive importance sampling, from the mixture of the paths to the Gaussian with
        the moments of the posterior, in up to 100 dimensions; the result replaces the mixture only where it has more
        effective draws. In up to 256, where weights would be those of few draws, it is three updates of batch and match
        (:class:`pplvi.AutoBatchAndMatch`) for each, of the best Gaussian and those at other modes. 0 is the paper.
    :param num_components: where that leaves less than nine in ten draws effective, in up to 20 dimensions, mixtures of
        2, 4, ... up to so many Gaussians, by EM on the weighted draws; kept by the same rule. 1 for none.
    :param init_radius: starts are uniform on ``(-init_radius, init_radius)`` in every unconstrained coordinate.
    :param init_loc_fn: start from this instead, any of Pyro's ``init_to_*``, called anew for each path.
    :param lbfgs: settings of L-BFGS in place of Stan's defaults: ``max_iterations`` of a path, ``tol_obj``,
        ``tol_rel_obj``, ``tol_grad``, ``tol_rel_grad``, ``tol_param`` and ``init_alpha``.
    :param seed: makes runs reproducible and leaves the global random state as it was.
    :param vectorize: the way of running rows, ``"broadcast"``, ``"vmap"`` or ``"loop"`` (``False``); the fastest that
        is right for the programs unless named.
    :ivar is_matched: whether the Gaussians are those of batch and match.
    :raises ValueError: for settings out of range; on the first run, for a model without latent sites, with discrete
        ones that are not enumerated, with subsampled plates, whose log density is not finite at any start (with the
        first bad site), or whose posterior is improper as far as the paths can tell.

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
        model: Program,
        *,
        num_paths: Count = 4,
        history: Count = 6,
        elbo_draws: Count = 25,
        exact_hessian: bool = True,
        moment_matching: Natural = 10,
        num_components: Count = 8,
        init_radius: Positive = 2.0,
        init_loc_fn: Callable[..., Any] | None = None,
        lbfgs: Mapping[str, float] | None = None,
        seed: Seed | None = None,
        vectorize: Vectorize = None,
    ) -> None:
        super().__init__(model, init_radius=init_radius, init_loc_fn=init_loc_fn, seed=seed, vectorize=vectorize)
        self._options = _options(history, lbfgs or {})
        self._num_paths, self._elbo_draws = num_paths, elbo_draws
        self._exact_hessian, self._moment_matching = exact_hessian, moment_matching
        self._num_components = num_components
        self.is_matched = False
        self._paths: tuple[OptimizationPath, ...] = ()

    def _find(self, density: UnconstrainedDensity) -> Gaussian:
        options = Options(**self._options, precision=torch.finfo(density.dtype).eps)
        starts = self._starts(density, self._num_paths)
        self._paths, found = explore(density, starts, options, self._elbo_draws, exact=self._exact_hessian)
        if MOST_DIMENSIONS < density.dim <= LOW_RANK_ABOVE and self._moment_matching:
            self.is_matched = True
            return _matched(density, found, _UPDATES * self._moment_matching)
        return match_moments(density, stack_gaussians(found), self._moment_matching, self._num_components)

    @property
    def paths(self) -> tuple[OptimizationPath, ...]:
        """What each path found; empty before the first run and after ``load_state_dict``."""
        return self._paths


@checked
def init_to_pathfinder(
    model: Program, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """An ``init_loc_fn`` for any guide: the mean of the best Gaussian that Pathfinder finds. It runs at once.

    Source: Zhang, Carpenter, Gelman and Vehtari 2022, Pathfinder, JMLR 23(306), section 4.

    :param model: the model that the guide is for.
    :param args: the positional arguments to fit it to.
    :param kwargs: the keyword arguments.
    :param options: options of :class:`AutoPathfinder`.
    :returns: a function from a site to its initial value, of the shape of the site, constrained; sites that the model
        does not have are started by ``init_to_median``.
    :raises ValueError: where :class:`AutoPathfinder` does.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model():
    ...     pyro.sample("x", dist.Normal(5.0, 0.1))
    >>> guide = AutoNormal(model, init_loc_fn=init_to_pathfinder(model, seed=0))
    >>> guide()["x"].shape, round(guide.median()["x"].item(), 2)
    (torch.Size([]), 5.0)
    """
    guide = AutoPathfinder(model, **{"num_components": 1, **options}).run(*args, **(kwargs or {}))
    return init_to_value(values=guide.best_values(), fallback=init_to_median)


def _options(history: int, lbfgs: Mapping[str, float]) -> dict[str, Any]:
    known = {f.name for f in fields(Options)} - {"history", "precision"}
    wrong = {name: value for name, value in lbfgs.items() if name not in known or not 0 <= value < math.inf}
    if wrong:
        raise ValueError(f"lbfgs has {wrong}; expected numbers of at least 0 for some of {sorted(known)}")
    check_counts(max_iterations=lbfgs.get("max_iterations", Options.max_iterations))
    return {"history": history, **lbfgs}


def _matched(density: UnconstrainedDensity, parts: Sequence[Gaussian], num_iterations: int) -> Gaussian:
    """What batch and match makes of the best Gaussian, and of each at a mode of its own that is as high."""
    found: list[tuple[Gaussian, float]] = []
    for part in parts:
        if not any(_is_way(density, part.loc, one.loc) for one, _ in found):
            found.append(matched(density, part, num_iterations))
    least = max(elbo for _, elbo in found) - _AS_HIGH
    return stack_gaussians([one for one, elbo in sorted(found, key=lambda pair: -pair[1]) if elbo >= least])


@torch.no_grad()
def _is_way(density: UnconstrainedDensity, one: Tensor, other: Tensor) -> bool:
    """Whether a straight way from one point to another leads through no valley."""
    points = torch.lerp(one, other, torch.linspace(0.0, 1.0, _POINTS).to(one).unsqueeze(1))
    height = density(points.to(density.dtype)).double().nan_to_num(-math.inf, -math.inf, -math.inf)
    return bool(height.min() > torch.minimum(height[0], height[-1]) - _VALLEY)
