"""What ``pyro.infer.SVI`` sees: an objective, a sampler and a number of particles, as a Pyro ELBO.

:class:`WeightedELBO` joins the three; the short classes below name the combinations that a reader of the papers looks
for. All of them go where Pyro's own ELBOs go: ``SVI(model, guide, optim, loss=...)``, ``loss(model, guide)`` as a torch
module (``ELBOModule``), or :func:`pplvi.fit`. They keep no state of a model, so one object serves many. Losses are in
nats; those that are bounds have ``loss = -bound``, and :class:`ChiELBO` ``loss = +bound``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from pyro.infer import ELBO as PyroELBO
from pyro.util import warn_if_nan
from torch import Tensor

from pplvi.objectives.bounds import RenyiBound, ThermodynamicBound
from pplvi.objectives.forward_kl import ForwardKLDivergence
from pplvi.objectives.step import Estimator, Monitor, Objective, Step
from pplvi.programs.joint import execute
from pplvi.programs.traces import Run
from pplvi.samplers import Importance, Request, Sampler, exact_entropies
from pplvi.types import Program


class Loss(PyroELBO):
    """A Pyro ELBO defined by its differentiable loss. Losses add, and scale: ``a + 0.5 * b``, ``sum([a, b]) / 2``."""

    monitor: Monitor | None = None

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, in nats, as a scalar tensor whose gradient is the gradient estimate."""
        raise NotImplementedError

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss, without gradients."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss; its gradients are added to the parameters' ``grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return float(warn_if_nan(loss.detach(), "loss"))

    def prepare(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> None:
        """Make what steps keep beside parameters, such as chains, without a step; the random state stays as it is."""

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Any, Any]:
        run = execute(model, guide, args, kwargs)
        return run.model, run.guide

    def __add__(self, other: Loss) -> Loss:
        return LossSum([(1.0, self), (1.0, other)]) if isinstance(other, Loss) else NotImplemented

    def __mul__(self, factor: float) -> Loss:
        return LossSum([(float(factor), self)]) if isinstance(factor, int | float) else NotImplemented

    __rmul__ = __mul__

    def __radd__(self, other: int) -> Loss:
        return self if other == 0 else NotImplemented  # where sum() starts

    def __truediv__(self, divisor: float) -> Loss:
        return self * (1.0 / divisor) if isinstance(divisor, int | float) else NotImplemented


