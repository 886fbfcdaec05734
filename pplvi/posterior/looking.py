"""What one run of a model and a guide tells of draws of them: whether they vary, and what they take."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributions import biject_to

from pplvi.posterior.draws import Draws
from pplvi.programs.density import UnconstrainedDensity
from pplvi.programs.sites import Site, is_delta, latent_sites, sample_sites
from pplvi.programs.state import fingerprint
from pplvi.programs.traces import Run
from pplvi.programs.work import Work

_BYTES = 32 * 2**20  # of values and densities that one call makes: what is larger waits for memory
_SMALL = 8 * 2**20  # of all draws together: too few for networks to matter
_ALIVE = 4  # as many tensors of the largest size are held at once
_FEW = (2, 6)
_USUAL, _BEST, _CHEAP = 4_000, 0.9, 1e8  # draws, the part of them that is effective at best, elements computed


def is_at_a_point(run: Run) -> bool:
    """Whether all draws of a guide are one and the same, so that one run says it all."""
    random = (site for site in latent_sites(run.guide).values() if not is_delta(site))
    return next(random, None) is None and not run.subsampled and run.scale == 1.0


@dataclass(frozen=True)
class MoreDraws:
    """What more draws of a guide take: a mark of the programs, a seed, a size of chunks, and bytes."""

    mark: str
    seed: int
    chunk: int | None
    bytes: int


def mark_of(run: Run) -> str:
    """What a run that drew from a fixed seed looked like: another one if a parameter or the data have changed."""
    return fingerprint([{name: site["value"] for name, site in sample_sites(run.guide)}, run.log_target()])


def fitting(run: Run, num_draws: int = 0, make: Callable[[int], Any] | None = None, widest: int = 0) -> int | None:
    """How many draws one call may have; ``None`` where draws of several calls would belong to different data.

    :param num_draws: how many are wanted: of many, what the programs compute on the way is looked at too, such as the
        hidden layer of a network.
    :param make: makes so many draws.
    :param widest: bytes of the largest tensor of the run.
    """
    if run.subsampled or run.scale != 1.0:
        return None
    each = bytes_of(run)
    if make is not None and num_draws * max(each, widest) > _SMALL:
        each = max(each, _ALIVE * _widest_of_draw(make))
    return max(1, _BYTES // max(1, each))


def _widest_of_draw(make: Callable[[int], Any]) -> int:
    """By how many bytes the largest tensor on the way grows with a draw."""
    found = []
    for size in (_FEW[0], *_FEW):  # the first call may look for a way of running draws
        with Work() as work:
            make(size)
        found.append(work.widest)
    return (found[2] - found[1]) // (_FEW[1] - _FEW[0])


def bytes_of(run: Run) -> int:
    """What one draw takes."""
    return sum(_size(site) for trace in (run.model, run.guide) for _, site in sample_sites(trace))


def _size(site: Site) -> int:
    """Bytes of a draw of a site: its value, or the mean and such of an observed one, and its density."""
    value = site["value"]
    if not isinstance(value, Tensor):
        return 0
    events = math.prod(site["fn"].event_shape)
    return int(value.element_size() * (value.numel() + value.numel() // max(1, events)))


def work_of_draw(more: Callable[[int, int], Any]) -> float:
    """How many elements one draw more has the programs compute, counted in a few: a number and no time.

    :param more: what makes so many draws, or evaluates so many rows; it is given their number and a seed.
    """
    counts = []
    for size in (_FEW[0], *_FEW):  # the first call may look for a way of running draws
        with Work() as work:
            more(size, 0)
        counts.append(work.elements)
    return max(1.0, (counts[2] - counts[1]) / (_FEW[1] - _FEW[0]))


def work_of_row(density: UnconstrainedDensity) -> float:
    """How many elements one row more has a density compute."""
    rows = density.start.expand(_FEW[1], -1)
    return work_of_draw(lambda size, seed: density(rows[:size]))


def repays(efficiency: float, rows: int, work: float) -> bool:
    """Whether rows that a better guide may come of are cheap, or fewer than it would save of 4,000 effective draws.

    :param efficiency: effective part of the draws so far.
    :param rows: that a round of adaptation takes.
    :param work: elements computed for one of them.

    >>> repays(0.8, 1000, 1e3), repays(0.8, 1000, 1e6), repays(0.5, 1000, 1e6)
    (True, False, True)
    """
    saved = _USUAL * (1 / max(efficiency, 1e-9) - 1 / _BEST)
    return rows * work < _CHEAP or rows < saved


def point_sites(draws: Draws, run: Run) -> frozenset[str]:
    """Latent sites that the guide holds at a point: ``Delta`` there, and the same in every draw."""
    if not draws.random:
        return frozenset(draws.latents)
    same = {name for name, value in draws.latents.items() if bool((value == value[:1]).all())}
    if not same or draws.num_draws == 1:
        return frozenset()
    held = {name for name, site in latent_sites(run.guide).items() if name in same and is_delta(site)}
    return frozenset(name for name in held if name not in run.model.nodes or not _is_constant(run.model.nodes[name]))


def _is_constant(site: Any) -> bool:
    """Whether a latent has one value only, such as the probability of a single class: any guide is exact there."""
    try:
        free = biject_to(site["fn"].support).inverse_shape(site["value"].shape)
    except NotImplementedError:
        return False
    return math.prod(free) == 0 < site["value"].numel()


def name_of(program: Any) -> str:
    """What a reader calls a model or guide: the name of the function or of the class."""
    program = inspect.unwrap(program)
    return str(getattr(program, "__name__", type(program).__name__))


def chunks_of(total: int, chunk_size: int | None, most: int | None) -> list[tuple[int, int]]:
    """First and last of the draws of each call.

    :param chunk_size: what the user wants a call to have.
    :param most: what fits into memory, if that is known.
    :raises ValueError: for less than one draw.

    >>> chunks_of(5, 2, None)
    [(0, 2), (2, 4), (4, 5)]
    """
    if total < 1 or (chunk_size is not None and chunk_size < 1):
        raise ValueError(f"got num_draws={total} and chunk_size={chunk_size}; expected at least 1 of each.")
    size = chunk_size or most or total
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def check_latents(draws: Draws) -> None:
    """Refuse a model without latents.

    :raises ValueError: if there are none.
    """
    if not draws.latents:
        raise ValueError(
            "the model has no latent sites to draw (all its sites are observed, deterministic or enumerated), so "
            "there is no posterior: expected at least one pyro.sample without obs=."
        )


def check_same_data(draws: Draws) -> None:
    """Refuse draws of several runs that belong to different data.

    :raises ValueError: where plates are subsampled.
    """
    if names := subsampled(draws, draws.plates):
        raise ValueError(
            f"the plates {names} are subsampled anew in every run of the program, so that draws of several runs would "
            "belong to different data: expected the full data, or one run (no chunk_size)."
        )


def subsampled(draws: Draws, sites: Iterable[str]) -> list[str]:
    """The subsampled plates that some sites are in."""
    return sorted({plate.name for site in sites for plate in draws.plates[site] if plate.scale != 1})
