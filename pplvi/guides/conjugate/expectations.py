"""Expectations of polynomials of latent sites under a mean field: means, covariances, logarithms.

Each is a sum of einsums over moments of the sites' distributions, written down once and evaluated at every update. What
a distribution has no moment for is refused with the names of the sites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor

from pplvi.guides.conjugate.expressions import Expression, Function
from pplvi.guides.conjugate.merging import Series
from pplvi.guides.conjugate.operations import aligned
from pplvi.guides.conjugate.terms import Atom, Constant, Gather, Index, Label, Labelling, Term, contract, view


class BlockMoments(Protocol):
    """What the distribution of a block of sites is asked for."""

    def moment(self, site: str, power: float) -> Tensor:
        """``E[z^power]``, of the shape of the site."""

    def log(self, site: str) -> Tensor:
        """``E[log z]``."""

    def log_complement(self, site: str) -> Tensor:
        """``E[log(1 - z)]``."""

    def covariance(self, a: Atom, b: Atom) -> tuple[Tensor, Labelling]:
        """The covariance of two atoms, with a label for each dimension."""


Distributions = Mapping[str, BlockMoments]


class NotConjugate(ValueError):
    """An expectation that has no closed form under the sites' distributions.

    :ivar sites: those that it is about.
    """

    def __init__(self, message: str, sites: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.sites = frozenset(sites)


@dataclass(frozen=True)
class Expected:
    """A number that depends on the state of the mean field: call it with one.

    :ivar function: of the state.
    :ivar sites: whose moments it is a function of.
    """

    function: Callable[[Distributions], Tensor]
    sites: frozenset[str]

    def __call__(self, state: Distributions) -> Tensor:
        """Its value, broadcastable to the shape of what was asked for."""
        return self.function(state)


def combined(function: Callable[..., Tensor], *parts: Any) -> Expected:
    """A function of expectations and numbers."""
    sites = frozenset().union(*(part.sites for part in parts if isinstance(part, Expected)))
    return Expected(
        lambda state: function(*(part(state) if isinstance(part, Expected) else part for part in parts)), sites
    )


@dataclass
class Blocks:
    """Which sites share a distribution, and what is found on the way: elements that need a joint one.

    :ivar names: the block of each site.
    :ivar families: what each site's distribution can do: ``"normal"`` has covariances, and ``"lognormal"`` all powers.
    :ivar loose: sites that are integrated numerically where there is no closed form.
    :ivar series: sites of a block that are rows of one array.
    :ivar pairs: atoms whose covariance is used.
    """

    names: Mapping[str, str]
    families: Mapping[str, str]
    loose: frozenset[str] = frozenset()
    series: tuple[Series, ...] = ()
    pairs: list[tuple[Atom, Atom]] = field(default_factory=list)

    def with_series(self, series: Sequence[Series]) -> Blocks:
        """The same, where arrays of sites are known by their names too."""
        names = {s.name: self.names[s.members[0]] for s in series}
        families = {s.name: self.families[s.members[0]] for s in series}
        return Blocks({**self.names, **names}, {**self.families, **families}, self.loose, tuple(series))

    def mean(self, e: Expression) -> Expected:
        """``E[e]``."""
        pieces = [piece for term in e.terms for piece in self._pieces(term)]
        return _sum_of(pieces, e)

    def covariance(self, a: Expression, b: Expression) -> Expected:
        """``Cov(a, b)``, element by element of what both broadcast to; products of means do not occur, nor cancel."""
        terms, labels = aligned(a, b)
        shape = a.shown * b.shown
        pairs: Any = product(a.terms, terms)
        if a is b:  # half of the pairs are the other half with names exchanged
            both = [(x, y, i, j) for i, x in enumerate(a.terms) for j, y in enumerate(terms) if i <= j]
            pairs = [(x, y._replace(factor=y.factor * (1 if i == j else 2))) for x, y, i, j in both]
        pieces = [piece for x, y in pairs for piece in self._central(x, y)]
        return _sum_of(pieces, _Shape(labels, shape))

    def second_moment(self, e: Expression) -> Expected:
        """``E[e^2]``, as the square of the mean plus the variance."""
        return combined(lambda mean, variance: mean**2 + variance, self.mean(e), self.covariance(e, e))

    def log(self, e: Expression) -> Expected:
        """``E[log e]`` of one term, or of one minus a site."""
        if (atom := _complement(e)) is not None:
            return _sum_of([_Piece(1.0, (_LogComplement(atom),))], e)
        if len(e.terms) != 1 or not e.terms[0].labels <= set(e.labels):
            raise NotConjugate(
                f"the logarithm of a sum with {_listed(e.sites)}: expected one product in its place", e.sites
            )
        (term,) = e.terms
        pieces = [_Piece(math.log(abs(term.factor)), ())]
        pieces += [_Piece(1.0, (Constant(c.value.abs().log(), c.labels),)) for c in term.constants]
        pieces += [_Piece(atom.power, (self._logarithm(atom),)) for atom in term.atoms]
        return _sum_of(pieces, e)

    def log_variance(self, e: Expression) -> Expected:
        """``Var(log e)`` of one positive site to a power."""
        ((term,), (atom,)) = e.terms, e.terms[0].atoms
        return _sum_of([_Piece(term.atoms[0].power ** 2, (_LogVariance(atom),))], e)

    def _logarithm(self, atom: Atom) -> _Log:
        if self.families[atom.site] == "normal":
            raise NotConjugate(f"the logarithm of site {atom.site!r}, whose distribution is normal", {atom.site})
        return _Log(atom)

    def independent(self, a: Iterable[str], b: Iterable[str]) -> None:
        """Check that two sets of sites have no block in common.

        :raises NotConjugate: if they have.
        """
        if shared := {self.names[s] for s in a} & {self.names[s] for s in b}:
            raise NotConjugate(f"a product of functions of the same block {sorted(shared)}", {*a, *b})

    # ------------------------------------------------------------------ terms

    def _grouped(self, term: Term) -> dict[str, list[Atom]]:
        groups: dict[str, list[Atom]] = {}
        for atom in term.atoms:
            groups.setdefault(self.names[atom.site], []).append(atom)
        return groups

    def _pieces(self, term: Term) -> list[_Piece]:
        options = [self._expected(group) for group in self._grouped(term).values()]
        return [_Piece(term.factor, term.constants).times(*choice) for choice in product(*options)]

    def _central(self, x: Term, y: Term) -> list[_Piece]:
        left, right = self._grouped(x), self._grouped(y)
        start = _Piece(x.factor * y.factor, x.constants + y.constants)
        shared = [name for name in left if name in right]
        if not shared:
            return []
        alone = [self._expected(g[n]) for g in (left, right) for n in g if n not in shared]
        means = [[p.times(q) for p in self._expected(left[n]) for q in self._expected(right[n])] for n in shared]
        central = [self._between(left[n], right[n]) for n in shared]
        found = []
        for chosen in product((False, True), repeat=len(shared)):
            if any(chosen):
                options = [c if k else m for k, m, c in zip(chosen, means, central, strict=True)]
                found += [start.times(*choice) for choice in product(*alone, *options)]
        return found

    def _between(self, left: list[Atom], right: list[Atom]) -> list[_Piece]:
        if len(left) == len(right) == 1 and self._is_normal(left + right):
            return [_Piece(1.0, (self._pair(left[0], right[0]),))]
        minus = [p.times(q, _Piece(-1.0)) for p in self._expected(left) for q in self._expected(right)]
        return self._expected(left + right) + minus

    def _expected(self, atoms: list[Atom]) -> list[_Piece]:
        """The expectation of a product of atoms of one block."""
        if all(_same_element(atom, atoms[0]) for atom in atoms):
            power = sum(atom.power for atom in atoms)
            self._check_power(atoms[0].site, power)
            return [_Piece(1.0, (_Power(atoms[0]._replace(power=power)),))] if power else [_Piece(1.0)]
        if len(atoms) == 2 and self._is_normal(atoms):
            means = _Piece(1.0, tuple(_Power(atom) for atom in atoms))
            return [means, _Piece(1.0, (self._pair(*atoms),))]
        raise _too_high(atoms)

    def _is_normal(self, atoms: Sequence[Atom]) -> bool:
        return all(atom.power == 1.0 and self.families[atom.site] == "normal" for atom in atoms)

    def _pair(self, a: Atom, b: Atom) -> _Pair:
        self.pairs.append((a, b))
        return _Pair(a, b)

    def _check_power(self, site: str, power: float) -> None:
        family = self.families[site]
        if power not in POWERS[family] and family != "lognormal":
            raise NotConjugate(_no_power(site, power, family), {site})


POWERS: dict[str, tuple[float, ...]] = {
    "normal": (0.0, 1.0, 2.0),
    "gamma": (0.0, 1.0),
    "inverse gamma": (0.0, -1.0),
    "beta": (0.0,),
    "Dirichlet": (0.0,),
    "Wishart": (0.0, 1.0),
    "lognormal": (),
}


def _no_power(site: str, power: float, family: str) -> str:
    what = {1.0: "the mean", 2.0: "the square"}.get(power, f"the power {power:g}")
    return f"{what} of site {site!r}, of which a {family} distribution has no closed-form update"


def _too_high(atoms: Sequence[Atom]) -> NotConjugate:
    sites = {atom.site for atom in atoms}
    powers = " ".join(f"{a.site}^{a.power:g}" for a in atoms)
    return NotConjugate(f"the expectation of a product of {len(atoms)} factors of one block ({powers})", sites)


def _listed(sites: Iterable[str]) -> str:
    return ", ".join(repr(site) for site in sorted(sites))


def _complement(e: Expression) -> Atom | None:
    """The site of ``1 - site``."""
    if len(e.terms) != 2:
        return None
    one, other = sorted(e.terms, key=lambda term: len(term.atoms))
    if one.factor != 1.0 or one.atoms or other.factor != -1.0 or other.constants or len(other.atoms) != 1:
        return None
    ones = all(bool((c.value == 1).all()) for c in one.constants)
    return other.atoms[0] if ones and other.atoms[0].power == 1.0 else None


def same_entry(a: Index, b: Index) -> bool:
    """Whether two entries of atoms' indices are the same element."""
    if isinstance(a, Gather) and isinstance(b, Gather):
        return a.labels == b.labels and (a.places is b.places or torch.equal(a.places, b.places))
    return a is b


