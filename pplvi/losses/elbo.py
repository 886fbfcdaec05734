"""The losses that a reader of the papers looks for by name: an objective each, on draws of the guide.

Each is a :class:`pplvi.losses.WeightedELBO` that prints as the call which makes it. All of them go where Pyro's own
ELBOs go: ``SVI(model, guide, optim, loss=...)``, ``loss(model, guide)`` as a torch module (``ELBOModule``), or
:func:`pplvi.fit`. They keep no state of a model, so one object serves many. Losses are in nats; those that are bounds
have ``loss = -bound``, and :class:`ChiELBO` ``loss = +bound``. :class:`ELBO` also tells its two halves apart.

Where a step is recorded, :func:`own_loss` puts :class:`ELBO` in the place of Pyro's trace ELBOs, which branch on
values.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Number, Positive, Probability
from pplvi.losses.base import Loss, WeightedELBO
from pplvi.objectives.bounds import RenyiBound, ThermodynamicBound
from pplvi.objectives.forward_kl import ForwardKLDivergence
from pplvi.objectives.step import Estimator, Objective
from pplvi.programs.joint import execute
from pplvi.programs.scales import LatentWeight
from pplvi.programs.traces import Run
from pplvi.samplers.importance import exact_entropies
from pplvi.types import Program


class _Named(WeightedELBO):
    """A WeightedELBO that prints as the call that makes it."""

    arguments: dict[str, Any]

    def _set_up(self, objective: Objective, num_particles: int, options: dict[str, Any], **arguments: Any) -> None:
        super().__init__(objective, None, num_particles, **options)
        self.arguments = {"num_particles": num_particles, **{k: v for k, v in arguments.items() if v is not None}}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.arguments.items())})"


def _check_estimator(estimator: str | None, name: str, allowed: Sequence[str]) -> None:
    if estimator is not None and estimator not in allowed:
        choices = ", ".join(["None", *map(repr, allowed)])
        raise ValueError(f"{name} has no estimator={estimator!r}: expected one of {choices}.")


@checked
class ELBO(_Named):
    """The evidence lower bound, ``loss = -mean_k [log p(x, z_k) - log q(z_k)]`` (Jordan et al. 1999).

    :param num_particles: number of draws.
    :param entropy: ``"sampled"``: ``-log q`` at the draws; ``"exact"``: the exact entropy of every guide site given the
        draws above it (Jacobians of automatic guides stay sampled), which lowers the variance far from the optimum;
        ``"kl"``: ``KL(q || p)`` of every site that has it in closed form
        (:func:`pplvi.samplers.divergences.divergences`), the others sampled: what Pyro's ``TraceMeanField_ELBO``
        computes, and right for automatic guides too.
    :param estimator: ``None`` (pathwise where reparameterised, elsewhere VIMCO, which is the plain score function where
        there is one particle alone: take several), ``"reparam"`` (refuse other sites),
        ``"score"``, ``"vimco"`` (score function without and with leave-one-out baseline), or ``"stl"`` (sticking the
        landing, Roeder et al. 2017: no variance at the exact posterior).
    :raises ValueError: for an unknown estimator or entropy, or ``"stl"`` without a sampled entropy; with ``"kl"``, for
        models with enumerated sites.

    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> ELBO(num_particles=3).loss(model, guide)
    0.0
    """

    def __init__(
        self,
        num_particles: Count = 1,
        entropy: Literal["sampled", "exact", "kl"] = "sampled",
        *,
        estimator: Estimator | None = None,
        **options: Any,
    ) -> None:
        _check_estimator(estimator, "ELBO", ("reparam", "score", "vimco", "stl"))
        if entropy != "sampled" and estimator == "stl":
            raise ValueError(f"entropy={entropy!r} leaves no sampled log q to freeze: drop it or estimator='stl'.")
        objective = RenyiBound(1.0, estimator, exact_entropy=entropy == "exact", analytic_kl=entropy == "kl")
        shown = None if entropy == "sampled" else entropy
        self._set_up(objective, num_particles, options, entropy=shown, estimator=estimator)

    def terms(
        self, model: Program, guide: Program, *args: Any, per_site: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The two halves of the ELBO, ``E_q[log p(x, z)]`` and the entropy of the guide, in nats.

        :param per_site: also ``"sites"``: each model site's expected log density and each guide site's entropy.
        :returns: ``{"elbo", "expected_log_prob", "entropy"}``, subsample scales included.
        :raises ValueError: with ``per_site`` for models with enumerated sites, whose densities do not separate.
        """
        options: dict[str, Any] = {"num_particles": self.num_particles, "vectorize": self.vectorize_particles}
        if self.objective.routing.exact_entropy:
            options["exact"] = "entropy"
        with torch.no_grad():
            return self._terms(execute(model, guide, args, kwargs, **options), per_site)

    def _terms(self, run: Run, per_site: bool) -> dict[str, Any]:
        entropies = exact_entropies(run) if self.objective.routing.exact_entropy else None
        entropy = -run.log_forward() if entropies is None else sum(entropies.values(), run.zeros())
        halves = {"expected_log_prob": _mean(run, run.log_target()), "entropy": _mean(run, entropy)}
        found: dict[str, Any] = {"elbo": sum(halves.values()), **halves}
        return {**found, "sites": _sites(run, entropies)} if per_site else found


