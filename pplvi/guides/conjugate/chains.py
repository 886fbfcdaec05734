"""Markov chains of enumerated sites: factors over time at once, and the log normaliser by a tree of matrix products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pplvi.guides.conjugate.loops import LEAST, LoopTurns, form_of
from pplvi.guides.conjugate.merging import merge
from pplvi.guides.conjugate.parameters import given_parameters
from pplvi.programs.masks import without_missing
from pplvi.programs.sites import is_enumerated

_LOWEST = -1e30  # a probability of zero, whose gradient is no NaN


@dataclass(frozen=True)
class Part:
    """Where the factors of some turns are: each touches one variable, or it and the one before.

    :ivar turns: the factors, with dimensions ``(turn, before, own, *plates)``.
    :ivar places: the variable of each.
    :ivar is_pair: whether they touch the one before.
    """

    turns: LoopTurns
    places: tuple[int, ...]
    is_pair: bool


@dataclass(frozen=True)
class MarkovChain:
    """A Markov chain.

    :ivar names: its variables, in order.
    :ivar size: how many values each has.
    :ivar batch: sizes of the plates around all of them.
    :ivar parts: its factors.
    """

    names: tuple[str, ...]
    size: int
    batch: tuple[int, ...]
    parts: tuple[Part, ...]

    def marginals(self, log_factors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The log normaliser, the posterior probabilities of every factor, and those of pairs of neighbours.

        :param log_factors: by the name of the turns.
        :returns: nats; tensors of the factors' shapes; ``(variables, before, own, *batch)``, where the first variable
            has the same probabilities for every value before it.
        """
        with torch.enable_grad():
            leaves = {name: f.detach().requires_grad_() for name, f in log_factors.items()}
            matrices = self._matrices(leaves)
            total = log_product(matrices).sum()
            *found, pairs = torch.autograd.grad(total, [*leaves.values(), matrices])
        return total.detach(), dict(zip(leaves, found, strict=True)), pairs

    def _matrices(self, factors: Mapping[str, Tensor]) -> Tensor:
        first = next(iter(factors.values()))
        found = first.new_zeros((len(self.names), self.size, self.size, *self.batch))
        for part in self.parts:
            factor = factors[part.turns.name].nan_to_num(neginf=_LOWEST)
            if part.turns.mask is not None and not part.turns.is_enumerated:
                factor = torch.where(part.turns.mask, factor, 0.0)
            whole = factor.expand(len(part.places), self.size, self.size, *self.batch)
            found = found.index_add(0, torch.tensor(part.places, device=found.device), whole)
        return found


def log_product(matrices: Tensor) -> Tensor:
    """``log sum exp`` over all paths of a product of matrices ``(n, K, K, ...)``, the first of which has equal rows.

    The rows of the first are averaged, so that it stands for a vector. Neighbours are multiplied at once, in
    ``log2(n)`` rounds (Särkkä & García-Fernández 2021, "Temporal parallelization of Bayesian smoothers").
    """
    while len(matrices) > 1:
        even = len(matrices) // 2 * 2
        left, right = matrices[0:even:2], matrices[1:even:2]
        product = torch.logsumexp(left.unsqueeze(3) + right.unsqueeze(1), 2)
        matrices = torch.cat([product, matrices[even:]])
    size = matrices.shape[1]
    return torch.logsumexp(matrices[0].flatten(0, 1), 0) - torch.log(matrices.new_tensor(float(size)))


def find_chain(sites: Sequence[Any], trace: Any, nesting: int) -> MarkovChain | None:
    """The chain that sites which depend on enumerated ones make; ``None`` where they make another graph.

    :param sites: of the trace, in order.
    :param trace: of these sites alone.
    :param nesting: how many dimensions are plates.
    """
    names = [site["name"] for site in sites if is_enumerated(site)]
    if len(names) < LEAST or any(not _is_plain(site, nesting) for site in sites):
        return None
    trace.symbolize_dims()
    symbols = {trace.nodes[name]["infer"]["_enumerate_symbol"]: i for i, name in enumerate(names)}
    found = [_scope(site, symbols, nesting) for site in sites]
    if any(not _is_link(scope) for scope in found):
        return None
    sizes = {n for scope in found for _, n in scope.values()}
    batches = {tuple(_batch(site, nesting)) for site in sites}
    if len(sizes) != 1 or len(batches) != 1:
        return None
    groups: dict[Any, list[tuple[Any, dict[int, tuple[int, int]]]]] = {}
    for site, scope in zip(sites, found, strict=True):
        key = (form_of(site), len(scope))
        groups.setdefault(key, []).append((site, scope))
    parts = [part for group in groups.values() for part in _parts(group, nesting)]
    return MarkovChain(tuple(names), sizes.pop(), batches.pop(), tuple(parts))


