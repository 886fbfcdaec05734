"""Expectations of densities of normal vectors, such as a softmax: points of a cubature, the same at every sweep."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pplvi.guides.conjugate.expectations import Blocks, Expected, combined
from pplvi.guides.conjugate.expressions import Expression
from pplvi.guides.conjugate.hermite import product_rule

_NODES = {1: 32, 2: 20, 3: 10}  # a dimension, of product rules
_PAIRS = 128  # of points where there are more dimensions
_JITTER = 1e-12


def integrated_rows(blocks: Blocks, density: Callable[..., Tensor], e: Expression, shape: Any) -> Expected:
    r"""``E[density(f)]`` of a density each of whose elements depends on one row of normal predictors ``f``.

    With :math:`f = m + L \epsilon`, :math:`L L^\top` the covariance of a row, and fixed points in the place of
    :math:`\epsilon`: Gauss-Hermite's up to three dimensions; otherwise a Sobol sequence, in pairs of opposite sign and
    with its covariance made the identity, so that quadratic densities have their exact expectations.

    :param density: a function of an array of the shape of ``e``.
    :param shape: of the density.
    """
    first: Any = e.unsqueeze(-1)
    second: Any = e.unsqueeze(-2)
    size = e.shape[-1]

    def value(mean: Tensor, covariance: Tensor) -> Tensor:
        mean = mean.expand(torch.broadcast_shapes(mean.shape, (*shape, size)))
        covariance = covariance.expand(torch.broadcast_shapes(covariance.shape, (*shape, size, size)))
        points, weights = (part.to(mean) for part in points_of(size))
        spread = covariance.diagonal(dim1=-2, dim2=-1).detach().amax((-1,), keepdim=True)
        eye = torch.eye(size).to(mean)
        tril = torch.linalg.cholesky(covariance + _JITTER * (1 + spread.unsqueeze(-1)) * eye)
        places = mean + (tril @ points.T).movedim(-1, 0)
        return torch.tensordot(weights, torch.vmap(density)(places).expand(len(weights), *shape), 1)

    return combined(value, blocks.mean(e), blocks.covariance(first, second))


@cache
def points_of(size: int) -> tuple[Tensor, Tensor]:
    """Points ``(S, size)`` that stand for a standard normal vector, and their weights ``(S,)``.

    >>> points, weights = points_of(5)
    >>> bool(((points.T * weights) @ points - torch.eye(5)).abs().max() < 1e-12)
    True
    """
    if size in _NODES:
        return product_rule(_NODES[size], size)
    draws = torch.quasirandom.SobolEngine(size, scramble=True, seed=0).draw(max(_PAIRS, 2 * size), dtype=torch.float64)
    x = torch.special.ndtri(draws.clamp(1e-6, 1 - 1e-6))
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / len(x)), x.T, upper=False).T
    return torch.cat([x, -x]), torch.full((2 * len(x),), 0.5 / len(x), dtype=torch.float64)
