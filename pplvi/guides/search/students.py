"""Mixtures of t distributions that start at the modes which scouts meet, adapted by importance sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import torch
from torch import Tensor

from pplvi.guides.search.base import FoundGuide
from pplvi.guides.search.constant import ConstantMixture
from pplvi.guides.search.explore import check_proper
from pplvi.guides.search.gaussians import Gaussian, full_gaussian
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Positive, Seed
from pplvi.posterior.looking import repays, work_of_row
from pplvi.posterior.scouts import (
    MOST_DIMENSIONS,
    Weighed,
    climbed,
    mixed,
    moments,
    prior_starts,
    screened,
    weighed,
    wide,
)
from pplvi.posterior.students import Students, joined
from pplvi.programs.deadline import is_time_over
from pplvi.programs.density import UnconstrainedDensity
from pplvi.programs.ways import Vectorize
from pplvi.types import Program
from pplvi.weights.algebra import effective_sample_size, log_evidence, normalize
from pplvi.weights.pareto import pareto_smooth

__all__ = ["AutoStudentMixture"]

_SCREENED, _CLIMBING = 80, 16  # far points looked at for each scout, and those that climb
_DEAR = 5e3  # elements computed for a far point from which on fewer are looked at
_GOOD, _GAIN, _ROUNDS, _TRIES = 0.9, 1.02, 60, 2
_FAIR, _MOST_WORK = 0.5, 1e9  # of the draws are effective: no more rounds are worth so many elements computed
_LEAST_DRAWS, _MOST_DRAWS, _DRAWS_OF_DIM = 4_000, 20_000, 200
_FEW_DRAWS, _DEAR_ROUND = 1_000, 2e8  # elements computed in a round from which on it has fewer draws
_ENOUGH = 10  # effective draws for each dimension and component, below which weights are tempered
_TOPS = (0.0, 0.1, 0.3, 0.03, 0.2)  # of the weight, that of the largest weights, which a new component is fitted to
_LIGHTER, _HEAVY = 15.0, 8.0  # degrees of freedom
_SURE_TAILS = 0.5  # k-hat
_LIGHT = 0.02  # nats of evidence that a mixture may not lose, beyond its error


@checked
class AutoStudentMixture(FoundGuide):
    r"""A mixture of multivariate t distributions, from the modes that scouts meet, adapted by importance sampling.

    .. math:: q(z) = \sum_k \alpha_k\, t_{\nu_k}(z; \mu_k, \Sigma_k)

    with ``z`` the latents packed into ``(latent_dim,)`` after Pyro's ``biject_to``. Scouts climb from draws of the
    prior, and from those of many far points at which the density is higher than the modes met so far would have it;
    every mode is a component, shaped by its curvature. Rounds of importance sampling follow, in each of which the
    mixture is fitted to its weighted draws by EM, degrees of freedom included, and a new component goes where weights
    are largest; a round counts if it leaves more effective draws and loses no evidence. Where draws are dear, rounds
    end when they would take more of them than they save. Several modes and heavy tails are what it is for. Degrees of
    freedom are at most 40.

    There is nothing to train: the first call runs it, :meth:`run` runs it again.

    Source: Hoogerheide, Opschoor and van Dijk 2012, A class of adaptive importance sampling weighted EM algorithms for
    efficient and robust posterior and predictive simulation, Journal of Econometrics 171(2); Cappe, Douc, Guillin,
    Marin and Robert 2008, Adaptive importance sampling in general mixture classes.

    :param model: a Pyro model in up to 100 unconstrained dimensions; its latent sites are continuous or enumerated, its
        plates are not subsampled.
    :param num_scouts: how many points climb from the prior; 160 times as many far ones, fewer where they are dear, are
        looked at, for narrow modes.
    :param num_components: the most components; modes beyond it, those of the least mass, are left out.
    :param start: a guide of Gaussians that was found for the same model and data, which are the first components in
        place of what scouts meet: for tails that they are too light for.
    :param init_radius: as ``init_loc_fn``, ``seed`` and ``vectorize`` of :class:`pplvi.AutoPathfinder`: from there four
        more scouts climb.
    :raises ValueError: where :class:`pplvi.AutoPathfinder` does, and in more than 100 dimensions.

    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     x = pyro.sample("x", dist.Normal(0.0, 5.0))
    ...     pyro.sample("y", dist.Normal(x.abs(), 0.5), obs=torch.tensor(6.0))
    >>> guide = AutoStudentMixture(model, seed=0).run()
    >>> guide.loc.squeeze(1).sign().unique()  # both modes
    tensor([-1.,  1.])
    """

    _parts: ClassVar[tuple[str, ...]] = Students._fields

    def __init__(
        self,
        model: Program,
        *,
        num_scouts: Count = 64,
        num_components: Count = 16,
        start: FoundGuide | None = None,
        init_radius: Positive = 2.0,
        init_loc_fn: Callable[..., Any] | None = None,
        seed: Seed | None = None,
        vectorize: Vectorize = None,
    ) -> None:
        super().__init__(model, init_radius=init_radius, init_loc_fn=init_loc_fn, seed=seed, vectorize=vectorize)
        self._num_scouts, self._num_components, self._begin = num_scouts, num_components, start

    def _find(self, density: UnconstrainedDensity) -> Students:
        if density.dim > MOST_DIMENSIONS:
            raise ValueError(
                f"AutoStudentMixture got a model of {density.dim:,} unconstrained dimensions: expected at most "
                f"{MOST_DIMENSIONS}, as it needs second derivatives and full covariances. Use AutoBatchAndMatch or "
                "AutoFlow."
            )
        if self._begin is None:
            start = self._modes(density)
            _check_proper(density, start)
        else:
            start = _heavier(self._begin._components(density)).heaviest(self._num_components)
        return _adapted(density, start, self._num_components)

    def _modes(self, density: UnconstrainedDensity) -> Students:
        call = self._target, density.args, density.kwargs
        near = torch.stack(self._starts(density, 4))
        prior = prior_starts(density, *call, self._num_scouts)
        modes = climbed(density, torch.cat([near, prior]))
        if (seen := mixed(modes)) is None:
            return _spread(torch.cat([near, prior]))
        far = int(_SCREENED * self._num_scouts * min(1.0, _DEAR / work_of_row(density)))
        candidates = torch.cat([prior_starts(density, *call, far), wide(seen, far)])
        found = mixed(climbed(density, screened(density, seen, candidates, _CLIMBING), modes)) or seen
        return found.heaviest(self._num_components)

    @property
    def _students(self) -> Students:
        self._need_prototype("density")
        return Students(*(self._buffers[name] for name in self._parts))  # type: ignore[arg-type]

    def get_posterior(self, *args: Any, **kwargs: Any) -> StudentMixture:
        """The mixture over the packed unconstrained latents.

        :raises ValueError: the guide has not run yet.
        """
        return StudentMixture(self._students)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw the packed latents."""
        return pyro.sample(f"_{self._pyro_name}_latent", self.get_posterior(), infer={"is_auxiliary": True})

    def _latent_draws(self, *args: Any, **kwargs: Any) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._students.sample(self.quantile_draws)