def _is_plain(site: Any, nesting: int) -> bool:
    """Whether a site counts once, or is masked along plates."""
    mask, scale = site["mask"], site["scale"]
    along_plates = not isinstance(mask, Tensor) or all(size == 1 for size in mask.shape[: max(0, mask.dim() - nesting)])
    masked = type(site["fn"]).__name__ == "MaskedDistribution"
    return isinstance(scale, float | int) and scale == 1 and along_plates and not masked


def _mask_of(sites: Sequence[Any], nesting: int) -> Tensor | None:
    """Where some factors count, ``(turn, 1, 1, *plates)``."""
    masks = [True if site["mask"] is None else site["mask"] for site in sites]
    if all(mask is True for mask in masks):
        return None
    whole = [torch.as_tensor(mask, dtype=torch.bool) for mask in masks]
    plates = [mask.reshape(((1,) * nesting + tuple(mask.shape))[mask.dim() :]) for mask in whole]
    return torch.stack(torch.broadcast_tensors(*plates))[:, None, None]


def _scope(site: Any, symbols: Mapping[str, int], nesting: int) -> dict[int, tuple[int, int]]:
    """The variables that a site depends on: of each its dimension and size."""
    shape = site["fn"].batch_shape
    found = {}
    for dim, symbol in site["infer"]["_dim_to_symbol"].items():
        own = symbol == site["infer"].get("_enumerate_symbol")
        size = len(site["value"]) if own else shape[dim] if len(shape) >= -dim else 1
        if symbol in symbols and dim < -nesting and (own or size > 1):
            found[symbols[symbol]] = (dim, int(size))
    return found


def _is_link(scope: Mapping[int, Any]) -> bool:
    return 0 < len(scope) <= 2 and max(scope) - min(scope) == len(scope) - 1


def _batch(site: Any, nesting: int) -> list[int]:
    shape = site["fn"].batch_shape
    return [shape[d] if len(shape) >= -d else 1 for d in range(-nesting, 0)]


def _parts(group: Sequence[tuple[Any, dict[int, tuple[int, int]]]], nesting: int) -> list[Part]:
    """Factors of one form at once; one by one where they differ."""
    items = [_laid_out(site, scope, nesting) for site, scope in group]
    places, is_pair = tuple(max(scope) for _, scope in group), len(group[0][1]) == 2
    whole = merge(items, {})
    if whole is not None:
        sites = tuple(site for site, _ in group)
        return [Part(LoopTurns(sites, *whole, _mask_of(sites, nesting)), places, is_pair)]
    alone = [merge([item], {}) for item in items]
    if any(found is None for found in alone):
        raise AssertionError("a single site merges with itself")
    return [
        Part(LoopTurns((site,), *found, _mask_of([site], nesting)), (place,), is_pair)  # type: ignore[misc, call-arg]
        for (site, _), found, place in zip(group, alone, places, strict=True)
    ]


def _laid_out(site: Any, scope: Mapping[int, tuple[int, int]], nesting: int) -> tuple[Any, Any]:
    """Distribution and value of a site with batch dimensions ``(before, own, *plates)``."""
    dims = [scope[v][0] for v in sorted(scope)]
    fn = _arranged(site["fn"], dims, nesting, 0)
    return fn, _moved(without_missing(site), site["fn"].event_dim, dims, nesting)


def _arranged(fn: Any, dims: Sequence[int], nesting: int, event: int) -> Any:
    if type(fn).__name__ == "Independent":
        count = fn.reinterpreted_batch_ndims
        return _arranged(fn.base_dist, dims, nesting, event + count).to_event(count)
    found = {
        name: _moved(value, event + getattr(fn.arg_constraints.get(name), "event_dim", 0), dims, nesting)
        for name, value in given_parameters(fn).items()
    }
    return type(fn)(**found, validate_args=False)


def _moved(value: Any, event: int, dims: Sequence[int], nesting: int) -> Any:
    """A tensor whose batch dimensions are brought into the order ``(before, own, *plates)``."""
    if not isinstance(value, Tensor):
        return value
    while value.dim() - event < max(nesting, -min(dims)):
        value = value.unsqueeze(0)
    batch = value.dim() - event
    kept = [batch + d for d in dims] + list(range(batch - nesting, value.dim()))
    others = [i for i in range(value.dim()) if i not in kept]
    value = value.permute((*others, *kept)) if value.dim() else value
    for _ in others:
        value = value.squeeze(0)
    return value if len(dims) == 2 else value.unsqueeze(0)
