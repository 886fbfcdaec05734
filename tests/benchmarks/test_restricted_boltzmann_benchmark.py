"""The tables of benchmarks/restricted_boltzmann.py, small, on the digits of scikit-learn."""

import json
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "restricted_boltzmann.py"


def test_a_machine_learns_more_than_the_means_of_the_pixels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    out = tmp_path / "table.json"
    script = runpy.run_path(str(SCRIPT))
    main = script["main"]
    rows, times = main(
        ["--no-compile", "--seeds", "1", "--share", "6", "--turns", "1", "--rows", "2", "--out", str(out)]
    )
    assert set(times) == {"SVI", "SVI, centered", "scikit-learn", "bare torch", "matrix products"}
    train, test = script["images"](None, "sampled")
    pixels = torch.distributions.Bernoulli(train.mean(0).clamp(0.01, 0.99)).log_prob(test).sum(-1).mean().item()
    assert rows[0].seeds[0] > pixels + 1.0
    written = json.loads(out.read_text())
    assert [row["name"] for row in written["log_likelihood"]] == ["PCD-1, lr to 0"]
    assert "times bare torch" in capsys.readouterr().out
