"""Exponential families whose weighted maximum-likelihood estimate is a function of weighted moments; a class for each.

A block of sites shares parameters: their distributions' arguments are rows of them. :class:`Cells` holds one site's
values and, for each, the rows that it is for; a :class:`ExponentialFamily` turns weights of the values into new rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Tables = dict[str, Tensor]
Alternatives = tuple[tuple[str, ...], ...]


class CollapseError(ValueError):
    """The likelihood has no maximum: a component closes in on a single value."""


@dataclass(frozen=True)
class Cells:
    """Values of one site as ``(G, M, *event)``: ``G`` combinations of rows with ``M`` values each.

    :ivar rows: row of the parameter for each combination, by argument, ``(G,)``.
    :ivar constants: values of the other arguments, ``(G or 1, M)``.
    :ivar single: those of them that are one value for all.
    :ivar value: ``(G or 1, M, *event)``.
    :ivar arrange: weights, of the shape of the site's log density, as ``(G, M)``.
    """

    rows: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    single: frozenset[str]
    value: Tensor
    arrange: Callable[[Tensor], Tensor]

    def sums(self, weights: Tensor, statistic: Tensor) -> Tensor:
        """Weighted sums ``(G, *event)`` of a statistic ``(G or 1, M, *event)``."""
        event = statistic.shape[2:]
        if len(statistic) == 1:
            return (weights @ statistic[0].reshape(statistic.shape[1], -1)).reshape(-1, *event)
        return torch.einsum("gm,gme->ge", weights, statistic.flatten(2) if event else statistic[..., None]).reshape(
            -1, *event
        )

    def add(self, role: str, size: int, values: Tensor) -> Tensor:
        """Sums over combinations, ``(G, ...)``, by the row of an argument, ``(size, ...)``."""
        return values.new_zeros(size, *values.shape[1:]).index_add(0, self.rows[role], values)


class ExponentialFamily:
    """Closed-form maximisation of ``sum_e c_e log p(x_e | rows)`` in the rows.

    :cvar alternatives: each argument by the names under which it can be given, the first of which a distribution has.
    :cvar free: which arguments may depend on parameters; ``None`` for all.
    """

    alternatives: ClassVar[Alternatives]
    free: ClassVar[frozenset[str] | None] = None

    @classmethod
    def roles_of(cls, fn: Any) -> list[str]:
        """Alternatives of the arguments that a distribution was given."""
        return [next((n for n in names if n in vars(fn)), names[0]) for names in cls.alternatives]

    @staticmethod
    def row_dims(fn: Any, role: str) -> int:
        """Dimensions of one row of an argument."""
        constraint = type(fn).arg_constraints.get(role)
        return int(getattr(constraint, "event_dim", 0))

    @staticmethod
    def canonical(fn: Any, role: str, rows: Tensor) -> Tensor:
        """A parameter's rows as a distribution keeps them: probabilities that sum to one."""
        if ExponentialFamily.row_dims(fn, role) != 1 or role not in ("probs", "logits"):
            return rows
        return rows / rows.sum(-1, keepdim=True) if role == "probs" else rows.log_softmax(-1)

    @classmethod
    def is_closed(cls, cells: Sequence[Cells], parameters: Mapping[str, str]) -> bool:
        """Whether the maximum is in closed form for these rows.

        :param parameters: the parameter behind each argument that is one.
        """
        return cls.free is None or set(parameters) <= cls.free

    @classmethod
    def solve(cls, cells: Sequence[Cells], weights: Sequence[Tensor], old: Tables) -> Tables:
        """New rows by argument, for weights ``(G, M)`` of the cells of each site; rows without weight stay."""
        raise NotImplementedError


def _ratio(numerator: Tensor, denominator: Tensor, old: Tensor) -> Tensor:
    shape = (-1, *[1] * (numerator.dim() - 1))
    denominator = denominator.reshape(shape) if denominator.dim() < numerator.dim() else denominator
    return torch.where(denominator > 0, numerator / denominator, old.reshape(numerator.shape))


class _Mean(ExponentialFamily):
    """One argument, a function of the ratio of two weighted sums."""

    @classmethod
    def numerator(cls, cells: Cells) -> Tensor:
        return cells.value

    @classmethod
    def denominator(cls, cells: Cells) -> Tensor:
        return cells.value.new_ones(1, cells.value.shape[1])

    @classmethod
    def solve(cls, cells: Sequence[Cells], weights: Sequence[Tensor], old: Tables) -> Tables:
        ((role, rows),) = old.items()
        top, bottom = [], []
        for cell, weight in zip(cells, weights, strict=True):
            top.append(cell.add(role, len(rows), cell.sums(weight, cls.numerator(cell).to(rows.dtype))))
            bottom.append(cell.add(role, len(rows), cell.sums(weight, cls.denominator(cell).to(rows.dtype))))
        total = torch.stack(bottom).sum(0)
        found = _ratio(torch.stack(top).sum(0), total, torch.zeros_like(rows))
        empty = (total <= 0).reshape(-1, *[1] * (rows.dim() - 1))
        return {role: torch.where(empty, rows, cls.placed(role, found))}

    @classmethod
    def placed(cls, role: str, mean: Tensor) -> Tensor:
        """The argument at this ratio."""
        return mean


