"""Forward divergences, and the log partition function, whose gradient is the negative phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.objectives.step import Objective, Routing, Step, Terms
from pplvi.weights.algebra import expectation


def weighted_sum(weight: Tensor, values: Tensor) -> Tensor:
    """``sum weight * values`` over particles, where a weight of zero also silences an infinite value."""
    return (weight * values.masked_fill(weight == 0, 0.0)).sum(0)


@checked
@dataclass(frozen=True)
class ForwardKLDivergence(Objective):
    """The forward KL divergence ``KL(p || q)`` up to a constant: ``-E_p[log q]``, self-normalised.

    ``-sum u log q`` with ``u = softmax(log w)`` detached, at detached draws: wake-phi with draws of the guide
    (Bornschein & Bengio 2015; Le et al. 2019), sleep-phi with draws of the model (Hinton et al. 1995), whose weights
    are equal. It gives no gradient to the model, is biased by O(1/K), and is no bound of the log evidence.
    """

    self_normalised: ClassVar[bool] = True
    proposals: ClassVar[frozenset[str]] = frozenset({"guide", "model", "mixture"})

    @property
    def routing(self) -> Routing:
        """Draws are detached."""
        return Routing(detach=True)

    def __call__(self, step: Step) -> Terms:
        """Value and surrogate, each of shape ``(*batch)``."""
        loss = -weighted_sum(torch.softmax(step.log_weight, 0), step.log_forward)
        return Terms(loss.detach(), loss)


def log_normalizer_gradient(step: Step) -> Tensor:
    """``E_B[log_target_fixed]``, shape ``(*batch)``: its gradient is that of ``log Z`` of the step's target.

    ``grad log Z = E_p[grad log gamma]`` for ``p = gamma / Z``: the negative phase of a Boltzmann machine (Hinton 2002;
    Tieleman 2008), and what the normaliser of a learned target adds in nested variational inference.

    >>> step = Step.from_proposal(log_target=torch.tensor([1.0, 3.0]), log_forward=torch.tensor([1.0, 3.0]))
    >>> log_normalizer_gradient(step)
    tensor(2.)
    """
    return expectation(step.log_weight_in + step.log_increment, step.log_target_fixed)


@checked
@dataclass(frozen=True)
class LogPartition(Objective):
    """The negative phase: a surrogate whose gradient is that of ``log Z``, ``E_B[log_target_fixed]``.

    On draws of the target itself, such as persistent chains, or weighted for it. The value is the mean log density of
    the draws, which is no estimate of ``log Z`` and bounds nothing.

    >>> step = Step.from_proposal(log_target=torch.tensor([1.0, 3.0]), log_forward=torch.tensor([1.0, 3.0]))
    >>> LogPartition()(step).value
    tensor(2.)
    """

    proposals: ClassVar[frozenset[str]] = frozenset({"guide", "model", "chains"})

    @property
    def routing(self) -> Routing:
        """Draws are detached."""
        return Routing(detach=True)

    def __call__(self, step: Step) -> Terms:
        """Value and surrogate, each of shape ``(*batch)``."""
        surrogate = log_normalizer_gradient(step)
        return Terms(surrogate.detach(), surrogate)
