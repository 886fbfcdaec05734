"""Which arguments of distributions are rows of a parameter, such as ``mu[z]``: read off from runs at other values.

An argument that is a selection of a parameter's rows takes, wherever the parameter is put, the values that its rows
have there. Two random points of the domain settle which row is where, whatever the program did to select it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pplvi.programs.sites import base_distribution, is_deterministic, sample_sites
from pplvi.programs.traces import Run
from pplvi.training.em.complete import CompleteData
from pplvi.training.em.families import CLOSED_FORMS, ExponentialFamily


@dataclass(frozen=True)
class Argument:
    """An argument of a distribution.

    :ivar parameters: names of those that it depends on; none for a constant.
    :ivar rows: for a selection of rows of one parameter, which; ``(*batch)``, of size 1 where all are the same.
    :ivar value: what it is at present, ``(*batch, *row)``, of size 1 where all are the same.
    """

    parameters: frozenset[str]
    rows: Tensor | None
    value: Tensor


@dataclass(frozen=True)
class Link:
    """A site that depends on parameters, and how.

    :ivar family: the family of its distribution, if it is one with a closed form.
    :ivar parameters: all that its density depends on.
    """

    site: Mapping[str, Any]
    family: type[ExponentialFamily] | None
    arguments: Mapping[str, Argument]
    parameters: frozenset[str]

    @property
    def is_read(self) -> bool:
        """Whether its density depends on parameters through rows of them alone."""
        through = frozenset().union(*(a.parameters for a in self.arguments.values()))
        free = (a.rows is not None for a in self.arguments.values() if a.parameters)
        return self.family is not None and through == self.parameters and all(free)


def links_of(problem: CompleteData) -> dict[str, Link]:
    """The sites whose densities depend on parameters, by name."""
    with torch.enable_grad():
        here = problem.run()
    generator = torch.Generator().manual_seed(0)
    probes = [_Probe.of(problem, generator) for _ in range(2)]
    found = {}
    for name, site in sample_sites(here.model):
        if not is_deterministic(site) and (link := _link(problem, name, site, probes)).parameters:
            found[name] = link
    return found


@dataclass(frozen=True)
class _Probe:
    """A run with parameters elsewhere, and their values there."""

    run: Run
    values: Mapping[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, problem: CompleteData, generator: torch.Generator) -> _Probe:
        with problem.elsewhere(generator):
            return cls(problem.run(), {name: problem.value(name) for name in problem.leaves})


def _link(problem: CompleteData, name: str, site: Any, probes: list[_Probe]) -> Link:
    base = base_distribution(site["fn"])
    family = CLOSED_FORMS.get(type(base).__name__)
    with torch.enable_grad():
        density = site["fn"].log_prob(site["value"])
    arguments = {}
    for role in family.roles_of(base) if family is not None else ():
        arguments[role] = _argument(
            problem, base, role, [(base_distribution(p.run.model.nodes[name]["fn"]), p.values) for p in probes]
        )
    return Link(site, family, arguments, _parameters(problem, density))


def _parameters(problem: CompleteData, x: Any) -> frozenset[str]:
    """Alternatives of the parameters that a tensor depends on."""
    if not (isinstance(x, Tensor) and x.requires_grad):
        return frozenset()
    leaves = problem.leaves
    found = torch.autograd.grad(x.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
    return frozenset(name for name, gradient in zip(leaves, found, strict=True) if gradient is not None)


def _argument(problem: CompleteData, base: Any, role: str, probes: list[tuple[Any, Mapping[str, Tensor]]]) -> Argument:
    value = torch.as_tensor(getattr(base, role))
    events = ExponentialFamily.row_dims(base, role)
    parameters, rows = _parameters(problem, value), None
    if len(parameters) == 1:
        (name,) = parameters
        rows = _rows([(getattr(fn, role), values[name]) for fn, values in probes], events, role, base)
    return Argument(parameters, rows, collapsed(value.detach(), value.dim() - events))


def _rows(seen: list[tuple[Tensor, Tensor]], events: int, role: str, base: Any) -> Tensor | None:
    """Which row of a parameter each element of an argument is, from the two at several points."""
    event = tuple(seen[0][0].shape[seen[0][0].dim() - events :])
    if tuple(seen[0][1].shape[seen[0][1].dim() - events :]) != event:
        return None
    pairs = []
    for argument, parameter in seen:
        small = collapsed(argument, argument.dim() - events)
        table = ExponentialFamily.canonical(base, role, parameter.reshape(-1, *event))
        batch = tuple(small.shape[: small.dim() - events])
        pairs.append((small.reshape(math.prod(batch), -1), table.reshape(len(table), -1)))
    index = _nearest(*(x[:, 0] for x in pairs[0]))
    close = 1e-9 if pairs[0][0].dtype == torch.float64 else 1e-5
    equal = all(torch.allclose(x, table[index], rtol=close, atol=close) for x, table in pairs)
    return index.reshape(batch) if equal else None


def _nearest(x: Tensor, table: Tensor) -> Tensor:
    ordered, order = table.contiguous().sort()
    right = torch.searchsorted(ordered, x.contiguous()).clamp(max=len(table) - 1)
    left = (right - 1).clamp(min=0)
    return order[torch.where((ordered[left] - x).abs() < (ordered[right] - x).abs(), left, right)]


def collapsed(x: Tensor, batch: int) -> Tensor:
    """A tensor with size 1 in those of its first dimensions along which it is one and the same by its strides.

    >>> collapsed(torch.zeros(3, 1).expand(3, 5), 2).shape
    torch.Size([3, 1])
    """
    for dim in range(batch):
        if x.stride(dim) == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x
