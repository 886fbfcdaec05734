"""Gibbs moves for discrete sites: each coordinate is drawn anew from its conditional under the target.

The conditionals come from the target's own log density, at every value that the coordinate can take; nothing needs to
be known about the program. Independent elements of the data are moved side by side, the other coordinates of a site,
in plates or event dimensions, one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from pplvi.kernels.coordinates import Finite
from pplvi.kernels.invariant import Frame, InvariantKernel, SitesMove
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.types import Values


@dataclass(frozen=True)
class GibbsMove(SitesMove["GibbsKernel", Finite]):
    """The sweeps of a :class:`GibbsKernel` over a model's sites."""

    @torch.no_grad()
    def move(self, previous: Values, frame: Frame) -> dict[str, Tensor]:
        """Values after the sweeps."""
        values = {name: value.detach() for name, value in previous.items()}
        like = frame.log_density(values)
        for _ in range(self.kernel.num_sweeps):
            for site in self.sites:
                for mask in _masks(site, values[site.name], frame.align(like, site.events - site.unit)):
                    values[site.name] = self._drawn(site, mask, values, frame)
        return values

    @staticmethod
    def _drawn(site: Finite, mask: Tensor, values: Values, frame: Frame) -> Tensor:
        """The site with one coordinate from its conditional, for every particle and element of the data."""
        value, options = values[site.name], site.values.to(values[site.name])
        tried = [{**values, site.name: torch.where(mask, option, value)} for option in options]
        logits = torch.stack([frame.log_density(one) for one in tried])
        logits = torch.where(logits.isnan(), -torch.inf, logits)
        gumbel = -(-torch.rand_like(logits).log()).log()
        chosen = frame.align((logits + gumbel).argmax(0), site.events - site.unit)
        return torch.where(mask, options[chosen], value)


@checked
@dataclass(frozen=True)
class GibbsKernel(InvariantKernel):
    """Gibbs sampling of all discrete sites, one coordinate after another (Geman & Geman 1984).

    It leaves its target invariant, so that discrete targets can be annealed. Sites in plates common to the whole model
    are drawn for all elements of the data at once. Models with continuous sites too need a second kernel for these:
    ``AnnealedGuide(..., kernel=(GibbsKernel(), HamiltonianKernel(0.1)))``.

    :param num_sweeps: sweeps over all coordinates in a transition.
    :raises ValueError: for fewer than one sweep.

    >>> kernel = GibbsKernel(num_sweeps=2)
    """

    moves: ClassVar[type[SitesMove[Any, Any]]] = GibbsMove
    kind: ClassVar[type] = Finite
    lacking: ClassVar[str] = (
        "have no finite support: expected discrete sites for GibbsKernel. Use HamiltonianKernel or another kernel for "
        "continuous ones."
    )
    num_sweeps: Count = 1


def _masks(site: Finite, value: Tensor, aligned: Tensor) -> Iterator[Tensor]:
    """One mask for each coordinate of a site that is not an independent element of the data, broadcast to its value."""
    unit = site.unit
    shape = value.shape[: value.dim() - unit]
    independent = [1] * (len(shape) - aligned.dim()) + list(aligned.shape)[max(0, aligned.dim() - len(shape)) :]
    sizes = [size if kept == 1 else 1 for size, kept in zip(shape, independent, strict=True)]
    for where in product(*(range(size) for size in sizes)):
        mask = torch.zeros(sizes, dtype=torch.bool, device=value.device)
        mask[where] = True
        yield mask.reshape(*sizes, *[1] * unit)