class StudentMixture(ConstantMixture):
    """A mixture of multivariate t distributions; its components are constants, so draws carry no gradient.

    :param parts: the components.
    :param batch_shape: of independent copies.

    >>> one = Students(torch.zeros(1), torch.zeros(1, 2), torch.eye(2)[None], torch.full((1,), torch.inf))
    >>> StudentMixture(one).log_prob(torch.zeros(3, 2)).exp() * 2 * math.pi
    tensor([1., 1., 1.])
    """

    parts: Students

    def rows(self, number: int) -> Tensor:
        """Draws ``(number, dim)``."""
        return self.parts.sample(number)

    def log_prob_of_rows(self, rows: Tensor) -> Tensor:
        """Log densities ``(S,)`` of ``(S, dim)``, in nats."""
        return self.parts.log_prob(rows)


def _check_proper(density: UnconstrainedDensity, start: Students) -> None:
    """Refuse a density that does not fall off around the first components.

    :raises ValueError: with the site in whose direction it does not.
    """
    with torch.no_grad():
        peak = float(density(start.loc.to(density.dtype)).double().nan_to_num(-math.inf).max())
    for loc, tril in zip(start.loc, start.tril, strict=True):
        if (gaussian := full_gaussian(loc, tril @ tril.mT)) is not None:
            check_proper(density, gaussian, None, peak)


def _heavier(parts: Gaussian) -> Students:
    """An equal mixture of Gaussians with heavier tails."""
    flat = torch.zeros_like(parts.loc[:, 0])
    return Students(flat - math.log(len(flat)), parts.loc, torch.linalg.cholesky(parts.covariance), flat + _HEAVY)


def _spread(points: Tensor) -> Students:
    """One component with the moments of points, where no mode was met."""
    flat = torch.zeros(len(points), dtype=points.dtype)
    loc, covariance = moments(Weighed(points, flat, flat))
    tril = torch.linalg.cholesky(covariance + 1e-6 * torch.eye(len(loc)).to(covariance))
    one = torch.zeros(1).to(points)
    return Students(one, loc[None], tril[None], torch.full_like(one, 3.0))


