"""Batch and match: a full-rank Gaussian from the scores of the target, by updates in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pplvi.guides.search.base import FoundGuide
from pplvi.guides.search.explore import elbos, explore
from pplvi.guides.search.gaussians import Gaussian, full_gaussian, stack_gaussians
from pplvi.guides.search.lbfgs import Options
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Plural, Positive, Seed
from pplvi.programs.deadline import is_time_over
from pplvi.programs.density import UnconstrainedDensity
from pplvi.programs.ways import Vectorize
from pplvi.types import Program

__all__ = ["AutoBatchAndMatch"]

_SCOUT_DRAWS, _JUDGE_DRAWS = 25, 500
_AVERAGED = 0.25  # of the iterations, at the end
_LOW_RANK_ABOVE = 256  # dimensions: batches are larger than that below, and small beyond


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
    operations, so that thousands of dimensions are in reach.

    There is nothing to train: the first call runs it, :meth:`run` runs it again. After a run, ``elbo`` is its ELBO, in
    nats.

    Source: Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei and Saul 2024, Batch and match: black-box variational
    inference with a score-based divergence, ICML; Modi, Gower, Margossian, Yao, Blei and Saul 2023, Variational
    inference with Gaussian score matching, NeurIPS.

    :param model: a Pyro model; its latent sites are continuous or enumerated, its plates are not subsampled.
    :param batch_size: draws in an iteration; unless given, twice the dimension and at least 128 in up to 256
        dimensions, and 128 in more.
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
        self._begin = start
        self.elbo = float("nan")

    def _find(self, density: UnconstrainedDensity) -> Gaussian:
        start = self._first(density)
        found = self._matched(density, start.loc, start.covariance)
        choices = [start] if found is None else [found, start]
        judged = elbos(density, choices, _JUDGE_DRAWS)
        self.elbo = max(judged)
        return stack_gaussians([choices[judged.index(self.elbo)]])

    def _first(self, density: UnconstrainedDensity) -> Gaussian:
        """The best Gaussian of the paths, or that of the guide to start at."""
        if self._begin is None:
            options = Options(precision=torch.finfo(density.dtype).eps)
            return explore(density, self._starts(density, self._num_paths), options, _SCOUT_DRAWS)[1][0]
        return Gaussian(*(part[0] for part in self._begin._components(density)))

    def _matched(self, density: UnconstrainedDensity, loc: Tensor, covariance: Tensor) -> Gaussian | None:
        size = self._batch_size or _default_batch(density.dim)
        first = int((1 - _AVERAGED) * self._num_iterations)  # of those that are averaged
        total, averaged = (torch.zeros_like(loc), torch.zeros_like(covariance)), 0
        for t in range(self._num_iterations):
            batch = None if is_time_over() else _batch(density, loc, covariance, size)
            if batch is None:
                break
            loc, covariance = update(loc, covariance, *batch, size * density.dim / (t + 1))
            if t >= first:
                total, averaged = (total[0] + loc, total[1].add_(covariance)), averaged + 1
        if averaged:
            loc, covariance = total[0] / averaged, total[1] / averaged
        return full_gaussian(loc, covariance)


def _default_batch(dim: int) -> int:
    return max(128, 2 * dim) if dim <= _LOW_RANK_ABOVE else 128


def _batch(density: UnconstrainedDensity, loc: Tensor, covariance: Tensor, size: int) -> tuple[Tensor, Tensor] | None:
    """Draws and their scores, of the rows that are finite; ``None`` where there are none to speak of."""
    tril, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed):
        return None
    draws = loc + torch.randn(size, density.dim).to(loc) @ tril.mT
    value, scores = density.value_and_gradient(draws)
    good = value.isfinite() & scores.isfinite().all(1)
    return (draws[good], scores[good]) if int(good.sum()) >= 2 else None


def update(loc: Tensor, covariance: Tensor, draws: Tensor, scores: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """One update of batch and match.

    :param loc: mean, ``(dim,)``.
    :param covariance: ``(dim, dim)``.
    :param draws: from that Gaussian, ``(batch, dim)``.
    :param scores: gradient of the target's log density at them, ``(batch, dim)``.
    :param rate: the inverse regularisation, positive.
    :returns: the new mean and covariance.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    >>> target = torch.tensor([2.0, 3.0], dtype=torch.float64)  # precisions
    >>> start = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    >>> update(*start, z, -target * z, rate=1e6)[1].diagonal()  # to the variances of the target, in one step
    tensor([0.5000, 0.3333], dtype=torch.float64)
    """
    share = rate / (1 + rate)
    centre, force = draws.mean(0), scores.mean(0)
    spread = torch.cat([(rate / len(draws)) ** 0.5 * (draws - centre), share**0.5 * (loc - centre)[None]])
    pull = torch.cat([(rate / len(scores)) ** 0.5 * (scores - force), share**0.5 * force[None]])
    v = torch.addmm(covariance, spread.T, spread)
    new = _solve_low_rank(pull, v) if len(pull) < len(v) else _solve(pull.T @ pull, v)
    return (loc + rate * (new @ force + centre)) / (1 + rate), new


def _solve(u: Tensor, v: Tensor) -> Tensor:
    """The positive definite ``S`` with ``S U S + S = V``, which is ``2 V (I + (I + 4 U V)^{1/2})^{-1}``.

    With ``V = K K^T`` it is ``K 2 (I + (I + 4 K^T U K)^{1/2})^{-1} K^T``, of symmetric matrices only.
    """
    root = torch.linalg.cholesky(v)
    values, vectors = torch.linalg.eigh(root.T @ u @ root)
    shrunk = root @ (vectors * (2 / (1 + (1 + 4 * values.clamp(min=0)).sqrt())).sqrt())
    return shrunk @ shrunk.T


def _solve_low_rank(q: Tensor, v: Tensor) -> Tensor:
    """The same for ``U = Q^T Q`` of few rows: ``M = Q S Q^T`` solves ``M + M^2 = Q V Q^T``, and
    ``S = V - V Q^T (I + M)^{-2} Q V``, at ``rank * dim^2`` operations instead of ``dim^3``."""
    moved = q @ v
    values, vectors = torch.linalg.eigh(moved @ q.T)
    inside = 0.5 + (values.clamp(min=0) + 0.25).sqrt()
    taken = (vectors / inside).T @ moved
    return torch.addmm(v, taken.T, taken, alpha=-1)
