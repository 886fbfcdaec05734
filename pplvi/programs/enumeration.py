"""Discrete sites summed out: model-side by tensor contraction, guide-side as an exact expectation.

Works on packed traces (``pyro.ops.packed``), where every tensor dimension has a symbol, and hands back ordinary
tensors aligned right on plate dimensions. The contraction is Pyro's plated variable elimination (Obermeyer et al.
2019, "Tensor variable elimination for plated factor graphs").
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree, contract_to_tensor
from torch import Tensor

from pplvi.programs.masks import without_missing
from pplvi.programs.sites import Site

Tree = OrderedDict[frozenset[str], list[Tensor]]
PlateTerms = list[tuple[frozenset[str], Tensor]]


class Trace(Protocol):
    """What is asked of a Pyro trace: its sites, and symbols for the dimensions of its packed tensors."""

    nodes: dict[str, Site]
    plate_to_symbol: dict[str, str]
    symbol_to_dim: dict[str, int]

    def pack_tensors(self, plate_to_symbol: dict[str, str] | None = None) -> None:
        """Give every dimension of every log density a symbol."""


def log_densities(model: Trace, guide: Trace, scale: float) -> tuple[PlateTerms, PlateTerms]:
    """Terms of the log joint density of an enumerated model and of the log density of its guide.

    Sites enumerated in the model only are summed out: ``log sum_z p(x, z)``. Over sites enumerated in the guide every
    term is averaged: ``sum_z q(z) [...]``, gradients included.

    :param scale: subsample scale to leave out of every density.
    :returns: two lists of tensors, aligned right on plate dimensions, to be summed, each with its plates' names.
    :raises ValueError: if sites that share an enumerated variable have different scales.
    """
    symbols = _pack(model, guide)
    average = _GuideAverage(guide, symbols)
    names = {symbol: name for trace in (model, guide) for name, symbol in trace.plate_to_symbol.items()}

    def term(ordinal: frozenset[str], density: Tensor) -> tuple[frozenset[str], Tensor]:
        return frozenset(names[symbol] for symbol in ordinal), average(ordinal, density)

    target = [term(ordinal, density) for ordinal, density in _model_terms(model, guide, scale)]
    forward = [term(_ordinal(guide, s), _rescaled(s["packed"]["log_prob"], 1 / scale)) for s in _sites(guide)]
    return target, forward


def _sites(trace: Trace) -> Iterator[Site]:
    for site in trace.nodes.values():
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
            yield site


def _pack(model: Trace, guide: Trace) -> dict[str, int]:
    for trace, known in ((guide, None), (model, guide)):
        for site in _sites(trace):
            _score(site)
        trace.pack_tensors(known.plate_to_symbol if known is not None else None)
    return {**guide.symbol_to_dim, **model.symbol_to_dim}


def _score(site: Site) -> None:
    if "log_prob" not in site:
        unscaled = site["fn"].log_prob(without_missing(site), *site["args"], **site["kwargs"])
        site["unscaled_log_prob"] = unscaled
        site["log_prob"] = scale_and_mask(unscaled, site["scale"], site["mask"])


def _ordinal(trace: Trace, site: Site) -> frozenset[str]:
    return frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)


def _enumerated_symbols(trace: Trace) -> set[str]:
    return {s["infer"]["_enumerate_symbol"] for s in _sites(trace) if s["infer"].get("_enumerate_dim") is not None}


def _rescaled(term: Tensor, factor: Any) -> Tensor:
    if factor == 1.0:
        return term
    dims = term._pyro_dims  # type: ignore[attr-defined]
    term = term * factor
    term._pyro_dims = dims  # type: ignore[attr-defined]
    return term


def _model_terms(model: Trace, guide: Trace, scale: float) -> Iterator[tuple[frozenset[str], Tensor]]:
    """Model densities by plate context; those that touch a model-enumerated variable arrive contracted."""
    sum_dims = _enumerated_symbols(model) - _enumerated_symbols(guide)
    rest = []
    for site in _sites(model):
        if _among(site, sum_dims):
            rest.append(site)
        else:
            yield _ordinal(model, site), _rescaled(site["packed"]["log_prob"], 1 / scale)
    while rest:
        variables = _connected(rest[0], rest, sum_dims)
        yield from _contracted(model, [s for s in rest if _among(s, variables)], variables, scale)
        rest = [s for s in rest if not _among(s, variables)]


def _among(site: Site, symbols: set[str]) -> set[str]:
    """Those of the symbols that a site's density depends on."""
    return symbols.intersection(site["packed"]["log_prob"]._pyro_dims)


