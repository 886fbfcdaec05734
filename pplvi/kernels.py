"""Transition kernels: conditional programs that share the model's site names and get the values to move as an argument.

A kernel is called as ``kernel(previous, *args, **kwargs)``, with ``previous`` a dict from site name to value, and
samples every latent site of the model once. The same kind of program serves forward, ``q[k](z[k] | z[k-1])``, and
reverse, ``r[k-1](z[k-1] | z[k])``. The classes here build such programs for a model's sites, in unconstrained
coordinates: what they sample lies in each site's support, and the Jacobian is in its density once. Values have the
particles leftmost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import Transform, biject_to, identity_transform
from torch.distributions.transforms import IndependentTransform
from torch.nn.functional import softplus

from pplvi.programs.running import plain_run
from pplvi.programs.sites import Plate, latent_sites, site_plates
from pplvi.types import LogDensity, Program, Values


@dataclass(frozen=True)
class Coordinates:
    """A latent site in unconstrained coordinates.

    :ivar shape: event shape in unconstrained coordinates.
    :ivar transform: from unconstrained coordinates to the site's support.
    """

    name: str
    shape: tuple[int, ...]
    plates: tuple[Plate, ...]
    transform: Transform

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates in one event."""
        return math.prod(self.shape)

    def read(self, values: Values) -> Tensor:
        """Unconstrained coordinates of the site's value, flat: ``(*batch, size)``."""
        free = self.transform.inv(values[self.name])
        return free.reshape((*free.shape[: free.dim() - len(self.shape)], self.size))

    def log_jacobian(self, values: Values) -> Tensor:
        """``log |d value / d coordinates|`` of the site's value, of its batch shape."""
        free = self.transform.inv(values[self.name])
        return self.transform.log_abs_det_jacobian(free, values[self.name])

    def write(self, free: Tensor) -> Tensor:
        """The value of the site at flat unconstrained coordinates."""
        return self.transform(free.reshape((*free.shape[:-1], *self.shape)))

    def copies(self, values: Values) -> float:
        """How many elements of the site's plates each one stands for: more than one where they are subsampled."""
        shape, events = values[self.name].shape, self.transform.codomain.event_dim
        cut = (plate for plate in self.plates if plate.full_size != plate.size)
        return math.prod(plate.full_size / shape[plate.dim - events] for plate in cut)

    def normal(self, mean: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """Independent normal in the flat coordinates, as a distribution over the site's values."""
        full = (x.expand(*x.shape[:-1], self.size) for x in torch.broadcast_tensors(mean, scale))
        mean, scale = (x.reshape((*x.shape[:-1], *self.shape)) for x in full)
        base = dist.Normal(mean, scale).to_event(len(self.shape))
        return base if _is_identity(self.transform) else dist.TransformedDistribution(base, [self.transform])

    @contextmanager
    def inside(self, values: Values, entered: dict[str, Any]) -> Iterator[None]:
        """Enter the site's plates, of the sizes that its value has; a plate is made once for all sites of a program.

        :param entered: the program's plates so far.
        """
        shape = values[self.name].shape
        events = self.transform.codomain.event_dim
        with ExitStack() as stack:
            for plate in self.plates:
                if plate.name not in entered:
                    entered[plate.name] = _plate(plate, shape[plate.dim - events])
                stack.enter_context(entered[plate.name])
            yield


def _plate(plate: Plate, size: int) -> Any:
    full = plate.full_size if plate.full_size != plate.size else size
    return pyro.plate(plate.name, full, subsample_size=size, dim=plate.dim)


def _is_identity(transform: Transform) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform == identity_transform


def coordinates_of(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Coordinates, ...]:
    """The latent sites of a model in unconstrained coordinates.

    :raises ValueError: for a site without a smooth support, or a model without latent sites.

    >>> def model():
    ...     pyro.sample("scale", dist.Gamma(2.0, 1.0))
    >>> [(site.name, site.shape) for site in coordinates_of(model, (), {})]
    [('scale', ())]
    """
    found = tuple(coordinates(name, site) for name, site in latent_sites(plain_run(model, args, kwargs).model).items())
    if not found:
        raise ValueError("the model has no latent site: expected at least one for a kernel to move.")
    return found


def coordinates(name: str, site: Any) -> Coordinates:
    """One latent site of a trace in unconstrained coordinates.

    :raises ValueError: for a site without a smooth support.
    """
    try:
        transform = biject_to(_common_support(site["fn"].support))
    except NotImplementedError as error:
        raise ValueError(
            f"site {name!r} has support {site['fn'].support}, which has no unconstrained coordinates: expected a "
            "continuous site. Enumerate it in the model, move it by GibbsKernel, or write a kernel of your own."
        ) from error
    events = site["fn"].event_dim
    shape = tuple(transform.inverse_shape(site["fn"].event_shape)) if events else ()
    return Coordinates(name, shape, site_plates(site), _to_event(transform, events))


def _common_support(support: Any) -> Any:
    """The support itself, or that of every component of a mixture."""
    return support.base_constraint if type(support).__name__ == "MixtureSameFamilyConstraint" else support


def _to_event(transform: Transform, events: int) -> Transform:
    missing = events - transform.codomain.event_dim
    return IndependentTransform(transform, missing) if missing else transform


def seen_by(site: Coordinates, sites: Sequence[Coordinates]) -> list[Coordinates]:
    """The site itself and those outside its plates, whose values broadcast into them."""
    around = {plate.name for plate in site.plates}
    return [other for other in sites if {plate.name for plate in other.plates} <= around]


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate on the last dimension; the others broadcast."""
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)


class Kernel(Protocol):
    """Builds the forward and the reverse program of one transition."""

    def build(self, sites: Sequence[Coordinates], log_density: LogDensity) -> tuple[Program, Program]:
        """Forward and reverse kernel for a model's sites.

        :param log_density: ``log gamma[k]`` at given values and the model's arguments, summed over everything.
        """
        ...


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

    hidden: int = 50
    covariance: float = 1.0

    def __post_init__(self) -> None:
        if self.hidden < 1 or not self.covariance > 0:
            raise ValueError(f"hidden={self.hidden}, covariance={self.covariance}: expected positive numbers.")

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

    step_size: float = 0.01
    learn: bool = True

    def __post_init__(self) -> None:
        if not self.step_size > 0:
            raise ValueError(f"step_size={self.step_size}: expected a positive number.")

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


def log_density_gradient(
    sites: Sequence[Coordinates], free: Values, log_density: Callable[[Values], Tensor]
) -> dict[str, Tensor]:
    """Gradient of a log density, Jacobian included, in the sites' flat unconstrained coordinates.

    It is differentiable itself where gradients are on, for kernels whose draws carry a path through it. The scale of a
    site's subsampled plates is taken out: a kernel moves an element by that element's own density.

    :param log_density: of constrained values, summed over everything, subsampled plates scaled.

    >>> site = Coordinates("z", (), (), torch.distributions.identity_transform)
    >>> with torch.no_grad():
    ...     log_density_gradient([site], {"z": torch.tensor([[2.0]])}, lambda z: -(z["z"] ** 2).sum() / 2)
    {'z': tensor([[-2.]])}
    """
    live = torch.is_grad_enabled()
    with torch.enable_grad():
        points = {name: x if live and x.requires_grad else x.detach().requires_grad_() for name, x in free.items()}
        values = {site.name: site.write(points[site.name]) for site in sites}
        copies = {site.name: site.copies(values) for site in sites}
        total = log_density(values) + sum(copies[site.name] * site.log_jacobian(values).sum() for site in sites)
        gradients = torch.autograd.grad(total, list(points.values()), create_graph=live)
    return {name: slope / copies.get(name, 1.0) for name, slope in zip(points, gradients, strict=True)}
