"""Langevin kernels, uncorrected, with a learned score (MCD) or a learned control (CMCD)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pplvi.kernels.base import ReverseProgram, log_density_gradient
from pplvi.kernels.coordinates import Coordinates, seen_by, side_by_side
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Positive
from pplvi.types import LogDensity, Program, Values


@checked
@dataclass(frozen=True)
class LangevinKernel:
    """Unadjusted Langevin kernel, ``N(x + eps grad log gamma[k](x), 2 eps)``, its own reverse kernel.

    In unconstrained coordinates, the Jacobian included in the density whose gradient is taken. The reverse density is
    exact, so that weights are proper whatever the step size; ``eps`` is learned, one for each transition (Thin et al.
    2021, Monte Carlo variational autoencoders).

    :param step_size: initial ``eps``.
    :param learn: train it.
    :raises ValueError: if the step size is not positive.

    >>> kernel = LangevinKernel(step_size=0.05)
    """

    step_size: Positive = 0.01
    learn: bool = True

    def build(self, sites: Sequence[Coordinates], log_density: LogDensity) -> tuple[Program, Program]:
        """One program for both directions."""
        program = LangevinProgram(self, sites, log_density)
        return program, program


class LangevinProgram(PyroModule):
    """The program that :class:`LangevinKernel` builds."""

    def __init__(self, kernel: LangevinKernel, sites: Sequence[Coordinates], log_density: LogDensity) -> None:
        super().__init__()
        self.sites = tuple(sites)
        self.__dict__["log_density"] = log_density
        size = torch.tensor(float(kernel.step_size))
        self.step_size: Any = PyroParam(size, constraints.softplus_positive) if kernel.learn else size

    def forward(self, previous: Values, *args: Any, **kwargs: Any) -> None:
        """Sample every site one step up the gradient from its previous value."""
        free = {site.name: site.read(previous) for site in self.sites}
        drift = log_density_gradient(self.sites, free, lambda values: self.log_density(values, args, kwargs))
        plates: dict[str, Any] = {}
        for site in self.sites:
            mean = free[site.name] + self.step_size * drift[site.name]
            with site.inside(previous, plates):
                pyro.sample(site.name, site.normal(mean, (2 * self.step_size).sqrt()))


@checked
@dataclass(frozen=True)
class ControlledLangevinKernel:
    """Unadjusted Langevin kernels with a learned control ``u``, one network for each transition.

    In unconstrained coordinates, with ``g`` the gradient of ``log gamma[k]``, Jacobian included, the kernels are

        q[k](y | x)   = N(y; x + eps g(x) + sqrt(2 eps) u(x), 2 eps)
        r[k-1](x | y) = N(x; y + eps g(y) - sqrt(2 eps) u(y), 2 eps).

    ``control="both"`` is controlled Monte Carlo diffusion (CMCD, Vargas et al. 2024). ``control="reverse"`` leaves
    ``u`` out of the forward kernel: Monte Carlo diffusion (Doucet et al. 2022; Geffner & Domke 2023), where
    ``g - u / sqrt(2 eps)`` learns the score of the draws. The network sees the site itself and those outside its
    plates, ``u(x) = W tanh(V x + a) + b``, with ``W`` and ``b`` zero at first: the kernel is :class:`LangevinKernel`
    then. Step sizes are learned for each coordinate. Weights are proper whatever has been learned.

    :param step_size: initial ``eps`` of every coordinate.
    :param hidden: number of hidden units of a site's network.
    :param control: ``"both"`` or ``"reverse"``.
    :param learn: train the step sizes; the control is always trained.
    :raises ValueError: for sizes that are not positive, or another ``control``.

    >>> kernel = ControlledLangevinKernel(step_size=0.05, hidden=16)
    """

    step_size: Positive = 0.01
    hidden: Count = 32
    control: Literal["both", "reverse"] = "both"
    learn: bool = True

    def build(self, sites: Sequence[Coordinates], log_density: LogDensity) -> tuple[ControlledProgram, ReverseProgram]:
        """Forward program, which has all parameters, and the reverse program that shares them."""
        ahead = ControlledProgram(self, sites, log_density)
        return ahead, ReverseProgram(ahead)


class ControlledProgram(PyroModule):
    """The forward program that :class:`ControlledLangevinKernel` builds."""

    def __init__(self, kernel: ControlledLangevinKernel, sites: Sequence[Coordinates], log_density: LogDensity) -> None:
        super().__init__()
        self.sites, self.sign = tuple(sites), 1.0 if kernel.control == "both" else 0.0
        self.__dict__["log_density"] = log_density
        for index, site in enumerate(self.sites):
            size = torch.full((site.size,), float(kernel.step_size))
            learned = PyroParam(size, constraints.softplus_positive)
            setattr(self, f"step_size_{index}", learned if kernel.learn else size)
            inner = torch.nn.Linear(sum(other.size for other in seen_by(site, self.sites)), kernel.hidden)
            outer = torch.zeros(site.size, kernel.hidden + 1)
            for part, value in (("weight", inner.weight), ("bias", inner.bias), ("outputs", outer)):
                setattr(self, f"{part}_{index}", PyroParam(value.detach().clone(), constraints.real))

    def forward(self, previous: Values, *args: Any, **kwargs: Any) -> None:
        """Sample every site one controlled step from its previous value."""
        self.step(previous, args, kwargs, self.sign)

    def back(self, reached: Values, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Sample every site one step back from the value that was reached, the control against it."""
        self.step(reached, args, kwargs, -1.0)

    def step(self, previous: Values, args: tuple[Any, ...], kwargs: Mapping[str, Any], sign: float) -> None:
        """Sample every site one step up the gradient, the control added with this sign."""
        free = {site.name: site.read(previous) for site in self.sites}
        drift = log_density_gradient(self.sites, free, lambda values: self.log_density(values, args, kwargs))
        plates: dict[str, Any] = {}
        for index, site in enumerate(self.sites):
            size = getattr(self, f"step_size_{index}")
            mean, noise = free[site.name] + size * drift[site.name], (2 * size).sqrt()
            if sign:
                mean = mean + sign * noise * self._control(index, site, free)
            with site.inside(previous, plates):
                pyro.sample(site.name, site.normal(mean, noise))

    def _control(self, index: int, site: Coordinates, free: Values) -> Tensor:
        weight, bias, outputs = (getattr(self, f"{part}_{index}") for part in ("weight", "bias", "outputs"))
        inputs = side_by_side([free[other.name] for other in seen_by(site, self.sites)])
        hidden = torch.tanh(torch.nn.functional.linear(inputs, weight, bias))
        return torch.nn.functional.linear(hidden, outputs[:, :-1], outputs[:, -1])