@torch.no_grad()
def _adapted(density: UnconstrainedDensity, start: Students, most: int) -> Students:
    """The mixture after rounds of importance sampling, each with EM and then with a new component."""
    work = work_of_row(density)
    least_draws = min(_LEAST_DRAWS, max(_FEW_DRAWS, int(_DEAR_ROUND / work)))
    size = min(max(least_draws, _DRAWS_OF_DIM * density.dim), _MOST_DRAWS)
    best, found = start, weighed(density, start, size)
    if not bool(found.log_weight.isfinite().all()):
        best = _lighter(start)
        found = weighed(density, best, size)
    if not bool(found.log_weight.isfinite().any()):
        return start
    attempt, least, before = 0, _efficiency(found), density.rows
    for _ in range(_ROUNDS):
        dear = (density.rows - before) * work > _MOST_WORK
        good = _efficiency(found) > (_FAIR if dear else _GOOD)
        if is_time_over() or good or _is_enough(found, work) or attempt == _TRIES * len(_TOPS):
            break
        new = _refitted(best, found, _TOPS[attempt % len(_TOPS)] if len(best.loc) < most else 0.0)
        if not bool(found.log_weight.isfinite().all()):
            new = _lighter(new)
        draws = weighed(density, new, min(size + size * len(new.loc) // 4, _MOST_DRAWS))
        if _is_better(draws, found):
            attempt = 0 if _efficiency(draws) > _GAIN * least else attempt + 1
            best, found = new, draws
            least = max(least, _efficiency(draws))
        else:
            attempt += 1
            found = weighed(density, best, len(found.log_weight))  # what a fit to the old draws led to is known
    return best


def _lighter(mixture: Students) -> Students:
    """With tails that do not reach where the density is not finite, as far as that is where it overflows."""
    return mixture._replace(df=mixture.df.clamp(min=_LIGHTER))


def _refitted(mixture: Students, found: Weighed, top: float) -> Students:
    """After EM on the weighted draws; if ``top`` is positive, with a component more at the largest weights."""
    smoothed = pareto_smooth(found.log_weight)[0]
    if top and (more := _at_the_top(found, smoothed, top)) is not None:
        mixture = joined([mixture, more], torch.tensor([1 - top, top]))
    enough = _ENOUGH * found.position.shape[1] * len(mixture.loc)
    weight = normalize(_tempered(smoothed, min(enough, len(smoothed) / 4)))
    fitted = mixture.fitted(found.position, weight)
    return fitted.with_tails(found.position, weight)


def _at_the_top(found: Weighed, smoothed: Tensor, top: float) -> Students | None:
    """A component for the draws of the largest weights, which make up so much of all weight."""
    weight = normalize(smoothed)
    order = weight.argsort(descending=True)
    number = max(2 * found.position.shape[1] + 2, int((weight[order].cumsum(0) < top).sum()))
    kept = order[:number]
    loc, covariance = moments(Weighed(found.position[kept], found.log_p[kept], smoothed[kept]))
    tril, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed) or not bool(tril.isfinite().all()):
        return None
    one = torch.zeros(1).to(loc)
    return Students(one, loc[None], tril[None], torch.full_like(one, 5.0))


def _tempered(log_weight: Tensor, enough: float) -> Tensor:
    """The weights to the largest power of at most 1, of those tried, that leaves so many effective draws."""
    for power in (1.0, 0.8, 0.6, 0.4, 0.25, 0.15, 0.1, 0.05):
        tempered = (power * log_weight).nan_to_num(-math.inf)
        if float(effective_sample_size(tempered)) >= enough:
            break
    return tempered


def _is_enough(found: Weighed, work: float) -> bool:
    """Whether a better mixture would save fewer draws than a round takes, and tails are no longer in question."""
    if repays(_efficiency(found), len(found.log_weight), work):
        return False
    return float(pareto_smooth(found.log_weight)[1]) < _SURE_TAILS


def _efficiency(found: Weighed) -> float:
    return float(effective_sample_size(found.log_weight)) / len(found.log_weight)


def _is_better(new: Weighed, old: Weighed) -> bool:
    """More effective draws and no less evidence, or more evidence beyond the errors."""
    (a, error), (b, other) = (map(float, log_evidence(each.log_weight)) for each in (new, old))
    margin = 3 * math.hypot(error, other)
    if a - b > max(margin, 0.1):
        return True
    return _efficiency(new) > _efficiency(old) and b - a < max(margin, _LIGHT)
