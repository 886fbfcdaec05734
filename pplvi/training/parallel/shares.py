"""Which elements of the data are on which rank, and what of the programs goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from pplvi.programs.calls import Arguments
from pplvi.programs.handlers import parameters_of
from pplvi.programs.ranks import ProcessGroup
from pplvi.programs.running import plain_run, plain_run_of_pair
from pplvi.programs.sites import is_deterministic, is_factor, sample_sites
from pplvi.programs.state import fingerprint, preserved_buffers
from pplvi.programs.traces import Run
from pplvi.training.batches import Batches, FullData, OneShot, Share
from pplvi.training.replicas import Recipe
from pplvi.training.restart import scratch
from pplvi.types import Call


class Slice(NamedTuple):
    """What a rank has of a batch.

    :ivar rows: elements here.
    :ivar total: elements on all ranks; ``None`` where only the ranks together know.
    :ivar absent: whether the one element here is another rank's, since there are fewer elements than ranks.
    """

    rows: int
    total: int | None
    absent: bool = False


class OwnData(Share):
    """Every rank brings its own batches, such as those of a ``DistributedSampler``.

    :ivar common: whether the ranks are at the same place of the same data.
    """

    common = False

    def __init__(self, ranks: ProcessGroup) -> None:
        self.ranks, self.part = ranks, Slice(0, None)

    def __call__(self, call: Call) -> Call:
        """The batch as it is."""
        self.part = Slice(_rows(call), None)
        return call


class Slices(OwnData):
    """Every rank brings the same batches and keeps a slice of each, so that the union is the batch of one process."""

    common = True

    def __call__(self, call: Call) -> Call:
        """This rank's slice of every tensor that is as long as the batch; one element if there are too few."""
        total = _rows(call)
        low, high = (total * r // self.ranks.size for r in (self.ranks.rank, self.ranks.rank + 1))
        absent = low == high
        low, high = (0, 1) if absent else (low, high)
        self.part = Slice(high - low, total, absent)
        return cut(call, slice(low, high))


def _rows(call: Call) -> int:
    rows = Arguments.of(*call).size
    if not rows:
        raise ValueError(
            "data-parallel training splits the first dimension of the arguments, but the model is called without a "
            "tensor that has elements: expected the data among args= or in data=."
        )
    return rows


def cut(call: Call, part: slice) -> Call:
    """A call with this part of every tensor that is as long as its batch.

    >>> cut(((torch.arange(3), 7), {}), slice(0, 2))
    ((tensor([0, 1]), 7), {})
    """
    arguments = Arguments.of(*call)
    rows = arguments.size
    return arguments.call([x[part] if x.dim() and len(x) == rows else x for x in arguments.tensors])


@dataclass(frozen=True)
class Split:
    """What of the programs grows with the data.

    :ivar plates: names of the plates.
    :ivar local: dimension along which a parameter has a row for each element, by name.
    :ivar known: whether the guide was there to be looked at.
    """

    plates: frozenset[str]
    local: Mapping[str, int]
    known: bool = True


def share_of(ranks: ProcessGroup, batches: Batches, shard: bool) -> OwnData:
    """How batches get to the ranks.

    :param shard: whether every rank has the full data as arguments and is to keep a slice.
    :raises ValueError: where that cannot be told, or the ranks' data contradict it.
    """
    loader = getattr(batches, "data", None)
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        return OwnData(ranks)
    same = ranks.agree(fingerprint(batches.peek()))
    if isinstance(batches, FullData) and shard != same:
        raise ValueError(
            "every rank was given the same full data: expected parallel=pplvi.fitting.DataParallel(shard=True), which "
            "lets each keep a slice, or every rank's own rows in args=. parallel='none' trains each rank by itself."
            if same
            else "shard=True, but the ranks were given different data: expected the same full data on all. Leave "
            "shard= out if every rank has rows of its own."
        )
    if isinstance(batches, OneShot) and not same:
        raise ValueError("a one-shot iterator that differs between ranks may end on one of them first: pass a loader.")
    return Slices(ranks) if same else OwnData(ranks)


def split_of(recipe: Recipe, call: Call) -> Split:
    """What grows with the data, from a run of the programs with all rows and one with one row more or less.

    :raises ValueError: if no plate does, or a site outside of these plates does.
    """
    rows = _rows(call)
    other = cut(call, slice(0, rows - 1)) if rows > 1 else _doubled(call)
    with recipe.environment.active():
        pairs = [_looked_at(recipe, x) for x in (call, other)]
    (run, parameters), (again, others) = pairs
    plates = frozenset(name for name, size in _sizes(run).items() if size != _sizes(again).get(name))
    _check_sites(run, again, plates)
    grown = {n: _grown(p, others[n]) for n, p in parameters.items() if n in others and p.shape != others[n].shape}
    return Split(plates, grown, recipe.makes_guide)


def _doubled(call: Call) -> Call:
    arguments = Arguments.of(*call)
    return arguments.call([torch.cat([x, x]) if x.dim() and len(x) == arguments.size else x for x in arguments.tensors])


def _looked_at(recipe: Recipe, call: Call) -> tuple[Run, dict[str, Tensor]]:
    runs: list[Run] = []
    with scratch(), preserved_buffers(model=recipe.model):
        if not recipe.makes_guide:
            return plain_run(recipe.model, *call), {}
        model, guide = replace(recipe, apart=False).build()
        parameters = parameters_of(lambda: runs.append(plain_run_of_pair(model, guide, *call)))
    return runs[0], parameters


def _sizes(run: Run) -> dict[str, tuple[int, int]]:
    sites = (site for trace in (run.model, run.guide) for _, site in sample_sites(trace))
    frames = (frame for site in sites for frame in site["cond_indep_stack"])
    return {frame.name: (int(frame.size), int(frame.full_size or frame.size)) for frame in frames}


def _check_sites(run: Run, again: Run, plates: frozenset[str]) -> None:
    if not plates:
        raise ValueError(
            "no plate of the model grows with the rows of its arguments, so that nothing can be split over ranks: "
            "expected pyro.plate('data', len(y)) around what belongs to a row, or pyro.plate('data', N, "
            "subsample_size=len(y)) for minibatches."
        )
    sizes = _sizes(run)
    if fixed := sorted(p for p in plates if sizes[p][0] == _sizes(again).get(p, sizes[p])[0]):
        raise ValueError(
            f"the plates {fixed} subsample themselves: expected minibatches in data=, which the ranks can share."
        )
    for one, other in ((run.model, again.model), (run.guide, again.guide)):
        for name, site in sample_sites(one):
            inside = any(frame.name in plates for frame in site["cond_indep_stack"])
            theirs = other.nodes.get(name)
            if inside or is_deterministic(site) or theirs is None:
                continue
            if site["value"].shape != theirs["value"].shape or _is_other_factor(site, theirs):
                raise ValueError(
                    f"site {name!r} depends on the rows of the arguments but is in no plate that does: expected it "
                    "inside pyro.plate('data', len(y)), one element for each row. A density of all rows together, or a "
                    "guide that draws all latents in one vector, cannot be split over ranks."
                )


def _is_other_factor(one: Any, other: Any) -> bool:
    return is_factor(one) and not torch.equal(one["fn"].log_factor, other["fn"].log_factor)


def _grown(one: Tensor, other: Tensor) -> int:
    return next(dim for dim, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b)
