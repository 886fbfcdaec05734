"""Coordinate ascent: the blocks of a mean field updated in turn, each to its maximiser, and the bound by terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pplvi.guides.conjugate.expressions import Symbolic
from pplvi.guides.conjugate.families import BlockFamily, start_of
from pplvi.guides.conjugate.lognormal import LogNormalFamily, PointFamily, PositivePointFamily
from pplvi.guides.conjugate.normal import NormalFamily
from pplvi.guides.conjugate.parameters import parameters
from pplvi.guides.conjugate.reading import Factor, Reading
from pplvi.guides.recording import Recorder, Recording
from pplvi.programs.enumeration import factor_marginals
from pplvi.programs.sites import base_distribution
from pplvi.programs.state import is_recording

_LOCAL_SWEEPS, _LOCAL_TOLERANCE = 100, 1e-8


@dataclass
class BlockMeanField:
    """Distributions of all blocks for a reading of a program, and the probabilities of its enumerated sites.

    :ivar families: by block.
    :ivar marginals: what each factor's expectation is multiplied with; for enumerated sites their probabilities.
    :ivar log_normaliser: of the enumerated sites, nats.
    :ivar pairs: probabilities of neighbours, where the enumerated sites are a chain.
    """

    reading: Reading
    families: dict[str, BlockFamily]
    marginals: dict[str, Tensor] = field(default_factory=dict)
    log_normaliser: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    pairs: Tensor | None = None

    def __post_init__(self) -> None:
        self.state = {site: self.families[b] for b, sites in self.reading.blocks.items() for site in sites}
        self._weights = {b: self._weight(b) for b in self.families}
        for block, layout in self.reading.layouts.items():
            if layout.series is not None:
                self.state[layout.series] = self.families[block]
        self._own: dict[str, list[Factor]] = {
            b: [f for f in self.reading.factors if any(self.state[s] is family for s in f.expected.sites)]
            for b, family in self.families.items()
        }
        self.marginals = {f.name: f.weight for f in self.reading.factors if not f.summed}

    def _weight(self, block: str) -> Tensor | None:
        """Of the entropy, for each independent element of a block."""
        family, sites = self.families[block], self.reading.blocks[block]
        found = self.reading.latents[sites[0]]
        weight = found.weight
        if weight is None or not isinstance(family, NormalFamily):
            return weight
        whole = weight.reshape((*weight.shape, *(1,) * found.fn.event_dim)).expand(found.start.shape)
        return family.layout.packed_axes(whole, sites[0])

    # ------------------------------------------------------------------ steps

    def values(self, factors: Sequence[Factor]) -> list[Tensor]:
        """Expected log densities at the present distributions, element by element."""
        return [f.of_values(self.state) if f.summed else f.at(self.state) for f in factors]

    def expect(self) -> None:
        """The exact joint distribution of the enumerated sites given the blocks."""
        summed = [f for f in self.reading.factors if f.summed]
        if not summed:
            return
        with torch.no_grad():
            log_factors = dict(zip((f.name for f in summed), self.values(summed), strict=True))
        if self.reading.chain is not None:
            value, found, self.pairs = self.reading.chain.marginals(log_factors)
        else:
            value, found = factor_marginals(self.reading.trace, self.reading.empty, log_factors)
        self.log_normaliser = torch.as_tensor(value)
        for f in summed:
            if (left_out := f.left_out) is not None:
                found[f.name] = found[f.name].masked_fill(left_out, 0.0)
        self.marginals |= found

    def gradients(self, block: str) -> tuple[Tensor, ...]:
        """Of the expected log joint, in the mean parameters of a block."""
        leaves = self.families[block].leaves
        with torch.enable_grad():
            own = self._own[block]
            total: Any = sum((self.marginals[f.name] * v).sum() for f, v in zip(own, self.values(own), strict=True))
            found = torch.autograd.grad(total, leaves, allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))

    def factors_of(self, block: str) -> list[Factor]:
        """The factors that a block changes."""
        return self._own[block]

    def weight(self, block: str) -> Tensor | None:
        """What a block's entropy is multiplied with."""
        return self._weights[block]

    @torch.no_grad()
    def expected(self, block: str) -> float:
        """The expected log joint, without the terms that a block does not change, nats."""
        own = self._own[block]
        return sum(float(_product_sum(self.marginals[f.name], v)) for f, v in zip(own, self.values(own), strict=True))

    def objective(self, block: str) -> float:
        """The bound, without the terms that a block does not change, nats."""
        return self.expected(block) + float(_weighted(self.families[block].entropy(), self._weights[block]))

    def update(self, block: str, rate: float = 1.0) -> None:
        """Move a block to its maximiser, or by ``rate`` of the way in natural parameters."""
        if (how := self.reading.fallback.get(block)) is not None:
            if is_recording():
                raise ValueError(
                    f"block {block!r} has no closed form, and the search of fallback={how!r} ends when it is done, "
                    "which a recorded sweep cannot: expected compile=False."
                )
            UPDATES[how](self, block, rate)
        else:
            family = self.families[block]
            family.step(family.target(self.gradients(block), self._weights[block]), rate)

    def sweep(self, rate: float = 1.0) -> None:
        """Update the enumerated sites and every block in the order of the program."""
        self.expect()
        for block in self.families:
            self.update(block, rate)

    # ------------------------------------------------------------------ the bound

    @torch.no_grad()
    def terms(self) -> dict[str, float]:
        """The bound by terms, nats: ``E[log p]`` of every site, then the entropy of every block."""
        self.expect()
        found = {}
        inside = 0.0
        for factor, value in zip(self.reading.factors, self.values(self.reading.factors), strict=True):
            number = float(_product_sum(self.marginals[factor.name], value))
            found[f"E log p({factor.name})"] = number
            inside += number if factor.summed else 0.0
        if self.reading.summed:
            found[f"H({', '.join(self.reading.summed)})"] = float(self.log_normaliser) - inside
        return found | {f"H({block})": float(value) for block, value in self.entropies().items()}

    @torch.no_grad()
    def entropies(self) -> dict[str, Tensor]:
        """Of each block, scaled as its plates are."""
        return {b: _weighted(f.entropy(), self._weights[b]) for b, f in self.families.items()}

    @torch.no_grad()
    def bound(self) -> Tensor:
        """``E[log p(x, z)] + H(q)``, nats."""
        self.expect()
        plain = [f for f in self.reading.factors if not f.summed]
        values = zip(plain, self.values(plain), strict=True)
        total: Any = sum(_product_sum(self.marginals[f.name], value) for f, value in values)
        return (total + self.log_normaliser + sum(self.entropies().values())).detach()

    # ------------------------------------------------------------------ as a function of tensors

    @property
    def canonical(self) -> list[Tensor]:
        """The canonical parameters of all blocks, which the rest follows from."""
        return [value for family in self.families.values() for value in family.canonical.values()]

    def place(self, canonical: Sequence[Tensor]) -> None:
        """Put all blocks there."""
        left = iter(canonical)
        for family in self.families.values():
            family.canonical = {name: next(left) for name in family.canonical}
            family.refresh()

    def swept(self, *canonical: Tensor) -> tuple[Tensor, ...]:
        """The canonical parameters a sweep later, and the bound there: what is recorded of coordinate ascent."""
        self.place(canonical)
        self.sweep()
        bound = self.bound()
        return (*(value.detach().clone() for value in self.canonical), bound)


