"""Objectives of one level among many: nested variational inference and its relatives.

A level moves draws weighted for ``gamma[k-1]`` to draws weighted for ``gamma[k]``. Its objective is a divergence
between the extended proposal ``gamma[k-1](z[k-1]) q[k](z[k] | z[k-1]) / Z[k-1]`` and the extended target
``gamma[k](z[k]) r[k-1](z[k-1] | z[k]) / Z[k]``. Two averages over particles appear: ``E_A`` under the incoming weights,
``softmax(log_weight_in)``, and ``E_B`` under the outgoing ones, ``softmax(log_weight_in + log v)``, both held fixed.
``sg`` stops gradients. Levels are local: no gradient goes from one to another through draws or weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.objectives.forward_kl import log_normalizer_gradient
from pplvi.objectives.step import BoundSide, Objective, Routing, Step, Terms
from pplvi.weights.algebra import expectation


def _incoming(step: Step, values: Tensor) -> Tensor:
    """``E_A``: the average under the weights that came in."""
    return expectation(step.log_weight_in, values)


def _outgoing(step: Step, values: Tensor) -> Tensor:
    """``E_B``: the average under the weights that go out."""
    return expectation(step.log_weight_out, values)


@checked
def log_normalizer_ratio(step: Step) -> Tensor:
    """``log E_A[v]``, shape ``(*batch)``: the estimate of ``log Z[k] - log Z[k-1]``, in nats, gradients included.

    Properly weighted draws make ``E_A[v]`` consistent for the ratio; with equal incoming weights it is unbiased.

    >>> step = Step.from_proposal(log_target=torch.tensor([0.0, 0.0]), log_forward=torch.tensor([0.0, 0.0]))
    >>> log_normalizer_ratio(step)
    tensor(0.)
    """
    return torch.logsumexp(step.log_weight_out, 0) - torch.logsumexp(step.log_weight_in, 0)


@dataclass(frozen=True)
class IncrementalBound(Objective):
    """Annealed variational objective of one level, ``-mean log v`` (AVO; Huang et al. 2018).

    Draws count equally whatever their weights. Summed over the levels of a path without resampling, minus the value is
    a lower bound of ``log Z[K] - log Z[0]``, the evidence bound on the extended space.

    >>> step = Step.from_proposal(log_target=torch.tensor([0.0, -1.0]), log_forward=torch.zeros(2))
    >>> IncrementalBound()(step).value
    tensor(0.5000)
    """

    monitor: ClassVar[BoundSide] = "lower"
    linear: ClassVar[bool] = True

    @property
    def routing(self) -> Routing:
        """Sticking the landing, level by level."""
        return Routing(freeze=True, local=True)

    def __call__(self, step: Step) -> Terms:
        """Value and surrogate, each of shape ``(*batch)``."""
        loss = -step.log_increment.mean(0)
        return Terms(loss.detach(), loss)


class _SelfNormalised(Objective):
    """An objective whose averages over particles are normalised by their weights."""

    @property
    def min_particles(self) -> int:
        """Self-normalised averages need two particles."""
        return 2


@dataclass(frozen=True)
class NestedReverseKL(_SelfNormalised):
    """Reverse KL divergence of one level, from extended proposal to extended target (Zimmermann et al. 2021).

    The value is ``-E_A[log v] + log E_A[v]``, an estimate of the divergence that is never negative. The surrogate is
    ``-E_A[log v] - E_A[sg(log v - E_A log v) log gamma[k-1]] - E_A[log gamma[k-1]] + E_B[log_target_fixed]`` with the
    forward density frozen. Its last two terms are the gradients of the normalisers of learned targets; where nothing is
    learned in them they vanish. Self-normalised, so biased by O(1/K).

    >>> step = Step.from_proposal(log_target=torch.tensor([0.0, -1.0]), log_forward=torch.zeros(2))
    >>> NestedReverseKL()(step).value
    tensor(0.1201)
    """

    proposals: ClassVar[frozenset[str]] = frozenset({"guide", "rejection"})

    @property
    def routing(self) -> Routing:
        """Frozen forward density, draws live within the level only."""
        return Routing(freeze=True, local=True)

    def __call__(self, step: Step) -> Terms:
        """Value and surrogate, each of shape ``(*batch)``."""
        log_v = step.log_increment
        mean = _incoming(step, log_v)
        signal = (log_v - mean).detach()
        surrogate = -mean - _incoming(step, (signal + 1.0) * step.log_initial) + log_normalizer_gradient(step)
        return Terms((log_normalizer_ratio(step) - mean).detach(), surrogate)


@checked
@dataclass(frozen=True)
class NestedForwardKL(_SelfNormalised):
    """Forward KL divergence of one level, from extended target to extended proposal (Zimmermann et al. 2021).

    The value is ``E_B[log v] - log E_A[v]``. The surrogate is ``-E_B[log q] - E_B[log gamma[k-1]] +
    E_A[log gamma[k-1]] + E_B[sg(log v - E_B log v) log_target_fixed]`` at detached draws: no reparameterisation. The
    divergence's gradient in the reverse kernel is unstable and is left out.

    :ivar fit_reverse: train the reverse kernel by the reverse KL divergence, ``-E_A[log r]``; otherwise it gets no
        gradient at all.

    >>> step = Step.from_proposal(log_target=torch.tensor([0.0, -1.0]), log_forward=torch.zeros(2))
    >>> NestedForwardKL()(step).value
    tensor(0.1109)
    """

    proposals: ClassVar[frozenset[str]] = frozenset({"guide", "rejection"})
    fit_reverse: bool = False

    @property
    def routing(self) -> Routing:
        """Draws are detached, level by level."""
        return Routing(detach=True, local=True)

    def __call__(self, step: Step) -> Terms:
        """Value and surrogate, each of shape ``(*batch)``."""
        log_v = step.log_increment.detach()
        mean = _outgoing(step, log_v)
        surrogate = (
            _incoming(step, step.log_initial)
            - _outgoing(step, step.log_forward + step.log_initial)
            + _outgoing(step, (log_v - mean) * step.log_target_fixed)
        )
        if self.fit_reverse:
            surrogate = surrogate - _incoming(step, step.log_reverse)
        return Terms(mean - log_normalizer_ratio(step).detach(), surrogate)


class _OverTime(Objective):
    """An objective of one step in time: minus the value, summed, is a lower bound of the log evidence on average."""

    monitor: ClassVar[BoundSide] = "lower"


@checked
@dataclass(frozen=True)
class FilteringBound(_OverTime):
    """Filtering bound of one level, ``-log E_A[v]``, end to end.

    FIVO, VSMC and AESMC (Maddison et al. 2017; Naesseth et al. 2018; Le et al. 2018). Summed over the levels, minus
    the value is the logarithm of an unbiased estimate of ``Z[K] / Z[0]`` and so bounds it from below on average, with
    or without resampling. Gradients go through draws and weights back to the last resampling, whose indices carry
    none.

    >>> step = Step.from_proposal(log_target=torch.tensor([0.0, 0.0]), log_forward=torch.zeros(2))
    >>> FilteringBound()(step).value
    tensor(-0.)
    """

    @property
    def routing(self) -> Routing:
        """Draws and weights stay attached from level to level."""
        return Routing(local=False)

    def __call__(self, step: Step) -> Terms:
        """Value and surrogate, each of shape ``(*batch)``."""
        loss = -log_normalizer_ratio(step)
        return Terms(loss.detach(), loss)


@dataclass(frozen=True)
class FilteringForwardKL(_OverTime, _SelfNormalised):
    """Forward KL divergence of proposals and maximum likelihood for the model, step by step in time.

    NASMC (Gu, Ghahramani & Turner 2015), reweighted wake-sleep over time. The value is that of
    :class:`FilteringBound`, a lower bound of the log evidence on average. The surrogate is ``-E_B[log q] -
    E_B[log_target_fixed] + E_A[log_initial]`` at detached draws: the first term fits the proposal. The others, summed
    over time, are Fisher's identity for the gradient of the log evidence in the model's parameters, consistent in the
    number of particles (the paper keeps the last step's densities only). No reparameterisation is needed. Look-ahead
    factors are no part of a likelihood: learn them by :class:`NestedForwardKL`.

    >>> step = Step.from_proposal(log_target=torch.tensor([0.0, 0.0]), log_forward=torch.zeros(2))
    >>> FilteringForwardKL()(step).value
    tensor(-0.)
    """

    @property
    def routing(self) -> Routing:
        """Draws are detached, step by step."""
        return Routing(detach=True, local=True)

    def __call__(self, step: Step) -> Terms:
        """Value and surrogate, each of shape ``(*batch)``."""
        after, before = step.log_forward + step.log_target_fixed, step.log_initial
        return Terms(-log_normalizer_ratio(step).detach(), _incoming(step, before) - _outgoing(step, after))
