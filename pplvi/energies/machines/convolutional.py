"""Convolutional machines: one set of filters for all places of an image, and probabilistic max pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import conv2d, fold, one_hot, softplus
from torch.nn.grad import conv2d_weight

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.couplings import Coupling, Edge, Products
from pplvi.energies.machines.exact_posterior import ConditionalGuide
from pplvi.energies.machines.rbm import Kind, make_units
from pplvi.energies.machines.units import Beta, Units, times
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, NonNegative
from pplvi.types import Values


@checked
class PooledUnits(Units):
    r"""Binary maps in blocks of which at most one unit is on: probabilistic max pooling.

    .. math:: p(s_i = 1) = \frac{e^{f_i}}{1 + \sum_{j \in B} e^{f_j}}, \qquad \log Z = \sum_B \log \Big(1 + \sum_{j
        \in B} e^{f_j}\Big)

    The value is the maps side by side, ``(*batch, maps * height * width)``; each map has one bias.

    :param maps: number of maps.
    :param shape: height and width of a map.
    :param pool: side of a block; 1 are binary units.
    :raises ValueError: if a map is no whole number of blocks.

    Source: Lee, Grosse, Ranganath & Ng (2009), "Convolutional deep belief networks for scalable unsupervised learning
    of hierarchical representations".

    >>> units = PooledUnits(1, (2, 2), pool=2)
    >>> units.mean(torch.zeros(4)), units.pooled(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    (tensor([0.2000, 0.2000, 0.2000, 0.2000]), tensor([1.]))
    """

    def __init__(self, maps: Count, shape: tuple[Count, Count], *, pool: Count = 2) -> None:
        height, width = shape
        if height % pool or width % pool:
            raise ValueError(f"pool={pool!r} of maps of {height} x {width}: expected a divisor of both.")
        size = maps * height * width
        super().__init__(size // pool**2, size)
        self.pool, self.num_states, self.num_biases = pool, pool**2 + 1, maps
        self._sides = maps, height // pool, pool, width // pool, pool

    def _apart(self, x: Tensor) -> Tensor:
        """The units of a block on the first dimension, ``(pool**2, *batch, maps, rows, columns)``."""
        blocks = x.reshape(*x.shape[:-1], *self._sides)
        return blocks.movedim((-3, -1), (0, 1)).flatten(0, 1)

    def _whole(self, apart: Tensor) -> Tensor:
        """Back to ``(*batch, width)``."""
        return apart.unflatten(0, (self.pool, self.pool)).movedim((0, 1), (-3, -1)).flatten(-5)

    def _chances(self, field: Tensor, beta: Beta) -> Tensor:
        logits = self._apart(times(beta, field))
        return torch.exp(logits - softplus(logits.logsumexp(0)))

    def mean(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """Probability that each unit is the one that is on."""
        return self._whole(self._chances(field, beta))

    def sample(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """At most one unit of each block: the one in whose share of the unit interval a uniform number lies."""
        chances = self._chances(field.detach(), beta)
        above, uniform = chances.cumsum(0), torch.empty_like(chances[0]).uniform_()
        below = torch.cat([torch.zeros_like(above[:1]), above[:-1]])
        drawn = (below <= uniform) & (uniform < above)
        return self._whole(drawn.to(field.dtype))

    def log_partition(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """``sum log(1 + sum exp(beta f))`` over blocks."""
        return softplus(self._apart(times(beta, field)).logsumexp(0)).flatten(-3).sum(-1)

    def pooled(self, value: Tensor) -> Tensor:
        """Whether a block has a unit that is on, or the probability of that, ``(*batch, num_blocks)``."""
        return self._apart(value).sum(0).flatten(-3)

    def encode(self, levels: Tensor) -> Tensor:
        """Values of states of the blocks, ``(*batch, num_blocks)`` integers: 0 is all off."""
        maps, rows, _, columns, _ = self._sides
        codes = one_hot(levels.long(), self.pool**2 + 1)[..., 1:].movedim(-1, 0)
        return self._whole(codes.unflatten(-1, (maps, rows, columns)))

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Each state of a block with the same probability."""
        return self.sample(like.new_zeros((*shape, self.width)))

    def problem(self, value: Tensor) -> str | None:
        """Refuse what is not binary, or has two units of a block on."""
        if bool(((value == 0) | (value == 1)).all()) and bool((self.pooled(value) <= 1).all()):
            return None
        return "values that are not 0 or 1, or two units that are on in one block: expected at most one."


@checked
@dataclass(frozen=True)
class ConvolutionalCoupling(Coupling):
    r"""The same weights at every place: ``f_h = v * K`` (a valid convolution), ``f_v`` its transpose.

    The parameter ``K`` has shape ``(maps, channels, filter_size, filter_size)``.

    :ivar edge: names of the image's layer and of that of the maps.
    :ivar image: channels, height and width of the image.
    :ivar maps: number of maps.
    :ivar filter_size: side of a filter.

    Source: Lee, Grosse, Ranganath & Ng (2009); Norouzi, Ranjbar & Mori (2009).

    >>> coupling = ConvolutionalCoupling(("v", "h"), (1, 3, 3), maps=2, filter_size=2)
    >>> coupling.field("h", {"v": torch.ones(9)}, torch.ones(2, 1, 2, 2))
    tensor([4., 4., 4., 4., 4., 4., 4., 4.])
    """

    has_statistics: ClassVar[bool] = True
    edge: Edge
    image: tuple[Count, Count, Count]
    maps: Count
    filter_size: Count

    @property
    def inner(self) -> tuple[int, int]:
        """Height and width of a map."""
        return self.image[1] - self.filter_size + 1, self.image[2] - self.filter_size + 1

    def start(self, scale: float) -> Tensor:
        """Normal weights with this standard deviation."""
        return scale * torch.randn(self.maps, self.image[0], self.filter_size, self.filter_size)

    def field(self, target: str, values: Values, parameter: Tensor, products: Products | None = None) -> Tensor:
        """The convolution of an image with the filters, or of maps with the filters turned round."""
        image, maps = self.edge
        if target != maps:
            value = values[maps]
            columns = parameter.flatten(1).T @ value.reshape(-1, self.maps, self.inner[0] * self.inner[1])
            return fold(columns, self.image[1:], self.filter_size).reshape(*value.shape[:-1], -1)
        value, kept = values[image], None if products is None or torch.is_grad_enabled() else products[self.edge]
        known: Tensor | None = None if kept is None else kept.get(value)
        if known is None:
            known = conv2d(value.reshape(-1, *self.image), parameter).reshape(*value.shape[:-1], -1)
            if kept is not None:
                kept[value] = known
        return known

    def statistics(self, first: Tensor, second: Tensor, into: Tensor | None = None) -> Tensor:
        """Sums over rows and places of what ``K`` is multiplied with, of its shape."""
        shape = (self.maps, self.image[0], self.filter_size, self.filter_size)
        images, maps = first.reshape(-1, *self.image), second.reshape(-1, self.maps, *self.inner)
        product = conv2d_weight(images, shape, maps)
        return product if into is None else into.add_(product)

    def filters(self, parameter: Tensor) -> Tensor:
        """The filters, ``(maps, channels * filter_size**2)``."""
        return parameter.flatten(1)


@checked
class ConvolutionalBoltzmannMachine(BoltzmannMachine):
    r"""A convolutional restricted Boltzmann machine with probabilistic max pooling.

    .. math:: E(v, h) = -a \sum_i v_i - \sum_k \sum_j h_j^k \big(b_k + (v * K^k)_j\big)

    where of each block of ``pool x pool`` units of a map at most one is on. Layers ``"v"`` (an image, flat, one bias a
    channel) and ``"h"`` (:class:`PooledUnits`). It is not centered.

    :param image: channels, height and width of the images.
    :param maps: number of maps of hidden units.
    :param filter_size: side of the filters.
    :param pool: side of the pooled blocks, which divides the maps' sides ``height - filter_size + 1``.
    :param visible: ``"bernoulli"``, ``"gaussian"``, or units of your own.
    :param mean_field_visible: accept grey levels in ``[0, 1]``, as means of Bernoulli units.
    :param name: prefix of the parameters' names.
    :param init_scale: standard deviation of the weights at the start.
    :raises ValueError: for filters that do not fit into the image, or blocks that do not into the maps.

    Source: Lee, Grosse, Ranganath & Ng (2009).

    >>> machine = ConvolutionalBoltzmannMachine((1, 6, 6), maps=2, filter_size=3, pool=2)
    >>> machine.layers["h"].width, machine.guide.factorised(torch.ones(5, 36)).means["h"].shape
    (32, torch.Size([5, 32]))
    """

    def __init__(
        self,
        image: tuple[Count, Count, Count],
        *,
        maps: Count,
        filter_size: Count,
        pool: Count = 2,
        visible: Kind | Units = "bernoulli",
        mean_field_visible: bool = False,
        name: str = "",
        init_scale: NonNegative = 0.01,
    ) -> None:
        if filter_size > min(image[1:]):
            raise ValueError(f"filter_size={filter_size} of images {image}: expected 1 to {min(image[1:])}.")
        coupling = ConvolutionalCoupling(("v", "h"), image, maps, filter_size)
        channels, height, width = image
        units = make_units(visible, channels * height * width, mean_field=mean_field_visible)
        units.num_biases = channels
        layers = {"v": units, "h": PooledUnits(maps, coupling.inner, pool=pool)}
        super().__init__(layers, [coupling], centered=False, name=name, init_scale=init_scale)

    @property
    def guide(self) -> ConditionalGuide:
        """The exact posterior of the hidden layer, as a Pyro guide."""
        return ConditionalGuide(self)

    def pooled(self, v: Tensor) -> Tensor:
        """Probability that a unit of each block is on, given images, ``(*batch, num_blocks)``."""
        found: Tensor = self.units_h.pooled(self.layers["h"].mean(self.field("h", {"v": v})))
        return found
