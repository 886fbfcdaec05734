"""Every tutorial runs from its first cell to its last, with short loops, in a process and a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[2] / "tutorials").glob("*.py"))


def run(tutorial: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    settings = {"PPLVI_SMOKE": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tutorial)]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(tutorial, tmp_path):
    done = run(tutorial, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Pareto k-hat" in done.stdout
    pictures = list((tmp_path / "out").glob("*.png"))
    assert pictures
    assert all(picture.stat().st_size > 1_000 for picture in pictures)


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_is_in_percent_format(tutorial):
    text = tutorial.read_text()
    assert text.startswith("# %% [markdown]\n# # ")
    assert "\n# %%\n" in text
    assert 'os.environ.get("PPLVI_SMOKE")' in text


def test_there_are_tutorials():
    assert [path.stem for path in TUTORIALS][:2] == ["01_first_fit", "02_extending"]
