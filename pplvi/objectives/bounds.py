"""Objectives: pure functions of weighted steps.

Everything is a sequence of weighted steps. Draws that are properly weighted for an unnormalised target gamma[k-1] are
moved with a forward kernel q[k]; the way back is scored with a reverse kernel r[k-1]; where they arrived is scored
under gamma[k]:

    log v    = log gamma[k](z[k]) + log r[k-1](z[k-1] | z[k]) - log gamma[k-1](z[k-1]) - log q[k](z[k] | z[k-1])
    log w[k] = log w[k-1] + log v

A :class:`Step` holds these terms. An :class:`Objective` turns one into a value and a surrogate whose gradient is the
gradient estimate, both per independent datum, and declares what the draws have to be: detached or not, which densities
are frozen, and which bound it reports. All quantities are in nats; particles are on dimension 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pplvi.objectives.forward_kl import weighted_sum
from pplvi.objectives.step import BoundSide, Estimator, Objective, Routing, Step, Terms
from pplvi.weights.algebra import logmeanexp


@dataclass(frozen=True)
class RenyiBound(Objective):
    """The variational Renyi bound, ``L = log mean w^(1-alpha) / (1-alpha)``, by its gradient estimators.

    ``alpha=1`` is the ELBO ``mean log w`` (Jordan et al. 1999), ``alpha=0`` the importance-weighted bound (Burda et al.
    2016), ``0 < alpha < 1`` between the two (Li & Turner 2016), ``alpha=-1`` the chi upper bound (Dieng et al. 2017).
    Lower bounds are maximised (the value is ``-L``), upper ones minimised (``+L``).

    Estimators of the gradient: pathwise where draws are reparameterised, VIMCO where not (``None``; Mnih & Rezende
    2016); ``"score"`` and ``"vimco"`` use the score function at every site, the second with leave-one-out baselines;
    ``"stl"`` freezes the guide's density (Roeder et al. 2017; biased on a nonlinear bound with more than one particle);
    ``"dreg"`` mends that (Tucker et al. 2019): with ``u = softmax((1-alpha) log w)`` and
    ``c = alpha u + (1-alpha) u^2`` its gradient is ``sum c grad_z log w + sum (u - c) grad_theta log gamma``.

    >>> step = Step.from_proposal(log_target=torch.tensor([0.0, -1.0]), log_forward=torch.zeros(2))
    >>> RenyiBound(alpha=1.0)(step).value
    tensor(0.5000)
    """

    alpha: float
    estimator: Estimator | None = None
    exact_entropy: bool = False
    analytic_kl: bool = False

    @property
    def monitor(self) -> BoundSide:  # type: ignore[override]
        """A lower bound on the log evidence for ``alpha >= 0``, an upper one below."""
        return "lower" if self.alpha >= 0 else "upper"

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Only the ELBO is linear in the log weights."""
        return self.alpha == 1.0

    @property
    def routing(self) -> Routing:
        """Detached draws for score functions, frozen densities for ``"stl"`` and ``"dreg"``."""
        return Routing(
            detach=self.estimator in ("score", "vimco"),
            freeze=self.estimator in ("stl", "dreg"),
            exact_entropy=self.exact_entropy,
            analytic_kl=self.analytic_kl,
        )

    @property
    def min_particles(self) -> int:
        """Leave-one-out baselines need two particles."""
        return 2 if self.estimator == "vimco" else 1

    def bound(self, log_weight: Tensor, dim: int = 0) -> Tensor:
        """The bound of log weights along a dimension."""
        if self.alpha == 1.0:
            return log_weight.mean(dim)
        power = 1.0 - self.alpha
        return logmeanexp(power * log_weight, dim) / power

    def __call__(self, step: Step) -> Terms:
        """Value and surrogate, each of shape ``(*batch)``."""
        log_weight = step.log_weight_in + step.log_increment
        gain = self._doubly_reparameterised(log_weight, step) if self.estimator == "dreg" else self.bound(log_weight)
        if step.log_score is not None:
            gain = gain + self._score_term(log_weight.detach(), step.log_score)
        sign = -1.0 if self.monitor == "lower" else 1.0
        return Terms(sign * self.bound(log_weight.detach()), sign * gain)

    def _doubly_reparameterised(self, log_weight: Tensor, step: Step) -> Tensor:
        u = torch.softmax((1.0 - self.alpha) * log_weight.detach(), 0)
        c = self.alpha * u + (1.0 - self.alpha) * u**2
        return weighted_sum(c, log_weight) + weighted_sum(u - c, step.log_target_fixed)

    def _score_term(self, log_weight: Tensor, log_score: Tensor) -> Tensor:
        if self.estimator == "reparam":
            raise ValueError(
                "estimator='reparam' was asked for, but the guide has sites that cannot be reparameterised: expected "
                "only sites with has_rsample. Use estimator=None, 'vimco' or 'score', or enumerate discrete sites."
            )
        if self.estimator != "score" and len(log_weight) < 2:
            raise ValueError(
                "num_particles=1 with sites that cannot be reparameterised: the leave-one-out baseline (VIMCO) needs "
                "at least 2 particles. Raise num_particles, or use estimator='score' (no baseline, higher variance)."
            )
        if not log_score.requires_grad:  # only the value is wanted: no K x K matrix
            return torch.zeros_like(log_score[0])
        term = (self._signal(log_weight) * log_score).sum(0)
        if not self.linear or self.exact_entropy or self.analytic_kl:
            return term
        # E[grad log q] = 0: taking the pathwise -log q of these sites out again only lowers the variance.
        return term + (log_score - log_score.detach()).mean(0)

    def _signal(self, log_weight: Tensor) -> Tensor:
        """Learning signal of each particle's score function, detached."""
        if self.estimator == "score":
            return log_weight / len(log_weight) if self.linear else self.bound(log_weight).expand_as(log_weight)
        return self.bound(log_weight) - self.bound(_leave_one_out(log_weight), dim=1)