class Bernoulli(_Mean):
    """Share of ones.

    :cvar simplex: whether shares are those of classes, which sum to one.
    """

    alternatives: ClassVar[Alternatives] = (("probs", "logits"),)
    simplex: ClassVar[bool] = False

    @classmethod
    def placed(cls, role: str, mean: Tensor) -> Tensor:
        """Probabilities or their log odds, of classes their logarithms; off zero by the smallest number."""
        tiny = torch.finfo(mean.dtype).tiny
        if cls.simplex:
            return mean.clamp(min=tiny) if role == "probs" else mean.clamp(min=tiny).log()
        mean = mean.clamp(tiny, 1 - torch.finfo(mean.dtype).eps / 2)
        return mean if role == "probs" else torch.logit(mean)


class Binomial(Bernoulli):
    """Share of successes."""

    alternatives: ClassVar[Alternatives] = (("probs", "logits"), ("total_count",))
    free: ClassVar[frozenset[str] | None] = frozenset({"probs", "logits"})

    @classmethod
    def denominator(cls, cells: Cells) -> Tensor:
        """Trials."""
        return cells.constants["total_count"]


class Geometric(Bernoulli):
    """Successes to trials."""

    @classmethod
    def numerator(cls, cells: Cells) -> Tensor:
        """One success in each value."""
        return torch.ones_like(cells.value)

    @classmethod
    def denominator(cls, cells: Cells) -> Tensor:
        """Failures and the success."""
        return 1 + cells.value


class OneHot(Bernoulli):
    """Shares of classes."""

    simplex: ClassVar[bool] = True


class Multinomial(OneHot):
    """Shares of counts."""

    @classmethod
    def denominator(cls, cells: Cells) -> Tensor:
        """Sums of the counts."""
        return cells.value.sum(-1)


class Categorical(OneHot):
    """Shares of classes, from their numbers."""

    @classmethod
    def solve(cls, cells: Sequence[Cells], weights: Sequence[Tensor], old: Tables) -> Tables:
        """Weights are added up by row and class."""
        ((role, rows),) = old.items()
        total, size = torch.zeros_like(rows).flatten(), rows.shape[-1]
        for cell, weight in zip(cells, weights, strict=True):
            place = cell.rows[role][:, None] * size + cell.value.long()
            total = total.index_add(0, place.expand_as(weight).flatten(), weight.flatten())
        counts = total.reshape(rows.shape)
        whole = counts.sum(-1, keepdim=True)
        shares = counts / whole.clamp(min=torch.finfo(rows.dtype).tiny)
        return {role: torch.where(whole > 0, cls.placed(role, shares), rows)}


class Poisson(_Mean):
    """Mean count."""

    alternatives: ClassVar[Alternatives] = (("rate",),)

    @classmethod
    def placed(cls, role: str, mean: Tensor) -> Tensor:
        """The rate, off zero."""
        return mean.clamp(min=torch.finfo(mean.dtype).tiny)


class Exponential(_Mean):
    """One by the mean."""

    alternatives: ClassVar[Alternatives] = (("rate",),)

    @classmethod
    def numerator(cls, cells: Cells) -> Tensor:
        """One event in each value."""
        return torch.ones_like(cells.value)

    @classmethod
    def denominator(cls, cells: Cells) -> Tensor:
        """Time."""
        return cells.value


class Gamma(Exponential):
    """Concentration by the mean, where the concentration is known."""

    alternatives: ClassVar[Alternatives] = (("rate",), ("concentration",))
    free: ClassVar[frozenset[str] | None] = frozenset({"rate"})

    @classmethod
    def numerator(cls, cells: Cells) -> Tensor:
        """The concentration."""
        return cells.constants["concentration"] + torch.zeros_like(cells.value)


