"""Sigmoid belief networks: layers of binary causes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import pyro_method
from torch import Tensor, nn

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.models.latent.layered import LayeredModel, given_to_guide, masked_event, zero_filled

__all__ = ["SigmoidBeliefNetwork"]

MOST_ENUMERATED = 14


@checked
class SigmoidBeliefNetwork(LayeredModel):
    r"""Layers of binary units, each with log odds linear in the layer above.

    .. math:: p(z_L) = \prod_j \sigma(\pm b_{Lj}), \qquad p(z_{l,i} = 1 \mid z_{l+1}) = \sigma(W_l z_{l+1} + b_l)_i,
        \qquad x = z_0

    ``guide`` is a recognition network of the same shape from the data up, for :class:`pplvi.ReweightedWakeSleep`,
    :class:`pplvi.WakeSleep` or bounds with VIMCO. With at most 14 units in every latent layer :meth:`distribution` sums
    them out.

    Source: Neal (1992), "Connectionist learning of belief networks"; Saul, Jaakkola & Jordan (1996), "Mean field theory
    for sigmoid belief networks"; Hinton et al. (1995) for the recognition network.

    :param widths: of the data and of each latent layer.
    :param name: prefix of the parameters' names.
    :raises ValueError: for fewer than two layers, or widths below 1.

    >>> import pplvi
    >>> network = SigmoidBeliefNetwork([6, 4, 2])
    >>> network.distribution().log_prob(torch.zeros(3, 6)).shape
    torch.Size([3])
    >>> bound = -pplvi.ImportanceWeightedELBO(50).loss(network.model, network.guide, torch.zeros(1, 6))
    >>> abs(bound - network.distribution().log_prob(torch.zeros(6)).item()) < 0.5
    True
    """

    def __init__(self, widths: Sequence[Count], *, name: str = "sigmoid_belief_network") -> None:
        super().__init__(widths, name)
        for layer, (below, above) in enumerate(pairwise(widths)):
            setattr(self, f"weight_{layer}", nn.Parameter(torch.randn(below, above) * above**-0.5))
            setattr(self, f"recognition_{layer}", nn.Parameter(torch.randn(above, below) * below**-0.5))
            setattr(self, f"recognition_bias_{layer}", nn.Parameter(torch.zeros(above)))
        for layer, width in enumerate(widths):
            setattr(self, f"bias_{layer}", nn.Parameter(torch.zeros(width)))

    def _given(self, layer: int, above: Tensor) -> dist.Bernoulli:
        weight, bias = getattr(self, f"weight_{layer}"), getattr(self, f"bias_{layer}")
        return dist.Bernoulli(logits=above @ weight.T + bias)

    def _top(self) -> dist.Bernoulli:
        return dist.Bernoulli(logits=getattr(self, f"bias_{len(self.widths) - 1}"))

    @pyro_method
    def model(self, x: Tensor | None = None, *, mask: Tensor | None = None, size: int | None = None) -> Tensor:
        """Layers from the top, and data ``"x"``, in plate ``"data"``.

        :param x: binary data, ``(N, D)``; drawn if left out.
        :param mask: which numbers were seen, ``(N, D)`` or ``(D,)``, boolean.
        :param size: how many to draw (one), or how many the data given stand for.
        :raises ValueError: for data or a mask of another shape.
        """
        depth = len(self.widths) - 1
        with self.plate(x, size):
            value = pyro.sample(f"z{depth}", self._top().to_event(1))
            for layer in range(depth - 1, 0, -1):
                value = pyro.sample(f"z{layer}", self._given(layer, value).to_event(1))
            found: Tensor = pyro.sample("x", masked_event(self._given(0, value), x, mask), obs=zero_filled(x, mask))
        return found

    @pyro_method
    def guide(self, x: Tensor | None = None, *, mask: Tensor | None = None, size: int | None = None) -> None:
        """The recognition network, which sees zeros where numbers are missing; same arguments as the model.

        :raises ValueError: without data.
        """
        with self.plate(x := given_to_guide(x), size):
            below = zero_filled(x, mask)
            for layer in range(len(self.widths) - 1):
                weight, bias = getattr(self, f"recognition_{layer}"), getattr(self, f"recognition_bias_{layer}")
                below = pyro.sample(f"z{layer + 1}", dist.Bernoulli(logits=below @ weight.T + bias).to_event(1))

    @pyro_method
    def distribution(self) -> dist.TorchDistribution:
        """The marginal of data, a mixture over all states of the first latent layer.

        :raises ValueError: for latent layers of more than 14 units.
        """
        if max(self.widths[1:]) > MOST_ENUMERATED:
            raise ValueError(
                f"widths={list(self.widths)}: expected latent layers of at most {MOST_ENUMERATED} units to sum over. "
                "Use importance-weighted bounds."
            )
        depth = len(self.widths) - 1
        states = self._states(depth)
        log_p = self._top().log_prob(states).sum(-1)
        for layer in range(depth - 1, 0, -1):
            below = self._states(layer)
            each = self._given(layer, states)  # sum_i s_i logit_i + log sigmoid(-logit_i), one product for all pairs
            free = torch.nn.functional.logsigmoid(-each.logits).sum(-1)
            log_p, states = (log_p + free + below @ each.logits.T).logsumexp(-1), below
        return dist.MixtureSameFamily(dist.Categorical(logits=log_p), self._given(0, states).to_event(1))

    def _states(self, layer: int) -> Tensor:
        numbers = torch.arange(2 ** self.widths[layer], device=self.bias_0.device)
        return (numbers[:, None] >> torch.arange(self.widths[layer], device=numbers.device) & 1).to(self.bias_0)

    @torch.no_grad()
    def sample(self, num_draws: Count) -> Tensor:
        """Draws, ``(num_draws, D)``."""
        found: Tensor = self.model(size=num_draws)
        return found
