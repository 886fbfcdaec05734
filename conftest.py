"""Test set-up shared by the tests and the doctests: one thread, an empty parameter store and fixed seeds."""

import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiled programs of one run serve all its workers and processes, and the next run.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parent / ".pytest_cache" / "inductor"))

import gc
import warnings
from collections import Counter
from collections.abc import Iterator

import pyro
import pytest
import torch

from pplvi.compile import backends
from pplvi.programs.state import reseed

torch.set_num_threads(1)
# A precompiled header takes longer than a program, but here some sixty programs share it.
backends._CPU_OPTIONS["cpp_cache_precompile_headers"] = True

if "PYTEST_XDIST_WORKER" not in os.environ:
    # Workers that import ArviZ for the first time of the day at once race for its stamp file: it is written first.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz  # noqa: F401


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Of each test marked ``table(n)`` every n-th case is for ``make test``, all are for ``make test-all``; what is to
    run is sorted, the slow ones first: workers that are done then share what is left of the short ones."""
    cases: Counter[str] = Counter()
    for item in items:
        if (table := item.get_closest_marker("table")) is not None:
            test = item.nodeid.partition("[")[0]
            if cases[test] % table.args[0]:
                item.add_marker("exhaustive")
            cases[test] += 1
    yield
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Modules and collected tests stay: the garbage collector need not look at them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Start every test and doctest from the same state, and check that it left torch's defaults alone."""
    pyro.clear_param_store()
    reseed(0)
    defaults = torch.get_default_dtype(), torch.distributions.Distribution._validate_args
    yield
    changed = torch.get_default_dtype(), torch.distributions.Distribution._validate_args
    torch.set_default_dtype(defaults[0])
    torch.distributions.Distribution.set_default_validate_args(defaults[1])
    assert changed == defaults, f"(default dtype, validation flag) went from {defaults} to {changed}"
