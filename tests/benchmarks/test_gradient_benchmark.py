"""The signal-to-noise table of benchmarks/gradients.py, small: its trends and its file."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gradients.py"


def test_dreg_keeps_its_signal_and_the_plain_gradient_loses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rainforth et al. 2018: K^(-1/2); Tucker et al. 2019: K^(1/2), and a variance that falls with K."""
    out = tmp_path / "gradients.json"
    main = runpy.run_path(str(SCRIPT))["main"]
    rows = main(["--particles", "4", "16", "64", "--replicas", "600", "--out", str(out)])
    by_name = {name: [row for row in rows if row.estimator == name] for name in ("reparam", "stl", "dreg", "vimco")}
    variance = [row.sd**2 for row in by_name["dreg"]]
    assert variance[0] > variance[1] > variance[2]
    ratio = {name: [row.snr for row in found] for name, found in by_name.items()}
    assert ratio["dreg"][0] < ratio["dreg"][1] < ratio["dreg"][2]
    assert ratio["reparam"][0] > ratio["reparam"][1] > ratio["reparam"][2]
    written = json.loads(out.read_text())
    assert written["slopes"]["dreg"] == pytest.approx(0.5, abs=0.2)
    assert written["slopes"]["reparam"] == pytest.approx(-0.5, abs=0.2)
    assert len(written["rows"]) == len(rows) == 12
    assert "SNR goes as K^" in capsys.readouterr().out