@checked
class BetaELBO(_Named):
    r"""The ELBO with a weight on the divergence of its guide from the prior; no bound that is reported.

    .. math:: \ell = -E_q[\log p(x \mid z)] - \beta\, E_q[\log p(z) - \log q(z)]

    Above one it trades likelihood for latents that are nearer to independent. Weights, evidence and
    :class:`pplvi.Posterior` are those of the unweighted pair, and ``monitor`` is ``None``: judge by
    ``fit(..., monitor=ELBO())``.

    Source: Higgins et al. (2017), "beta-VAE: learning basic visual concepts with a constrained variational framework".

    :param beta: the weight of all latent sites, positive.
    :param num_particles: number of draws.
    :param estimator: as in :class:`ELBO`.
    :raises ValueError: for a weight that is not positive, or an unknown estimator.

    >>> BetaELBO(4.0, num_particles=2), BetaELBO(4.0).monitor
    (BetaELBO(num_particles=2, beta=4.0), None)
    """

    def __init__(
        self, beta: Positive, num_particles: Count = 1, *, estimator: Estimator | None = None, **options: Any
    ) -> None:
        _check_estimator(estimator, "BetaELBO", ("reparam", "score", "vimco", "stl"))
        if not beta > 0:
            raise ValueError(f"beta={beta!r}: expected a positive number, and 1 for the ELBO.")
        self._set_up(RenyiBound(1.0, estimator), num_particles, options, beta=beta, estimator=estimator)
        self.beta, self.monitor = float(beta), None

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted loss, in nats."""
        with LatentWeight(self.beta):
            return super().differentiable_loss(model, guide, *args, **kwargs)


def _mean(run: Run, density: Tensor) -> float:
    return float(run.scale * density.mean(0).sum())


def _sites(run: Run, entropies: dict[str, Tensor] | None) -> dict[str, dict[str, float]]:
    if run.enumerated:
        raise ValueError(
            "per_site=True with enumerated sites: they are summed out jointly and have no terms of their own."
        )
    entropies = entropies or {name: -density for name, density in run.log_probs(run.guide).items()}
    expected = {name: _mean(run, density) for name, density in run.log_probs(run.model).items()}
    return {"expected_log_prob": expected, "entropy": {name: _mean(run, h) for name, h in entropies.items()}}


_MULTI_SAMPLE = ("reparam", "score", "vimco", "stl", "dreg")


@checked
class ImportanceWeightedELBO(_Named):
    """The importance-weighted bound, ``loss = -log mean_k p(x, z_k) / q(z_k)``, per datum (Burda et al. 2016).

    :param num_particles: number of draws ``K``; the bound tightens with it.
    :param estimator: as in :class:`ELBO`, and ``"dreg"`` (doubly reparameterised, Tucker et al. 2019), whose guide
        gradient keeps its signal-to-noise ratio as ``K`` grows. ``"stl"`` is biased here for ``K > 1``.
    :raises ValueError: for an unknown estimator.

    >>> ImportanceWeightedELBO(num_particles=16, estimator="dreg")
    ImportanceWeightedELBO(num_particles=16, estimator='dreg')
    """

    def __init__(self, num_particles: Count = 10, *, estimator: Estimator | None = None, **options: Any) -> None:
        _check_estimator(estimator, "ImportanceWeightedELBO", _MULTI_SAMPLE)
        self._set_up(RenyiBound(0.0, estimator), num_particles, options, estimator=estimator)


@checked
class RenyiELBO(_Named):
    """The variational Renyi bound, ``loss = -log mean_k w_k^(1-alpha) / (1-alpha)``, per datum (Li & Turner 2016).

    :param alpha: order in ``[0, 1]``: 0 is the importance-weighted bound, 1 the ELBO.
    :param num_particles: number of draws.
    :param estimator: as in :class:`ImportanceWeightedELBO`.
    :raises ValueError: for ``alpha`` outside ``[0, 1]``: a negative order is an upper bound, see :class:`ChiELBO`.

    >>> RenyiELBO(alpha=0.5, num_particles=8)
    RenyiELBO(num_particles=8, alpha=0.5)
    """

    def __init__(
        self, alpha: Number = 0.5, num_particles: Count = 10, *, estimator: Estimator | None = None, **options: Any
    ) -> None:
        _check_estimator(estimator, "RenyiELBO", _MULTI_SAMPLE)
        if alpha < 0:
            raise ValueError(
                f"alpha={alpha}: a negative order bounds the evidence from above and must not be maximised. Use "
                "ChiELBO, the upper bound of order n=2 (alpha=-1)."
            )
        if alpha > 1:
            raise ValueError(f"alpha={alpha}: expected an order between 0 (importance-weighted) and 1 (ELBO).")
        self._set_up(RenyiBound(float(alpha), estimator), num_particles, options, alpha=alpha, estimator=estimator)


@checked
class ChiELBO(_Named):
    """The chi upper bound (CUBO, n=2), ``loss = +log mean_k w_k^2 / 2``, minimised (Dieng et al. 2017).

    It makes the guide cover the posterior. Its Monte Carlo estimate is biased downwards; use many particles.

    :param num_particles: number of draws.
    :param estimator: as in :class:`ImportanceWeightedELBO`.

    >>> ChiELBO(num_particles=64).monitor
    'upper'
    """

    def __init__(self, num_particles: Count = 10, *, estimator: Estimator | None = None, **options: Any) -> None:
        _check_estimator(estimator, "ChiELBO", _MULTI_SAMPLE)
        self._set_up(RenyiBound(-1.0, estimator), num_particles, options, estimator=estimator)


@checked
class ThermodynamicELBO(_Named):
    """The thermodynamic variational objective, a left Riemann sum over inverse temperatures (Masrani et al. 2019).

    ``loss = -sum_j (beta[j+1] - beta[j]) E_beta[j][log w]``, a lower bound between the ELBO (one interval) and the log
    evidence, with a covariance gradient that needs no reparameterisation.

    :param num_particles: number of draws, at least 2.
    :param betas: left ends of the intervals, ``0 = betas[0] < betas[1] < ... < 1``.
    :param estimator: only ``None``: the covariance gradient is the estimator.
    :raises ValueError: if the betas do not start at 0, increase, and stay below 1, or for another estimator.

    >>> ThermodynamicELBO(num_particles=16, betas=(0.0, 0.1, 0.3))
    ThermodynamicELBO(num_particles=16, betas=(0.0, 0.1, 0.3))
    """

    def __init__(
        self,
        num_particles: Count = 10,
        betas: Sequence[Probability] = (0.0, 0.1, 0.3),
        *,
        estimator: Estimator | None = None,
        **options: Any,
    ) -> None:
        _check_estimator(estimator, "ThermodynamicELBO", ())
        betas = tuple(float(beta) for beta in betas)
        if not betas or betas[0] != 0.0 or betas[-1] >= 1.0 or any(a >= b for a, b in pairwise(betas)):
            raise ValueError(f"betas={betas}: expected increasing values that start at 0 and stay below 1.")
        self._set_up(ThermodynamicBound(betas), num_particles, options, betas=betas)


@checked
class ForwardKL(_Named):
    """The forward KL divergence ``KL(p(z | x) || q)``, self-normalised: ``loss = -sum_k u_k log q(z_k)``, per datum.

    ``u = softmax(log w)``, draws detached: the wake-phi update of reweighted wake-sleep (Bornschein & Bengio 2015). It
    fits the guide to the posterior's moments where the ELBO picks a mode. Biased by O(1/K), no bound of the evidence
    (``monitor`` is ``None``), and without gradient for the model.

    :param num_particles: number of draws ``K``, at least 2.
    :param estimator: only ``None``: the weights are the estimator.
    :raises ValueError: for fewer than 2 particles, whose weights say nothing, or for another estimator.

    >>> ForwardKL(num_particles=32).monitor is None
    True
    """

    def __init__(self, num_particles: Count = 10, *, estimator: Estimator | None = None, **options: Any) -> None:
        _check_estimator(estimator, "ForwardKL", ())
        self._set_up(ForwardKLDivergence(), num_particles, options)


def own_loss(loss: Any) -> Loss:
    """A loss that traces: one of this package, or ours for exactly Pyro's trace ELBOs.

    :raises ValueError: for any other, subclasses included.

    >>> own_loss(Trace_ELBO(num_particles=3))
    ELBO(num_particles=3)
    """
    if isinstance(loss, Loss):
        return loss
    if type(loss) in (Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO):
        entropy: Literal["kl", "sampled"] = "kl" if type(loss) is TraceMeanField_ELBO else "sampled"
        return ELBO(loss.num_particles, entropy, vectorize_particles=loss.vectorize_particles)
    raise ValueError(
        f"{type(loss).__name__} branches on values and cannot be traced: expected a loss of this package, or exactly "
        "Trace_ELBO, TraceEnum_ELBO or TraceMeanField_ELBO, which stand for pplvi.ELBO. Use one of these, or "
        "compile=False."
    )