class LossSum(Loss):
    """A weighted sum of losses, each on draws of its own."""

    def __init__(self, terms: Sequence[tuple[float, Loss]]) -> None:
        inner = [(w, loss.terms if isinstance(loss, LossSum) else [(1.0, loss)]) for w, loss in terms]
        self.terms: list[tuple[float, Loss]] = [(w * v, part) for w, parts in inner for v, part in parts]
        most = max(loss.num_particles for _, loss in self.terms)
        super().__init__(num_particles=most, vectorize_particles=all(x.vectorize_particles for _, x in self.terms))
        monitors = {loss.monitor for _, loss in self.terms}
        self.monitor = monitors.pop() if len(monitors) == 1 and all(w > 0 for w, _ in self.terms) else None

    def prepare(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> None:
        """Prepare every term."""
        for _, loss in self.terms:
            loss.prepare(model, guide, *args, **kwargs)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted sum of the terms' losses, in nats."""
        parts = [weight * loss.differentiable_loss(model, guide, *args, **kwargs) for weight, loss in self.terms]
        return torch.stack(parts).sum()

    def __repr__(self) -> str:
        return " + ".join(repr(loss) if weight == 1.0 else f"{weight:g} * {loss!r}" for weight, loss in self.terms)


class WeightedELBO(Loss):
    """An objective on the steps of a sampler: what every named class here is made of.

    The loss is ``sum over batch of scale * value``, where the objective sees one log weight per particle and per
    element of the batch plates (those common to all sites), and ``scale`` is the plates' subsample scale. Subsampling
    any other plate puts its scale inside the log weights, which only linear objectives survive without bias.

    :param objective: a function of steps (:mod:`pplvi.objectives.bounds`).
    :param sampler: where the steps come from; by default importance sampling from the guide.
    :param num_particles: number of draws.
    :param vectorize_particles: run all particles in one call, as an outermost plate; otherwise one after another, for
        models that cannot be vectorised.
    :param allow_biased_subsampling: accept a nonlinear objective although a plate is subsampled that does not hold all
        latents.
    :raises ValueError: if the objective cannot use the sampler's draws, or needs more particles.

    >>> import pyro, pyro.distributions as dist
    >>> from pplvi.objectives.bounds import RenyiBound
    >>> from pplvi.samplers import Importance
    >>> def model():
    ...     pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(0.5))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(0.25, 0.5**0.5))
    >>> loss = WeightedELBO(RenyiBound(alpha=0.0), Importance(), num_particles=5)
    >>> round(-loss.loss(model, guide), 4)  # the guide is exact: log p(y)
    -1.328
    """

    def __init__(
        self,
        objective: Objective,
        sampler: Sampler | None = None,
        num_particles: int = 1,
        *,
        vectorize_particles: bool = True,
        allow_biased_subsampling: bool = False,
    ) -> None:
        super().__init__(num_particles=_checked_count(num_particles), vectorize_particles=vectorize_particles)
        self.objective = objective
        self.sampler = Importance() if sampler is None else sampler
        self.allow_biased_subsampling = allow_biased_subsampling
        self.monitor = objective.monitor
        if self.sampler.proposal not in objective.proposals:
            raise ValueError(
                f"{type(objective).__name__} cannot use draws from the {self.sampler.proposal}: expected draws from "
                f"{' or '.join(sorted(objective.proposals))}. Choose another sampler or objective."
            )
        if num_particles < objective.min_particles:
            raise ValueError(f"num_particles={num_particles}: {objective!r} needs at least {objective.min_particles}.")
        if num_particles < 2 and objective.self_normalised and self.sampler.proposal != "model":
            raise ValueError(f"num_particles={num_particles}: self-normalised weights need at least 2 particles.")

    def steps(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Iterator[Step]:
        """Run the sampler and yield its weighted steps, checked against what the objective can use."""
        request = Request(self.num_particles, self.vectorize_particles, self.objective.routing)
        for step in self.sampler(model, guide, args, kwargs, request):
            self._check(step)
            yield step

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, in nats: its value is the objective's, its gradient that of the objective's surrogate."""
        return torch.stack([self._level(step) for step in self.steps(model, guide, *args, **kwargs)]).sum()

    def _level(self, step: Step) -> Tensor:
        value, surrogate = self.objective(step)
        return step.scale * (value.detach() + (surrogate - surrogate.detach())).sum()

    def _check(self, step: Step) -> None:
        if self.objective.linear or self.sampler.proposal == "model":  # equal weights leave nothing nonlinear
            return
        if step.averaged:
            raise ValueError(
                f"{self} is not linear in the log weights, but the guide enumerates sites, which leaves no weight per "
                "particle. Use ELBO, draw these sites, or enumerate them in the model instead."
            )
        if step.subsampled and not self.allow_biased_subsampling:
            raise ValueError(
                f"{self} is biased here: the subsampled plates {list(step.subsampled)} do not contain every latent "
                "site, so their scale would go inside a nonlinear bound. Use ELBO, use full data, put all latents "
                "into the plate, or accept the bias with allow_biased_subsampling=True."
            )

    def __repr__(self) -> str:
        return f"WeightedELBO({self.objective!r}, {type(self.sampler).__name__}(), num_particles={self.num_particles})"


class _Named(WeightedELBO):
    """A WeightedELBO that prints as the call that makes it."""

    arguments: dict[str, Any]

    def _set_up(self, objective: Objective, num_particles: int, options: dict[str, Any], **arguments: Any) -> None:
        super().__init__(objective, None, num_particles, **options)
        self.arguments = {"num_particles": num_particles, **{k: v for k, v in arguments.items() if v is not None}}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.arguments.items())})"


def _checked_count(num_particles: int) -> int:
    if not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"num_particles={num_particles!r}: expected a whole number of at least 1.")
    return num_particles


def _check_estimator(estimator: str | None, name: str, allowed: Sequence[str]) -> None:
    if estimator is not None and estimator not in allowed:
        choices = ", ".join(["None", *map(repr, allowed)])
        raise ValueError(f"{name} has no estimator={estimator!r}: expected one of {choices}.")


class ELBO(_Named):
    """The evidence lower bound, ``loss = -mean_k [log p(x, z_k) - log q(z_k)]`` (Jordan et al. 1999).

    :param num_particles: number of draws.
    :param entropy: ``"sampled"``: ``-log q`` at the draws; ``"exact"``: the exact entropy of every guide site given the
        draws above it (Jacobians of automatic guides stay sampled), which lowers the variance far from the optimum;
        ``"kl"``: ``KL(q || p)`` of every site that has it in closed form (:func:`pplvi.divergences.divergences`), the
        others sampled: what Pyro's ``TraceMeanField_ELBO`` computes, and right for automatic guides too.
    :param estimator: ``None`` (pathwise where reparameterised, VIMCO elsewhere), ``"reparam"`` (refuse other sites),
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
        num_particles: int = 1,
        entropy: Literal["sampled", "exact", "kl"] = "sampled",
        *,
        estimator: Estimator | None = None,
        **options: Any,
    ) -> None:
        _check_estimator(estimator, "ELBO", ("reparam", "score", "vimco", "stl"))
        if entropy not in ("sampled", "exact", "kl"):
            raise ValueError(f"entropy={entropy!r}: expected 'sampled', 'exact' or 'kl'.")
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
        counts = [self.num_particles] if self.vectorize_particles else [1] * self.num_particles
        with torch.no_grad():
            runs = (execute(model, guide, args, kwargs, num_particles=count) for count in counts)
            return _averaged([self._terms(run, per_site) for run in runs])

    def _terms(self, run: Run, per_site: bool) -> dict[str, Any]:
        entropies = exact_entropies(run) if self.objective.routing.exact_entropy else None
        entropy = -run.log_forward() if entropies is None else sum(entropies.values(), run.zeros())
        halves = {"expected_log_prob": _mean(run, run.log_target()), "entropy": _mean(run, entropy)}
        found: dict[str, Any] = {"elbo": sum(halves.values()), **halves}
        return {**found, "sites": _sites(run, entropies)} if per_site else found


def _averaged(parts: list[Any]) -> Any:
    """Mean of nested dicts of numbers."""
    if isinstance(parts[0], dict):
        return {key: _averaged([part[key] for part in parts]) for key in parts[0]}
    return sum(parts) / len(parts)


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


class ImportanceWeightedELBO(_Named):
    """The importance-weighted bound, ``loss = -log mean_k p(x, z_k) / q(z_k)``, per datum (Burda et al. 2016).

    :param num_particles: number of draws ``K``; the bound tightens with it.
    :param estimator: as in :class:`ELBO`, and ``"dreg"`` (doubly reparameterised, Tucker et al. 2019), whose guide
        gradient keeps its signal-to-noise ratio as ``K`` grows. ``"stl"`` is biased here for ``K > 1``.
    :raises ValueError: for an unknown estimator.

    >>> ImportanceWeightedELBO(num_particles=16, estimator="dreg")
    ImportanceWeightedELBO(num_particles=16, estimator='dreg')
    """

    def __init__(self, num_particles: int = 10, *, estimator: Estimator | None = None, **options: Any) -> None:
        _check_estimator(estimator, "ImportanceWeightedELBO", _MULTI_SAMPLE)
        self._set_up(RenyiBound(0.0, estimator), num_particles, options, estimator=estimator)


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
        self, alpha: float = 0.5, num_particles: int = 10, *, estimator: Estimator | None = None, **options: Any
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


class ChiELBO(_Named):
    """The chi upper bound (CUBO, n=2), ``loss = +log mean_k w_k^2 / 2``, minimised (Dieng et al. 2017).

    It makes the guide cover the posterior. Its Monte Carlo estimate is biased downwards; use many particles.

    :param num_particles: number of draws.
    :param estimator: as in :class:`ImportanceWeightedELBO`.

    >>> ChiELBO(num_particles=64).monitor
    'upper'
    """

    def __init__(self, num_particles: int = 10, *, estimator: Estimator | None = None, **options: Any) -> None:
        _check_estimator(estimator, "ChiELBO", _MULTI_SAMPLE)
        self._set_up(RenyiBound(-1.0, estimator), num_particles, options, estimator=estimator)


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
        num_particles: int = 10,
        betas: Sequence[float] = (0.0, 0.1, 0.3),
        *,
        estimator: Estimator | None = None,
        **options: Any,
    ) -> None:
        _check_estimator(estimator, "ThermodynamicELBO", ())
        betas = tuple(float(beta) for beta in betas)
        if not betas or betas[0] != 0.0 or betas[-1] >= 1.0 or any(a >= b for a, b in pairwise(betas)):
            raise ValueError(f"betas={betas}: expected increasing values that start at 0 and stay below 1.")
        self._set_up(ThermodynamicBound(betas), num_particles, options, betas=betas)


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

    def __init__(self, num_particles: int = 10, *, estimator: Estimator | None = None, **options: Any) -> None:
        _check_estimator(estimator, "ForwardKL", ())
        self._set_up(ForwardKLDivergence(), num_particles, options)
