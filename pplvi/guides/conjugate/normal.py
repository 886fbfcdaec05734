"""Normal blocks: several sites, joint where elements interact, independent along the axes where none do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from pplvi.guides.conjugate.families import BlockFamily, Parameters
from pplvi.guides.conjugate.terms import Atom, Gather, Index, Labelling, view


@dataclass(frozen=True)
class BlockLayout:
    """Where the elements of a block's sites are.

    :ivar shapes: of the sites.
    :ivar axes: for each site its dimensions along which elements are independent, in one order for all sites.
    :ivar series: a name for all sites as rows of one array, where they have one shape.
    """

    shapes: Mapping[str, tuple[int, ...]]
    axes: Mapping[str, tuple[int, ...]]
    series: str | None = None

    def shape(self, site: str) -> tuple[int, ...]:
        """Of a site, or of the array of all."""
        return (len(self.shapes), *next(iter(self.shapes.values()))) if site == self.series else self.shapes[site]

    def own_axes(self, site: str) -> tuple[int, ...]:
        """The independent dimensions of a site, or of the array of all."""
        return tuple(d + 1 for d in next(iter(self.axes.values()))) if site == self.series else self.axes[site]

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the independent axes."""
        name = next(iter(self.shapes))
        return tuple(self.shapes[name][d] for d in self.axes[name])

    def joint(self, site: str) -> tuple[int, ...]:
        """The other dimensions of a site."""
        axes = self.own_axes(site)
        return tuple(d for d in range(len(self.shape(site))) if d not in axes)

    def joint_shape(self, site: str) -> tuple[int, ...]:
        """Their sizes."""
        shape = self.shape(site)
        return tuple(shape[d] for d in self.joint(site))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How many joint elements each site has."""
        return {site: math.prod(self.joint_shape(site)) for site in self.shapes}

    def places(self, site: str) -> slice:
        """Where a site's elements are in the joint vector."""
        sizes = self.sizes
        if site == self.series:
            return slice(0, sum(sizes.values()))
        start = sum(sizes[s] for s in list(sizes)[: list(sizes).index(site)])
        return slice(start, start + sizes[site])

    def packed(self, values: Mapping[str, Tensor]) -> Tensor:
        """Parameters of the sites as ``(*batch, P)``."""
        return torch.cat([self.row(values[site], site) for site in self.shapes], -1)

    def row(self, value: Tensor, site: str) -> Tensor:
        """A site's values, with any dimensions before its own, as ``(..., *batch, P)``."""
        first = value.dim() - len(self.shapes[site])
        order = [first + d for d in (*self.axes[site], *self.joint(site))]
        return value.permute((*range(first), *order)).reshape((*value.shape[:first], *self.batch, -1))

    def packed_axes(self, value: Tensor, site: str) -> Tensor:
        """What belongs to the batch of a tensor that is the same for all joint elements, of the batch shape."""
        return value.permute((*self.axes[site], *self.joint(site))).reshape((*self.batch, -1))[..., 0]

    def unpacked(self, vector: Tensor, site: str) -> Tensor:
        """A site's values of ``(..., *batch, P)``, in its own shape."""
        order, shape = (*self.own_axes(site), *self.joint(site)), self.shape(site)
        first = vector.dim() - len(self.batch) - 1
        part = vector[..., self.places(site)].reshape((*vector.shape[:first], *(shape[d] for d in order)))
        back = [first + order.index(d) for d in range(len(order))]
        return part.permute((*range(first), *back))


