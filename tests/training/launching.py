"""Ranks that are forks of the tests' process, and what comes of them."""

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch.distributed


def launched(ranks: int, work: Callable[[int], Any], folder: Path, killed: int | None = None) -> list[Any]:
    """What every rank makes; each is a fork, so that nothing is imported again."""

    def run(rank: int) -> None:
        pyro.clear_param_store()
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(work(rank)))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os._exit(0)  # what the parent registered is its own

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()  # if it still waits for another one
        process.join()
    assert [p.exitcode for p in processes] == [-signal.SIGKILL if rank == killed else 0 for rank in range(ranks)]
    return [pickle.loads((folder / f"{r}.pickle").read_bytes()) for r in range(ranks) if r != killed]


def outcome(case: Callable[[Any], Any], parallel: Any) -> Any:
    """What comes of a case, or what it raises."""
    try:
        return case(parallel)
    except Exception:
        import traceback

        return traceback.format_exc()


def check_same(found: Any, expected: Any) -> None:
    """Equal but for rounding."""
    assert isinstance(found, dict), found
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-10, err_msg=name)
