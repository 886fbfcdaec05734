"""Batch and match: a full-rank Gaussian from the scores of the target, by updates in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pplvi.guides.search.base import FoundGuide
from pplvi.guides.search.explore import elbos, explore
from pplvi.guides.search.gaussians import Gaussian, stack_gaussians
from pplvi.guides.search.lbfgs import Options
from pplvi.guides.search.matching import Factored, Full
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Plural, Positive, Seed
from pplvi.programs.deadline import is_time_over
from pplvi.programs.density import UnconstrainedDensity
from pplvi.programs.ways import Vectorize
from pplvi.types import Program

__all__ = ["AutoBatchAndMatch"]

_SCOUT_DRAWS, _JUDGE_DRAWS = 25, 500
_AVERAGED = 0.25  # of the iterations, at the end
LOW_RANK_ABOVE = 256  # dimensions: batches are larger than that below, and small beyond
_FULL_UP_TO, _FACTORS = 1000, 32  # dimensions of a full covariance; factors of those in more


@checked
class AutoBatchAndMatch(FoundGuide):
    r"""Batch and match: the full-rank Gaussian whose score agrees best with the posterior's.

    .. math:: \min_{\mu, \Sigma} E_{z \sim q_t} \| \nabla \log q(z) - \nabla \log p(x, z) \|^2_{\Sigma}
        + \tfrac{2}{\lambda_t} KL(q_t \| q), \qquad q = \mathrm{Normal}(\mu, \Sigma)

    over the latents packed into ``(latent_dim,)`` after Pyro's ``biject_to``. With the means and covariances
    ``z, C`` of a batch of draws and ``g, G`` of their scores, the minimum is

    .. math:: \Sigma_{t+1} = 2 V \big(I + (I + 4 U V)^{1/2}\big)^{-1}, \qquad
        \mu_{t+1} = \tfrac{1}{1 + \lambda} \mu_t + \tfrac{\lambda}{1 + \lambda} (\Sigma_{t+1} \bar g + \bar z)

    .. math:: U = \lambda G + \tfrac{\lambda}{1 + \lambda} \bar g \bar g^T, \qquad
        V = \Sigma_t + \lambda C + \tfrac{\lambda}{1 + \lambda} (\mu_t - \bar z)(\mu_t - \bar z)^T

    No learning rate, no entropy, no gradient of the objective: where the posterior is Gaussian it is found in a few
    steps. It starts at the best Gaussian of Pathfinder's paths, with ``lambda = batch_size * latent_dim / (t + 1)``;
    the last quarter of the iterations is averaged. If the Gaussian found has a smaller ELBO than the start, the start
    is kept. Batches smaller than the dimension change the covariance by a low rank, at ``batch_size * latent_dim^2``
    operations. In more than a thousand dimensions the covariance is ``diag(psi) + L L^T`` with few factors ``L``, on
    which each update is projected (the *patch*), at ``(rank + batch_size)^2 * latent_dim`` operations: memory and work
    are linear in the dimension.

    There is nothing to train: the first call runs it, :meth:`run` runs it again. After a run, ``elbo`` is its ELBO, in
    nats.

    Source: Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei and Saul 2024, Batch and match: black-box variational
    inference with a score-based divergence, ICML; Modi, Gower, Margossian, Yao, Blei and Saul 2023, Variational
    inference with Gaussian score matching, NeurIPS; Modi, Cai and Saul 2025, Batch, match, and patch: low-rank
    approximations for score-based variational inference, AISTATS.

    :param model: a Pyro model; its latent sites are continuous or enumerated, its plates are not subsampled.
    :param batch_size: draws in an iteration; unless given, twice the dimension and at least 128 in up to 256
        dimensions, 128 in more, and 64 where the covariance has factors.
    :param rank: factors of the covariance; unless given, it is full in up to 1,000 dimensions, and has 32 in more.
    :param num_iterations: how many updates.
    :param num_paths: paths of Pathfinder, of which the best Gaussian is the start.
    :param start: a guide that was found for the same model and data, whose best Gaussian is the start, without paths.
    :param init_radius: of the paths, as ``init_loc_fn``, ``seed`` and ``vectorize`` of :class:`pplvi.AutoPathfinder`.
    :raises ValueError: where :class:`pplvi.AutoPathfinder` does.

    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("z", dist.MultivariateNormal(torch.ones(2), torch.tensor([[1.0, 0.8], [0.8, 1.0]])))
    >>> AutoBatchAndMatch(model, seed=0).run().get_posterior().variance.round(decimals=2)  # mean field: 0.36
    tensor([1., 1.])
    """

    def __init__(
        self,
        model: Program,
        *,
        batch_size: Plural | None = None,
        rank: Count | None = None,
        num_iterations: Count = 200,
        num_paths: Count = 4,
        start: FoundGuide | None = None,
        init_radius: Positive = 2.0,
        init_loc_fn: Callable[..., Any] | None = None,
        seed: Seed | None = None,
        vectorize: Vectorize = None,
    ) -> None:
        super().__init__(model, init_radius=init_radius, init_loc_fn=init_loc_fn, seed=seed, vectorize=vectorize)
        self._batch_size, self._num_iterations, self._num_paths = batch_size, num_iterations, num_paths
        self._begin, self._rank = start, rank
        self.elbo = float("nan")

    def _find(self, density: UnconstrainedDensity) -> Gaussian:
        few = self._rank or (_FACTORS if density.dim > _FULL_UP_TO else None)
        found, self.elbo = matched(density, self._first(density), self._num_iterations, self._batch_size, few)
        return stack_gaussians([found])

    def _first(self, density: UnconstrainedDensity) -> Gaussian:
        """The best Gaussian of the paths, or that of the guide to start at."""
        if self._begin is None:
            options = Options(precision=torch.finfo(density.dtype).eps)
            return explore(density, self._starts(density, self._num_paths), options, _SCOUT_DRAWS)[1][0]
        return Gaussian(*(part[0] for part in self._begin._components(density)))


def matched(
    density: UnconstrainedDensity, start: Gaussian, num_iterations: int, size: int | None = None, few: int | None = None
) -> tuple[Gaussian, float]:
    """What batch and match makes of a Gaussian, or the Gaussian itself where that has the larger ELBO; and its ELBO.

    :param density: the target.
    :param num_iterations: how many updates; they end when the time is over.
    :param size: draws in an update.
    :param few: factors of the covariance, which is full unless given.
    """
    found = _matched(density, start, num_iterations, size or _default_batch(density.dim, few), few)
    choices = [start] if found is None else [found, start]
    judged = elbos(density, choices, _JUDGE_DRAWS)
    return choices[judged.index(max(judged))], max(judged)


def _matched(
    density: UnconstrainedDensity, start: Gaussian, num_iterations: int, size: int, few: int | None
) -> Gaussian | None:
    current: Any = Full.of(start) if few is None else Factored.of(start, few)
    first = int((1 - _AVERAGED) * num_iterations)  # of those that are averaged
    mean = None
    for t in range(num_iterations):
        batch = None if is_time_over() else _batch(density, current, size)
        if batch is None:
            break
        try:
            current = current.updated(*batch, size * density.dim / (t + 1))
        except LinAlgError:  # of scores so large that a covariance cannot be factorised
            break
        if t >= first:
            mean = current if mean is None else mean.towards(current, 1 / (t - first + 1))
    found: Gaussian | None = (current if mean is None else mean).gaussian()
    return found


def _default_batch(dim: int, few: int | None) -> int:
    if few is not None:
        return 64
    return max(128, 2 * dim) if dim <= LOW_RANK_ABOVE else 128


def _batch(density: UnconstrainedDensity, current: Full | Factored, size: int) -> tuple[Tensor, Tensor] | None:
    """Draws and their scores, of the rows that are finite; ``None`` where there are none to speak of."""
    draws = current.sample(size)
    if draws is None:
        return None
    value, scores = density.value_and_gradient(draws)
    good = value.isfinite() & scores.square().sum(1).isfinite()
    return (draws[good], scores[good]) if int(good.sum()) >= 2 else None
