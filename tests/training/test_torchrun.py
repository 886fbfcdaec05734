"""``torchrun`` itself, on a script as users write it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train

COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def alone():
    return train.train(parallel="none")


def check_ranks(folder: Path, alone: dict[str, torch.Tensor], *options: str) -> None:
    """Both ranks have what one process finds."""
    arguments = [train.__file__, str(folder), *(["--killed"] if options else [])]
    done = subprocess.run([*COMMAND, *options, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(2):
        found = torch.load(folder / f"{rank}.pt")
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


def test_a_script_does_what_one_process_does(tmp_path, alone):
    check_ranks(tmp_path, alone)


@pytest.mark.exhaustive  # four processes more
def test_a_rank_that_is_killed_is_started_again_and_goes_on(tmp_path, alone):
    check_ranks(tmp_path, alone, "--max-restarts", "3")  # a group that could not be joined is a restart too
    assert (tmp_path / "run.pt").exists()
