"""The tables of the annealing ring, small: their rows, their files, and what they must show."""

import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[list[str]], Any]]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: runpy.run_path(str(BENCHMARKS / f"{name}.py"))["main"]


def test_rows_of_the_ring(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Any) -> None:
    out, main = tmp_path / "ring.json", command("annealing_ring")
    options = ["--targets", "4", "--methods", "AVO", "NVIR*", "--batches", "10", "--mode", "eager", "--out", str(out)]
    short, long = main([*options, "--steps", "2"]), main([*options, "--steps", "60"])
    assert [row.method for row in long] == ["AVO", "NVIR*"]
    assert all(row.log_z == pytest.approx(math.log(8), abs=5 * row.log_z_sd + 0.2) for row in long)
    assert long[1].ess > short[1].ess
    assert long[0].betas == short[0].betas
    assert long[1].betas != short[1].betas
    assert len(json.loads(out.read_text())["rows"]) == 2
    assert "log Z (R)" in capsys.readouterr().out


def test_memory_is_flat_level_by_level_and_grows_with_all_levels(tmp_path: Path, command: Any) -> None:
    out = tmp_path / "levels.json"
    options = ["--no-compiler", "--rounds", "2", "--targets", "4", "16", "--particles", "100", "--out", str(out)]
    found = command("levels")(options)
    kept = {(row["step"], row["targets"]): row["bytes"] for row in found["memory"]}
    assert kept["level by level", 16] < 1.1 * kept["level by level", 4]
    assert kept["all levels", 16] > 4 * kept["all levels", 4]
    assert {row["step"] for row in found["time"]} == {"level by level", "all levels", "by hand", "CompiledSVI trace"}
    assert json.loads(out.read_text())["memory"] == found["memory"]


def test_nested_gradients_have_more_signal_with_more_samples(tmp_path: Path, command: Any) -> None:
    out = tmp_path / "gradients.json"
    options = ["--targets", "3", "--samples", "4", "64", "--repetitions", "60", "--steps", "3"]
    rows = command("nested_gradients")([*options, "--objectives", "NVI", "AVO", "--out", str(out)])
    ratio = {(row.objective, row.trained_steps, row.num_samples): row.snr for row in rows}
    assert all(ratio[name, 0, 64] > ratio[name, 0, 4] for name in ("NVI", "AVO"))
    assert len(json.loads(out.read_text())["rows"]) == 8
