"""A weighted step, and what an objective says of the draws that it works on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

BoundSide = Literal["lower", "upper"]


Estimator = Literal["reparam", "score", "vimco", "stl", "dreg"]


@dataclass(frozen=True)
class Step:
    """One weighted step: log densities of shape ``(num_particles, *batch)``.

    ``batch`` are the plates common to every sample site, latent and observed, of model and guide: weights are per datum
    wherever the model allows it. Ordinary variational inference is one step from nothing, with ``log_weight_in``,
    ``log_reverse`` and ``log_initial`` zero.

    :ivar log_weight_in: weight of ``z[k-1]`` for ``gamma[k-1]``.
    :ivar log_weight: weight of ``z[k]`` for ``gamma[k]``, detached.
    :ivar log_target: ``log gamma[k](z[k])``.
    :ivar log_target_fixed: ``log gamma[k]`` at detached ``z[k]``, parameters live.
    :ivar log_reverse: ``log r[k-1](z[k-1] | z[k])``.
    :ivar log_initial: ``log gamma[k-1](z[k-1])``.
    :ivar log_forward: ``log q[k](z[k] | z[k-1])``.
    :ivar log_score: the part of the guide's log density whose draws carry no path gradient, unscaled, or ``None``.
    :ivar score: the same for each single draw, ``(num_particles, *batch, draws)``, for linear objectives, or ``None``.
    :ivar below: the part of the log weight that depends on each of these draws, detached, of the same shape.
    :ivar log_reverse_fixed: ``log r[k-1]`` at detached ``z[k]``, parameters live; or ``None``, if the same.
    :ivar score_path: what these densities add to ``log_forward``, whose gradient has mean zero.
    :ivar scale: subsample scale of the batch plates: multiplies the objective, never a weight.
    :ivar subsampled: subsampled plates outside ``batch``; their scale is inside the densities.
    :ivar averaged: the densities are exact expectations over enumerated guide sites, so there are no weights.

    >>> step = Step.from_proposal(log_target=torch.tensor([-1.0, -2.0]), log_forward=torch.tensor([-1.5, -1.5]))
    >>> step.log_increment
    tensor([ 0.5000, -0.5000])
    """

    log_weight_in: Tensor
    log_weight: Tensor
    log_target: Tensor
    log_target_fixed: Tensor
    log_reverse: Tensor
    log_initial: Tensor
    log_forward: Tensor
    log_score: Tensor | None = None
    scale: float = 1.0
    subsampled: tuple[str, ...] = ()
    averaged: bool = False
    score: Tensor | None = None
    below: Tensor | None = None
    score_path: Tensor | None = None
    log_reverse_fixed: Tensor | None = None

    @classmethod
    def from_proposal(
        cls,
        log_target: Tensor,
        log_forward: Tensor,
        log_target_fixed: Tensor | None = None,
        log_score: Tensor | None = None,
        scale: float = 1.0,
        subsampled: tuple[str, ...] = (),
        averaged: bool = False,
    ) -> Step:
        """The step of ordinary importance sampling: drawn from ``q``, weighted for ``gamma``."""
        zero = torch.zeros_like(log_target)
        fixed = log_target if log_target_fixed is None else log_target_fixed
        weight = (log_target - log_forward).detach()
        return cls(zero, weight, log_target, fixed, zero, zero, log_forward, log_score, scale, subsampled, averaged)

    @classmethod
    def from_move(
        cls,
        log_weight_in: Tensor,
        log_target: Tensor,
        log_initial: Tensor,
        log_reverse: Tensor | None = None,
        log_forward: Tensor | None = None,
        log_target_fixed: Tensor | None = None,
        log_reverse_fixed: Tensor | None = None,
        scale: float = 1.0,
        subsampled: tuple[str, ...] = (),
    ) -> Step:
        """The step of draws that are moved from ``gamma[k-1]`` to ``gamma[k]``.

        Their new weight is ``log w + log v``. Without a forward and a reverse kernel the draws stay where they are.

        >>> zero, start, target = torch.zeros(2), torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.5])
        >>> Step.from_move(log_weight_in=zero, log_target=target, log_initial=start).log_weight
        tensor([-0.5000,  0.5000])
        """
        fixed = log_target if log_target_fixed is None else log_target_fixed
        reverse = torch.zeros_like(fixed) if log_reverse is None else log_reverse
        forward = torch.zeros_like(fixed) if log_forward is None else log_forward
        step = cls(
            log_weight_in=log_weight_in,
            log_weight=log_weight_in,
            log_target=log_target,
            log_target_fixed=fixed,
            log_reverse=reverse,
            log_reverse_fixed=log_reverse_fixed,
            log_initial=log_initial,
            log_forward=forward,
            scale=scale,
            subsampled=subsampled,
        )
        return replace(step, log_weight=step.log_weight_out.detach())

    @classmethod
    def equally_weighted(cls, log_density: Tensor) -> Step:
        """Draws of the target itself, before and after the step: all weights are one.

        The value of an objective is zero, and what is left is the gradient of the target's log density at the draws.

        :param log_density: the target's log density at the draws, ``(num_particles, *batch)``.

        >>> Step.equally_weighted(torch.tensor([-1.0, -2.0])).log_increment
        tensor([0., 0.])
        """
        zero = torch.zeros_like(log_density).detach()
        return cls(
            log_weight_in=zero,
            log_weight=zero,
            log_target=log_density,
            log_target_fixed=log_density,
            log_reverse=zero,
            log_initial=log_density.detach(),
            log_forward=zero,
        )

    @classmethod
    def concatenate(cls, steps: Sequence[Step]) -> Step:
        """Put the particles of several steps side by side."""
        if len(steps) == 1:
            return steps[0]
        first = steps[0]
        names = [f.name for f in fields(cls) if isinstance(getattr(first, f.name), Tensor)]
        joined: dict[str, Any] = {name: torch.cat([getattr(step, name) for step in steps]) for name in names}
        return replace(first, **joined)

    @property
    def num_particles(self) -> int:
        """Size of the particle dimension."""
        return self.log_weight.shape[0]

    @property
    def log_increment(self) -> Tensor:
        """The incremental weight ``log v``, ``(num_particles, *batch)``."""
        return self.log_target + self.log_reverse - self.log_initial - self.log_forward

    @property
    def log_weight_out(self) -> Tensor:
        """The new weight with its graph, ``(num_particles, *batch)``; :attr:`log_weight` is this one, detached."""
        return self.log_weight_in + self.log_increment


class Terms(NamedTuple):
    """What an objective makes of a step: a value to report and a surrogate to differentiate, each ``(*batch)``."""

    value: Tensor
    surrogate: Tensor


@dataclass(frozen=True)
class Routing:
    """What an objective needs of its draws.

    :ivar detach: draws are detached at their sample sites.
    :ivar freeze: parameters of the guide's densities are frozen, and ``log_target_fixed`` is provided.
    :ivar exact_entropy: ``-log_forward`` is the sum of the guide sites' exact entropies.
    :ivar analytic_kl: divergences between guide and prior take the place of ``log q - log p`` where they are known.
    :ivar per_draw: of draws without a path gradient, each score function comes with the part of the log weight that
        depends on the draw, enough for objectives linear in the log weight.
    :ivar local: of an objective of one level among many: whether draws and weights are detached between levels, or
        stay attached back to the last resampling. ``None`` for an objective of a single step.
    """

    detach: bool = False
    freeze: bool = False
    exact_entropy: bool = False
    analytic_kl: bool = False
    per_draw: bool = False
    local: bool | None = None


class Objective(ABC):
    """A pure function of a step. Subclasses say what draws they need and which bound they report.

    :cvar monitor: what minus the value is a bound of, ``"lower"``; the value itself an ``"upper"`` bound; or ``None``.
    :cvar linear: linear in ``log v``: the only kind that survives scales inside the densities or averaged densities.
    :cvar self_normalised: compares weights of particles, so that one particle of a guide says nothing.
    :cvar proposals: where draws may come from: the guide (``"guide"``), the model itself (``"model"``), a mixture of
        the guide with another proposal (``"mixture"``), where ``log_weight`` is not that of ``log_forward``, or the
        guide with some of its draws rejected (``"rejection"``), where only ``log_weight_in`` knows which.
    """

    monitor: ClassVar[BoundSide | None] = None
    linear: ClassVar[bool] = False
    self_normalised: ClassVar[bool] = False
    proposals: ClassVar[frozenset[str]] = frozenset({"guide"})

    @property
    def routing(self) -> Routing:
        """Routing of gradients; by default plain reparameterised draws."""
        return Routing()

    @property
    def min_particles(self) -> int:
        """Fewest particles the objective is defined for."""
        return 1

    @abstractmethod
    def __call__(self, step: Step) -> Terms:
        """Value and surrogate of a step, each of shape ``(*batch)``, to be minimised."""
