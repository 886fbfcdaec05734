"""The table of benchmarks/hmm_heuristics.py, small: its rows, its file, and that its two ways to log Z agree."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "hmm_heuristics.py"


def test_rows_of_the_hidden_markov_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "hmm.json"
    main = runpy.run_path(str(SCRIPT))["main"]
    options = ["--time-steps", "5", "--test-instances", "20", "--samples", "400", "--particles", "10"]
    rows = main([*options, "--iterations", "8", "--out", str(out)])
    assert [row.method for row in rows] == ["none", "mixture", "learned"]
    for row in rows:
        assert row.log_z == pytest.approx(row.log_z_exact, abs=0.5)
        assert row.log_z_resampled == pytest.approx(row.log_z_exact, abs=0.5)
        assert 1 <= row.ess <= row.ess_exact + 20
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 3
    assert found["settings"]["time_steps"] == 5
    assert "log Z (R)" in capsys.readouterr().out
