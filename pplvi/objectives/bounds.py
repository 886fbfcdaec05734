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

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Number
from pplvi.objectives.forward_kl import weighted_sum
from pplvi.objectives.step import BoundSide, Estimator, Objective, Routing, Step, Terms
from pplvi.weights.algebra import logmeanexp


@checked
@dataclass(frozen=True)
class RenyiBound(Objective):
    """The variational Renyi bound, ``L = log mean w^(1-alpha) / (1-alpha)``, by its gradient estimators.

    ``alpha=1`` is the ELBO ``mean log w`` (Jordan et al. 1999), ``alpha=0`` the importance-weighted bound (Burda et al.
    2016), ``0 < alpha < 1`` between the two (Li & Turner 2016), ``alpha=-1`` the chi upper bound (Dieng et al. 2017).
    Lower bounds are maximised (the value is ``-L``), upper ones minimised (``+L``).

    Estimators of the gradient: pathwise where draws are reparameterised, VIMCO where not (``None``; Mnih & Rezende
    2016; the plain score function where there is one particle, which has no others as a baseline); ``"score"`` and
    ``"vimco"`` use the score function at every site, the second with leave-one-out baselines; ``"stl"`` freezes the
    guide's density (Roeder et al. 2017; biased on a nonlinear bound with more than one particle); ``"dreg"`` mends that
    (Tucker et al. 2019): with ``u = softmax((1-alpha) log w)`` and ``c = alpha u + (1-alpha) u^2`` its gradient is
    ``sum c grad_z log w + sum (u - c) grad_theta log gamma``.

    >>> step = Step.from_proposal(log_target=torch.tensor([0.0, -1.0]), log_forward=torch.zeros(2))
    >>> RenyiBound(alpha=1.0)(step).value
    tensor(0.5000)
    """

    alpha: Number
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
            per_draw=self.linear,
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
            self._check_score()
            gain = gain + self._score_term(log_weight.detach(), step)
        sign = -1.0 if self.monitor == "lower" else 1.0
        return Terms(sign * self.bound(log_weight.detach()), sign * gain)

    def _doubly_reparameterised(self, log_weight: Tensor, step: Step) -> Tensor:
        u = torch.softmax((1.0 - self.alpha) * log_weight.detach(), 0)
        c = self.alpha * u + (1.0 - self.alpha) * u**2
        return weighted_sum(c, log_weight) + weighted_sum(u - c, step.log_target_fixed)

    def _check_score(self) -> None:
        if self.estimator == "reparam":
            raise ValueError(
                "estimator='reparam' was asked for, but the guide has sites that cannot be reparameterised: expected "
                "only sites with has_rsample. Use estimator=None, 'vimco' or 'score', or enumerate discrete sites."
            )

    def _score_term(self, log_weight: Tensor, step: Step) -> Tensor:
        assert step.log_score is not None
        if not step.log_score.requires_grad:  # only the value is wanted
            return torch.zeros_like(step.log_score[0])
        if step.score is not None and step.below is not None and step.score_path is not None:
            term, path = (self._signal(step.below) * step.score).sum((0, -1)), step.score_path
        else:
            term, path = (self._signal(log_weight) * step.log_score).sum(0), step.log_score
            if not self.linear or self.exact_entropy or self.analytic_kl:
                return term
        # E[grad log q] = 0: taking the pathwise -log q of these sites out again only lowers the variance.
        return term + (path - path.detach()).mean(0)

    def _signal(self, log_weight: Tensor) -> Tensor:
        """Learning signal of each particle's score function, detached."""
        if self.estimator == "score" or len(log_weight) == 1:  # nothing is left out of one that could be a baseline
            return log_weight / len(log_weight) if self.linear else self.bound(log_weight).expand_as(log_weight)
        others = _leave_one_out(log_weight, torch.cumsum, torch.add, 0.0) / (len(log_weight) - 1)
        if self.linear:
            return (log_weight - others) / len(log_weight)
        return self.bound(log_weight) - self._without_one(log_weight, others)

    def _without_one(self, log_weight: Tensor, others: Tensor) -> Tensor:
        """The bound with each particle's log weight in turn replaced by the mean of the others."""
        power = 1.0 - self.alpha
        rest = _leave_one_out(power * log_weight, torch.logcumsumexp, torch.logaddexp, -math.inf)
        return (torch.logaddexp(rest, power * others) - math.log(len(log_weight))) / power


def _leave_one_out(
    values: Tensor, running: Callable[..., Tensor], both: Callable[[Tensor, Tensor], Tensor], nothing: float
) -> Tensor:
    """Total of all rows but each in turn, from the running totals before and after it: nothing is subtracted, and
    memory grows as the number of rows."""
    edge = torch.full_like(values[:1], nothing)
    before = torch.cat([edge, running(values, 0)[:-1]])
    after = torch.cat([edge, running(values.flip(0), 0)[:-1]]).flip(0)
    return both(before, after)


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
