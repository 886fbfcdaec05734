"""Sites as coordinates: a walk moves unconstrained values or states of a finite support."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, identity_transform
from torch.distributions.transforms import IndependentTransform

from pplvi.kinds.checked import checked
from pplvi.programs.running import plain_run
from pplvi.programs.sites import Plate, base_distribution, latent_sites, site_plates
from pplvi.types import Program, Values


@checked
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
        transform = biject_to(site["fn"].support)
    except NotImplementedError as error:
        raise ValueError(
            f"site {name!r} has support {site['fn'].support}, which has no unconstrained coordinates: expected a "
            "continuous site. Enumerate it in the model, move it by GibbsKernel, or write a kernel of your own."
        ) from error
    events = site["fn"].event_dim
    shape = tuple(transform.inverse_shape(site["fn"].event_shape)) if events else ()
    return Coordinates(name, shape, site_plates(site), _to_event(transform, events))


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


@dataclass(frozen=True)
class Finite:
    """A latent site whose coordinates take finitely many values.

    :ivar values: the values of one coordinate, ``(num_values, *unit)``, with ``unit`` the shape of a one-hot vector or
        nothing.
    :ivar events: number of event dimensions of the site, those of ``unit`` included.
    """

    name: str
    values: Tensor
    events: int

    @property
    def unit(self) -> int:
        """Number of dimensions of one coordinate."""
        return self.values.dim() - 1


def sites_of(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Coordinates | Finite, ...]:
    """The latent sites of a model: in unconstrained coordinates, or with their values where these are finitely many.

    :raises ValueError: for a site that is neither, or a model without latent sites.

    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("c", dist.Categorical(torch.ones(3)))
    >>> [site.values for site in sites_of(model, (), {})]
    [tensor([0, 1, 2])]
    """
    latents = latent_sites(plain_run(model, args, kwargs).model)
    if not latents:
        raise ValueError("the model has no latent site: expected at least one for a kernel to move.")
    return tuple(_finite(name, site) or coordinates(name, site) for name, site in latents.items())


def _finite(name: str, site: Any) -> Finite | None:
    base = base_distribution(site["fn"])
    if not getattr(base, "has_enumerate_support", False):
        return None
    try:
        values = base.enumerate_support(expand=False)
    except NotImplementedError:
        return None
    return Finite(name, values.reshape(len(values), *base.event_shape), site["fn"].event_dim)
