"""Gauss-Hermite rules for standard normal vectors."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor


@cache
def product_rule(nodes: int, dimensions: int) -> tuple[Tensor, Tensor]:
    """Points of a product rule, ``(nodes**dimensions, dimensions)``, and their weights, which sum to one.

    >>> points, weights = product_rule(4, 2)
    >>> points.shape, round(float(weights @ points[:, 0] ** 4), 6)
    (torch.Size([16, 2]), 3.0)
    """
    places, weights = (torch.as_tensor(part) for part in np.polynomial.hermite_e.hermegauss(nodes))
    weights = weights / weights.sum()
    points = torch.cartesian_prod(*[places] * dimensions).reshape(-1, dimensions)
    return points, torch.cartesian_prod(*[weights] * dimensions).reshape(-1, dimensions).prod(-1)
