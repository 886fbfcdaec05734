"""The table of benchmarks/wake_sleep.py, small: its rows, its file, and that training helps."""

import json
import math
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "wake_sleep.py"


def test_rows_of_wake_sleep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "wake_sleep.json"
    options = ["--methods", "WakeSleep", "RWS mixture", "--mode", "trace", "--seconds", "1", "--points", "3"]
    small = ["--draws", "50", "--hidden", "8", "--test-images", "40", "--out", str(out)]
    rows = runpy.run_path(str(SCRIPT))["main"]([*options, *small])
    assert [row.method for row in rows] == ["WakeSleep", "RWS mixture"]
    for row in rows:
        assert len(row.curve) == 3
        first, last = row.curve[0], row.curve[-1]
        assert first.steps < last.steps
        assert -64 * math.log(2) < last.log_p  # better than fair coins
        assert first.log_p < last.log_p < -5
        assert all(point.gap >= 0 and point.gap_on_dreams >= 0 for point in row.curve)
    assert [row["method"] for row in json.loads(out.read_text())["rows"]] == ["WakeSleep", "RWS mixture"]
    assert "log p" in capsys.readouterr().out
