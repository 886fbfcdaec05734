"""``torchrun``'s agent on functions, and ``torchrun`` itself on a script as users write it."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import train
from launching import launched
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pplvi.programs.ranks import RankLostError, join, met_as

COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def alone():
    return train.train(parallel="none")


def check_found(folder: Path, alone: dict[str, torch.Tensor]) -> None:
    """Both ranks have what one process finds."""
    for rank in range(2):
        found = torch.load(folder / f"{rank}.pt")
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


def check_script(folder: Path, alone: dict[str, torch.Tensor], *options: str) -> None:
    """The command does what one process does."""
    arguments = [train.__file__, str(folder), *(["--killed"] if options else [])]
    done = subprocess.run([*COMMAND, *options, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    check_found(folder, alone)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # the agent has threads
def test_workers_of_its_agent_do_what_one_process_does(tmp_path, alone):
    meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork"}
    elastic_launch(LaunchConfig(1, 1, 2, run_id="test", **meeting), train.saved)(tmp_path, False)
    check_found(tmp_path, alone)


def test_ranks_that_are_started_again_meet_those_of_their_own_start(tmp_path):
    """The agent's store keeps the addresses of ranks that have ended, which one that comes first must not take."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, None, is_master=True)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def work(rank: int, late: float) -> list[int]:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", **where}
        time.sleep(late if rank == 0 else 0.0)
        return join(timeout=20).gather(rank)

    for late in (0.0, 0.3):
        assert launched(2, partial(work, late=late), tmp_path) == [[0, 1], [0, 1]]


def test_a_rank_that_does_not_come_is_missed():
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(RankLostError, match="the 2 ranks did not meet"):
        met_as(store, 0, 2)


@pytest.mark.exhaustive  # two processes that import everything
def test_a_script_does_what_one_process_does(tmp_path, alone):
    check_script(tmp_path, alone)


@pytest.mark.exhaustive  # four processes more
def test_a_rank_that_is_killed_is_started_again_and_goes_on(tmp_path, alone):
    check_script(tmp_path, alone, "--max-restarts", "3")  # a group that could not be joined is a restart too
    assert (tmp_path / "run.pt").exists()
