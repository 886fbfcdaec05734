"""A mean field some of whose factors are known by draws: expectations are means over these, the rest in closed form.

At a draw of the trained sites the program is one without them, whose other sites are read as ever. So whatever is
conditionally conjugate given them is updated in closed form, whatever the program does with them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pplvi.guides.conjugate.ascent import BlockMeanField
from pplvi.guides.conjugate.expectations import NotConjugate
from pplvi.guides.conjugate.reading import Factor, Reading
from pplvi.guides.conjugate.trained import TrainedFactor, standing_still
from pplvi.programs.randomness import OutOfPlace, carried
from pplvi.programs.state import preserved_rng

_AT_ONCE = 32  # draws of one gradient
_MANY = 1024  # of the last sweeps, and of the bound that is reported
_FEW = 64  # in their place, where programs are read for one draw after another
_RATE = 0.05
_WINDOW, _TAIL = 50, 150  # steps
_LAST_SWEEPS = 50


@dataclass
class SampledMeanField(BlockMeanField):
    """Distributions of the blocks, and draws of the trained factors.

    :ivar read: the program at given values of the trained sites.
    :ivar trained: the factors.
    :ivar call: arguments of the program.
    """

    read: Callable[[Mapping[str, Tensor]], Reading] = field(kw_only=True)
    trained: Sequence[TrainedFactor] = field(kw_only=True)
    call: Any = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sites = [name for factor in self.trained for name in factor.sites]
        self._program: Callable[..., Any] | None = None
        self.redraw(_AT_ONCE)
        self.values(())

    @property
    def many(self) -> int:
        """How many draws are many."""
        return _FEW if self._program == self._in_turn else _MANY

    def redraw(self, number: int, *, path: bool = False) -> None:
        """Draw the trained sites anew.

        :param number: how many draws, a multiple of 32.
        :param path: keep the path of draws, for a gradient.
        """
        with torch.set_grad_enabled(path):
            found = [factor.draw(number, self.call) for factor in self.trained]
        self.draws = [value for values, _ in found for value in values]
        self.log_densities = {f.name: log_q for f, (_, log_q) in zip(self.trained, found, strict=True)}

    # ------------------------------------------------------------------ expectations

    def values(self, factors: Sequence[Factor]) -> list[Tensor]:
        """Expected log densities, averaged over the draws."""
        leaves = [leaf for family in self.families.values() for leaf in family.leaves]
        chunks = zip(*(value.split(_AT_ONCE) for value in self.draws), strict=True)
        parts = [self._averages(*(x.contiguous() for x in (*chunk, *leaves))) for chunk in chunks]
        means = [torch.stack(part).mean(0) for part in zip(*parts, strict=True)]
        found = dict(zip((f.name for f in self.reading.factors), means, strict=True))
        return [found[f.name] for f in factors]

    def entropies(self) -> dict[str, Tensor]:
        """Of each block, and of each trained factor by its draws."""
        trained = {name: -log_q.mean() for name, log_q in self.log_densities.items()}
        return super().entropies() | trained

    def _averages(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self._program is None:
            self._program = self._recorded(*(x.detach() for x in inputs))
        found: tuple[Tensor, ...] = self._program(*inputs)
        return found

    def _recorded(self, *inputs: Tensor) -> Callable[..., Any]:
        """The averages as one graph of tensor operations, or of all draws at once, or of one draw after another."""
        with torch.no_grad(), preserved_rng():
            exact = self._in_turn(*inputs)  # what is refused is refused here
            for make in (make_fx, lambda function: lambda *_: function):
                try:
                    program = make(self._at_once)(*inputs)
                    found = program(*inputs)
                except (RuntimeError, TypeError, NotConjugate):  # it looks at values, or has no rule for many draws
                    continue
                if all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(found, exact, strict=True)):
                    return program
        return self._in_turn

    def _at_once(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        draws, leaves = inputs[: len(self.sites)], inputs[len(self.sites) :]
        with pyro.validation_enabled(False), carried(OutOfPlace()):
            found = torch.vmap(lambda *values: self._at(values, leaves), randomness="different")(*draws)
        return tuple(value.mean(0) for value in found)

    def _in_turn(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        draws, leaves = inputs[: len(self.sites)], inputs[len(self.sites) :]
        rows = [self._at(values, leaves) for values in zip(*draws, strict=True)]
        return tuple(torch.stack(parts).mean(0) for parts in zip(*rows, strict=True))

    def _at(self, values: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The expected log density of every site, given one draw of the trained ones."""
        left, families = iter(leaves), {}
        for block, family in self.families.items():
            families[block] = copy.copy(family)
            families[block].leaves = tuple(next(left) for _ in family.leaves)
        inner = BlockMeanField(self.read(dict(zip(self.sites, values, strict=True))), families)
        return tuple(inner.values(inner.reading.factors))

    # ------------------------------------------------------------------ training

    def differentiable_bound(self) -> Tensor:
        """The bound, as a function of draws with their path."""
        self.expect()
        values = self.values(self.reading.factors)
        total = self.log_normaliser + sum(self.entropies().values())
        for factor, value in zip(self.reading.factors, values, strict=True):
            weight = self.marginals[factor.name].detach()
            part = torch.where(weight != 0, weight * value, value.new_zeros(())).sum()
            total = total + (part - part.detach() if factor.summed else part)
        return total


