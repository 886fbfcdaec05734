"""Residual kernels: a Gaussian around a learned step (Zimmermann et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.nn.functional import softplus

from pplvi.kernels.coordinates import Coordinates, seen_by, side_by_side
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Positive
from pplvi.types import LogDensity, Program, Values


@checked
@dataclass(frozen=True)
class ResidualKernel:
    """Residual conditional Gaussian, ``N(x + W h(x) + b, diag(softplus(V h(x) + c)))`` with ``h = relu(Linear(x))``.

    In unconstrained coordinates, one network a site; it sees its own site and those outside its plates. The hidden
    layer starts as torch's ``Linear`` does, ``W``, ``b`` and ``V`` at zero and the covariance at ``covariance``: a
    random walk at first. The kernel of Zimmermann et al. 2021, section 4.1.

    :param hidden: number of hidden units.
    :param covariance: initial variance of every coordinate.
    :raises ValueError: for sizes that are not positive.

    >>> kernel = ResidualKernel(hidden=50)
    """

    hidden: Count = 50
    covariance: Positive = 1.0

    def build(self, sites: Sequence[Coordinates], log_density: LogDensity) -> tuple[Program, Program]:
        """Two programs with parameters of their own; the target plays no part."""
        return ResidualProgram(self, sites), ResidualProgram(self, sites)


class ResidualProgram(PyroModule):
    """The program that :class:`ResidualKernel` builds."""

    def __init__(self, kernel: ResidualKernel, sites: Sequence[Coordinates]) -> None:
        super().__init__()
        self.sites = tuple(sites)
        self.offset = kernel.covariance + math.log(-math.expm1(-kernel.covariance))  # inverse of softplus
        self.alike = kernel, self.sites  # what else than its parameters makes the program
        for index, site in enumerate(self.sites):
            inputs = sum(other.size for other in seen_by(site, self.sites))
            first = torch.nn.Linear(inputs, kernel.hidden)
            outputs = torch.zeros(2 * site.size, kernel.hidden + 1)
            self._declare(index, first.weight.detach(), first.bias.detach(), outputs)

    def _declare(self, index: int, weight: Tensor, bias: Tensor, outputs: Tensor) -> None:
        for part, value in (("weight", weight), ("bias", bias), ("outputs", outputs)):
            setattr(self, f"{part}_{index}", PyroParam(value.clone(), constraints.real))

    def forward(self, previous: Values, *args: Any, **kwargs: Any) -> None:
        """Sample every site around its previous value."""
        plates: dict[str, Any] = {}
        for index, site in enumerate(self.sites):
            with site.inside(previous, plates):
                pyro.sample(site.name, site.normal(*self._moments(index, site, previous)))

    def _moments(self, index: int, site: Coordinates, previous: Values) -> tuple[Tensor, Tensor]:
        inputs = own = site.read(previous)
        if len(self.sites) > 1:
            inputs = side_by_side([other.read(previous) for other in seen_by(site, self.sites)])
        weight, bias, outputs = (getattr(self, f"{part}_{index}") for part in ("weight", "bias", "outputs"))
        hidden = torch.relu(torch.nn.functional.linear(inputs, weight, bias))
        shift, spread = torch.nn.functional.linear(hidden, outputs[:, :-1], outputs[:, -1]).chunk(2, -1)
        return own + shift, softplus(spread + self.offset).sqrt()
