"""Couplings whose networks are quadratic forms: from a Gaussian to a posterior that is nearly one, in few steps.

Where a posterior is close to a Gaussian, the map from one to the other is the identity plus a quadratic polynomial, to
first order in the third derivatives of the log density. Linear in its parameters, it is learned in a fraction of the
steps that a neural network takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

_LIMIT = 2.0  # of a log scale
_REACH = 5.0  # of a coordinate in the networks: quadratics of quadratics would run away beyond
_NORM = 0.5**0.5


class QuadraticFlow(nn.Module):
    r"""A monotone map of every coordinate, then a stack of couplings in rotated coordinates.

    .. math:: x_d \leftarrow \sinh(e^{\delta_d} \mathrm{asinh}\, x_d + \epsilon_d) - \sinh \epsilon_d, \qquad
        u = Q^T x, \quad y_B = u_B e^{s(u_A)} + t(u_A), \quad y_A = u_A

    with ``s`` and ``t`` affine in the entries of ``5 tanh(u_A / 5)`` and their products, so that both are bounded,
    ``A`` one half of the coordinates, and ``Q`` a fixed random rotation, another one in each transform. Log scales
    ``s`` are at most 2. Zero parameters give the identity; either direction is one pass. One coupling reaches three
    eighths of the third derivatives of a log density, so that it takes several for all of them to be learned at a good
    rate; more make polynomials of higher degree.

    :param features: number of coordinates.
    :param transforms: number of couplings.
    :param rotate: rotate by random rotations; ``False`` only shuffles, which keeps the structure of hierarchical
        models.
    """

    rotations: Tensor
    back: Tensor
    rows: Tensor
    cols: Tensor
    middle: Tensor

    def __init__(self, features: int, transforms: int = 8, rotate: bool = True) -> None:
        super().__init__()
        self.given = given = features // 2
        turns = torch.stack([_turn(features, rotate) for _ in range(transforms)])
        pairs = torch.triu_indices(given, given)
        self.register_buffer("rotations", turns.to(torch.get_default_dtype()))
        self.register_buffer("back", reduce(torch.matmul, turns).mT.to(torch.get_default_dtype()))
        self.register_buffer("rows", pairs[0])
        self.register_buffer("cols", pairs[1])
        self.register_buffer("middle", -_NORM * torch.eq(*pairs).to(torch.get_default_dtype()))
        self.weight = nn.Parameter(torch.zeros(transforms, 2 * (features - given), given + pairs.shape[1]))
        self.bias = nn.Parameter(torch.zeros(transforms, 2 * (features - given)))
        self.skew = nn.Parameter(torch.zeros(features))
        self.tail = nn.Parameter(torch.zeros(features))

    def forward(self, context: Tensor | None = None) -> Direction:
        """The map, with ``call_and_ladj`` and ``inv``."""
        return Direction(self.push, self.pull)

    def push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From base to data, shapes ``(*batch, D)``, with the log-determinant ``(*batch,)``."""
        bent = torch.sinh(torch.addcmul(self.skew, self.tail.exp(), torch.asinh(x)))
        y, logs = bent - torch.sinh(self.skew), [self._slopes(x, bent)]
        for rotation, weight, bias in self._couplings():
            a, b = (y @ rotation).tensor_split((self.given,), -1)
            log_scale, shift = self._conditioned(a, weight, bias)
            y = torch.cat([a, torch.addcmul(shift, b, log_scale.exp())], -1)
            logs.append(log_scale)
        return y @ self.back, torch.cat(logs, -1).sum(-1)

    def pull(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """From data to base."""
        x, logs = y @ self.back.mT, []
        for rotation, weight, bias in reversed(self._couplings()):
            a, b = x.tensor_split((self.given,), -1)
            log_scale, shift = self._conditioned(a, weight, bias)
            x = torch.cat([a, (b - shift) * (-log_scale).exp()], -1) @ rotation.mT
            logs.append(log_scale)
        bent = x + torch.sinh(self.skew)
        x = torch.sinh((torch.asinh(bent) - self.skew) * (-self.tail).exp())
        return x, -torch.cat([*logs, self._slopes(x, bent)], -1).sum(-1)

    def _couplings(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return list(zip(self.rotations.unbind(), self.weight.unbind(), self.bias.unbind(), strict=True))

    def _slopes(self, x: Tensor, bent: Tensor) -> Tensor:
        # of sinh(angle): log cosh(angle) - log cosh(asinh(x)) + tail
        return self.tail + torch.hypot(bent, torch.ones_like(bent)).log() - 0.5 * torch.log1p(x * x)

    def _conditioned(self, a: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        a = _REACH * torch.tanh(a / _REACH)
        left, right = a.index_select(-1, self.rows), a.index_select(-1, self.cols)
        products = torch.addcmul(self.middle, left, right, value=_NORM)  # of variance one where a is standard normal
        raw, shift = nn.functional.linear(torch.cat([a, products], -1), weight, bias).chunk(2, -1)
        return _LIMIT * torch.tanh(raw / _LIMIT), shift


def _turn(features: int, rotate: bool) -> Tensor:
    if rotate:
        return torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))[0]
    return torch.eye(features, dtype=torch.float64)[torch.randperm(features)]


class Direction:
    """A map and its inverse, each giving the value and the log-determinant."""

    def __init__(self, call: Callable[[Tensor], Any], back: Callable[[Tensor], Any]) -> None:
        self.call_and_ladj, self._back = call, back

    @property
    def inv(self) -> Direction:
        """The inverse."""
        return Direction(self._back, self.call_and_ladj)
