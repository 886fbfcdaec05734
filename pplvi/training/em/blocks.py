"""Parameters that are maximised together in closed form: those that sites of one family connect."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pplvi.programs.sites import base_distribution
from pplvi.training.em.complete import CompleteData, ParameterLeaves
from pplvi.training.em.families import Cells, CollapseError, ExponentialFamily
from pplvi.training.em.gathers import Link

# Constraints of a parameter inside which the maximum of a family always is.
_SIMPLEX, _CHOLESKY, _DEFINITE = {"_Simplex"}, {"_LowerCholesky", "_SoftplusLowerCholesky"}, {"_PositiveDefinite"}
_DOMAINS: dict[str, set[str]] = {
    "probs": _SIMPLEX,
    "scale_tril": _CHOLESKY,
    "covariance_matrix": _DEFINITE | {"_SoftplusPositiveDefinite"},
    "precision_matrix": _DEFINITE | {"_SoftplusPositiveDefinite"},
}
_BOUNDS: dict[str, tuple[float, float]] = {
    "loc": (-math.inf, math.inf),
    "logits": (-math.inf, math.inf),
    "scale": (0.0, math.inf),
    "rate": (0.0, math.inf),
    "probs": (0.0, 1.0),
}


@dataclass(frozen=True)
class Block:
    """Parameters, each one argument of a family's distributions, and the sites that depend on them.

    :ivar roles: the argument that each parameter is, by its name.
    """

    family: type[ExponentialFamily]
    roles: Mapping[str, str]
    cells: Mapping[str, Cells]
    fn: Any

    def maximise(self, problem: ParameterLeaves, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New constrained values by name.

        :raises ValueError: where the likelihood has no maximum.
        """
        values = {name: problem.value(name) for name in self.roles}
        old = {role: self._table(role, values[name]) for name, role in self.roles.items()}
        weights = [cells.arrange(counts[site]) for site, cells in self.cells.items()]
        try:
            new = self.family.solve(list(self.cells.values()), weights, old)
        except CollapseError:
            raise CollapseError(
                f"the likelihood has no maximum: a spread in {sorted(self.roles)} went to zero, as a component that "
                "closes in on a single datum does. Expected a bound, such as constraint=constraints.greater_than(0.01) "
                "of a scale, fewer components, or another start (seed=)."
            ) from None
        return {name: new[role].reshape(values[name].shape) for name, role in self.roles.items()}

    def _table(self, role: str, value: Tensor) -> Tensor:
        events = ExponentialFamily.row_dims(self.fn, role)
        return value.reshape(-1, *value.shape[value.dim() - events :])


def blocks_of(problem: CompleteData, links: Mapping[str, Link]) -> list[Block]:
    """The blocks that have a closed form."""
    found = (_block(problem, group) for group in _groups(links))
    return [block for block in found if block is not None]


def _groups(links: Mapping[str, Link]) -> Iterator[dict[str, Link]]:
    """Sites that parameters connect."""
    rest = dict(links)
    while rest:
        reached = next(iter(rest.values())).parameters
        while (
            more := frozenset().union(reached, *(x.parameters for x in rest.values() if x.parameters & reached))
        ) > reached:
            reached = more
        group = {name: link for name, link in rest.items() if link.parameters & reached}
        rest = {name: link for name, link in rest.items() if name not in group}
        yield group


def _block(problem: CompleteData, group: Mapping[str, Link]) -> Block | None:
    family = next(iter(group.values())).family
    if family is None or not all(link.is_read and link.family is family for link in group.values()):
        return None
    pairs = {(name, role) for link in group.values() for role, a in link.arguments.items() for name in a.parameters}
    roles = dict(pairs)
    if len(roles) != len(pairs) or len(set(roles.values())) != len(roles):
        return None
    if not all(_is_free(problem.constraint(name), role) for name, role in roles.items()):
        return None
    cells = {name: cells_of(link) for name, link in group.items()}
    if not family.is_closed(list(cells.values()), {role: name for name, role in roles.items()}):
        return None
    return Block(family, roles, cells, base_distribution(next(iter(group.values())).site["fn"]))


def _is_free(constraint: Any, role: str) -> bool:
    """Whether a constraint leaves all values that an argument can have."""
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    kind = type(constraint).__name__
    if kind == "_Real" or kind in _DOMAINS.get(role, ()):
        return True
    low, high = (getattr(constraint, f"{side}_bound", None) for side in ("lower", "upper"))
    if low is None or role not in _BOUNDS:
        return False
    return bool(low <= _BOUNDS[role][0] and (math.inf if high is None else high) >= _BOUNDS[role][1])


def cells_of(link: Link) -> Cells:
    """The values of a site, arranged by the rows that they are for."""
    layout = _Layout(link)
    rows, constants = {}, {}
    for role, argument in link.arguments.items():
        if argument.parameters:
            rows[role] = layout.combinations(argument.rows)
        else:
            events = ExponentialFamily.row_dims(layout.base, role)
            constants[role] = layout.arrange(argument.value, events)
    single = {r for r in constants if math.prod(link.arguments[r].value.shape) == math.prod(constants[r].shape[2:])}
    value = torch.as_tensor(link.site["value"])
    return Cells(
        rows, constants, frozenset(single), layout.arrange(value, len(layout.base.event_shape)), layout.weights
    )


class _Layout:
    """Dimensions of a site along which rows of parameters change, which are put first, and the others."""

    def __init__(self, link: Link) -> None:
        fn = link.site["fn"]
        self.base = base_distribution(fn)
        extra = len(fn.event_shape) - len(self.base.event_shape)
        inner = tuple(self.base.batch_shape)[len(self.base.batch_shape) - extra :] if extra else ()
        value = torch.as_tensor(link.site["value"])
        outer = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - len(fn.event_shape)])
        self.shape, self.extra = (*outer, *inner), extra
        rows = [self._padded(a.rows) for a in link.arguments.values() if a.rows is not None and a.parameters]
        self.first = [d for d in range(len(self.shape)) if any(r.shape[d] != 1 for r in rows)]
        self.rest = [d for d in range(len(self.shape)) if d not in self.first]

    def _padded(self, x: Tensor, events: int = 0) -> Tensor:
        return x.reshape((1,) * (len(self.shape) + events - x.dim()) + tuple(x.shape))

    def arrange(self, x: Tensor, events: int = 0) -> Tensor:
        """A tensor over the site's elements as ``(G or 1, M, *event)``."""
        x = self._padded(x, events)
        event = tuple(x.shape[len(self.shape) :])
        many = any(x.shape[d] != 1 for d in self.first)
        sizes = [self.shape[d] if many else 1 for d in self.first] + [self.shape[d] for d in self.rest]
        places = [*self.first, *self.rest, *range(len(self.shape), len(self.shape) + events)]
        groups = math.prod(sizes[: len(self.first)])
        return x.permute(places).expand(*sizes, *event).reshape(groups, -1, *event)

    def combinations(self, rows: Any) -> Tensor:
        """The row of an argument for each combination, ``(G,)``."""
        x = self._padded(rows).permute(*self.first, *self.rest)
        sizes = [self.shape[d] for d in self.first]
        return x.expand(*sizes, *[1] * len(self.rest)).reshape(-1)

    def weights(self, counts: Tensor) -> Tensor:
        """Weights as ``(G, M)``."""
        spread = counts.reshape(*counts.shape, *[1] * self.extra).expand(self.shape)
        return spread.permute(*self.first, *self.rest).reshape(math.prod(self.shape[d] for d in self.first), -1)
