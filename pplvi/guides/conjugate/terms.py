"""Polynomials of latent sites as sums of einsums: what a term is, and how its dimensions are named and gathered.

A :class:`Term` is ``factor * product of constants * product of atoms``. Every dimension of size above one has a
:class:`Label`; labels that an expression does not have among its own dimensions are summed over. An :class:`Atom` is a
latent site to a power, each of its dimensions under a label or gathered by an index.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Label:
    """A dimension of an einsum; one object is one dimension.

    :param size: how many elements it has.
    """

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size


class Gather(NamedTuple):
    """A dimension of a site that is indexed by a tensor of whole numbers, whose own dimensions are labelled."""

    places: Tensor
    labels: tuple[Label, ...]


Index = Label | Gather | None
Labelling = tuple[Label, ...]


class Atom(NamedTuple):
    """A latent site to a power; ``entries`` has one for each dimension of the site, ``None`` for those of size one."""

    site: str
    entries: tuple[Index, ...]
    power: float = 1.0

    @property
    def labels(self) -> Labelling:
        """All labels of the atom, without repetition."""
        known = [entry for entry in self.entries if entry is not None]
        flat = [label for e in known for label in (e.labels if isinstance(e, Gather) else (e,))]
        return tuple(dict.fromkeys(flat))


class Constant(NamedTuple):
    """A tensor whose dimensions are labelled, all of them."""

    value: Tensor
    labels: Labelling


class Term(NamedTuple):
    """A product."""

    factor: float
    constants: tuple[Constant, ...] = ()
    atoms: tuple[Atom, ...] = ()

    @property
    def labels(self) -> set[Label]:
        """Every label that occurs."""
        parts: tuple[Constant | Atom, ...] = (*self.constants, *self.atoms)
        return {label for part in parts for label in part.labels}

    def times(self, other: Term) -> Term:
        """The product of two terms; labels that they share are the same dimension."""
        return Term(self.factor * other.factor, self.constants + other.constants, self.atoms + other.atoms)

    def relabelled(self, names: Mapping[Label, Label]) -> Term:
        """The same with other labels."""
        constants = tuple(Constant(c.value, renamed(c.labels, names)) for c in self.constants)
        return Term(self.factor, constants, tuple(a._replace(entries=_renamed(a.entries, names)) for a in self.atoms))

    def gathered(self, label: Label, index: Tensor, labels: Labelling) -> Term:
        """The term with one of its dimensions replaced by ``index``, whose dimensions have the labels given."""
        constants = tuple(Constant(*gathered_along(c.value, c.labels, label, index, labels)) for c in self.constants)
        return Term(self.factor, constants, tuple(_gather_atom(a, label, index, labels) for a in self.atoms))

    def renewed(self, keep: Iterable[Label] = ()) -> Term:
        """The same with new labels for all but some."""
        kept = set(keep)
        return self.relabelled({label: Label(label.size) for label in self.labels - kept})


def renamed(labels: Sequence[Label], names: Mapping[Label, Label]) -> Labelling:
    """Labelling under other names."""
    return tuple(names.get(label, label) for label in labels)


def _renamed(index: tuple[Index, ...], names: Mapping[Label, Label]) -> tuple[Index, ...]:
    return tuple(
        Gather(entry.places, renamed(entry.labels, names))
        if isinstance(entry, Gather)
        else entry and names.get(entry, entry)
        for entry in index
    )


def _gather_atom(atom: Atom, label: Label, index: Tensor, labels: Labelling) -> Atom:
    def entry(old: Index) -> Index:
        if old is label:
            return Gather(index, labels)
        if isinstance(old, Gather) and label in old.labels:
            return Gather(*gathered_along(old.places, old.labels, label, index, labels))
        return old

    return atom._replace(entries=tuple(entry(old) for old in atom.entries))


def gathered_along(
    value: Tensor, names: Labelling, label: Label, index: Tensor, labels: Labelling
) -> tuple[Tensor, Labelling]:
    """Index the dimension ``label`` of a labelled tensor; labels that index and tensor share are one dimension."""
    if label not in names:
        return value, names
    index = index.to(value.device)
    position = names.index(label)
    if not set(labels) & set(names):
        rest = names[:position] + labels + names[position + 1 :]
        flat = value.index_select(position, index.reshape(-1))
        return flat.reshape((*value.shape[:position], *index.shape, *value.shape[position + 1 :])), rest
    rest = tuple(dict.fromkeys((*(n for n in names if n is not label), *labels)))
    places = [
        laid_on(index, labels, rest) if n is label else laid_on(torch.arange(n.size, device=index.device), (n,), rest)
        for n in names
    ]
    return value[tuple(places)], rest


def laid_on(value: Tensor, names: Labelling, onto: Labelling) -> Tensor:
    """A labelled tensor with its dimensions in the order of ``onto``, of size one where it has none."""
    order = [names.index(label) for label in onto if label in names]
    return value.permute(order).reshape([label.size if label in names else 1 for label in onto])


def view(value: Tensor, index: Sequence[Index]) -> tuple[Tensor, Labelling]:
    """A tensor with one entry of ``index`` for each dimension: what it is once labelled and gathered."""
    plain = [entry if isinstance(entry, Label) else Label(size) for entry, size in zip(index, value.shape, strict=True)]
    if len(set(plain)) < len(plain):  # the same label twice: a diagonal
        return _einsum_view(value, tuple(plain), index)
    names: Labelling = tuple(plain)
    for entry, label in zip(index, plain, strict=True):
        if entry is None:
            position = names.index(label)
            value, names = value.select(position, 0), names[:position] + names[position + 1 :]
        elif isinstance(entry, Gather):
            value, names = gathered_along(value, names, label, entry.places, entry.labels)
    return value, names


def _einsum_view(value: Tensor, plain: Labelling, index: Sequence[Index]) -> tuple[Tensor, Labelling]:
    names = tuple(dict.fromkeys(plain))
    value = contract([Constant(value, plain)], names)
    return view(value, [next(e for e, p in zip(index, plain, strict=True) if p is name) for name in names])


def contract(parts: Sequence[Constant], out: Labelling) -> Tensor:
    """The einsum of labelled tensors."""
    if not parts:
        return torch.ones(())
    numbers = {label: i for i, label in enumerate(dict.fromkeys(label for part in parts for label in part.labels))}
    operands = [piece for part in parts for piece in (part.value, [numbers[label] for label in part.labels])]
    return torch.einsum(*operands, [numbers[label] for label in out])


def simplified(index: Tensor, labels: Labelling, size: int) -> Gather | Label:
    """An index without dimensions along which it is constant; a label where it counts from 0 to ``size``."""
    for position in range(index.dim() - 1, -1, -1):
        first = index.narrow(position, 0, 1)
        if bool((index == first).all()):
            index, labels = index.select(position, 0), labels[:position] + labels[position + 1 :]
    counts = index.dim() == 1 and len(index) == size
    if counts and bool((index == torch.arange(size, device=index.device)).all()):
        return labels[0]
    return Gather(index, labels)


def missing_size(term: Term, labels: Iterable[Label]) -> int:
    """How often a term is repeated by a sum over labels of which it has only some."""
    own = term.labels
    return math.prod(label.size for label in labels if label not in own)
