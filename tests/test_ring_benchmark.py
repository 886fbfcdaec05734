"""The table of benchmarks/annealing_ring.py, small: its rows, its file, and that training helps."""

import json
import math
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "annealing_ring.py"


def test_rows_of_the_ring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ring.json"
    main = runpy.run_path(str(SCRIPT))["main"]
    options = ["--targets", "4", "--methods", "AVO", "NVIR*", "--batches", "10", "--out", str(out)]
    short, long = main([*options, "--steps", "2"]), main([*options, "--steps", "60"])
    assert [row.method for row in long] == ["AVO", "NVIR*"]
    assert all(row.log_z == pytest.approx(math.log(8), abs=5 * row.log_z_sd + 0.2) for row in long)
    assert long[1].ess > short[1].ess
    assert long[0].betas == short[0].betas
    assert long[1].betas != short[1].betas
    assert len(json.loads(out.read_text())) == 2
    assert "log Z (R)" in capsys.readouterr().out
