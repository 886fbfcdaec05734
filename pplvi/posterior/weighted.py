"""Draws of a guide with their importance weights: diagnostics and estimates that need nothing but the draws.

Weights and densities are in nats and have shape ``(num_draws, *batch)``, where ``batch`` are the plates common to every
site of model and guide; each batch element has diagnostics of its own, and estimates add over the batch.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.posterior.draws import Draws
from pplvi.posterior.gather import take
from pplvi.posterior.islands import evidence_of_islands, smallest_ess
from pplvi.posterior.tables import frame_of, to_html
from pplvi.programs.reparam import decentered
from pplvi.programs.state import random_state
from pplvi.weights.algebra import effective_sample_size, log_evidence
from pplvi.weights.pareto import pareto_k_error, pareto_smooth, tail_shortfall
from pplvi.weights.resampling import resample

if TYPE_CHECKING:
    import pandas


class Estimate(NamedTuple):
    """A Monte Carlo estimate and its standard error, in nats.

    >>> print(Estimate(-31.3114, 0.0123))
    -31.311 +- 0.012
    """

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.error:.3f}"


@checked
class WeightedDraws:
    """Draws with importance weights, if they have any; the part of a posterior that runs no program.

    :param draws: draws of a guide, or of MCMC if they have no ``log_q``.
    :param point_sites: latent sites that the guide holds at a point, where it has no density.
    :param num_chains: number of MCMC chains, or of islands, that lie one after another in the draws; 1 for a guide.
    :param evidence: log evidence by each island of a sequential Monte Carlo run, ``(num_chains,)``, in nats.
    :raises ValueError: if the draws are predictions, without densities.

    >>> z = torch.tensor([0.0, 1.0, 3.0])
    >>> draws = Draws({"z": z}, {}, {}, {}, -z, -z, (), {"z": ()}, frozenset())
    >>> WeightedDraws(draws).ess
    tensor(3.)
    """

    def __init__(
        self,
        draws: Draws,
        point_sites: frozenset[str] = frozenset(),
        num_chains: Count = 1,
        evidence: Tensor | None = None,
    ) -> None:
        if draws.log_p is None:
            raise ValueError("these draws are predictions, without densities: expected draws of a guide or of MCMC.")
        self.draws, self.point_sites, self.num_chains, self._log_p = draws, point_sites, num_chains, draws.log_p
        self.evidence = evidence

    @property
    def pool(self) -> WeightedDraws:
        """All draws there are behind these: what :meth:`resample` chooses from."""
        return self

    def to_frame(self) -> pandas.DataFrame:
        """Mean, sd, 5 %, 50 % and 95 % quantiles of every element of the latent and deterministic sites.

        Draws of a guide count by their Pareto-smoothed weights; those of MCMC, and of a guide that holds sites at a
        point, count alike. See :func:`pplvi.posterior.tables.frame_of`.
        """
        return frame_of(self.draws, self.psis_log_weight if self.has_weights else None)

    def _repr_html_(self) -> str:
        verdict = getattr(self, "verdict", None)
        return to_html(repr(self), [] if verdict is None else [str(verdict)], self.to_frame())

    @property
    def num_draws(self) -> int:
        """Number of draws, all chains together."""
        return self._log_p.shape[0]

    @property
    def log_p(self) -> Tensor:
        """Log joint density of each draw under the model, shape ``(num_draws, *batch)``, in nats."""
        return self._log_p

    @property
    def log_q(self) -> Tensor:
        """Log density of each draw under the guide, shape ``(num_draws, *batch)``, in nats.

        :raises ValueError: for MCMC draws.
        """
        if self.draws.log_q is None:
            raise ValueError(
                "MCMC draws have no guide density, so no k-hat, weights or evidence: expected draws of a guide. Judge "
                "the run by R-hat and ESS, az.summary(pplvi.to_arviz(mcmc))."
            )
        return self.draws.log_q

    @property
    def is_mcmc(self) -> bool:
        """Whether the draws are those of an MCMC run."""
        return self.draws.log_q is None

    @property
    def is_dirac(self) -> bool:
        """Whether the guide holds latent sites at a point, as ``AutoDelta`` does: it has no density there."""
        return bool(self.point_sites)

    @property
    def has_weights(self) -> bool:
        """Whether the draws have importance weights, and hence k-hat, ESS, evidence and corrected leave-one-out."""
        return not (self.is_mcmc or self.is_dirac or self._subsampled)

    @property
    def _subsampled(self) -> list[str]:
        plates = {plate for site in self.draws.plates.values() for plate in site if plate.scale != 1}
        return sorted({plate.name for plate in plates - set(self.draws.batch)})

    @cached_property
    def log_weight(self) -> Tensor:
        r"""Raw log importance weights :math:`\log p - \log q`, shape ``(num_draws, *batch)``, in nats.

        :raises ValueError: for MCMC draws, for a guide that holds sites at a point, if a plate that the weights would
            have to average over is subsampled, and if a weight is NaN or infinitely large.
        """
        log_q = self._density_of_guide()
        if self._subsampled:
            raise ValueError(
                f"the plates {self._subsampled} are subsampled, and a weight of rescaled minibatch terms is not an "
                "importance weight: expected the full data. Build the posterior with the full plate as args."
            )
        log_weight = self.log_p - log_q
        if bad := int((log_weight.isnan() | log_weight.isposinf()).sum()):
            raise ValueError(
                f"{bad} of {log_weight.numel()} importance weights are NaN or infinite: expected finite log densities. "
                "Look for NaN in the data and in the guide's parameters, or draw in float64."
            )
        return log_weight

    def _density_of_guide(self) -> Tensor:
        if self.is_dirac:
            raise ValueError(
                f"the guide holds {sorted(self.point_sites)} at a point, as AutoDelta and an AutoLaplaceApproximation "
                "that has not been expanded do, so it has no density to weigh: expected a guide with a spread. Use "
                "AutoNormal or AutoFlow, or AutoLaplaceApproximation.laplace_approximation(...)."
            )
        return self.log_q

    @cached_property
    def _smoothed(self) -> tuple[Tensor, Tensor]:
        return pareto_smooth(self.log_weight)

    @property
    def psis_log_weight(self) -> Tensor:
        """Pareto-smoothed log weights on the scale of :attr:`log_weight`, shape ``(num_draws, *batch)``, in nats.

        :raises ValueError: where :attr:`log_weight` does.
        """
        return self._smoothed[0]

    @property
    def pareto_k(self) -> Tensor:
        """Pareto k-hat of the weights, shape ``batch``; see :func:`pplvi.weights.pareto_smooth`. NaN for islands.

        :raises ValueError: where :attr:`log_weight` does.
        """
        return torch.tensor(math.nan) if self.evidence is not None else self._smoothed[1]

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the raw weights, shape ``batch``, in draws; of islands that of the worst latent.

        :raises ValueError: where :attr:`log_weight` does.
        """
        if self.evidence is not None:
            return smallest_ess(self.draws.latents.values(), self.num_chains)
        return effective_sample_size(self.log_weight)

    @property
    def log_evidence(self) -> tuple[Tensor, Tensor]:
        r"""Log evidence and its standard error, each of shape ``batch``, in nats.

        The error is that of :func:`pplvi.weights.log_evidence` and, added in quadrature, twice what a Pareto tail would
        add beyond the largest draw (:func:`pplvi.weights.pareto.tail_shortfall`, at half an error above k-hat): from a
        k-hat of 0.5 on weights have no finite variance, and the spread of the draws at hand says little.

        :raises ValueError: where :attr:`log_weight` does.
        """
        if self.evidence is not None:
            return evidence_of_islands(self.evidence)
        return self._evidence(self.log_weight)

    def _evidence(self, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        value, error = log_evidence(log_weight)
        return value, torch.hypot(error, self._tail_error.to(error))

    @cached_property
    def _tail_error(self) -> Tensor:
        pareto_k = self.pareto_k.double()
        above = pareto_k + 0.5 * pareto_k_error(pareto_k, self.num_draws)
        return 2 * tail_shortfall(self.log_weight.double(), above)

    @property
    def total_log_evidence(self) -> Estimate:
        """Log evidence of all data: the sum over the batch, times its subsample scale.

        :raises ValueError: where :attr:`log_weight` does.
        """
        if self.evidence is not None:
            value, error = evidence_of_islands(self.evidence)
            return Estimate(value.item(), error.item())
        value, error = self._evidence(self.log_weight.double())
        return Estimate(self._scale * value.sum().item(), self._scale * error.square().sum().sqrt().item())

    @property
    def expected_log_prob(self) -> Estimate:
        r"""Expected log joint density :math:`E_q[\log p(x, z)]` of all data, in nats."""
        return self._mean(self.log_p)

    @property
    def entropy(self) -> Estimate:
        r"""Entropy of the guide :math:`-E_q[\log q(z)]`, summed over the batch, in nats.

        :raises ValueError: for MCMC draws and for a guide that holds sites at a point.
        """
        return self._mean(-self._density_of_guide())

    @property
    def elbo(self) -> Estimate:
        r"""Evidence lower bound :math:`E_q[\log p(x, z) - \log q(z)]` of all data, in nats.

        :raises ValueError: for MCMC draws and for a guide that holds sites at a point.
        """
        return self._mean(self.log_p - self._density_of_guide())

    @property
    def gap(self) -> Estimate:
        r"""Estimate of :math:`\log Z - \text{ELBO} = \text{KL}(q \| p)`, with the error of the difference, in nats.

        :raises ValueError: where :attr:`log_weight` does.
        """
        log_weight = self.log_weight.double()
        relative = (log_weight - log_evidence(log_weight)[0]).exp()  # the evidence and the ELBO share their draws
        error = self._mean(relative - log_weight).error
        return Estimate(self.total_log_evidence.value - self.elbo.value, error)

    @property
    def _scale(self) -> float:
        return math.prod(plate.scale for plate in self.draws.batch)

    def _mean(self, per_draw: Tensor) -> Estimate:
        total = self._scale * per_draw.double().flatten(1).sum(1) if per_draw.dim() > 1 else per_draw.double()
        error = total.std().item() / math.sqrt(len(total)) if len(total) > 1 else math.inf
        return Estimate(total.mean().item(), error)

    def resample(
        self, num_samples: int | None = None, *, seed: int | None = None, deterministics: bool | None = None
    ) -> dict[str, Tensor]:
        """Latent draws of equal weight: the guide's, resampled in proportion to their Pareto-smoothed weights.

        They are chosen from the :attr:`pool`, which has more draws of the guide where that is needed and cheap.
        Every batch element is resampled on its own. MCMC draws and those of a guide without weights are equally
        weighted already. Draws come back in the order of the originals, copies of one next to each other.

        Source: Rubin 1988, Using the SIR algorithm to simulate posterior distributions.

        :param num_samples: how many; as many as there are draws unless given.
        :param seed: makes the choice reproducible and leaves the global random state as it was.
        :param deterministics: whether to give the deterministic sites too. ``None``: those that
            :func:`pplvi.noncentered`, or ``fit(model, "auto")`` on its own, has made of latent sites.
        :returns: ``{site: values}``, each of shape ``(num_samples, *plates, *event)``.
        :raises ValueError: if ``num_samples`` is below 1.
        """
        pool = self.pool
        size = self.num_draws if num_samples is None else num_samples
        with random_state(seed):
            indices = resample(pool._resampling_weight, size)
        batch = pool.draws.batch if pool.has_weights else ()
        latents, names = pool.draws.latents, list(pool.draws.deterministics)
        if not deterministics:
            names = [name for name in names if deterministics is None and decentered(name) in latents]
        return {name: take(pool.draws, name, indices, batch) for name in (*latents, *names)}

    @property
    def _resampling_weight(self) -> Tensor:
        return self.psis_log_weight if self.has_weights else torch.zeros(self.num_draws)
