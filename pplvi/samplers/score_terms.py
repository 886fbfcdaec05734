"""Score-function terms of single draws, each with the part of the log weight that depends on it (Rao-Blackwell).

The score function of a draw may be multiplied by the whole log weight, or by any part of it that holds all that the
draw can change: the rest has mean zero and only adds variance (Ranganath, Gerrish & Blei 2014, "Black box variational
inference"; Schulman et al. 2015, "Gradient estimation using stochastic computation graphs"). Two facts about a program
say what a draw cannot change: its plates, whose elements are independent of each other, and the order of its sites.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pplvi.objectives.step import Routing
from pplvi.programs.sites import Site, is_deterministic, latent_sites, sample_sites, site_plates
from pplvi.programs.traces import Run
from pplvi.samplers.divergences import divergent_sites

Context = frozenset[tuple[str, Any]]  # (plate, None) of a vectorised plate, (plate, element) inside a sequential one


class ScoreTerms(NamedTuple):
    """What a linear objective needs of draws without a path gradient.

    :ivar score: log density of each single draw, unscaled, ``(num_particles, *batch, draws)``.
    :ivar below: the part of the log weight that depends on it, detached, of the same shape.
    :ivar path: what these densities add to ``log_forward``, whose gradient has mean zero, ``(num_particles, *batch)``.
    """

    score: Tensor
    below: Tensor
    path: Tensor


@dataclass(frozen=True)
class _Term:
    """One summand of the log weight.

    It depends on a draw of the guide only if the draw is at or before ``place`` in the guide, and in its own context.
    """

    place: float
    context: Context
    value: Tensor


def score_terms(run: Run, routing: Routing) -> ScoreTerms | None:
    """The terms of a joint run, or ``None`` if every draw carries a path gradient, or weights depend on other ranks.

    What depends on a draw is told by its plates, as Pyro's ``Trace_ELBO`` does, and by the order of the sites, as
    ``TraceGraph_ELBO`` does: a density of the guide depends on the draws up to its own site, a density of the model on
    those up to the latest in the guide of the latents that the model has met so far.

    >>> import pyro, pyro.distributions as dist
    >>> from pplvi.programs.joint import execute
    >>> def program(p):
    ...     with pyro.plate("data", 3):
    ...         pyro.sample("z", dist.Bernoulli(p))
    >>> def model():
    ...     program(0.5)
    ...     pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))
    >>> terms = score_terms(execute(model, lambda: program(0.1), (), {}, num_particles=2), Routing(per_draw=True))
    >>> terms.score.shape
    torch.Size([2, 3])
    """
    scored = run.scored_sites(detached=routing.detach)
    if not scored or run.joint_shard is not None:  # what a draw changes may be on other ranks: all of the weight
        return None
    with torch.no_grad():
        below = _Below(run, _terms(run, routing))
        parts = [_flat(run, site, below(name, site)) for name, site in scored.items()]
    scores = [_flat(run, site, _kept(run, run.drawn_log_prob(name, site), site)) for name, site in scored.items()]
    sampled = [] if routing.exact_entropy else [n for n in scored if n not in _divergent(run, routing)]
    path = sum((run.to_batch(run.site_log_prob(name, scored[name]), name) for name in sampled), run.zeros())
    return ScoreTerms(torch.cat(scores, -1), torch.cat(parts, -1), path)


def _divergent(run: Run, routing: Routing) -> Mapping[str, Tensor]:
    return divergent_sites(run) if routing.analytic_kl else {}


def _terms(run: Run, routing: Routing) -> Iterator[_Term]:
    places = {name: place for place, name in enumerate(run.guide.nodes)}
    known = _divergent(run, routing)
    yield from _of_guide(run, routing, places, known)
    if run.enumerated:  # a contracted term has no site: it may depend on every draw
        yield from (_Term(math.inf, _named(plates), term) for plates, term in run.enumerated_target)
    else:
        yield from _of_model(run, places, known)


def _of_guide(run: Run, routing: Routing, places: Mapping[str, int], known: Mapping[str, Tensor]) -> Iterator[_Term]:
    """Minus the log density of each site, or its expectation, which depends on the draws *before* the site."""
    for name, site in _with_density(run.guide):
        context = _context(site)
        if name in known:
            yield _Term(places[name] - 1, context, -run.scaled(site, known[name]))
        elif routing.exact_entropy:
            yield _Term(places[name] - 1, context, run.entropy(name, site))
        else:
            yield _Term(places[name], context, -run.site_log_prob(name, site))


def _of_model(run: Run, places: Mapping[str, int], known: Mapping[str, Tensor]) -> Iterator[_Term]:
    latents = latent_sites(run.model)
    latest: float = -1
    for name, site in _with_density(run.model):
        if name in latents:
            latest = max(latest, places.get(name, math.inf))
        if name not in known:
            yield _Term(latest, _context(site), run.site_log_prob(name, site))


def _with_density(trace: Any) -> Iterator[tuple[str, Site]]:
    return ((name, site) for name, site in sample_sites(trace) if not is_deterministic(site))


def _context(site: Site) -> Context:
    elements = {(f.name, f.counter) for f in site["cond_indep_stack"] if not f.vectorized}
    return _named(p.name for p in site_plates(site)) | elements


def _named(plates: Iterable[str]) -> Context:
    return frozenset((name, None) for name in plates)


class _Below:
    """Sums of the terms that may depend on a draw, element by element of its plates."""

    def __init__(self, run: Run, terms: Iterable[_Term]) -> None:
        groups: dict[Context, list[_Term]] = defaultdict(list)
        for term in sorted(terms, key=lambda term: -term.place):
            groups[term.context].append(term)
        # Places fall along a group, so that what depends on a draw is a beginning of it: sums are made once for all.
        self.groups = {context: list(accumulate(group, _added)) for context, group in groups.items()}
        self.run, self.places = run, {name: place for place, name in enumerate(run.guide.nodes)}

    def __call__(self, name: str, site: Site) -> Tensor:
        own, zero = _context(site), self.run.zeros().new_zeros(())
        reached = (self._reached(group, self.places[name]) for group in self._together(own))
        return sum((_kept(self.run, term.value, site, term.context) for term in reached if term), zero)

    def _together(self, own: Context) -> Iterator[list[_Term]]:
        """The groups that are not another element of one of the draw's sequential plates."""
        elements = dict(own)
        for context, group in self.groups.items():
            if all(elements.get(plate, element) == element for plate, element in context):
                yield group

    @staticmethod
    def _reached(group: list[_Term], place: int) -> _Term | None:
        return next((term for term in reversed(group) if term.place >= place), None)


def _added(total: _Term, term: _Term) -> _Term:
    return _Term(term.place, term.context, total.value + term.value)


def _kept(run: Run, value: Tensor, site: Site, context: Context | None = None) -> Tensor:
    """A density summed over all plates but those that it shares with a site, ``(particles, *dims of plates)``."""
    dims = {p.dim for p in site_plates(site) if context is None or (p.name, None) in context}
    value = value.reshape((1,) * (run.nesting + 1 - value.dim()) + tuple(value.shape))
    summed = [dim for dim in range(-run.nesting, 0) if dim not in dims]
    return value.sum(summed, keepdim=True) if summed else value


def _flat(run: Run, site: Site, value: Tensor) -> Tensor:
    """Elements of a site's plates, ``(num_particles, *batch, elements)``."""
    sizes = {p.dim: p.size for p in site_plates(site)}
    value = value.expand(run.num_particles, *(sizes.get(dim, 1) for dim in range(-run.nesting, 0)))
    batch = [p.dim for p in run.batch]
    return value.movedim(batch, list(range(1, 1 + len(batch)))).reshape(*run.shape, -1)
