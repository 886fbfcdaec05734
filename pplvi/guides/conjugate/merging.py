"""Sites of a loop that differ in their numbers alone, as one site with one more dimension on the left.

A loop over time writes hundreds of factors of one form. Merged, their expectation is one einsum. Expressions are merged
where their terms have the same pattern; constants and indices are stacked; sites of one normal block of equal shapes
(a :class:`Series`) are rows of one array.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pplvi.guides.conjugate.expressions import Expression, Symbolic, expression
from pplvi.guides.conjugate.parameters import given_parameters
from pplvi.guides.conjugate.terms import Atom, Constant, Gather, Index, Label, Term


@dataclass(frozen=True)
class Series:
    """Sites of one block as rows of an array.

    :ivar name: of the array.
    :ivar members: its rows, in order.
    """

    name: str
    members: tuple[str, ...]


Places = Mapping[str, tuple[str, int]]


def places_of(series: Sequence[Series]) -> dict[str, tuple[str, int]]:
    """The array and the row of each site."""
    return {member: (s.name, i) for s in series for i, member in enumerate(s.members)}


def merge(items: Sequence[tuple[Any, Any]], rows: Places) -> tuple[Any, Any] | None:
    """Distributions and values of several sites as one of each, with a first dimension over the sites.

    :returns: ``None`` where they differ in more than numbers.
    """
    fns = [fn for fn, _ in items]
    if len({type(fn) for fn in fns}) > 1 or len({(fn.batch_shape, fn.event_shape) for fn in fns}) > 1:
        return None
    if type(fns[0]).__name__ == "Independent":
        inner = merge([(fn.base_dist, value) for fn, value in items], rows)
        count = fns[0].reinterpreted_batch_ndims
        return None if inner is None else (inner[0].to_event(count), inner[1])
    if hasattr(fns[0], "base_dist") or not fns[0].arg_constraints:
        return None
    found = _merged_parameters(fns, rows)
    value = _merged([value for _, value in items], rows)
    return None if found is None or value is None else (type(fns[0])(**found, validate_args=False), value)


def _merged_parameters(fns: Sequence[Any], rows: Places) -> dict[str, Any] | None:
    given = [given_parameters(fn) for fn in fns]
    found = {name: _merged([g.get(name) for g in given], rows) for name in given[0]}
    return None if any(v is None for v in found.values()) else found


def _merged(values: Sequence[Any], rows: Places) -> Any:
    if all(isinstance(v, Expression) for v in values):
        return merged_expression(values, rows)
    if any(isinstance(v, Symbolic) or not isinstance(v, Tensor) for v in values):
        return None
    return torch.stack(list(values)) if len({v.shape for v in values}) == 1 else None


def merged_expression(values: Sequence[Expression], rows: Places) -> Expression | None:
    """Expressions of one pattern, stacked along a new first dimension."""
    numbered = [_numbering(value) for value in values]
    if len({_pattern(value, numbers, rows) for value, numbers in zip(values, numbered, strict=True)}) > 1:
        return None
    names = {number: label for label, number in numbered[0].items()}
    renamed = [
        [term.relabelled({label: names[n] for label, n in numbers.items()}) for term in value.terms]
        for value, numbers in zip(values, numbered, strict=True)
    ]
    step = Label(len(values))
    terms = [_merged_term(parts, step, rows) for parts in zip(*renamed, strict=True)]
    shown = torch.stack([value.shown for value in values])
    return expression(terms, (step, *values[0].labels), shown)


def _numbering(value: Expression) -> dict[Label, int]:
    found = [label for label in value.labels if label is not None]
    for term in value.terms:
        parts: tuple[Constant | Atom, ...] = (*term.constants, *term.atoms)
        found += [label for part in parts for label in part.labels]
    return {label: number for number, label in enumerate(dict.fromkeys(found))}


def _pattern(value: Expression, numbers: Mapping[Label, int], rows: Places) -> Any:
    def entry(e: Index) -> Any:
        if isinstance(e, Gather):
            return ("gather", tuple(numbers[label] for label in e.labels))
        return e and numbers[e]

    terms = [
        (
            tuple(tuple(numbers[label] for label in c.labels) for c in term.constants),
            tuple((rows.get(a.site, (a.site,))[0], tuple(map(entry, a.entries)), a.power) for a in term.atoms),
        )
        for term in value.terms
    ]
    sizes = tuple(label.size for label in numbers)
    return tuple(value.shape), tuple(n and numbers[n] for n in value.labels), tuple(terms), sizes


def _merged_term(parts: Sequence[Term], step: Label, rows: Places) -> Term:
    factors = [part.factor for part in parts]
    constants = [_stacked([p.constants[i] for p in parts], step) for i in range(len(parts[0].constants))]
    if len(set(factors)) > 1:
        constants.append(Constant(torch.tensor(factors, dtype=torch.float64), (step,)))
    atoms = [_merged_atom([p.atoms[i] for p in parts], step, rows) for i in range(len(parts[0].atoms))]
    return Term(factors[0] if len(set(factors)) == 1 else 1.0, tuple(constants), tuple(atoms))


def _stacked(parts: Sequence[Constant], step: Label) -> Constant:
    first = parts[0]
    if all(p.value is first.value or _are_equal(p.value, first.value) for p in parts):
        return first
    return Constant(torch.stack([p.value for p in parts]), (step, *first.labels))


def _are_equal(a: Tensor, b: Tensor) -> bool:
    """Whether constants are known to be equal; those that depend on parameters may be so by chance."""
    return not (a.requires_grad or b.requires_grad) and torch.equal(a, b)


def _merged_atom(parts: Sequence[Atom], step: Label, rows: Places) -> Atom:
    entries = tuple(_merged_entry([p.entries[d] for p in parts], step) for d in range(len(parts[0].entries)))
    if parts[0].site not in rows:
        return Atom(parts[0].site, entries, parts[0].power)
    places = torch.tensor([rows[p.site][1] for p in parts])
    return Atom(rows[parts[0].site][0], (Gather(places, (step,)), *entries), parts[0].power)


def _merged_entry(parts: Sequence[Index], step: Label) -> Index:
    first = parts[0]
    if not isinstance(first, Gather):
        return first
    gathers = [p for p in parts if isinstance(p, Gather)]
    if all(torch.equal(p.places, first.places) for p in gathers):
        return first
    return Gather(torch.stack([p.places for p in gathers]), (step, *first.labels))
