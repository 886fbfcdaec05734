"""Block neural autoregressive flows: one network whose units belong to coordinates, monotone in each one's own.

Zuko has no such flow (its ``NAF`` gives every coordinate a monotone network that another network conditions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from pplvi.guides.flows.quadratic import Direction

_SPREAD = 2.0  # of the first layer's biases: units bend at different places
_DOUBLINGS, _HALVINGS = 20, 54  # of the bracket around a root, which lies within a million of zero

Push = Callable[[Tensor], tuple[Tensor, Tensor]]


class BlockNeuralFlow(nn.Module):
    r"""A stack of block neural autoregressive networks, in the given order and the reverse one by turns.

    .. math:: y = W_{L+1} \sigma(W_L \cdots \sigma(W_1 x + b_1) \cdots + b_L) + b_{L+1}, \qquad
        \log |\partial y_d / \partial x_d| = \log \big( W^{dd}_{L+1} \mathrm{diag}(\sigma') W^{dd}_L \cdots \big)

    Blocks ``W^{de}`` are zero for ``e > d`` and positive for ``e = d``. Half of each coordinate's units have the
    activation ``softplus(u)``, the other half ``-softplus(-u)``; a pair of both with the same input is ``u``, so zero
    parameters give the identity, which the hyperbolic tangents of the paper cannot, and every value is reached. There
    is no weight normalisation.

    A draw and its density are one pass. The inverse is by bisection, one coordinate after another.

    Source: De Cao, Titov & Aziz 2019, Block neural autoregressive flow, UAI.

    :param features: number of coordinates.
    :param transforms: number of networks.
    :param hidden_features: units of each hidden layer for each coordinate, even numbers.
    """

    def __init__(self, features: int, transforms: int = 1, hidden_features: Sequence[int] = (8, 8)) -> None:
        super().__init__()
        if not hidden_features or any(width % 2 for width in hidden_features):
            raise ValueError(f"hidden_features is {hidden_features!r}; expected even numbers of units a coordinate")
        self.transforms = nn.ModuleList(BlockNetwork(features, hidden_features) for _ in range(transforms))

    def forward(self, context: Tensor | None = None) -> Direction:
        """The map, with ``call_and_ladj`` and ``inv``."""
        parts: list[Any] = list(self.transforms)
        pushes = [partial(net.push, turned=bool(i % 2)) for i, net in enumerate(parts)]
        pulls = [partial(net.pull, turned=bool(i % 2)) for i, net in enumerate(parts)][::-1]
        return Direction(lambda x: _through(x, pushes), lambda y: _through(y, pulls))


class BlockNetwork(nn.Module):
    """One network of :class:`BlockNeuralFlow`."""

    def __init__(self, features: int, hidden_features: Sequence[int]) -> None:
        super().__init__()
        widths = [1, *hidden_features, 1]
        self.layers = nn.ModuleList(BlockLinear(features, a, b) for a, b in pairwise(widths))

    def push(self, x: Tensor, turned: bool = False) -> tuple[Tensor, Tensor]:
        """From base to data, shapes ``(*batch, D)``, with the log-determinant ``(*batch,)``."""
        units = (x.flip(-1) if turned else x).unsqueeze(-1)
        slope = torch.zeros_like(units)
        for depth, layer in enumerate(self.layers):
            if depth:
                units, slope = _bent(units, slope)
            units, slope = layer(units, slope)
        y = units.squeeze(-1)
        return y.flip(-1) if turned else y, slope.squeeze(-1).sum(-1)

    def pull(self, y: Tensor, turned: bool = False) -> tuple[Tensor, Tensor]:
        """From data to base; gradients are those of the implicit function."""
        push = partial(self.push, turned=turned)
        order = range(y.shape[-1])[:: -1 if turned else 1]
        with torch.no_grad():
            x = _roots(push, y, order)
        if torch.is_grad_enabled():
            matrix = _jacobian(push, x)
            x = x - torch.linalg.solve(matrix, (push(x)[0] - y).unsqueeze(-1)).squeeze(-1)
        return x, -push(x)[1]


class BlockLinear(nn.Module):
    """``W x + b`` with blocks ``(D, out, in)`` on the diagonal that are positive, and free ones below."""

    lower: Tensor
    log_start: Tensor
    spread: Tensor

    def __init__(self, features: int, width: int, out: int) -> None:
        super().__init__()
        below = torch.ones(features, features).tril(-1)
        places = (torch.arange(out // 2) + 0.5) / max(1, out // 2) - 0.5  # symmetric, so that their mean is zero
        self.register_buffer("lower", below.repeat_interleave(out, 0).repeat_interleave(width, 1))
        self.register_buffer("log_start", torch.tensor(-math.log(max(1, width // 2))))  # the mean over pairs
        self.register_buffer("spread", 2 * _SPREAD * places.repeat(2) if out > 1 else torch.zeros(1))
        self.own = nn.Parameter(torch.zeros(features, out, width))
        self.others = nn.Parameter(torch.zeros(features * out, features * width))
        self.bias = nn.Parameter(torch.zeros(features, out))

    def forward(self, units: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Units ``(*batch, D, in)`` and the logs of their slopes in their own coordinates, to ``(*batch, D, out)``."""
        log_own = self.own + self.log_start
        own = torch.einsum("...di,doi->...do", units, log_own.exp())
        others = (units.flatten(-2) @ (self.others * self.lower).mT).reshape(own.shape)
        return own + others + self.bias + self.spread, torch.logsumexp(log_own + slope.unsqueeze(-2), -1)


def _through(x: Tensor, maps: Sequence[Push]) -> tuple[Tensor, Tensor]:
    """One map after another, with the sum of the log-determinants."""
    total = x.new_zeros(x.shape[:-1])
    for each in maps:
        x, ladj = each(x)
        total = total + ladj
    return x, total


def _bent(units: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    up, down = units.chunk(2, -1)
    signed = torch.cat([up, -down], -1)
    return torch.cat([softplus(up), -softplus(-down)], -1), slope + logsigmoid(signed)


def _roots(push: Push, y: Tensor, order: Iterable[int]) -> Tensor:
    """``x`` with ``push(x) = y``, one coordinate after another: away from zero in doubled steps, then halved ones."""
    x = torch.zeros_like(y)
    for d in order:

        def below(t: Tensor, d: int = d) -> Tensor:
            x[..., d] = t
            return push(x)[0][..., d] < y[..., d]

        near = torch.zeros_like(y[..., d])
        upwards = below(near)
        far = torch.where(upwards, 1.0, -1.0).to(y)
        for _ in range(_DOUBLINGS):
            beyond = below(far) == upwards
            near, far = torch.where(beyond, far, near), torch.where(beyond, 2 * far, far)
        for _ in range(_HALVINGS):
            middle = 0.5 * (near + far)
            beyond = below(middle) == upwards
            near, far = torch.where(beyond, middle, near), torch.where(beyond, far, middle)
        x[..., d] = 0.5 * (near + far)
    return x


def _jacobian(push: Push, x: Tensor) -> Tensor:
    """``(*batch, D, D)``, without a graph."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = push(leaf)[0]
        rows = [torch.autograd.grad(y[..., d].sum(), leaf, retain_graph=True)[0] for d in range(y.shape[-1])]
    return torch.stack(rows, -2)
