"""Plates that a program subsamples by itself, run whole where the data for it are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.poutine.subsample_messenger import SubsampleMessenger

from pplvi.kinds.kinds import is_whole
from pplvi.programs.checks import check_pair
from pplvi.programs.handlers import within
from pplvi.programs.running import plain_run_of_pair
from pplvi.programs.sites import Site, is_deterministic, is_factor, sample_sites, site_plates
from pplvi.programs.traces import Run
from pplvi.types import Program


def full_size(count: int, size: int | None) -> int:
    """How many data ``count`` of them stand for: ``size`` if it is given.

    :raises ValueError: for a size that is no whole number, or smaller than the data that are there.

    >>> full_size(3, None), full_size(3, 12)
    (3, 12)
    """
    if size is not None and not (is_whole(size) and size >= count):
        raise ValueError(
            f"size={size!r}: expected how many data there are in all, a whole number of at least the {count} given."
        )
    return count if size is None else int(size)


def data_plate(count: int, size: int | None) -> Any:
    """The plate ``"data"`` of ``count`` data, which stand for ``size`` of them.

    >>> data_plate(3, None).size, data_plate(3, 12).size
    (3, 12)
    """
    return pyro.plate("data", full_size(count, size), subsample_size=None if size is None else count, dim=-1)


@contextmanager
def whole_plates() -> Iterator[None]:
    """Let plates inside have all their elements, whatever their ``subsample_size``; given indices are kept.

    >>> import pyro
    >>> with whole_plates(), pyro.plate("data", 4, subsample_size=2) as indices:
    ...     print(indices)
    tensor([0, 1, 2, 3])
    """
    place: Any = SubsampleMessenger
    original = place._subsample

    def all_of_it(name: str, size: Any = None, subsample_size: Any = None, subsample: Any = None, *more: Any) -> Any:
        return original(name, size, subsample_size if subsample is not None else None, subsample, *more)

    place._subsample = staticmethod(all_of_it)
    try:
        yield
    finally:
        place._subsample = staticmethod(original)


def with_all_data(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Program, Program]:
    """A pair that subsamples plates (``subsample_size=``), with all their elements if its arguments hold them.

    They do where the pair runs and has a value of its own for every element of every observed site; otherwise, as with
    arguments that are a minibatch already, the pair comes back as it is.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(y):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", 4, subsample_size=2) as i:
    ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y[i] if len(y) == 4 else y)
    >>> def guide(y):
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> [with_all_data(model, guide, (y,), {})[0] is model for y in (torch.zeros(4), torch.zeros(2))]
    [False, True]
    """
    if not _cut(plain_run_of_pair(model, guide, args, kwargs)):
        return model, guide
    pair = within(whole_plates, model), within(whole_plates, guide)
    try:
        run = plain_run_of_pair(*pair, args, kwargs)
        check_pair(run)
        run.log_probs(run.model), run.log_probs(run.guide)
    except Exception:  # whatever a program says when it has data for some of the elements only
        return model, guide
    complete = all(_has_all(site) for _, site in sample_sites(run.model) if site["is_observed"])
    return pair if complete and not _cut(run) else (model, guide)


def _cut(run: Run) -> bool:
    sites = (site for trace in (run.model, run.guide) for _, site in sample_sites(trace))
    return any(plate.size < plate.full_size for site in sites for plate in site_plates(site))


def _has_all(site: Site) -> bool:
    """Whether an observed value is no number that is repeated along a plate."""
    if is_factor(site) or is_deterministic(site):
        return True
    shape = tuple(site["value"].shape)
    batch = shape[: len(shape) - site["fn"].event_dim]
    return all(len(batch) >= -plate.dim and batch[plate.dim] == plate.size for plate in site_plates(site))
