"""The table of benchmarks/bars_and_stripes.py, small: the order of its rows and its file."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bars_and_stripes.py"


def test_exact_gradients_lead_and_chains_from_the_data_trail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.json"
    main = runpy.run_path(str(SCRIPT))["main"]
    settings = ["--steps", "1500", "--seeds", "1", "--lr", "0.5", "--no-compile", "--out", str(out)]
    rows = {(r.negative, r.centered, r.momentum): r.mean for r in main(settings)}
    assert rows["exact", True, 0.9] > -2.65
    assert rows["exact", True, 0.0] > rows["persistent", True, 0.0] > rows["contrastive", True, 0.0]
    assert rows["persistent", False, 0.0] > rows["contrastive", False, 0.0]
    written = json.loads(out.read_text())
    assert max(row["mean"] for row in written["rows"]) < written["optimum"] == pytest.approx(-2.5993, abs=1e-4)
    assert "negative phase" in capsys.readouterr().out