def _same_element(a: Atom, b: Atom) -> bool:
    return a.site == b.site and all(same_entry(x, y) for x, y in zip(a.entries, b.entries, strict=True))


# ---------------------------------------------------------------------- pieces of einsums


class _Power(tuple):
    """The moment of an atom."""

    def __new__(cls, atom: Atom) -> _Power:
        return super().__new__(cls, (atom,))

    def at(self, state: Distributions) -> tuple[Tensor, Labelling]:
        (atom,) = self
        return view(state[atom.site].moment(atom.site, atom.power), atom.entries)


class _Log(_Power):
    """The expected logarithm of an atom's site."""

    def at(self, state: Distributions) -> tuple[Tensor, Labelling]:
        (atom,) = self
        return view(state[atom.site].log(atom.site), atom.entries)


class _LogVariance(_Power):
    """The variance of the logarithm of an atom's site."""

    def at(self, state: Distributions) -> tuple[Tensor, Labelling]:
        (atom,) = self
        family: Any = state[atom.site]
        return view(family.log_variance(atom.site), atom.entries)


class _LogComplement(_Power):
    """The expected logarithm of one minus an atom's site."""

    def at(self, state: Distributions) -> tuple[Tensor, Labelling]:
        (atom,) = self
        return view(state[atom.site].log_complement(atom.site), atom.entries)


