"""A program read once: its factors as expectations, its latent sites, and which of their elements need joint blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain as flat
from typing import Any

import pyro
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from torch import Tensor

import pplvi.guides.conjugate.arrangements  # noqa: F401  registers the rules
from pplvi.guides.conjugate.chains import MarkovChain, find_chain
from pplvi.guides.conjugate.expectations import Blocks, NotConjugate
from pplvi.guides.conjugate.expressions import latent, sites_in
from pplvi.guides.conjugate.families import family_of
from pplvi.guides.conjugate.joint import block_layout
from pplvi.guides.conjugate.loops import LEAST, LoopTurns, alone, stem_of, turns
from pplvi.guides.conjugate.merging import Series, places_of
from pplvi.guides.conjugate.parameters import parameters
from pplvi.guides.conjugate.reading import Factor, Latent, Reading
from pplvi.guides.conjugate.tables import expected_log_prob
from pplvi.programs.handlers import Supply
from pplvi.programs.sites import (
    base_distribution,
    is_deterministic,
    is_enumerated,
    is_subsample,
    kind_of,
    latent_sites,
    sample_sites,
    site_plates,
)
from pplvi.programs.summing import is_summed
from pplvi.types import Program

_MANY = 5  # sites of a block that its name does not list
FALLBACKS = ("cvi", "laplace", "delta")


def read_program(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    init: Callable[[Any], Any],
    joint: Sequence[Sequence[str]] = (),
    fallback: Mapping[str, str] | None = None,
    indices: Mapping[str, Tensor] | None = None,
) -> Reading:
    """Read a program.

    :param model: the program; discrete sites are enumerated, whether they ask for it or not.
    :param args: its arguments.
    :param kwargs: its keyword arguments.
    :param init: the first value of a site, as Pyro's ``init_to_*``.
    :param joint: sites that share a block.
    :param fallback: how sites without a closed form are updated.
    :param indices: of the minibatch, by subsampled plate; drawn unless given.
    :raises ValueError: for sites that do not exist, have no family, or whose updates have no closed form.
    """
    first = InitMessenger(partial(_first_value, init))(Supply(indices or {})(model))
    prior = poutine.trace(first).get_trace(*args, **kwargs)
    fallback = dict(fallback or {})
    sites: dict[str, Any] = latent_sites(prior)
    summed = {n: s for n, s in sites.items() if s["fn"].has_enumerate_support}
    latents = {n: _latent(s) for n, s in sites.items() if n not in summed}
    _check_names([*flat.from_iterable(joint), *fallback], latents)
    families = {name: _family(name, found, fallback) for name, found in latents.items()}
    _check_blocks(joint, families)
    trace = _symbolic_run(model, args, kwargs, prior, latents, bool(summed))
    joint = [*joint, *_walks(trace, latents, families, {*flat.from_iterable(joint), *fallback})]
    names = {site: _block_name(group) for group in joint for site in group}
    series = [Series(f"rows of {_block_name(g)}", tuple(g)) for g in joint if _are_rows(g, latents)]
    blocks = Blocks({name: names.get(name, name) for name in latents}, families, frozenset(fallback))
    blocks = blocks.with_series(series)
    scored, inner, chain = _scored(trace, _nesting(prior), places_of(series))
    factors = [_factor(blocks, turn, summed, latents) for summed, turn in scored]
    members: dict[str, tuple[str, ...]] = {}
    for site in latents:
        block = blocks.names[site]
        members[block] = (*members.get(block, ()), site)
    normal = {b: m for b, m in members.items() if families[m[0]] in ("normal", "lognormal")}
    layouts = {b: block_layout(b, m, latents, blocks, b in names.values()) for b, m in normal.items()}
    hows = {blocks.names[site]: how for site, how in fallback.items()}
    drawn = tuple(name for name, site in summed.items() if not is_summed(site))
    positive = frozenset(b for b, m in members.items() if families[m[0]] == "lognormal")
    nodes = {name: trace.nodes[name] for name in summed}
    return Reading(latents, nodes, factors, layouts, members, inner, drawn, hows, positive, chain)


def _first_value(init: Callable[[Any], Any], site: Any) -> Any:
    fn = site["fn"]
    if fn.has_enumerate_support:
        return fn.sample()
    if init is init_to_sample and kind_of(fn) == "Wishart":
        return fn.mean  # draws may be singular
    return init(site)


def _latent(site: Any) -> Latent:
    value = site["value"]
    mask = None if site["name"].endswith("_unobserved") else site["mask"]  # its prior sums to one: see balance_missing
    return Latent(value.detach().double(), base_distribution_of(site["fn"]), site_plates(site), mask, value.dtype)


def base_distribution_of(fn: Any) -> Any:
    """The distribution of a site with its event dimension, without a mask."""
    return fn.base_dist if type(fn).__name__ == "MaskedDistribution" else fn


def _check_names(names: Sequence[str], latents: Mapping[str, Latent]) -> None:
    if unknown := [name for name in names if name not in latents]:
        raise ValueError(
            f"blocks= and fallback= name {unknown}: expected continuous latent sites of the model, one of "
            f"{sorted(latents)}"
        )


def _check_blocks(joint: Sequence[Sequence[str]], families: Mapping[str, str]) -> None:
    for group in joint:
        if len(group) > 1 and (bad := [site for site in group if families[site] != "normal"]):
            raise ValueError(
                f"the block {tuple(group)} holds {bad}, which have {[families[site] for site in bad]} distributions: "
                "expected normal sites only, which alone have a joint family here. Leave the others out of blocks=."
            )


def _family(name: str, found: Latent, fallback: Mapping[str, str]) -> str:
    if name in fallback:
        if fallback[name] not in FALLBACKS:
            raise ValueError(f"fallback for site {name!r} is {fallback[name]!r}; expected one of {FALLBACKS}")
        return _fallback_family(name, found)
    kind = type(base_distribution(found.fn)).__name__
    if (family := family_of(kind)) is None:
        raise ValueError(
            f"latent site {name!r} is {kind}, which has no conjugate family: expected Normal, MultivariateNormal, "
            f"Gamma, InverseGamma, Exponential, Beta, Dirichlet or Wishart. Name {_advice({name: found})}."
        )
    return family


def _normal_family(found: Latent) -> str | None:
    """The family of a site that is normal, or whose logarithm is; ``None`` for other supports."""
    support = base_distribution(found.fn).support
    kind = str(support)
    if kind.startswith("Real") or kind.startswith("IndependentConstraint(Real"):
        return "normal"
    return "lognormal" if "GreaterThan" in kind and getattr(support, "lower_bound", 1) == 0 else None


def _fallback_family(name: str, found: Latent) -> str:
    if (family := _normal_family(found)) is not None:
        return family
    kind = str(base_distribution(found.fn).support)
    raise ValueError(
        f"fallback for site {name!r} is no guide family: its support is {kind}, expected real or positive values. "
        f"Name a guide family, {_advice({name: found})}."
    )


def _nesting(trace: Any) -> int:
    return max((-f.dim for _, s in sample_sites(trace) for f in s["cond_indep_stack"] if f.vectorized), default=0)


def _symbolic_run(
    model: Program, args: Any, kwargs: Any, prior: Any, latents: Mapping[str, Latent], enumerated: bool
) -> Any:
    values: dict[str, Any] = {name: latent(name, found.start) for name, found in latents.items()}
    values |= {name: site["value"] for name, site in prior.nodes.items() if is_subsample(site)}
    program: Any = Supply(values)(config_enumerate(model) if enumerated else model)
    if enumerated:
        dims = max(_nesting(prior), _batch_dims(prior))
        program = poutine.enum(program, first_available_dim=-1 - dims)
    with pyro.validation_enabled(False):
        return poutine.trace(program).get_trace(*args, **kwargs)


def _batch_dims(trace: Any) -> int:
    return max((len(site["fn"].batch_shape) for _, site in sample_sites(trace)), default=0)


def _scored(trace: Any, nesting: int, rows: Any) -> tuple[list[tuple[bool, LoopTurns]], Any, MarkovChain | None]:
    """What is scored, and whether it depends on enumerated sites: sites, those of a loop at once.

    Also a trace of the sites that depend on enumerated ones, and the chain that they are.
    """
    sites = [site for _, site in sample_sites(trace) if not is_deterministic(site)]
    for site in sites:
        if site["name"].endswith("_unobserved"):
            site["mask"] = None
    summed = [site for site in sites if is_enumerated(site) or _beyond(site["fn"].batch_shape, nesting)]
    plain = [site for site in sites if not any(site is other for other in summed)]
    inner: Any = poutine.Trace()
    for site in summed:
        inner.nodes[site["name"]] = site
    found_chain = find_chain(summed, inner, nesting)
    inside = [alone(site) for site in summed] if found_chain is None else [part.turns for part in found_chain.parts]
    found = [(False, turn) for turn in turns(plain, rows)] + [(True, turn) for turn in inside]
    order = {site["name"]: i for i, site in enumerate(sites)}
    return sorted(found, key=lambda item: order[item[1].sites[0]["name"]]), inner, found_chain


def _beyond(shape: Sequence[int], nesting: int) -> bool:
    return any(size > 1 for size in shape[: max(0, len(shape) - nesting)])


def _factor(blocks: Blocks, turn: LoopTurns, summed: bool, latents: Mapping[str, Latent]) -> Factor:
    try:
        return Factor(expected_log_prob(blocks, turn.fn, turn.value), turn, summed)
    except NotConjugate as error:
        raise _refusal(turn, error, blocks, latents) from error


def _block_name(group: Sequence[str]) -> str:
    """Of a block: its sites', or the first and the last of many."""
    return "+".join(group) if len(group) < _MANY else f"{group[0]} to {group[-1]}"


