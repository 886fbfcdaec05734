"""The tables of benchmarks/deep_boltzmann.py, small: their rows, their file, and what does not depend on time."""

import json
import math
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "deep_boltzmann.py"


def test_rows_of_deep_boltzmann(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep.json"
    main = runpy.run_path(str(SCRIPT))["main"]
    options = ["--seconds", "0.5", "--small", "64", "6", "5", "--widths", "64", "10", "8", "--epochs", "1"]
    tables = main([*options, "--speed-widths", "12", "8", "6", "--repeats", "1", "--out", str(out)])
    training = tables["training"]
    assert [(row["start"], row["objective"]) for row in training] == [
        ("random start", "likelihood"),
        ("pretrained", "likelihood"),
        ("centered", "likelihood"),
        ("centered", "multi-prediction"),
    ]
    assert all(row["bound"] <= row["log_likelihood"] < 0 and 0 <= row["label_error"] <= 1 for row in training)
    assert tables["hessian"][2]["plain"] > 5 * tables["hessian"][2]["centered"]  # bright pixels, random start
    posteriors = {(row["posterior"], row["targets"]): row["gap_nats"] for row in tables["recognition"]}
    assert posteriors["mean field, 10 sweeps", ""] <= posteriors["mean field, 0 sweeps", ""]
    assert {"1-step", "10-step"} < {targets for _, targets in posteriors}
    assert [row["labels"] for row in tables["labels"]] == [1300, 1000, 100]
    assert [row["way"] for row in tables["speed"]] == ["SVI", "CompiledSVI, traced", "bare torch", "matrix products"]
    assert all(math.isfinite(row["ms"]) for row in tables["speed"])
    assert set(tables) < set(json.loads(out.read_text()))
    assert "| labels | machine | random |" in capsys.readouterr().out
