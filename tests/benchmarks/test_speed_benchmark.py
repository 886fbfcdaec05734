"""The table of benchmarks/speed.py, small: its rows, how they are merged, and the step at which compiling has paid."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with short turns, in this process."""
    module = importlib.import_module("benchmarks.speed")
    monkeypatch.setattr(module, "TURN_SECONDS", 0.01)
    monkeypatch.setattr(module, "TURNS", 2)
    monkeypatch.setattr(module, "BLOCK", 2)
    monkeypatch.setattr(module, "in_process", lambda folder, **order: module.work(**order))
    return module


def test_rows_are_measured_and_merged(speed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    speed.main(["--out", str(out), "--only", "hierarchical/eager", "hierarchical/trace"])
    rows = speed.main(["--out", str(out), "--only", "hierarchical/pyro"])
    assert [row["way"] for row in rows] == ["pyro", "eager", "trace"]
    assert rows == json.loads(out.read_text())["rows"]
    assert all(row["cpu_ms"] > 0 and row["cold"]["cpu"] >= 0 for row in rows)
    assert rows[0]["times"] == 1
    assert capsys.readouterr().out.count("hierarchical") == 5


def test_what_fails_is_a_row(speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(way: str, name: str, data: str | None) -> None:
        raise ValueError(f"{way} cannot train {name}\nmore")

    monkeypatch.setattr(speed, "start", refused)
    assert speed.in_turns(["max"], "ring", None) == {"max": {"failed": "ValueError: max cannot train ring"}}
    rows = [{"problem": "ring", "way": "max", "cold": {"failed": "ValueError: refused"}}]
    cells = [cell.strip() for cell in speed.table(rows).splitlines()[-1].strip("|").split("|")]
    assert (*cells[:2], cells[-1]) == ("ring", "max", "ValueError: refused")


def test_compiling_has_paid_where_it_has_used_less_time_than_pyro(speed: ModuleType) -> None:
    base = {"cpu_ms": 2.0, "cold": {"cpu": 1.0}}
    row = {"cpu_ms": 0.5, "cold": {"cpu": 4.0}, "warm": {"cpu": 0.5}}
    assert [speed.pays_from(row, base, state) for state in ("cold", "warm")] == ["2000", "0"]
    assert speed.pays_from(base | {"cpu_ms": 3.0}, base, "cold") == "never"
    assert speed.pays_from(row, None, "cold") == "-"
