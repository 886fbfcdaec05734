"""The up-down algorithm: contrastive wake-sleep for deep belief networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pplvi.energies.machines.dbn import DeepBeliefGuide, DeepBeliefNetwork
from pplvi.energies.machines.training_step import training_step
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Rate
from pplvi.losses.base import Loss
from pplvi.programs.plates import full_size


@checked
class UpDown(Loss):
    r"""Fine-tuning of a deep belief network: up with the data, some sweeps in the top machine, down from there.

    .. math:: \ell = -\sum_l \log p(h_{l-1} \mid h_l) + F(h_{L-1}) - F(h'_{L-1}) - \sum_l \log q(h'_l \mid h'_{l-1})

    in nats per datum. Going up from the data with the guide trains the generative weights (wake); the top machine is
    trained by contrastive divergence from there, ``F`` its free energy; going down from the end of its chain gives
    fantasies, on which the recognition weights are trained (sleep). It bounds nothing (``monitor`` is ``None``).

    :param sweeps: Gibbs sweeps in the top machine.
    :param offset_rate: rate at which the offsets of a centered top machine follow.
    :raises ValueError: for fewer than one sweep.

    Source: Hinton, Osindero & Teh (2006), "A fast learning algorithm for deep belief nets", appendix B.

    >>> import pyro
    >>> dbn = DeepBeliefNetwork([4, 3, 2])
    >>> svi = pyro.infer.SVI(dbn.model, dbn.guide, pyro.optim.SGD({"lr": 0.1}), UpDown(sweeps=3))
    >>> loss = svi.step(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    """

    def __init__(self, sweeps: Count = 10, *, offset_rate: Rate = 0.01) -> None:
        super().__init__(num_particles=1, vectorize_particles=True)
        self.sweeps, self.offset_rate = sweeps, offset_rate

    def __repr__(self) -> str:
        return f"UpDown(sweeps={self.sweeps})"

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The surrogate on one pass up and down for each datum; the programs themselves are not run.

        :raises ValueError: for a model and guide that are not those of a deep belief network.
        """
        network = getattr(model, "__self__", None)
        if not (isinstance(network, DeepBeliefNetwork) and isinstance(guide, DeepBeliefGuide)):
            raise ValueError(f"got model {model!r} and guide {guide!r}: expected dbn.model and dbn.guide.")
        with training_step():
            return self._loss(network, guide, *args, **kwargs)

    def _loss(
        self, network: DeepBeliefNetwork, guide: DeepBeliefGuide, v: Tensor, *, size: int | None = None
    ) -> Tensor:
        network.announce()
        guide.recognition.announce()
        network.layers[network.visible].validate(v, network.visible)
        full_size(len(v), size)  # the mean over the data is that of any number of them
        wake, top = guide.upward(v), network.top
        start = {top.visible: wake[top.visible]}
        start[top.hidden[0]] = top.redrawn(top.hidden[0], start)
        ends = top.gibbs(start, self.sweeps)
        dream = network.downward(ends)
        if torch.is_grad_enabled() and top.centered:
            top.move_offsets(start, self.offset_rate)
        loss = -network.log_joint(wake) + top.log_marginal({top.visible: ends[top.visible]}) - guide.log_density(dream)
        return loss.mean()
