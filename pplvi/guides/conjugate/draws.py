"""Blocks as sample statements of a guide: exact densities in constrained space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from pplvi.guides.conjugate.families import BlockFamily
from pplvi.guides.conjugate.lognormal import LogNormalFamily, PointFamily, is_point
from pplvi.guides.conjugate.normal import BlockLayout, NormalFamily
from pplvi.guides.conjugate.shapes import SiteShape, Structure

_IN_TURN = 4  # sites of a block that are drawn one after another


class Arrange(Transform):
    """Elements in another shape and order: volume is kept.

    :param before: shape of what comes in.
    :param order: of its dimensions in what goes out.
    """

    bijective = True

    def __init__(self, flat: int, before: tuple[int, ...], order: tuple[int, ...]) -> None:
        super().__init__()
        self.flat, self.before, self.order = flat, before, order

    @property
    def domain(self) -> Any:  # type: ignore[override]
        """Arrays with the dimensions that are joint flattened."""
        return constraints.independent(constraints.real, self.flat)

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        """Arrays of the site's shape."""
        return constraints.independent(constraints.real, len(self.before))

    def _call(self, x: Tensor) -> Tensor:
        lead = x.dim() - self.flat
        x = x.reshape((*x.shape[:lead], *self.before))
        return x.permute((*range(lead), *(lead + d for d in self.order)))

    def _inverse(self, y: Tensor) -> Tensor:
        lead = y.dim() - len(self.before)
        back = sorted(range(len(self.order)), key=lambda d: self.order[d])
        y = y.permute((*range(lead), *(lead + d for d in back)))
        return y.reshape((*y.shape[:lead], *self.forward_shape_of_flat()))

    def forward_shape_of_flat(self) -> tuple[int, ...]:
        """Shape of what comes in."""
        return (*self.before[: self.flat - 1], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zero."""
        return x.new_zeros(x.shape[: x.dim() - self.flat])

    def forward_shape(self, shape: Any) -> torch.Size:
        """Of what goes out."""
        lead = tuple(shape[: len(shape) - self.flat])
        return torch.Size(lead + tuple(self.before[d] for d in self.order))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Of what comes in."""
        lead, joint = tuple(shape[: len(shape) - len(self.before)]), self.before[self.flat - 1 :]
        return torch.Size((*lead, *self.before[: self.flat - 1], math.prod(joint)))


class BartlettWishart(dist.Wishart):
    """A Wishart distribution by its Bartlett decomposition alone: torch warns of every regular draw, and draws anew."""

    def rsample(self, sample_shape: Any = (), max_try_correction: int | None = None) -> Tensor:
        """Draw matrices."""
        drawn: Tensor = self._bartlett_sampling(torch.Size(sample_shape))
        return drawn


def draw_block(
    block: str, family: BlockFamily, structure: Structure, plates: Mapping[str, AbstractContextManager[Any]]
) -> dict[str, Tensor]:
    """Draw the sites of a block, each under its own name; a normal block across plates has one auxiliary site."""
    names = structure.blocks[block]
    if isinstance(family, (LogNormalFamily, PointFamily)) or not isinstance(family, NormalFamily):
        return _draw_alone(names, family, structure, plates)
    if is_across(family.layout, structure):
        return _draw_across(block, family, structure, plates)
    return _draw_in_turn(names, family, structure, plates)


def _draw_alone(
    names: tuple[str, ...], family: Any, structure: Structure, plates: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Sites that are independent of each other given the block's parameters."""
    drawn = {}
    for name in names:
        site = structure.sites[name]
        drawn[name] = draw_site(name, distribution_of(family, name, site), site, plates)
    return drawn


def distribution_of(family: Any, name: str, site: SiteShape) -> Any:
    """The distribution of a site, with its event dimensions."""
    if is_point(family):
        place = family.layout.unpacked(family.canonical["loc"], name)
        place = place.exp() if isinstance(family, LogNormalFamily) else place
        return dist.Delta(place.to(site.dtype), event_dim=site.event_dim)
    if isinstance(family, LogNormalFamily):
        fn = dist.LogNormal(family.layout.unpacked(family.canonical["loc"], name), family.standard_deviation(name))
    else:
        fn = family.distribution()
    return _with_event(fn, site)


def _with_event(fn: Any, site: SiteShape) -> Any:
    found = site.event_dim - fn.event_dim
    return fn.to_event(found) if found else fn


def law_of_site(family: Any, parameters: Sequence[Tensor], site: SiteShape) -> Any:
    """A distribution of a family's class with other parameters, with the event dimensions of a site."""
    named = dict(zip(family.names, parameters, strict=True))
    return _with_event(type(family).law(**named, validate_args=False), site)


def draw_site(name: str, fn: Any, site: SiteShape, plates: Mapping[str, Any], infer: Any = None) -> Tensor:
    """A sample statement in the plates of a site, in the dtype of the model."""
    with ExitStack() as stack:
        for plate in site.plates:
            stack.enter_context(plates[plate.name])
        value: Tensor = pyro.sample(name, _cast(fn, site.dtype), infer=infer)
    return value


def _cast(fn: Any, dtype: torch.dtype) -> Any:
    """The distribution with parameters of the model's dtype."""
    if isinstance(fn, dist.Independent):
        return _cast(fn.base_dist, dtype).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.LogNormal):
        return dist.LogNormal(fn.loc.to(dtype), fn.scale.to(dtype))
    if isinstance(fn, dist.TransformedDistribution):
        return dist.TransformedDistribution(_cast(fn.base_dist, dtype), fn.transforms)
    if isinstance(fn, dist.MultivariateNormal):
        return dist.MultivariateNormal(fn.loc.to(dtype), scale_tril=fn.scale_tril.to(dtype))
    if isinstance(fn, dist.Wishart):
        return BartlettWishart(fn.df.to(dtype), scale_tril=fn.scale_tril.to(dtype), validate_args=False)
    if isinstance(fn, dist.Delta):
        return fn
    return type(fn)(**{name: getattr(fn, name).to(dtype) for name in fn.arg_constraints}, validate_args=False)


def normal_site(loc: Tensor, tril: Tensor, layout: BlockLayout, name: str, site: SiteShape) -> Any:
    """A normal site of which ``loc`` has the independent axes and then the joint elements.

    :param loc: mean, ``(..., *batch, P)``.
    :param tril: Cholesky factor of the covariance, ``(*batch, P, P)``.
    """
    axes, joint = layout.axes[name], layout.joint(name)
    independent = [d for d in axes if d >= site.batch_dim]
    if not joint:
        fn = dist.Normal(_in_order(loc.squeeze(-1), axes), _in_order(tril[..., 0, 0], axes))
        return fn.to_event(site.event_dim) if site.event_dim else fn
    fn = dist.MultivariateNormal(loc, scale_tril=tril)
    if joint == (len(site.shape) - 1,) and axes == tuple(range(len(axes))):
        return fn.to_event(len(independent)) if independent else fn
    fn = fn.to_event(len(independent)) if independent else fn
    order = [d - site.batch_dim for d in (*independent, *joint)]
    before = tuple(site.shape[d] for d in (*independent, *joint))
    back = tuple(order.index(d) for d in range(len(order)))
    return dist.TransformedDistribution(fn, [Arrange(len(independent) + 1, before, back)])


def _in_order(value: Tensor, axes: tuple[int, ...]) -> Tensor:
    lead = value.dim() - len(axes)
    return value.permute((*range(lead), *(lead + axes.index(d) for d in range(len(axes)))))


def _draw_in_turn(
    names: tuple[str, ...], family: NormalFamily, structure: Structure, plates: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The first site of a block by its marginal distribution, each other one given those before."""
    layout, loc, covariance = family.layout, family.canonical["loc"], family.full_covariance()
    drawn: dict[str, Tensor] = {}
    known: list[Tensor] = []
    for name in names:
        own, before = layout.places(name), slice(0, layout.places(name).start)
        mean, spread = loc[..., own], covariance[..., own, own]
        if known:
            gain = torch.linalg.solve(covariance[..., before, before], covariance[..., before, own]).mT
            lead = torch.broadcast_shapes(*(row.shape[:-1] for row in known))
            rest = torch.cat([row.expand(*lead, row.shape[-1]) for row in known], -1) - loc[..., before]
            mean = mean + (gain @ rest.unsqueeze(-1)).squeeze(-1)
            spread = spread - gain @ covariance[..., before, own]
        fn = normal_site(mean, torch.linalg.cholesky(spread), layout, name, structure.sites[name])
        drawn[name] = draw_site(name, fn, structure.sites[name], plates)
        if len(names) > 1:
            known.append(layout.row(drawn[name].to(loc.dtype), name))
    return drawn


def _draw_across(
    block: str, family: NormalFamily, structure: Structure, plates: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A block whose elements in a plate are joint: one auxiliary site, of which the model's sites are parts."""
    layout = family.layout
    tril = torch.linalg.cholesky(family.full_covariance())
    dtype = structure.sites[structure.blocks[block][0]].dtype
    fn = dist.MultivariateNormal(family.canonical["loc"].to(dtype), scale_tril=tril.to(dtype))
    fn = fn.to_event(len(layout.batch)) if layout.batch else fn
    vector = pyro.sample(auxiliary_name(block), fn, infer={"is_auxiliary": True})
    drawn = {}
    lead = vector.shape[: vector.dim() - len(layout.batch) - 1]
    for name in structure.blocks[block]:
        site = structure.sites[name]
        value = layout.unpacked(vector, name)
        shape = torch.broadcast_shapes(lead + (1,) * site.event_dim, site.shape)
        value = value.reshape(shape)
        drawn[name] = draw_site(name, dist.Delta(value, event_dim=site.event_dim), site, plates)
    return drawn


def is_across(layout: BlockLayout, structure: Structure) -> bool:
    """Whether a normal block is drawn at once, by an auxiliary site: joint across plates, or of many sites."""
    across = any(d < structure.sites[n].batch_dim for n in layout.shapes for d in layout.joint(n))
    return across or len(layout.shapes) > _IN_TURN


def auxiliary_name(block: str) -> str:
    """Of the auxiliary site of a block that is joint across plates."""
    return f"_{block}_joint"
