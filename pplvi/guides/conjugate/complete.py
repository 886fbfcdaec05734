"""Complete conditionals: sites drawn given all others from their exact distribution, in place of the mean field's."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pplvi.guides.conjugate.ascent import BlockMeanField
from pplvi.guides.conjugate.draws import law_of_site
from pplvi.guides.conjugate.families import ElementaryFamily, Parameters
from pplvi.guides.conjugate.reading import Reading
from pplvi.guides.conjugate.shapes import SiteShape
from pplvi.guides.conjugate.terms import Atom, Labelling


class PointMoments:
    """What a value of a site gives for its moments.

    :param value: of the site, of its shape.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value.detach().double()

    def moment(self, site: str, power: float) -> Tensor:
        """``z^power``."""
        return self.value if power == 1.0 else self.value**power

    def log(self, site: str) -> Tensor:
        """``log z``."""
        return self.value.log()

    def log_complement(self, site: str) -> Tensor:
        """``log(1 - z)``."""
        return torch.log1p(-self.value)

    def covariance(self, a: Atom, b: Atom) -> tuple[Tensor, Labelling]:
        """Zero."""
        return self.value.new_zeros(()), ()


def check_conditional(reading: Reading, names: Sequence[str]) -> None:
    """Check that sites have complete conditionals that can be drawn one by one.

    :raises ValueError: for sites of other families, and for some that depend on each other or on enumerated sites.
    """
    for name in names:
        if name not in reading.latents or name in reading.layouts or name in reading.fallback:
            raise ValueError(
                f"conditional={list(names)!r} names {name!r}: expected latent sites of gamma, inverse gamma, beta or "
                f"Dirichlet distributions, among {sorted(n for n in reading.latents if n not in reading.layouts)}."
            )
    for factor in reading.factors:
        both = sorted(factor.expected.sites & {*names})
        if len(both) > 1 or (both and factor.summed):
            raise ValueError(
                f"conditional= names {both}, on which site {factor.name!r} depends together with each other or with "
                "enumerated sites: expected sites that are independent given all others. Name one of them."
            )


def complete_conditional(
    field: BlockMeanField, name: str, values: Mapping[str, Tensor], shapes: Mapping[str, SiteShape]
) -> Any:
    """The distribution of a site given values of all others, :math:`p(z_i | z_{-i}, x)`.

    :param values: with any dimensions of draws on the left.
    :param shapes: of the sites that have them.
    """
    family, site = field.families[name], shapes[name]
    others = {n: v for n, v in values.items() if any(n in f.expected.sites for f in field.factors_of(name))}
    leads = {n: v.shape[: v.dim() - len(shapes[n].shape)] for n, v in others.items()}
    draws = max((math.prod(lead) for lead in leads.values()), default=1)
    if all(not lead for lead in leads.values()):
        return law_of_site(family, _canonical(field, name, others), site)
    rows = {n: v.reshape(-1, *shapes[n].shape).expand(draws, *shapes[n].shape) for n, v in others.items()}
    found = torch.vmap(lambda own: _canonical(field, name, own))(rows)
    depth = max(len(lead) + shapes[n].batch_dim for n, lead in leads.items())  # where draws are, from the right
    return law_of_site(family, [_placed(p, depth, site.batch_dim) for p in found], site)


def _placed(parameter: Tensor, depth: int, batch: int) -> Tensor:
    """Draws on the left of the site's own batch dimensions."""
    between = (1,) * (depth - 1 - batch)
    return parameter.reshape((len(parameter), *between, *parameter.shape[1:]))


def _canonical(field: BlockMeanField, name: str, values: Mapping[str, Tensor]) -> Parameters:
    """Parameters of the complete conditional: the update of the mean field with all others at points."""
    family: Any = field.families[name]
    state: dict[str, Any] = dict(field.state) | {n: PointMoments(v) for n, v in values.items()}

    def expected(*leaves: Tensor) -> Tensor:
        own: ElementaryFamily = copy.copy(family)
        own.leaves = leaves
        parts: list[Any] = [
            (field.marginals[f.name] * f.at({**state, name: own})).sum() for f in field.factors_of(name)
        ]
        return torch.stack(parts).sum()

    leaves = [leaf.detach() for leaf in family.leaves]
    gradients = torch.func.grad(expected, argnums=tuple(range(len(leaves))))(*leaves)
    found: Parameters = family.target(gradients, field.weight(name))
    return found
