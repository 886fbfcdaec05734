"""The table of annealing kernels, small: its rows, its file, and what training must show."""

import json
import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_rows_of_the_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    out, main = tmp_path / "kernels.json", runpy.run_path(str(BENCHMARKS / "annealed_kernels.py"))["main"]
    options = ["--targets", "funnel", "--transitions", "2", "--particles", "4", "--draws", "2000", "--seeds", "1"]
    rows = main([*options, "--steps", "3", "--rate", "0.001", "--out", str(out)])
    assert [row.kernel for row in rows] == ["base", "MCVAE", "DAIS", "UHA", "MCD", "CMCD"]
    assert [row.gradients for row in rows] == [0, 4, 4, 4, 4, 4]
    assert all(row.gap > 0 for row in rows)
    assert len(json.loads(out.read_text())["rows"]) == 6
    assert "ESS/N" in capsys.readouterr().out
    (trained,) = main([*options, "--kernels", "CMCD", "--steps", "60", "--rate", "0.02"])
    assert trained.gap < rows[5].gap - 0.1