def _are_rows(group: Sequence[str], latents: Mapping[str, Latent]) -> bool:
    """Whether sites are the rows of one array: of one shape, in the same plates."""
    kinds = {(tuple(latents[s].start.shape), latents[s].fn.event_dim, latents[s].plates) for s in group}
    return len(group) > 1 and len(kinds) == 1


def _walks(
    trace: Any, latents: Mapping[str, Latent], families: Mapping[str, str], taken: set[str]
) -> list[tuple[str, ...]]:
    """Numbered normal sites each of which depends on one before it: a chain, which is one block."""
    stems: dict[str, list[str]] = {}
    for name in latents:
        if families[name] == "normal" and name not in taken and stem_of(name) != name:
            stems.setdefault(stem_of(name), []).append(name)
    return [tuple(g) for g in stems.values() if len(g) >= LEAST and _are_rows(g, latents) and _is_walk(trace, g)]


def _is_walk(trace: Any, group: Sequence[str]) -> bool:
    inside = set(group)
    for name in group[1:]:
        above = {s for v in parameters(base_distribution(trace.nodes[name]["fn"])).values() for s in sites_in(v)}
        if not above & (inside - {name}):
            return False
    return True


def _refusal(turn: LoopTurns, error: NotConjugate, blocks: Blocks, latents: Mapping[str, Latent]) -> ValueError:
    """What is said of a factor without a closed form."""
    sites = {site: latents[site] for site in sorted(error.sites) if site in latents}
    return ValueError(
        f"site {turn.name!r} is not conjugate: {error}. Expected a form whose updates are closed (a precision with a "
        "Gamma prior, scale=tau.rsqrt(); a linear map; one product in a logarithm). Rewrite it, or name "
        f"{_advice(sites, (blocks, turn))}."
    )


def _advice(latents: Mapping[str, Latent], about: tuple[Blocks, LoopTurns] | None = None) -> str:
    """The ``fallback=`` that sites can take: a guide family, where natural gradients do not take them."""
    if not latents:
        return "another guide"
    families = {site: _normal_family(found) for site, found in latents.items()}
    normal = None not in families.values() and (about is None or _is_integrable(*about, families))
    sites = ", ".join(f"{site!r}: {repr('cvi') if normal else 'AutoNormal'}" for site in latents)
    how = "updates by natural gradients" if normal else "pyro.infer.autoguide.AutoNormal or another guide, by gradient"
    return f"fallback={{{sites}}} for {how}, or use another guide"


def _is_integrable(blocks: Blocks, turn: LoopTurns, families: Mapping[str, Any]) -> bool:
    """Whether a factor has an expectation where some sites are normal, or their logarithms are."""
    loose = Blocks(blocks.names, {**blocks.families, **families}, blocks.loose | frozenset(families), blocks.series)
    try:
        expected_log_prob(loose, turn.fn, turn.value)
    except NotConjugate:
        return False
    return True
