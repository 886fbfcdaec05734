"""Kernels that move draws by a map with a known Jacobian: flows, and Hamiltonian dynamics without a Metropolis test.

A deterministic kernel has no density, but a pair of them has a ratio, ``r(z | z') / q(z' | z) = |dz' / dz|``. It is
kept in the reverse program, whose parameters are live, and the forward program's density is one: the gradient of the
Jacobian is then exact for every objective that follows draws, frozen densities included. Momenta are auxiliary sites of
the forward program, which the reverse program is told of and the next transition may refresh in part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pplvi.kernels import Coordinates, log_density_gradient, seen_by, side_by_side
from pplvi.types import LogDensity, MutableValues, Score, Values


class Known(dist.TorchDistribution):
    """A value that is computed, not drawn, with a log density that is kept in the books for it.

    :param value: what ``rsample`` returns, ``(*batch, *event)``.
    :param support: its support, which tells the event dimensions.
    :param score: log density of a value, of the batch shape; zero unless given.

    >>> Known(torch.tensor([1.0, 2.0]), constraints.real).sample()
    tensor([1., 2.])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True
    computed: ClassVar[bool] = True

    def __init__(self, value: Tensor, support: Any, score: Score | None = None) -> None:
        self.value, self._support, self._score = value, support, score
        events = value.dim() - support.event_dim
        super().__init__(value.shape[:events], value.shape[events:], validate_args=False)

    @property
    def support(self) -> Any:
        """The support of the value."""
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Known:
        """The same value for every element of a larger batch."""
        return Known(self.value.expand(*batch_shape, *self.event_shape), self._support, self._score)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """The value."""
        return self.value.expand(self._extended_shape(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """What is kept for the value."""
        if self._score is not None:
            return self._score(value)
        return torch.zeros(value.shape[: value.dim() - self._support.event_dim], device=value.device)


class _Reverse(PyroModule):
    """The reverse program of a kernel that moves by a map: it scores the values that were moved."""

    def __init__(self, ahead: Any) -> None:
        super().__init__()
        self.__dict__["ahead"] = ahead  # its parameters belong to the forward program

    def forward(self, reached: Values, *args: Any, **kwargs: Any) -> None:
        """Score every site's previous value by the Jacobian of the map that led to what was reached."""
        with self.ahead._pyro_context:
            gains = self.ahead.gains(reached)
        plates: dict[str, Any] = {}
        for site in self.ahead.sites:
            here = gains[site.name] + site.log_jacobian(reached)
            with site.inside(reached, plates):
                value = reached[site.name]
                pyro.sample(site.name, Known(value, site.transform.codomain, _Jacobian(site, here)))


@dataclass(frozen=True)
class _Jacobian:
    """``log |dz' / dz|`` of constrained values, given all of it but the part of the value moved."""

    site: Coordinates
    here: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        return self.here - self.site.log_jacobian({self.site.name: value})


@dataclass(frozen=True)
class FlowKernel:
    """Deterministic affine coupling flow in unconstrained coordinates, the identity at first.

    Each layer scales and shifts one half of a site's coordinates, then the other, by a network of everything else that
    the site can see: its other half, and sites outside its plates (``z' = exp(s) z + t``, Dinh et al. 2017). With
    resampling and moves that leave the target invariant this is annealed flow transport (Arbel et al. 2021). It is
    learned by objectives that follow draws; the forward KL divergence is not one.

    :param hidden: number of hidden units.
    :param num_layers: number of layers of two updates for every site.
    :raises ValueError: for sizes that are not positive.

    >>> kernel = FlowKernel(hidden=16, num_layers=3)
    """

    hidden: int = 32
    num_layers: int = 2

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.num_layers < 1:
            raise ValueError(f"hidden={self.hidden}, num_layers={self.num_layers}: expected positive numbers.")

    def build(self, sites: Sequence[Coordinates], log_density: LogDensity) -> tuple[FlowProgram, _Reverse]:
        """The flow and its bookkeeping; the target plays no part."""
        ahead = FlowProgram(self, sites)
        return ahead, _Reverse(ahead)


@dataclass(frozen=True)
class _Update:
    """One half of one site's coordinates, and what its network reads."""

    site: Coordinates
    moved: tuple[int, ...]
    fixed: tuple[int, ...]
    seen: tuple[Coordinates, ...]

    @property
    def inputs(self) -> int:
        return 1 + len(self.fixed) + sum(other.size for other in self.seen)

    def read(self, free: MutableValues) -> Tensor:
        """The network's inputs: a constant, the other half, and the sites around."""
        own = free[self.site.name]
        parts = [torch.ones_like(own[..., :1]), own[..., list(self.fixed)]]
        return side_by_side([*parts, *(free[other.name] for other in self.seen)])

    def write(self, free: MutableValues, moved: Tensor) -> MutableValues:
        """The point with other values in the half that is moved."""
        index = torch.tensor(self.moved, device=moved.device)
        own = free[self.site.name].expand(*moved.shape[:-1], self.site.size)
        return {**free, self.site.name: own.index_copy(-1, index, moved)}


class FlowProgram(PyroModule):
    """The program that :class:`FlowKernel` builds."""

    def __init__(self, kernel: FlowKernel, sites: Sequence[Coordinates]) -> None:
        super().__init__()
        self.sites = tuple(sites)
        self.updates = tuple(update for _ in range(kernel.num_layers) for update in _updates(self.sites))
        for index, update in enumerate(self.updates):
            first = torch.nn.Linear(update.inputs, kernel.hidden)
            second = torch.zeros(2 * len(update.moved), kernel.hidden + 1)
            for part, value in (("first", first.weight.detach().clone()), ("second", second)):
                setattr(self, f"{part}_{index}", PyroParam(value, constraints.real))

    def forward(self, previous: Values, *args: Any, **kwargs: Any) -> None:
        """Move every site."""
        free: MutableValues = {site.name: site.read(previous) for site in self.sites}
        for index, update in enumerate(self.updates):
            log_scale, shift = self._affine(index, update, free)
            moved = free[update.site.name][..., list(update.moved)] * log_scale.exp() + shift
            free = update.write(free, moved)
        plates: dict[str, Any] = {}
        for site in self.sites:
            with site.inside(previous, plates):
                pyro.sample(site.name, Known(site.write(free[site.name]), site.transform.codomain))

    def gains(self, reached: Values) -> MutableValues:
        """``log |du' / du|`` in unconstrained coordinates, for each site, from what was reached."""
        free: MutableValues = {site.name: site.read(reached) for site in self.sites}
        gains = {name: torch.zeros_like(value[..., 0]) for name, value in free.items()}
        for index, update in reversed(list(enumerate(self.updates))):
            log_scale, shift = self._affine(index, update, free)
            moved = (free[update.site.name][..., list(update.moved)] - shift) * (-log_scale).exp()
            free = update.write(free, moved)
            gains[update.site.name] = gains[update.site.name] + log_scale.sum(-1)
        return gains

    def _affine(self, index: int, update: _Update, free: MutableValues) -> tuple[Tensor, Tensor]:
        first, second = getattr(self, f"first_{index}"), getattr(self, f"second_{index}")
        hidden = torch.tanh(torch.nn.functional.linear(update.read(free), first))
        raw, shift = torch.nn.functional.linear(hidden, second[:, :-1], second[:, -1]).chunk(2, -1)
        return 3.0 * torch.tanh(raw / 3.0), shift


def _updates(sites: Sequence[Coordinates]) -> Iterator[_Update]:
    """The updates of one layer."""
    for site in sites:
        seen = tuple(other for other in seen_by(site, sites) if other is not site)
        halves = tuple(range(0, site.size, 2)), tuple(range(1, site.size, 2))
        yield from (_Update(site, a, b, seen) for a, b in (halves, halves[::-1]) if a)


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

    step_size: float = 0.1
    num_leapfrog: int = 1
    keep: float = 0.0
    learn: bool = True

    def __post_init__(self) -> None:
        if not self.step_size > 0 or self.num_leapfrog < 1 or not 0 <= self.keep < 1:
            raise ValueError(
                f"step_size={self.step_size}, num_leapfrog={self.num_leapfrog}, keep={self.keep}: expected positive "
                "numbers, and keep in [0, 1)."
            )

    def build(self, sites: Sequence[Coordinates], log_density: LogDensity) -> tuple[HamiltonianProgram, _Reverse]:
        """The dynamics and their bookkeeping."""
        ahead = HamiltonianProgram(self, sites, log_density)
        return ahead, _Reverse(ahead)


class HamiltonianProgram(PyroModule):
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