def _product_sum(weight: Tensor, value: Tensor) -> Tensor:
    """``sum weight * value``, where a weight of zero hides what is not finite."""
    return torch.where(weight != 0, weight * value, value.new_zeros(())).sum()


def _weighted(entropy: Tensor, weight: Tensor | None) -> Tensor:
    return entropy.sum() if weight is None else (entropy * weight).sum()


UPDATES: dict[str, Callable[[BlockMeanField, str, float], None]] = {}
"""How blocks are updated that have no closed form."""


def _normal_kind(reading: Reading, block: str) -> type[NormalFamily]:
    point = reading.fallback.get(block) == "delta"
    if block in reading.positive:
        return PositivePointFamily if point else LogNormalFamily
    return PointFamily if point else NormalFamily


def started(reading: Reading, given: Mapping[str, Any] | None = None) -> BlockMeanField:
    """The first mean field: normal blocks at the sites' first values, the others at their priors where they are known.

    :param reading: of a program.
    :param given: sites whose first values a user has named.
    """
    families: dict[str, BlockFamily] = {}
    known = set(given or {})
    for block, sites in reading.blocks.items():
        if block in reading.layouts:
            kind = _normal_kind(reading, block)
            values = {site: reading.latents[site].start for site in sites}
            values = {s: v.log() for s, v in values.items()} if issubclass(kind, LogNormalFamily) else values
            families[block] = kind(reading.layouts[block], values)
        else:
            fn = base_distribution(reading.latents[sites[0]].fn)
            numbers = {n: v.double() for n, v in parameters(fn).items() if not isinstance(v, Symbolic)}
            own = next(f for f in reading.factors if f.name == sites[0])
            numbers = numbers if own.expected.sites == {sites[0]} and not own.summed else {}
            families[block] = start_of(fn, reading.latents[sites[0]].start, numbers, sites[0] in known)
    return BlockMeanField(reading, families)


def settle_locals(field_: BlockMeanField) -> float:
    """Bring local blocks to their maximisers given the others; the bound there, nats."""
    bound = float(field_.bound())
    for _ in range(_LOCAL_SWEEPS if field_.reading.locals() else 0):
        for block in field_.reading.locals():
            field_.update(block)
        before, bound = bound, float(field_.bound())
        if math.isclose(before, bound, rel_tol=_LOCAL_TOLERANCE):
            break
    return bound


def ascend_bound(
    field_: BlockMeanField, *, most: int, tolerance: float, recorder: Recorder | None = None
) -> list[float]:
    """Sweep until the bound stands still: until its relative gain is below ``tolerance``.

    :param recorder: what records the sweeps, if anything does.
    :returns: the bound at the start and after each sweep, nats.
    :raises ValueError: if it is not finite; for sweeps that cannot be recorded.
    """
    bounds = [float(field_.bound())]
    recording = None if recorder is None else _recorded(field_, recorder)
    for _ in range(most):
        bounds.append(float(_swept(field_) if recording is None else recording()))
        if not math.isfinite(bounds[-1]):
            raise ValueError(
                f"the bound is {bounds[-1]} after {len(bounds) - 1} sweeps: expected a finite one. Look for NaN in the "
                "data, and for priors that are improper."
            )
        if abs(bounds[-1] - bounds[-2]) <= tolerance * (1 + abs(bounds[-1])):
            break
    if recording is not None:
        field_.place(recording.carried)
        field_.expect()
    return bounds


def _swept(field_: BlockMeanField) -> Tensor:
    """The bound after a sweep; the enumerated sites are up to date before it, since the bound was taken."""
    for block in field_.families:
        field_.update(block)
    return field_.bound()


def _recorded(field_: BlockMeanField, recorder: Recorder) -> Recording:
    start = [value.detach().clone() for value in field_.canonical]
    recording = recorder(field_.swept, start)
    field_.place(start)
    return recording