def _connected(site: Site, sites: list[Site], symbols: set[str]) -> set[str]:
    """Enumerated variables that a site depends on, directly or through other sites."""
    groups, reached = [_among(other, symbols) for other in sites], _among(site, symbols)
    while linked := set().union(*(group for group in groups if group & reached)) - reached:
        reached |= linked
    return reached


def _contracted(
    model: Trace, sites: list[Site], variables: set[str], scale: float
) -> Iterator[tuple[frozenset[str], Tensor]]:
    outside = _common_scale([site["scale"] for site in sites]) / scale
    tree: Tree = OrderedDict()
    for site in sites:
        tree.setdefault(_ordinal(model, site), []).append(_inside_the_sum(site))
    for ordinal, terms in contract_tensor_tree(tree, variables).items():
        yield from ((ordinal, _rescaled(term, outside)) for term in terms)


def _inside_the_sum(site: Site) -> Tensor:
    unscaled = site["packed"]["unscaled_log_prob"]
    if site["infer"].get("_enumerate_dim") is not None:
        return unscaled  # a masked prior still has to sum to one
    masked = packed.scale_and_mask(unscaled, mask=site["packed"]["mask"])
    # A fresh view: the contraction tells terms apart by identity.
    dims, masked = masked._pyro_dims, masked[...]
    masked._pyro_dims = dims
    return masked


def _common_scale(scales: list[Any]) -> Any:
    if any(isinstance(s, Tensor) and s.dim() for s in scales) or len({float(s) for s in scales}) != 1:
        raise ValueError(
            f"sites that share an enumerated variable have the scales {scales}: expected one common scalar scale, "
            "since it is applied outside the sum. Put them into the same subsampled plate or drop poutine.scale."
        )
    return scales[0]


class _GuideAverage:
    """Expectation of a packed term over the guide's enumerated sites, as an unpacked tensor."""

    def __init__(self, guide: Trace, symbols: dict[str, int]) -> None:
        self.symbols = symbols
        self.dims = _enumerated_symbols(guide)
        self.factors: Tree = OrderedDict()
        for site in _sites(guide):
            if site["infer"].get("_enumerate_dim") is not None:
                term = site["packed"]["unscaled_log_prob"]
                # A plate of size one leaves no dimension in its terms: it is no plate to the contraction.
                self.factors.setdefault(_ordinal(guide, site).intersection(term._pyro_dims), []).append(term)

    def __call__(self, ordinal: frozenset[str], term: Tensor) -> Tensor:
        dims = self.dims.intersection(term._pyro_dims)  # type: ignore[attr-defined]
        if dims:
            term = self._average(ordinal, term, dims)
        return packed.unpack(term, self.symbols)

    def _average(self, ordinal: frozenset[str], term: Any, dims: set[str]) -> Tensor:
        log_q = contract_to_tensor(self.factors, self.dims, target_ordinal=ordinal & self._plates(), target_dims=dims)
        term, log_q = packed.broadcast_all(term, log_q)
        kept = "".join(d for d in term._pyro_dims if d not in dims)
        positions = [i for i, d in enumerate(term._pyro_dims) if d in dims]
        average: Any = (log_q.exp() * term).sum(positions)
        average._pyro_dims = kept
        return average

    def _plates(self) -> frozenset[str]:
        """Plate symbols that the factors really carry: a plate of size one has none."""
        terms: list[Any] = [term for group in self.factors.values() for term in group]
        return frozenset(d for term in terms for d in term._pyro_dims) - self.dims


