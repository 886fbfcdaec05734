"""Uncorrected Hamiltonian kernels (Thin et al. 2021; Geffner & Domke 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from pplvi.kernels.base import ReverseProgram, log_density_gradient
from pplvi.kernels.coordinates import Coordinates
from pplvi.kernels.maps import Known, MapProgram
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Fraction, Positive
from pplvi.types import LogDensity, MutableValues, Values


@checked
@dataclass(frozen=True)
class UncorrectedHamiltonianKernel:
    """Hamiltonian dynamics without a Metropolis test, with momenta that are refreshed in part.

    Leapfrog steps of the level's target in unconstrained coordinates. Positions and momenta together have a density
    on the extended space, so that annealing stays properly weighted without accepting or rejecting, and step sizes,
    mass and refreshment are learned (Geffner & Domke 2021, UHA; Zhang et al. 2021, DAIS; Thin et al. 2021). Momenta are
    in units of their standard deviation, a step size for each coordinate is a diagonal mass:
    ``w = c w[k-1] + sqrt(1 - c^2) noise``, then leapfrog, and the pair of kernels adds
    ``(|w|^2 - |w[k]|^2) / 2`` to the log weight.

    :param step_size: initial step size of every coordinate.
    :param num_leapfrog: leapfrog steps of a transition.
    :param keep: the part ``c`` of the momentum that is kept, in ``[0, 1)``; 0 draws it anew.
    :param learn: train step sizes, and ``keep`` if it is not 0.
    :raises ValueError: for numbers out of range.

    >>> kernel = UncorrectedHamiltonianKernel(step_size=0.1, num_leapfrog=3, keep=0.5)
    """

    step_size: Positive = 0.1
    num_leapfrog: Count = 1
    keep: Fraction = 0.0
    learn: bool = True

    def build(self, sites: Sequence[Coordinates], log_density: LogDensity) -> tuple[HamiltonianProgram, ReverseProgram]:
        """The dynamics and their bookkeeping."""
        ahead = HamiltonianProgram(self, sites, log_density)
        return ahead, ReverseProgram(ahead)


class HamiltonianProgram(MapProgram):
    """The program that :class:`UncorrectedHamiltonianKernel` builds."""

    def __init__(
        self, kernel: UncorrectedHamiltonianKernel, sites: Sequence[Coordinates], log_density: LogDensity
    ) -> None:
        super().__init__()
        self.sites, self.num_leapfrog = tuple(sites), kernel.num_leapfrog
        self.__dict__["log_density"] = log_density
        for index, site in enumerate(self.sites):
            sizes = torch.full((site.size,), float(kernel.step_size))
            setattr(
                self, f"step_size_{index}", PyroParam(sizes, constraints.softplus_positive) if kernel.learn else sizes
            )
        keep = torch.tensor(float(kernel.keep))
        self.keep: Any = PyroParam(keep, constraints.unit_interval) if kernel.learn and kernel.keep else keep

    def forward(self, previous: Values, *args: Any, **kwargs: Any) -> None:
        """Refresh the momenta and follow the dynamics."""
        free: MutableValues = {site.name: site.read(previous) for site in self.sites}
        plates: dict[str, Any] = {}
        start: MutableValues = {}
        for site in self.sites:
            with site.inside(previous, plates):
                start[site.name] = _auxiliary("start", site, self._refreshed(site, previous, free[site.name]))
        free, end = self._leapfrog(free, start, lambda values: self.log_density(values, args, kwargs))
        for site in self.sites:
            with site.inside(previous, plates):
                _auxiliary("end", site, end[site.name])
                pyro.sample(site.name, Known(site.write(free[site.name]), site.transform.codomain))

    def _refreshed(self, site: Coordinates, previous: Values, like: Tensor) -> Tensor:
        noise = torch.randn_like(like)
        if (kept := previous.get(f"_end_{site.name}")) is None:
            return noise
        return self.keep * kept + (1 - self.keep**2).sqrt() * noise

    def _leapfrog(
        self, free: MutableValues, momentum: MutableValues, log_density: Any
    ) -> tuple[MutableValues, MutableValues]:
        sizes = {site.name: getattr(self, f"step_size_{index}") for index, site in enumerate(self.sites)}
        slope = log_density_gradient(self.sites, free, log_density)
        for _ in range(self.num_leapfrog):
            momentum = {name: p + sizes[name] / 2 * slope[name] for name, p in momentum.items()}
            free = {name: x + sizes[name] * momentum[name] for name, x in free.items()}
            slope = log_density_gradient(self.sites, free, log_density)
            momentum = {name: p + sizes[name] / 2 * slope[name] for name, p in momentum.items()}
        return free, momentum

    def gains(self, reached: Values) -> MutableValues:
        """What the momenta gain in log density, for each site: the dynamics keep volume."""
        names = [site.name for site in self.sites]
        return {n: (reached[f"_start_{n}"] ** 2 - reached[f"_end_{n}"] ** 2).sum(-1) / 2 for n in names}


def _auxiliary(which: str, site: Coordinates, value: Tensor) -> Tensor:
    """Keep a momentum as an auxiliary site of the forward program."""
    known = Known(value, constraints.real_vector)
    found: Tensor = pyro.sample(f"_{which}_{site.name}", known, infer={"is_auxiliary": True})
    return found
