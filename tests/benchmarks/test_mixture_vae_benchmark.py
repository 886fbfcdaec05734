"""The table of benchmarks/mixture_vae.py, small: its rows, its file, and weights per image that beat one weight."""

import json
import math
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mixture_vae.py"


def test_rows_of_the_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mixture_vae.json"
    options = ["--seconds", "1", "--fit-steps", "250", "--mode", "trace", "--test-batches", "4", "--out", str(out)]
    rows = runpy.run_path(str(SCRIPT))["main"](options)
    assert [row.method for row in rows] == ["labels", "prior", *["RWS"] * 3, *["NVI"] * 3]
    labels, prior, *_, rws = rows[:5]
    nvi = rows[-1]
    assert 0 < labels.error < nvi.error < rws.error
    assert nvi.error < prior.error
    assert nvi.ess_of_an_image > 5 * rws.ess_of_an_image
    assert nvi.accuracy > 0.5
    assert math.isnan(json.loads(out.read_text())["rows"][0]["ess"])
    assert "accuracy" in capsys.readouterr().out
