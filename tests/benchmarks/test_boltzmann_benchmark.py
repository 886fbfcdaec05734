"""The benchmark of partition functions runs, in small, and writes its rows."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_table_has_its_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    small = "--epochs 1 --betas 20 --chains 10 --sweeps 5 --hidden 4 --repeats 2 --speed-work 500 --rounds 1"
    command = [sys.executable, "-m", "benchmarks.boltzmann", "--out", str(out), *small.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["table"] for row in rows} == {"large", "partition", "speed"}
    assert len(rows) == 2 + 1 + 6
    large = [row for row in rows if row["table"] == "large"]
    assert [row["what"].split(", ")[-1] for row in large] == ["averaged parameters", "last parameters"]
    for row in large:
        assert row["interval"][0] <= row["log_likelihood"] <= row["interval"][1]
    assert large[0]["log_likelihood"] != large[1]["log_likelihood"]
    assert all(row["chain_betas_a_second"] > 0 for row in rows if row["table"] == "speed")