def log_likelihood(model: Trace, guide: Trace, name: str) -> Tensor | None:
    """Log density of an observed site given the rest of the data, with enumerated variables summed out.

    ``log p(x_i | x_-i, z) = log sum p(x, ...) - log sum p(x_-i, ...)``, which is the plain log density of a site that
    depends on no enumerated variable, and the marginal one of a mixture component's only observation.

    :returns: a tensor aligned right on plate dimensions; ``None`` where the site's plate elements share an enumerated
        variable, so that single elements have no term of their own.
    """
    symbols = _pack(model, guide)
    site = model.nodes[name]
    sum_dims = _connected(site, list(_sites(model)), _enumerated_symbols(model))
    ordinal = _ordinal(model, site)
    others: Tree = OrderedDict()
    for other in _sites(model):
        if other is not site and not sum_dims.isdisjoint(other["packed"]["log_prob"]._pyro_dims):
            others.setdefault(_ordinal(model, other), []).append(_inside_the_sum(other))
            if other["infer"].get("_enumerate_dim") is not None and not ordinal <= _ordinal(model, other):
                return None
    plates = frozenset(d for d in site["packed"]["log_prob"]._pyro_dims if d in ordinal)
    others.setdefault(ordinal, []).append(_zeros(site, plates))
    without = contract_to_tensor(_copy(others), sum_dims, target_ordinal=plates)
    others[ordinal].append(_inside_the_sum(site))
    joint = contract_to_tensor(others, sum_dims, target_ordinal=plates)
    joint, without = packed.broadcast_all(joint, without)
    difference: Tensor = joint - without
    difference._pyro_dims = joint._pyro_dims  # type: ignore[attr-defined]
    return packed.unpack(difference, symbols)


def _zeros(site: Site, plates: frozenset[str]) -> Tensor:
    """A term of no effect that tells the contraction how large the site's plates are."""
    term = site["packed"]["log_prob"]
    kept = [(dim, size) for dim, size in zip(term._pyro_dims, term.shape, strict=True) if dim in plates]
    zeros: Tensor = term.new_zeros([size for _, size in kept])
    zeros._pyro_dims = "".join(dim for dim, _ in kept)  # type: ignore[attr-defined]
    return zeros


def _copy(tree: Tree) -> Tree:
    return OrderedDict((ordinal, list(terms)) for ordinal, terms in tree.items())


def expected_counts(
    model: Trace, guide: Trace, instead: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The log evidence of a model without drawn latents, and how often each entry of its log densities counts.

    The count of an entry, such as a value of an enumerated site for one datum, is its posterior probability times the
    scale of its site, and zero where it is masked. It is the derivative of the log evidence in the entry.

    :param instead: log densities to put in the place of those of enumerated sites, by name, of shapes that broadcast to
        them; all other sites then count nothing in the sum, which makes the counts those of given probabilities.
    :returns: a scalar, in nats, and for every site a tensor of the shape of its log density.
    """
    log_factors = {}
    for site in _sites(model):
        name, own = site["name"], site["fn"].log_prob(without_missing(site), *site["args"], **site["kwargs"])
        if instead is not None:
            own = instead.get(name, own.new_zeros(())).to(own).expand_as(own)
        log_factors[name] = own
    return factor_marginals(model, guide, log_factors)


def factor_marginals(model: Trace, guide: Trace, log_factors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The log normaliser of given factors over a trace's enumerated sites, and the posterior probabilities of each.

    ``log Z = log sum_z exp sum_s f_s(z)`` and ``d log Z / d f_s``, which is the probability of the values that factor
    ``s`` has in its dimensions, times its scale and mask.

    :param model: an enumerated trace; its values and densities are not looked at.
    :param guide: the trace of a guide, which may be empty.
    :param log_factors: one tensor for each site, of the full shape of its density.
    :returns: ``log Z``, nats, and for each site a tensor of its factor's shape.
    :raises ValueError: if sites that share an enumerated variable have different scales.
    """
    with torch.enable_grad():
        leaves = {name: factor.detach().clone().requires_grad_() for name, factor in log_factors.items()}
        for site in _sites(model):
            site["unscaled_log_prob"] = leaf = leaves[site["name"]]
            site["log_prob"] = scale_and_mask(leaf, site["scale"], site["mask"])
        _pack(model, guide)
        total = torch.stack([term.sum() for _, term in _model_terms(model, guide, 1.0)]).sum()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return total.detach(), dict(zip(leaves, found, strict=True))


def depending(model: Trace, name: str) -> list[str]:
    """Names of the other sites whose log densities depend on an enumerated site, in a trace that has been packed."""
    symbol = model.nodes[name]["infer"]["_enumerate_symbol"]
    return [site["name"] for site in _sites(model) if _among(site, {symbol}) and site["name"] != name]


def varies(model: Trace, name: str, of: str) -> bool:
    """Whether a site's log density takes several values along an enumerated site, in a trace that has been packed."""
    term = model.nodes[name]["packed"]["unscaled_log_prob"]
    along = term.movedim(term._pyro_dims.index(model.nodes[of]["infer"]["_enumerate_symbol"]), 0)
    return not bool(torch.isclose(along, along[:1], rtol=1e-6, atol=1e-9).all())
