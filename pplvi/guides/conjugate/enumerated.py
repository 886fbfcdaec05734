"""Draws of enumerated sites from their exact joint distribution, site by site, each given the one above it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops import packed
from pyro.ops.indexing import Vindex
from torch import Tensor

from pplvi.guides.conjugate.ascent import BlockMeanField
from pplvi.programs.sites import Plate, kind_of, site_plates


@dataclass(frozen=True)
class EnumeratedConditional:
    """Probabilities of an enumerated site given its parent.

    :ivar probs: ``(*plates, values)``, or ``(*plates, values of the parent, values)``.
    :ivar parent: the enumerated site that it depends on, if any.
    :ivar plates: around it.
    :ivar kind: of its distribution in the model.
    :ivar dtype: of its values.
    :ivar mask: of its density.
    """

    probs: Tensor
    parent: str | None
    plates: tuple[Plate, ...]
    kind: str
    dtype: torch.dtype
    mask: Any

    def fn(self, drawn: Mapping[str, Tensor]) -> Any:
        """Its distribution given the values that were drawn before."""
        probs = self.probs
        if self.parent is not None:
            probs = Vindex(probs)[..., drawn[self.parent].long(), :]
        return dist.Bernoulli(probs[..., 1]) if self.kind == "Bernoulli" else dist.Categorical(probs)


def conditionals(field: BlockMeanField) -> dict[str, EnumeratedConditional]:
    """The exact joint distribution of the enumerated sites as one distribution a site, in the order of the program.

    :raises ValueError: where it is none: sites with several enumerated parents, or that an observation joins.
    """
    field.expect()
    if field.reading.chain is not None and field.pairs is not None:
        return _of_chain(field, field.pairs)
    symbols = {site["infer"]["_enumerate_symbol"]: name for name, site in field.reading.summed.items()}
    families: dict[str, set[str]] = {}
    found = {}
    for name, site in field.reading.summed.items():
        marginal = packed.pack(field.marginals[name], site["infer"]["_dim_to_symbol"])
        own = site["infer"]["_enumerate_symbol"]
        parents = [s for s in marginal._pyro_dims if s in symbols and s != own]
        families[name] = {own, *parents}
        _check(name, site, [symbols[s] for s in parents])
        found[name] = _conditional(site, marginal, own, symbols, parents)
    for factor in field.reading.factors:
        if factor.summed and factor.name not in families:
            _check_observation(factor, symbols, list(families.values()))
    return found


def _of_chain(field: BlockMeanField, pairs: Tensor) -> dict[str, EnumeratedConditional]:
    """Each variable of a chain given the one before; ``pairs`` has a row of equal values before the first."""
    found, before = {}, None
    for (name, site), joint in zip(field.reading.summed.items(), pairs, strict=True):
        _check(name, site, [])
        probs = joint.permute((*range(2, joint.dim()), 0, 1)).clamp(min=0) + 1e-300
        probs = probs.sum(-2) if before is None else probs
        probs = probs / probs.sum(-1, keepdim=True)
        found[name] = _made(probs, before, site)
        before = name
    return found


def _check(name: str, site: Any, parents: list[str]) -> None:
    if len(parents) > 1 or kind_of(site["fn"]) not in ("Bernoulli", "Categorical"):
        raise ValueError(
            f"enumerated site {name!r} ({kind_of(site['fn'])}, parents {parents}) cannot be drawn from its exact "
            "posterior: expected a Categorical or Bernoulli site with at most one enumerated parent. Have it summed "
            "out: infer={'enumerate': 'parallel'}, or pyro.infer.config_enumerate(model)."
        )


def _check_observation(factor: Any, symbols: Mapping[str, str], families: list[set[str]]) -> None:
    scope = set(factor.site["packed"]["log_prob"]._pyro_dims) & set(symbols)
    if not any(scope <= family for family in families):
        raise ValueError(
            f"site {factor.name!r} depends on {sorted(symbols[s] for s in scope)} at once, whose exact posterior is no "
            "chain and cannot be drawn: have them summed out, infer={'enumerate': 'parallel'}."
        )


def _conditional(
    site: Any, marginal: Any, own: str, symbols: Mapping[str, str], parents: list[str]
) -> EnumeratedConditional:
    dims, plates = marginal._pyro_dims, site_plates(site)
    names = site["infer"]["_dim_to_symbol"]
    nesting = max((-p.dim for p in plates), default=0)
    order = [names.get(d) for d in range(-nesting, 0)] + parents + [own]
    kept = [s for s in order if s is not None and s in dims]
    value = marginal.permute([dims.index(s) for s in kept])
    sizes = dict(zip(dims, marginal.shape, strict=True))
    value = value.reshape([sizes.get(s, 1) if s is not None else 1 for s in order])
    probs = value.clamp(min=0) + 1e-300
    probs = probs / probs.sum(-1, keepdim=True)
    parent = symbols[parents[0]] if parents else None
    return _made(probs, parent, site)


def _made(probs: Tensor, parent: str | None, site: Any) -> EnumeratedConditional:
    return EnumeratedConditional(
        probs, parent, site_plates(site), kind_of(site["fn"]), site["value"].dtype, site["mask"]
    )


def draw_enumerated(found: Mapping[str, EnumeratedConditional], plates: Mapping[str, Any]) -> dict[str, Tensor]:
    """Draw the sites in the order of the program."""
    drawn: dict[str, Tensor] = {}
    for name, conditional in found.items():
        with ExitStack() as stack:
            for plate in conditional.plates:
                stack.enter_context(plates[plate.name])
            if conditional.mask is not None:
                stack.enter_context(poutine.mask(mask=conditional.mask))
            drawn[name] = pyro.sample(name, conditional.fn(drawn))
    return drawn
