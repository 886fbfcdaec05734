"""The tables of benchmarks/restricted_boltzmann.py, small, on the digits of scikit-learn."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "restricted_boltzmann.py"


def test_a_machine_learns_more_than_the_means_of_the_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.json"
    main = runpy.run_path(str(SCRIPT))["main"]
    rows, times = main(["--no-compile", "--share", "6", "--turns", "1", "--rows", "2", "--out", str(out)])
    assert set(times) == {"SVI", "SVI, centered", "scikit-learn", "bare torch", "matrix products"}
    independent_pixels = -24.88
    assert rows[0].seeds[0] > independent_pixels + 2.0
    written = json.loads(out.read_text())
    assert [row["name"] for row in written["log_likelihood"]] == ["PCD-1, lr to 0"]
    assert "times bare torch" in capsys.readouterr().out