class Normal(ExponentialFamily):
    """Weighted mean and standard deviation; means that have several standard deviations have no closed form."""

    alternatives: ClassVar[Alternatives] = (("loc",), ("scale",))

    @classmethod
    def is_closed(cls, cells: Sequence[Cells], parameters: Mapping[str, str]) -> bool:
        """Whether each mean goes with one spread."""
        spread = next((role for role in parameters if role != "loc"), None)
        if "loc" not in parameters:
            return True
        if spread is None:
            return cls.weighs(cells)
        pairs = torch.cat([torch.stack([cell.rows["loc"], cell.rows[spread]], -1) for cell in cells]).unique(dim=0)
        return len(pairs) == len(pairs[:, 0].unique())

    @classmethod
    def weighs(cls, cells: Sequence[Cells]) -> bool:
        """Whether a mean can be had under known spreads."""
        return True

    @classmethod
    def values(cls, cells: Cells) -> Tensor:
        """What is normal."""
        return cells.value

    @classmethod
    def precise(cls, cell: Cells, weight: Tensor) -> Tensor:
        """Weights in units of known variances."""
        return weight / cell.constants["scale"] ** 2 if "scale" in cell.constants else weight

    @classmethod
    def solve(cls, cells: Sequence[Cells], weights: Sequence[Tensor], old: Tables) -> Tables:
        """Means first, then spreads around them."""
        found = {"loc": cls._means(cells, weights, old["loc"])} if "loc" in old else {}
        for role in old.keys() - {"loc"}:
            found[role] = cls._spreads(cells, weights, role, old[role], found.get("loc"))
        return found

    @classmethod
    def _means(cls, cells: Sequence[Cells], weights: Sequence[Tensor], old: Tensor) -> Tensor:
        top, bottom = torch.zeros_like(old), old.new_zeros(len(old))
        for cell, weight in zip(cells, weights, strict=True):
            weight = cls.precise(cell, weight)
            top = top + cell.add("loc", len(old), cell.sums(weight, cls.values(cell)))
            bottom = bottom + cell.add("loc", len(old), weight.sum(1))
        return _ratio(top, bottom, old)

    @classmethod
    def _spreads(
        cls, cells: Sequence[Cells], weights: Sequence[Tensor], role: str, old: Tensor, loc: Tensor | None
    ) -> Tensor:
        top, bottom = cls.squares(role, old), old.new_zeros(len(old))
        kept, top = top, torch.zeros_like(top)
        for cell, weight in zip(cells, weights, strict=True):
            center = cell.constants["loc"] if loc is None else loc[cell.rows["loc"]][:, None]
            top = top + cell.add(role, len(old), cls.scatter(weight, cls.values(cell) - center))
            bottom = bottom + cell.add(role, len(old), weight.sum(1))
        return cls.rooted(role, _ratio(top, bottom, kept))

    @classmethod
    def squares(cls, role: str, old: Tensor) -> Tensor:
        """Variances of an argument."""
        return old.square()

    @classmethod
    def scatter(cls, weight: Tensor, x: Tensor) -> Tensor:
        """Weighted sums of squares, ``(G, ...)``."""
        return (weight * x.square()).sum(1)

    @classmethod
    def rooted(cls, role: str, variance: Tensor) -> Tensor:
        """The argument at these variances.

        :raises CollapseError: where one is zero.
        """
        if not bool((variance > 0).all()):
            raise CollapseError
        return variance.sqrt()


class LogNormal(Normal):
    """Of the logarithms."""

    @classmethod
    def values(cls, cells: Cells) -> Tensor:
        """Their logarithms."""
        return cells.value.log()


class MultivariateNormal(Normal):
    """Weighted mean and covariance."""

    alternatives: ClassVar[Alternatives] = (("loc",), ("scale_tril", "covariance_matrix", "precision_matrix"))

    @classmethod
    def weighs(cls, cells: Sequence[Cells]) -> bool:
        """Whether all values have one covariance."""
        return all(cell.constants.keys() - {"loc"} <= cell.single for cell in cells)

    @classmethod
    def precise(cls, cell: Cells, weight: Tensor) -> Tensor:
        """One covariance weighs nothing."""
        return weight

    @classmethod
    def squares(cls, role: str, old: Tensor) -> Tensor:
        """Covariances of an argument."""
        if role == "scale_tril":
            return old @ old.mT
        return old if role == "covariance_matrix" else torch.linalg.inv(old)

    @classmethod
    def scatter(cls, weight: Tensor, x: Tensor) -> Tensor:
        """Weighted sums of outer products."""
        return (x * weight[..., None]).mT @ x

    @classmethod
    def rooted(cls, role: str, variance: Tensor) -> Tensor:
        """The argument at these covariances.

        :raises CollapseError: where one is not positive definite.
        """
        tril, failed = torch.linalg.cholesky_ex(variance)
        if bool(failed.any()):
            raise CollapseError
        if role == "scale_tril":
            return tril
        return variance if role == "covariance_matrix" else torch.cholesky_inverse(tril)


CLOSED_FORMS: dict[str, type[ExponentialFamily]] = {
    "Bernoulli": Bernoulli,
    "Binomial": Binomial,
    "Categorical": Categorical,
    "Exponential": Exponential,
    "Gamma": Gamma,
    "Geometric": Geometric,
    "LogNormal": LogNormal,
    "Multinomial": Multinomial,
    "MultivariateNormal": MultivariateNormal,
    "Normal": Normal,
    "OneHotCategorical": OneHot,
    "Poisson": Poisson,
}
