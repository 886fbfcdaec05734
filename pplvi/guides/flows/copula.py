"""A Gaussian copula with spline marginals, as a flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from pplvi.guides.flows.import_zuko import import_zuko

__all__ = ["gaussian_copula"]


class _UnitLower(Transform):
    """``y = (I + tril(a, -1)) x``."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.matrix = a.tril(-1) + torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)

    def _call(self, x: Tensor) -> Tensor:
        return x @ self.matrix.mT

    def _inverse(self, y: Tensor) -> Tensor:
        rows = y.reshape(-1, y.shape[-1])
        solved = torch.linalg.solve_triangular(self.matrix, rows.mT, upper=False, unitriangular=True)
        return solved.mT.reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x[..., 0])

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self(x)
        return y, self.log_abs_det_jacobian(x, y)


def gaussian_copula(features: int, bins: int = 8) -> Any:
    """Correlated normals, each bent by a monotone rational-quadratic spline of its own, from base to data.

    :param features: number of coordinates.
    :param bins: number of bins of each spline.
    """
    zuko = import_zuko()
    correlate = zuko.lazy.UnconditionalTransform(_UnitLower, torch.zeros(features, features))
    shapes = [(bins,), (bins,), (bins - 1,)]
    marginals = zuko.flows.gaussianization.ElementWiseTransform(
        features, univariate=zuko.transforms.MonotonicRQSTransform, shapes=shapes
    )
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(features), torch.ones(features), buffer=True
    )
    return zuko.lazy.Flow([correlate, marginals], base)