def _leave_one_out(log_weight: Tensor) -> Tensor:
    """``(K, K, *batch)``: row k has particle k's log weight replaced by the mean of the others."""
    count = len(log_weight)
    rows = log_weight.unsqueeze(0).expand(count, *log_weight.shape)
    own = torch.eye(count, dtype=torch.bool, device=log_weight.device)
    own = own.reshape(count, count, *[1] * (log_weight.dim() - 1))
    others = torch.where(own, 0.0, rows).sum(1) / (count - 1)
    return torch.where(own, others.unsqueeze(1), rows)


@dataclass(frozen=True)
class ThermodynamicBound(Objective):
    """The thermodynamic variational objective: a left Riemann sum of ``log p(x) = int E_beta[log w] d beta``.

    ``sum_k (beta[k+1] - beta[k]) E_beta[k][log w]`` over ``0 = beta[0] < ... < beta[n] = 1``, with expectations under
    the self-normalised weights ``softmax(beta log w)`` (Masrani, Le & Wood 2019). Its gradient is
    ``E[grad log w] + Cov[grad log pi_beta, log w]`` with ``pi_beta = gamma^beta q^(1-beta)``, at detached draws: no
    reparameterisation is needed, and discrete latents are as good as continuous ones. Betas ``(0,)`` are the ELBO.
    Self-normalised: value and gradient are biased by O(1/K), at ``beta=0`` only the gradient, by ``(K-1)/K``.
    """

    monitor: ClassVar[BoundSide] = "lower"
    betas: tuple[float, ...]

    @property
    def routing(self) -> Routing:
        """Draws are detached."""
        return Routing(detach=True)

    @property
    def min_particles(self) -> int:
        """A covariance needs two particles."""
        return 2

    def __call__(self, step: Step) -> Terms:
        """Value and surrogate, each of shape ``(*batch)``."""
        parts = [self._part(step, *interval) for interval in zip(self.betas, (*self.betas[1:], 1.0), strict=True)]
        value, surrogate = (-torch.stack(terms).sum(0) for terms in zip(*parts, strict=True))
        return Terms(value, surrogate)

    @staticmethod
    def _part(step: Step, beta: float, upper: float) -> tuple[Tensor, Tensor]:
        log_weight = step.log_weight_in + step.log_increment
        weight = torch.softmax(beta * log_weight.detach(), 0)
        mean = (weight * log_weight.detach()).sum(0)
        log_path = beta * log_weight + step.log_forward  # gamma^beta q^(1-beta), up to the incoming weight
        covariance = (weight * (log_weight.detach() - mean) * log_path).sum(0)
        return (upper - beta) * mean, (upper - beta) * ((weight * log_weight).sum(0) + covariance)
