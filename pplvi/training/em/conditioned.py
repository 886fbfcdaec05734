"""Programs with local discrete latents given each of their values: what is left of them is conjugate.

The discrete latents of one element of a plate have finitely many joint values. Given one of them, the posterior of the
continuous latents is in closed form, and so is ``log p(x_n, z_n = k)`` of each element ``n``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pyro
import torch
from torch import Tensor

from pplvi.guides.conjugate.ascent import BlockMeanField, started
from pplvi.guides.conjugate.program import read_program
from pplvi.guides.conjugate.reading import Reading
from pplvi.programs.running import plain_run
from pplvi.programs.sites import Plate, Site, is_deterministic, latent_sites, sample_sites, site_plates
from pplvi.types import Call, Program

MOST = 128  # joint values of the discrete latents of an element


@dataclass(frozen=True)
class LocalLatents:
    """The discrete latents of a program, which are those of one element of their plates.

    :ivar sites: by name.
    :ivar plates: around all of them; none for latents of the whole program.
    :ivar supports: of each site its values, ``(values, 1, ..., 1, *event)``.
    """

    sites: dict[str, Site]
    plates: tuple[Plate, ...]
    supports: dict[str, Tensor]

    @classmethod
    def of(cls, model: Program, call: Call) -> LocalLatents:
        """Those of a program.

        :raises ValueError: where they are not local to elements of the same plates.
        """
        trace = plain_run(model, *call).model
        sites = {n: s for n, s in latent_sites(trace).items() if s["fn"].has_enumerate_support}
        first = next(iter(sites.values()))
        found = cls(sites, site_plates(first), {n: s["fn"].enumerate_support(False) for n, s in sites.items()})
        found._check(dict(sample_sites(trace)))
        return found

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many values each site has."""
        return tuple(len(support) for support in self.supports.values())

    def values(self) -> list[dict[str, Tensor]]:
        """Every joint value, the last site's first."""
        return [dict(zip(self.sites, one, strict=True)) for one in product(*self.supports.values())]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the elements: sizes of their plates from the right, one where there is none."""
        sizes = {plate.dim: plate.size for plate in self.plates}
        return tuple(sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0))

    def by_element(self, value: Tensor) -> Tensor:
        """Sums over all but the elements of what has batch dimensions as the sites have them."""
        depth, kept = len(self.shape), {plate.dim for plate in self.plates}
        value = value.reshape((*(1,) * (depth - value.dim()), *value.shape))
        value = value.expand((*value.shape[: value.dim() - depth], *map(max, value.shape[-depth:], self.shape)))
        others = [d for d in range(-value.dim(), 0) if d not in kept]
        return (value.sum(others, keepdim=True) if others else value).reshape(self.shape)

    def _check(self, sites: dict[str, Site]) -> None:
        plates = {n: sorted(p.name for p in site_plates(s)) for n, s in sites.items() if not is_deterministic(s)}
        own = sorted(p.name for p in self.plates)
        where = f"plates {own}" if own else "no plate"
        advice = (
            "Put the sites of each datum into one plate, with pyro.plate('data', n); or train a bound on "
            "log p(x) in its place, fit(config_enumerate(model), AutoNormal), which sums discrete latents exactly."
        )
        if apart := {n: plates[n] for n in self.sites if plates[n] != own}:
            raise ValueError(
                f"discrete latents {[*self.sites]} are in different plates ({next(iter(self.sites))!r} in {where}, "
                f"{apart}), so that with continuous latents their joint values are too many: expected those of one "
                f"element of one plate. {advice}"
            )
        if (number := math.prod(self.sizes)) > MOST:
            raise ValueError(
                f"discrete latents {_listed(self.sites)} have {number} joint values, for each of which the continuous "
                f"ones have another posterior: expected at most {MOST}, local to the elements of a plate. {advice}"
            )
        counted = [*map(_is_counted, self.sites.values(), self.supports.values())]
        if odd := [n for n, good in zip(self.sites, counted, strict=True) if not good]:
            raise ValueError(
                f"discrete latents {odd} have values other than 0, 1, ...: expected Categorical, Bernoulli, Binomial "
                "or OneHotCategorical distributions where there are continuous latents too."
            )
        if outside := [n for n, inside in plates.items() if not {*own} <= {*inside}]:
            raise ValueError(
                f"sites {outside} are not in {where} of the discrete latents {[*self.sites]}, whose elements they "
                f"would join: expected all sites inside when there are continuous latents too. {advice}"
            )
        weighed = [n for n in plates if n in self.sites and sites[n]["mask"] is not None]
        if weighed := weighed or [n for n in plates if not _is_one(sites[n]["scale"])]:
            raise ValueError(
                f"sites {weighed} are masked or scaled, and mixtures with continuous latents are exact for whole "
                "elements: expected discrete latents without a mask, and no scale. Leave masked elements out."
            )


def _is_counted(site: Site, support: Tensor) -> bool:
    """Whether the values of a site are 0, 1, ..., or a one at these places."""
    event = tuple(site["fn"].event_shape)
    ordinal = torch.eye(len(support)) if event else torch.arange(len(support))
    flat = support.reshape(len(support), *event)
    return flat.shape == ordinal.shape and torch.equal(flat.double(), ordinal.double())


def _is_one(scale: Any) -> bool:
    return isinstance(scale, int | float) and scale == 1


def _listed(names: Any) -> str:
    found = list(names)
    return str(found) if len(found) < 6 else f"{found[0]!r} to {found[-1]!r}"


class ConditionedProgram:
    """A program given one joint value of its discrete latents.

    :param local: the latents.
    :param value: theirs.
    :param joint: normal sites that depend on each other given the data.
    :param check: of the first reading.
    """

    def __init__(
        self,
        model: Program,
        call: Call,
        local: LocalLatents,
        value: dict[str, Tensor],
        joint: Sequence[Sequence[str]],
        init: Callable[[Any], Any],
        check: Callable[[Reading], None],
    ) -> None:
        self.program = pyro.condition(model, data=value)
        self.call, self.local, self.joint = call, local, joint
        with torch.no_grad():
            reading = self.read(init)
        check(reading)
        self.field = started(reading)
        self.starts = {site: found.start.to(found.dtype) for site, found in reading.latents.items()}
        for block in reading.blocks:
            self._check(block)

    def read(self, init: Callable[[Any], Any]) -> Reading:
        """The program at the present parameters."""
        return read_program(self.program, *self.call, init=init, joint=self.joint)

    def again(self, canonical: Sequence[Tensor]) -> BlockMeanField:
        """The program at the present parameters, with the blocks there."""
        field = BlockMeanField(self.read(lambda site: self.starts[site["name"]]), self.field.families)
        field.place(canonical)
        return field

    @property
    def names(self) -> list[str]:
        """Of the canonical parameters."""
        return [f"{block}:{name}" for block, family in self.field.families.items() for name in family.canonical]

    def expected(self, field: BlockMeanField) -> dict[str, Tensor]:
        """Expected log densities of the sites for each element, nats."""
        values = {f.name: (field.marginals[f.name], f.at(field.state)) for f in field.reading.factors}
        return {
            name: self.local.by_element(torch.where(weight != 0, weight * value, value.new_zeros(())))
            for name, (weight, value) in values.items()
        }

    def log_joint(self, field: BlockMeanField) -> Tensor:
        """``log p(x_n, z_n = k)`` of each element, where the blocks are the posterior, nats."""
        parts = list(self.expected(field).values())
        for block, family in field.families.items():
            entropy, weight = family.entropy(), field.weight(block)
            parts.append(self.local.by_element(self._placed(entropy if weight is None else entropy * weight, block)))
        return torch.stack(parts).sum(0)

    def dims(self, block: str) -> list[int | None]:
        """Where the independent elements of a block are: from the right among its sites' batch dimensions."""
        reading = self.field.reading
        site = reading.blocks[block][0]
        found = reading.latents[site]
        batch = found.start.dim() - found.fn.event_dim
        axes = reading.layouts[block].axes[site] if block in reading.layouts else range(batch)
        return [d - batch if d < batch else None for d in axes]

    def _placed(self, value: Tensor, block: str) -> Tensor:
        """One number for each independent element of a block, at the batch dimensions of its sites."""
        dims = self.dims(block)
        extra = [*range(len(dims), value.dim()), *(i for i, d in enumerate(dims) if d is None)]
        value = value.sum(extra) if extra else value
        kept = [d for d in dims if d is not None]
        sizes = dict(zip(kept, value.shape, strict=True))
        value = value.permute([kept.index(d) for d in sorted(kept)])
        return value.reshape([sizes.get(d, 1) for d in range(min(kept, default=0), 0)])

    def _check(self, block: str) -> None:
        if missing := [p.name for p in self.local.plates if p.dim not in self.dims(block)]:
            raise ValueError(
                f"sites {list(self.field.reading.blocks[block])} depend on each other across plates {missing}, whose "
                f"elements have discrete latents {[*self.local.sites]}: expected independent elements."
            )
