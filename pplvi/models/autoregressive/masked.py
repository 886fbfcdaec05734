"""Networks whose outputs see only the inputs before them: fully visible belief networks, and MADE."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pyro.distributions as dist
import torch
from pyro.nn import pyro_method
from torch import Tensor, nn
from torch.nn.functional import linear

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.models.autoregressive.distributions import AutoregressiveDistribution
from pplvi.models.autoregressive.model import BinaryAutoregressiveModel
from pplvi.programs.calls import check_counts

__all__ = ["MADE", "FullyVisibleBeliefNetwork", "MaskedBernoulli"]


class MaskedBernoulli(AutoregressiveDistribution):
    """Binary numbers whose log odds a masked network gives: see :class:`MADE`.

    :param order: which number comes first, and so on, ``(D,)``.
    :param layers: weights and biases of the layers, masked, from data to log odds.
    :param direct: weights from data to log odds, ``(D, D)``, if there are any.
    """

    def __init__(self, order: Tensor, layers: Sequence[tuple[Tensor, Tensor]], direct: Tensor | None) -> None:
        super().__init__(len(order), layers[-1][1])
        self._order, self.layers, self.direct = order, tuple(layers), direct

    @property
    def order(self) -> list[int]:
        """Which number comes first, and so on."""
        return [int(d) for d in self._order]

    def logits(self, x: Tensor) -> Tensor:
        """Log odds of every number given those before it, ``(*, D)``."""
        h = x
        for weight, bias in self.layers[:-1]:
            h = torch.relu(linear(h, weight, bias))
        found = linear(h, *self.layers[-1])
        return found if self.direct is None else found + linear(x, self.direct)

    def conditionals(self, x: Tensor) -> dist.TorchDistribution:
        """Coins."""
        return dist.Bernoulli(logits=self.logits(x), validate_args=False)


class MaskedModel(BinaryAutoregressiveModel):
    """A masked network: a unit of degree ``k`` sees units below of a degree of at most ``k``, an output lower ones.

    :param num_visible: ``D``.
    :param degrees: of the hidden units of each layer.
    :param order: which number comes first, and so on, ``(D,)``.
    :param direct: weights from data to log odds beside hidden layers.
    :param name: prefix of the parameters' names.
    """

    order: Tensor
    direct: Tensor | None

    def __init__(self, num_visible: Count, degrees: Sequence[Tensor], order: Tensor, direct: bool, name: str) -> None:
        super().__init__(num_visible, name)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(num_visible))
        every = [place, *degrees]
        masks = [above[:, None] >= below for below, above in pairwise(every)]
        self.depth = len(masks)
        for layer, mask in enumerate([*masks, place[:, None] > every[-1]]):
            scale = mask.shape[1] ** -0.5 if self.depth else 0.0
            self.register_buffer(f"mask_{layer}", mask)
            setattr(self, f"weight_{layer}", nn.Parameter(scale * (2 * torch.rand(mask.shape) - 1)))
            if layer < self.depth:
                setattr(self, f"bias_{layer}", nn.Parameter(torch.zeros(len(mask))))
        self.bias = nn.Parameter(torch.zeros(num_visible))
        self.register_buffer("order", order)
        self.register_buffer("before", place[:, None] > place)
        self.direct = nn.Parameter(torch.zeros(num_visible, num_visible)) if direct else None

    @pyro_method
    def distribution(self, given: Tensor | None = None) -> MaskedBernoulli:
        """The distribution of data, with parameters as they are now."""
        self.check_given(given)
        layers = [(self._masked(layer), getattr(self, f"bias_{layer}")) for layer in range(self.depth)]
        layers.append((self._masked(self.depth), self.bias))
        direct = None if self.direct is None else self.direct * self.before
        return MaskedBernoulli(self.order, layers, direct)

    def _masked(self, layer: int) -> Tensor:
        found: Tensor = getattr(self, f"weight_{layer}") * getattr(self, f"mask_{layer}")
        return found


@checked
class FullyVisibleBeliefNetwork(MaskedModel):
    r"""Binary numbers, each by a logistic regression on those before it, or by a network of its own.

    .. math:: p(x_d = 1 \mid x_{<d}) = \sigma\Big(b_d + \sum_{i<d} W_{di} x_i\Big)

    With ``num_hidden`` every number has a group of so many hidden units that see it and those before, and is predicted
    from the groups of all before it.

    Source: Frey, Hinton & Dayan (1996), "Does the wake-sleep algorithm produce good density estimators?"; Bengio &
    Bengio (2000), "Modeling high-dimensional discrete data with multi-layer neural networks"; Goodfellow, Bengio &
    Courville (2016), Deep learning, sections 20.10.8 and 20.10.9.

    :param num_visible: ``D``.
    :param num_hidden: hidden units of each number; a logistic network without.
    :param name: prefix of the parameters' names.
    :raises ValueError: for sizes below 1.

    >>> network = FullyVisibleBeliefNetwork(3)
    >>> network.distribution().log_prob(torch.ones(3)).detach()  # fair coins at the start
    tensor(-2.0794)
    """

    def __init__(
        self, num_visible: Count, num_hidden: Count | None = None, *, name: str = "fully_visible_belief_network"
    ) -> None:
        check_counts(num_visible=num_visible)
        degrees = []
        if num_hidden is not None:
            check_counts(num_hidden=num_hidden)
            degrees = [torch.arange(max(num_visible - 1, 1)).repeat_interleave(num_hidden)]
        super().__init__(num_visible, degrees, torch.arange(num_visible), False, name)


@checked
class MADE(MaskedModel):
    r"""The masked autoencoder for distribution estimation: all log odds of binary data in one pass.

    .. math:: h = \max\big(0, (M_1 \circ W_1) x + c\big), \qquad \ell = (M_2 \circ W_2) h + (M_0 \circ A) x + b

    Hidden units have degrees, spread evenly over the order; masks leave each log odds the numbers before it.

    Source: Germain, Gregor, Murray & Larochelle (2015), "MADE: masked autoencoder for distribution estimation".

    :param num_visible: ``D``.
    :param hidden: units of each hidden layer.
    :param order: which number comes first, and so on, ``(D,)``; as they stand unless given.
    :param direct: weights ``A`` from data to log odds.
    :param name: prefix of the parameters' names.
    :raises ValueError: for sizes below 1, and an order that is no permutation.

    >>> made = MADE(4, [8, 8], order=torch.tensor([2, 0, 3, 1]))
    >>> made.sample(5).shape, made.distribution().log_prob(torch.zeros(5, 4)).shape
    (torch.Size([5, 4]), torch.Size([5]))
    """

    def __init__(
        self,
        num_visible: Count,
        hidden: Sequence[Count],
        *,
        order: Tensor | None = None,
        direct: bool = True,
        name: str = "made",
    ) -> None:
        check_counts(num_visible=num_visible, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        order = torch.arange(num_visible) if order is None else order
        if sorted(order.tolist()) != list(range(num_visible)):
            raise ValueError(f"order={order.tolist()}: expected a permutation of 0 to {num_visible - 1}.")
        degrees = [torch.arange(width) * max(num_visible - 1, 1) // width for width in hidden]
        super().__init__(num_visible, degrees, order, direct, name)