def by_draws(
    field_: BlockMeanField, trained: Sequence[TrainedFactor], read: Callable[..., Reading], call: Any
) -> SampledMeanField:
    """A mean field with expectations over draws of trained factors.

    :param read: the program, from values of the trained sites and ``init``.
    """
    starts = {site: found.start.to(found.dtype) for site, found in field_.reading.latents.items()}

    def at(values: Mapping[str, Tensor]) -> Reading:
        return read(values, lambda site: starts[site["name"]])

    return SampledMeanField(field_.reading, field_.families, read=at, trained=trained, call=call)


def ascend_by_draws(field_: SampledMeanField, *, most: int, tolerance: float) -> list[float]:
    """Closed-form updates of all blocks and a gradient step of the trained factors in turn, both by fresh draws.

    Steps of full length go on until the bound, which each estimates by 32 draws, stands still; then their length, and
    the rate of the updates, fall to zero. The last sweeps are by 1,024 draws and end where the bound of these stands
    still; the bound that is reported is by as many others.

    :param most: the most steps.
    :returns: estimates of the bound at each step, the last by many draws, nats.
    :raises ValueError: if it is not finite.
    """
    leaves = [leaf for factor in field_.trained for leaf in factor.parameters(field_.call)]
    optimiser = torch.optim.Adam(leaves, lr=_RATE) if leaves else None
    bounds: list[float] = []
    while len(bounds) < 2 * most / 3 and not standing_still(bounds, _WINDOW):
        bounds.append(_step(field_, optimiser, 1.0))
    tail = min(max(_TAIL, len(bounds) // 2), most - len(bounds))
    for i in range(tail):
        bounds.append(_step(field_, optimiser, 0.5 * (1 + math.cos(math.pi * i / tail))))
    field_.redraw(field_.many)
    last = -math.inf
    for _ in range(_LAST_SWEEPS):
        field_.sweep()
        before, last = last, float(field_.bound())
        if abs(last - before) <= max(tolerance, 1e-8) * (1 + abs(last)):
            break
    field_.redraw(field_.many)
    return [*bounds, _finite(float(field_.bound()))]


def _step(field_: SampledMeanField, optimiser: Any, share: float) -> float:
    with torch.enable_grad():
        field_.redraw(_AT_ONCE, path=True)
    live, field_.draws = field_.draws, [draw.detach() for draw in field_.draws]
    field_.sweep(share)
    field_.draws = live
    with torch.enable_grad():
        bound = field_.differentiable_bound()
    if optimiser is not None:
        if not bound.requires_grad:
            raise ValueError(
                f"the draws of {', '.join(map(repr, field_.sites))} have no gradient: expected a guide family of "
                "reparameterised draws, such as pyro.infer.autoguide.AutoNormal."
            )
        for group in optimiser.param_groups:
            group["lr"] = _RATE * share
        optimiser.zero_grad()
        (-bound).backward()
        optimiser.step()
    return _finite(float(bound.detach()))


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(
            f"the bound by draws is {value}: expected a finite one. Look for NaN in the data, for priors that are "
            "improper, and for draws outside of what the program takes."
        )
    return value