class _Pair(tuple):
    """The covariance of two atoms."""

    def __new__(cls, a: Atom, b: Atom) -> _Pair:
        return super().__new__(cls, (a, b))

    def at(self, state: Distributions) -> tuple[Tensor, Labelling]:
        a, b = self
        return state[a.site].covariance(a, b)


@dataclass(frozen=True)
class _Piece:
    """A factor times constants and moments."""

    factor: float
    parts: tuple[Any, ...] = ()

    def times(self, *others: _Piece) -> _Piece:
        factor = math.prod((other.factor for other in others), start=self.factor)
        return _Piece(factor, self.parts + tuple(part for other in others for part in other.parts))

    def at(self, state: Distributions, labels: Sequence[Label | None], like: Tensor) -> Tensor:
        """The einsum, aligned right on dimensions with these labels."""
        parts = [part if isinstance(part, Constant) else Constant(*part.at(state)) for part in self.parts]
        if not parts:
            return like.new_full((), self.factor)
        has = {label for part in parts for label in part.labels}
        out = tuple(label for label in labels if label is not None and label in has)
        value = self.factor * contract(parts, out)
        return value.reshape([label.size if label in has else 1 for label in labels])


@dataclass(frozen=True)
class _Shape:
    labels: Sequence[Label | None]
    shown: Tensor
    sites: frozenset[str] = frozenset()


def _sum_of(pieces: Sequence[_Piece], shape: Any) -> Expected:
    labels, like = tuple(shape.labels), shape.shown.new_zeros(())
    moments = [part for piece in pieces for part in piece.parts if not isinstance(part, Constant)]

    def value(state: Distributions) -> Tensor:
        return sum((piece.at(state, labels, like) for piece in pieces), like)

    return Expected(value, frozenset(atom.site for part in moments for atom in part))


def first_operation(value: Any) -> str:
    """The torch function behind a value that is no polynomial."""
    return value.operation if isinstance(value, Function) else "a polynomial"


__all__ = [
    "BlockMoments",
    "Blocks",
    "Distributions",
    "Expected",
    "NotConjugate",
    "combined",
    "first_operation",
    "same_entry",
]
