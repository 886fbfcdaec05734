"""A recognition network that is trained on the results of an iterative inference."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from pplvi.losses.base import Loss
from pplvi.types import Program

__all__ = ["RecognitionLoss", "Recognizing"]


@runtime_checkable
class Recognizing(Protocol):
    """A guide that refines what a network says at first, and can tell how far off that was."""

    def divergence(self, *args: Any, **kwargs: Any) -> Tensor:
        """``KL(q || q_network)`` of the refined posterior to the network's, ``(*batch)``, in nats."""


class RecognitionLoss(Loss):
    r"""Divergence of a recognition network from the posterior that is found with its help.

    .. math:: \sum_n \text{KL}(q_{\mu_n} \| q_{\nu(v_n)})

    Mean field is run without gradient, from the network's guess; the network learns to say at once what it will find.
    For every guide with ``divergence``: :class:`pplvi.RecognitionGuide` of a Boltzmann machine, and
    :class:`pplvi.BinaryMeanField` with a network. The model is not trained.

    Source: Salakhutdinov & Larochelle (2010), "Efficient learning of deep Boltzmann machines"; Goodfellow, Bengio &
    Courville (2016), Deep learning, section 19.5.

    :raises ValueError: at the first step, for another guide.

    >>> import torch
    >>> from pplvi.energies import DeepBoltzmannMachine
    >>> from pplvi import RecognitionGuide
    >>> machine = DeepBoltzmannMachine([4, 3, 2], init_scale=0.0)
    >>> RecognitionLoss().loss(machine.model, RecognitionGuide(machine, iterations=1), torch.ones(2, 4))
    0.0
    """

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The divergence, in nats, summed over data."""
        if not isinstance(guide, Recognizing):
            raise ValueError(
                f"{type(guide).__name__} has no divergence(): expected a guide with a recognition network, such as "
                "RecognitionGuide(machine), or BinaryMeanField(coding, network=...)."
            )
        return guide.divergence(*args, **kwargs).sum()
