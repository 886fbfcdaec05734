"""What a loss is: a Pyro ELBO with a differentiable loss, sums of such, and an objective on the steps of a sampler.

:class:`Loss` is what ``pyro.infer.SVI``, :func:`pplvi.fit` and compiled steps ask for; :class:`LossSum` is what
``a + b`` makes of two; :class:`WeightedELBO` joins an objective, a sampler and a number of particles, and checks that
they fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from pyro.infer import ELBO as PyroELBO
from pyro.util import warn_if_nan
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.objectives.step import BoundSide, Objective, Step
from pplvi.programs.joint import execute
from pplvi.programs.ways import Vectorize, named
from pplvi.samplers.base import Request, Sampler
from pplvi.samplers.importance import Importance
from pplvi.types import Program


class Loss(PyroELBO):
    """A Pyro ELBO defined by its differentiable loss. Losses add, and scale: ``a + 0.5 * b``, ``sum([a, b]) / 2``."""

    monitor: BoundSide | None = None
    compares_draws: ClassVar[bool] = False  # with the data, so that the model need not observe these

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
        super().__init__(num_particles=most)
        ways = [loss.vectorize_particles for _, loss in self.terms]
        self.vectorize_particles = False if any(named(way) == "loop" for way in ways) else ways[0]
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


@checked
class WeightedELBO(Loss):
    """An objective on the steps of a sampler: what every named class here is made of.

    The loss is ``sum over batch of scale * value``, where the objective sees one log weight per particle and per
    element of the batch plates (those common to all sites), and ``scale`` is the plates' subsample scale. Subsampling
    any other plate puts its scale inside the log weights, which only linear objectives survive without bias.

    :param objective: a function of steps (:mod:`pplvi.objectives.bounds`).
    :param sampler: where the steps come from; by default importance sampling from the guide.
    :param num_particles: number of draws.
    :param vectorize_particles: the way of running particles: ``"broadcast"`` (as an outermost plate), ``"vmap"`` or
        ``"loop"`` (``False``); the fastest that is right for the programs unless named.
    :param allow_biased_subsampling: accept a nonlinear objective although a plate is subsampled that does not hold all
        latents.
    :raises ValueError: if the objective cannot use the sampler's draws, or needs more particles.

    >>> import pyro, pyro.distributions as dist
    >>> from pplvi.objectives.bounds import RenyiBound
    >>> from pplvi.samplers.importance import Importance
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
        num_particles: Count = 1,
        *,
        vectorize_particles: Vectorize = True,
        allow_biased_subsampling: bool = False,
    ) -> None:
        super().__init__(num_particles=_checked_count(num_particles))
        named(vectorize_particles, "vectorize_particles")
        self.vectorize_particles: Vectorize = vectorize_particles
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


def _checked_count(num_particles: int) -> int:
    if not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"num_particles={num_particles!r}: expected a whole number of at least 1.")
    return num_particles