class NormalFamily(BlockFamily):
    """Normal distributions of ``(*batch, P)`` elements, independent along the batch, joint over ``P``.

    The leaves are the mean and the covariance (the variance where ``P`` is one), so that second moments are never taken
    apart into a difference of large numbers.
    """

    kind: ClassVar[str] = "normal"

    def __init__(self, layout: BlockLayout, values: Mapping[str, Tensor]) -> None:
        self.layout = layout
        loc = layout.packed(values)
        precision = (
            torch.ones_like(loc) if loc.shape[-1] == 1 else torch.eye(loc.shape[-1]).to(loc).expand(*loc.shape, -1)
        )
        self.canonical = {"loc": loc.clone(), "precision": precision.clone()}
        self.refresh()

    @property
    def size(self) -> int:
        """How many elements are joint."""
        return self.canonical["loc"].shape[-1]

    def mean_parameters(self) -> Parameters:
        """``E[z], Cov(z)``."""
        return self.canonical["loc"], self.covariance_matrix()

    def covariance_matrix(self) -> Tensor:
        """``(*batch, P, P)``, or the variances ``(*batch, 1)`` where ``P`` is one."""
        precision = self.canonical["precision"]
        return 1 / precision if self.size == 1 else torch.cholesky_inverse(torch.linalg.cholesky(precision))

    def target(self, gradients: Sequence[Tensor], weight: Tensor | None) -> Parameters:
        """``-2 dF/dCov``, and a step of ``precision^-1 dF/dmean`` from the mean."""
        slope, precision = self.slopes(gradients, weight)
        return self.canonical["loc"] + solved(precision, slope, self.size), precision

    def slopes(self, gradients: Sequence[Tensor], weight: Tensor | None) -> Parameters:
        """``dF/dmean, -2 dF/dCov`` for an entropy that counts once."""
        first, second = gradients
        if weight is not None:
            first, second = (
                torch.where(w > 0, g / w.clamp(min=1e-300), 0.0)
                for g in gradients
                for w in [weight.reshape((*weight.shape, *(1,) * (g.dim() - weight.dim())))]
            )
        precision = -2 * second if self.size == 1 else -(second + second.mT)
        if weight is not None:
            precision = _kept(precision, self.canonical["precision"], weight)
        return first, precision

    def step(self, target: Parameters, rate: float) -> None:
        """Along a line of natural parameters."""
        if rate != 1.0:
            loc, precision = self.canonical.values()
            new_loc, new = target
            mixed = torch.lerp(precision, new, rate)
            shift = rate * _times(new, new_loc - loc, self.size)
            target = (loc + solved(mixed, shift, self.size), mixed)
        super().step(target, 1.0)

    def full_covariance(self) -> Tensor:
        """``(*batch, P, P)``."""
        covariance = self.covariance_matrix()
        return covariance.unsqueeze(-1) if self.size == 1 else covariance

    def entropy(self) -> Tensor:
        """Of each element of the batch."""
        precision, constant = self.canonical["precision"], 0.5 * self.size * (1 + math.log(2 * math.pi))
        if self.size == 1:
            return constant - 0.5 * precision.squeeze(-1).log()
        return constant - torch.linalg.cholesky(precision).diagonal(dim1=-2, dim2=-1).log().sum(-1)

    # what expectations ask for

    def moment(self, site: str, power: float) -> Tensor:
        """The mean, or the mean square."""
        mean = self.layout.unpacked(self.leaves[0], site)
        return mean if power == 1.0 else mean**2 + self.layout.unpacked(self._variances(), site)

    def _variances(self) -> Tensor:
        return self.leaves[1] if self.size == 1 else self.leaves[1].diagonal(dim1=-2, dim2=-1)

    def covariance(self, a: Atom, b: Atom) -> tuple[Tensor, Labelling]:
        """The covariance of two atoms, whose batch axes are the same."""
        layout, batch = self.layout, len(self.layout.batch)
        index: list[Index] = [a.entries[d] for d in layout.own_axes(a.site)]
        rows, columns = layout.joint_shape(a.site), layout.joint_shape(b.site)
        if self.size == 1:
            value = self.leaves[1].reshape((*layout.batch, *rows, *columns))
        else:
            value = self.leaves[1][..., layout.places(a.site), layout.places(b.site)]
            value = value.reshape((*value.shape[:batch], *rows, *columns))
        index += [a.entries[d] for d in layout.joint(a.site)] + [b.entries[d] for d in layout.joint(b.site)]
        return view(value, index)

    def standard_deviation(self, site: str) -> Tensor:
        """Of each element of a site."""
        return self.layout.unpacked(self._variances().detach(), site).sqrt()


def _times(matrix: Tensor, vector: Tensor, size: int) -> Tensor:
    return matrix * vector if size == 1 else (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def solved(matrix: Tensor, vector: Tensor, size: int) -> Tensor:
    """``matrix^-1 vector`` for a positive definite matrix, or a number where ``size`` is one."""
    if size == 1:
        return vector / matrix
    return torch.cholesky_solve(vector.unsqueeze(-1), torch.linalg.cholesky(matrix)).squeeze(-1)


def _kept(precision: Tensor, old: Tensor, weight: Tensor) -> Tensor:
    inside = weight.reshape((*weight.shape, *(1,) * (precision.dim() - weight.dim()))) > 0
    return torch.where(inside, precision, old)


def differing_axes(a: Atom, b: Atom, axes: Mapping[str, Sequence[int]], same: object) -> set[int]:
    """Positions of those axes along which two atoms are not the same element."""
    pairs = zip(axes[a.site], axes[b.site], strict=True)
    return {i for i, (x, y) in enumerate(pairs) if not same(a.entries[x], b.entries[y])}  # type: ignore[operator]


__all__ = ["BlockLayout", "Gather", "NormalFamily", "differing_axes", "solved"]
