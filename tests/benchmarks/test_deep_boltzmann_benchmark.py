"""The tables of benchmarks/deep_boltzmann.py, small: their rows, their file, and what does not depend on time."""

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(FOLDER)
    return runpy.run_path(str(FOLDER / name))


def test_rows_of_deep_boltzmann(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep.json"
    main = script("deep_boltzmann.py", monkeypatch)["main"]
    options = ["--seconds", "0.2", "--seeds", "2", "--small", "64", "6", "5", "--widths", "64", "10", "8"]
    tables = main([*options, "--speed-widths", "12", "8", "6", "--repeats", "1", "--out", str(out)])
    training = tables["training"]
    assert [(row["start"], row["objective"]) for row in training] == [
        ("random start", "likelihood"),
        ("pretrained", "likelihood"),
        ("centered", "likelihood"),
        ("centered", "multi-prediction"),
    ]
    assert all(row["lowest"] < row["bound"] < row["highest"] for row in training)
    assert all(row["bound"] <= row["log_likelihood"] < 0 and 0 <= row["label_error"] <= 1 for row in training)
    assert tables["hessian"][2]["plain"] > 5 * tables["hessian"][2]["centered"]  # bright pixels, random start
    posteriors = {(row["posterior"], row["targets"]): row["gap_nats"] for row in tables["recognition"]}
    assert posteriors["mean field, 10 sweeps", ""] <= posteriors["mean field, 0 sweeps", ""]
    assert {"1-step", "10-step"} < {targets for _, targets in posteriors}
    assert [row["way"] for row in tables["speed"]] == ["SVI", "CompiledSVI, traced", "bare torch", "matrix products"]
    assert all(math.isfinite(row["ms"]) for row in tables["speed"])
    assert {name: table["rows"] for name, table in json.loads(out.read_text())["tables"].items()} == tables
    assert "| way " in capsys.readouterr().out


@pytest.mark.exhaustive
def test_rows_of_deep_boltzmann_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = script("deep_boltzmann_large.py", monkeypatch)
    out, machine = tmp_path / "large.json", tmp_path / "machine.pt"
    small = "--widths 64 20 15 --updates 250 --points 2 --betas 30 --final-betas 40 --chains 10 --epochs 2 --subsets 2"
    found = tables["main"]([*small.split(), "--tuning-lr", "0.01", "--machine", str(machine), "--out", str(out)])
    assert [row["updates"] for row in found["curve"]] == [125, 250]
    assert found["curve"][-1]["bound"] > found["curve"][0]["bound"]
    assert all(row["interval"][0] <= row["bound"] <= row["interval"][1] for row in found["curve"])
    assert [row["labels"] for row in found["labels"]] == [1300, 1000, 100]
    assert all(0 < row[start] < 0.8 for row in found["labels"] for start in ("machine", "random"))
    assert len(found["labels"][2]["machine_each"]) == 2
    again = tables["restored"](machine)
    assert again.weight("v", "h1").shape == (64, 20)
    assert {name: table["rows"] for name, table in json.loads(out.read_text())["tables"].items()} == found


def test_as_many_labels_of_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    balanced = script("deep_boltzmann_large.py", monkeypatch)["balanced"]
    y = torch.arange(1000) % 10
    chosen = balanced(y, 100)
    assert torch.equal(y[chosen].bincount(), torch.full((10,), 10))
    assert len(set(chosen.tolist())) == 100
    assert sorted(balanced(y, 1000).tolist()) == list(range(1000))


def test_labels_alone_need_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    main = script("deep_boltzmann_large.py", monkeypatch)["main"]
    with pytest.raises(SystemExit, match="needs a trained machine"):
        main(["--tables", "labels"])
