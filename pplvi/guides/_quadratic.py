"""Couplings whose networks are quadratic forms: from a Gaussian to a posterior that is nearly one, in few steps.

Where a posterior is close to a Gaussian, the map from one to the other is the identity plus a quadratic polynomial, to
first order in the third derivatives of the log density. Linear in its parameters, it is learned in a fraction of the
steps that a neural network takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_LIMIT = 5.0  # of a log scale


class QuadraticFlow(nn.Module):
    r"""A stack of couplings in rotated coordinates, each after a monotone map of every coordinate.

    .. math:: h = Q^T x, \quad u_d = \sinh(e^{\delta_d} \mathrm{asinh}\, h_d + \epsilon_d) - \sinh \epsilon_d, \quad
        y_B = u_B e^{s(u_A)} + t(u_A), \quad y_A = u_A

    with ``s`` and ``t`` affine in the entries of ``u_A`` and their products, ``A`` one half of the coordinates, and
    ``Q`` a fixed random rotation, another one in each transform. Zero parameters give the identity; either direction
    is one pass.

    Args:
        features: number of coordinates.
        transforms: number of couplings.
        rotate: rotate by random rotations; ``False`` only shuffles, which keeps the structure of hierarchical models.
    """

    def __init__(self, features: int, transforms: int = 4, rotate: bool = True) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(QuadraticCoupling(features, rotate) for _ in range(transforms))

    def forward(self, context: Tensor | None = None) -> Direction:
        """The map, with ``call_and_ladj`` and ``inv``."""
        parts: list[Any] = list(self.transforms)
        return Direction(
            lambda x: through(x, [p.push for p in parts]), lambda y: through(y, [p.pull for p in reversed(parts)])
        )


class Direction:
    """A map and its inverse, each giving the value and the log-determinant."""

    def __init__(self, call: Callable[[Tensor], Any], back: Callable[[Tensor], Any]) -> None:
        self.call_and_ladj, self._back = call, back

    @property
    def inv(self) -> Direction:
        """The inverse."""
        return Direction(self._back, self.call_and_ladj)


def through(x: Tensor, maps: Sequence[Callable[[Tensor], tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    """One map after another, with the sum of the log-determinants."""
    total = x.new_zeros(x.shape[:-1])
    for each in maps:
        x, ladj = each(x)
        total = total + ladj
    return x, total


class QuadraticCoupling(nn.Module):
    """One rotation, monotone map and coupling of :class:`QuadraticFlow`."""

    rotation: Tensor
    rows: Tensor
    cols: Tensor

    def __init__(self, features: int, rotate: bool) -> None:
        super().__init__()
        self.given = features // 2
        products = self.given * (self.given + 1) // 2
        mixed = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))[0]
        shuffled = torch.eye(features, dtype=torch.float64)[torch.randperm(features)]
        self.register_buffer("rotation", (mixed if rotate else shuffled).to(torch.get_default_dtype()))
        self.register_buffer("rows", torch.triu_indices(self.given, self.given)[0])
        self.register_buffer("cols", torch.triu_indices(self.given, self.given)[1])
        self.weight = nn.Parameter(torch.zeros(2 * (features - self.given), self.given + products))
        self.bias = nn.Parameter(torch.zeros(2 * (features - self.given)))
        self.skew = nn.Parameter(torch.zeros(features))
        self.tail = nn.Parameter(torch.zeros(features))

    def push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From base to data."""
        h = x @ self.rotation
        angle = self.tail.exp() * torch.asinh(h) + self.skew
        u = torch.sinh(angle) - torch.sinh(self.skew)
        ladj = self._elementwise_ladj(h, angle)
        a, b = u[..., : self.given], u[..., self.given :]
        log_scale, shift = self._conditioned(a)
        y = torch.cat([a, b * log_scale.exp() + shift], -1)
        return y @ self.rotation.mT, ladj + log_scale.sum(-1)

    def pull(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """From data to base."""
        u = y @ self.rotation
        a, b = u[..., : self.given], u[..., self.given :]
        log_scale, shift = self._conditioned(a)
        u = torch.cat([a, (b - shift) * (-log_scale).exp()], -1)
        angle = torch.asinh(u + torch.sinh(self.skew))
        h = torch.sinh((angle - self.skew) * (-self.tail).exp())
        return h @ self.rotation.mT, -self._elementwise_ladj(h, angle) - log_scale.sum(-1)

    def _elementwise_ladj(self, h: Tensor, angle: Tensor) -> Tensor:
        # log cosh without overflow
        log_cosh = angle.abs() + torch.nn.functional.softplus(-2 * angle.abs()) - math.log(2)
        return (log_cosh + self.tail - 0.5 * torch.log1p(h * h)).sum(-1)

    def _conditioned(self, a: Tensor) -> tuple[Tensor, Tensor]:
        same = torch.eq(self.rows, self.cols).to(a.dtype)
        products = (a[..., self.rows] * a[..., self.cols] - same) * 0.5**0.5
        raw, shift = (torch.cat([a, products], -1) @ self.weight.mT + self.bias).chunk(2, -1)
        return _LIMIT * torch.tanh(raw / _LIMIT), shift
