"""One way to run all benchmarks: the list, a quick run with its file of results, failures, and tables."""

import ast
import json
import math
from datetime import datetime
from pathlib import Path

import pytest
import torch

import pplvi
from benchmarks.__main__ import NAMES, command, main, title
from benchmarks.reporting import Table, rows_of, table_of

FOLDER = Path(__file__).parents[2] / "benchmarks"


def assigned(module: ast.Module) -> set[str]:
    """Names of functions and constants at the top of a module."""
    functions = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
    targets = [node.targets[0] for node in module.body if isinstance(node, ast.Assign)]
    return functions | {target.id for target in targets if isinstance(target, ast.Name)}


def test_every_module_with_a_main_is_in_the_list_and_has_a_quick_form() -> None:
    modules = {path.stem: assigned(ast.parse(path.read_text())) for path in FOLDER.glob("[!_]*.py")}
    assert sorted(NAMES) == sorted(name for name, names in modules.items() if "main" in names)
    assert all("QUICK" in modules[name] for name in NAMES)


def test_list_says_what_each_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == list(NAMES)
    assert all(title(name) in line and title(name).endswith(".") for name, line in zip(NAMES, lines, strict=True))


def test_quick_run_writes_rows_with_date_versions_and_machine(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--only", "gradients", "--quick", "--out", str(tmp_path), "--", "--seed", "3"]) == 0
    printed = capfd.readouterr().out
    assert "SNR goes as K^" in printed
    assert "| done" in printed
    found = json.loads((tmp_path / "gradients.json").read_text())
    assert found["versions"]["pplvi"] == pplvi.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) == {"python", "torch", "pyro", "pplvi", "numpy"}
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["cpu"]
    assert datetime.fromisoformat(found["date"]).tzinfo is not None
    assert found["settings"]["seed"] == 3
    assert "out" not in found["settings"]
    assert rows_of(tmp_path / "gradients.json") == found["rows"]
    assert {row["num_particles"] for row in found["rows"]} == {2, 4}


def test_a_failure_is_counted_and_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "gradients", "--out", str(tmp_path), "--", "--no-such-option"]) == 1
    assert "| failed (2)" in capfd.readouterr().out
    assert rows_of(tmp_path / "gradients.json") == []


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--only", "everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err


def test_commands_hand_options_on(tmp_path: Path) -> None:
    full = command("speed", tmp_path, quick=False, options=["--only", "hmm"])
    assert full[1:] == ["-m", "benchmarks.speed", "--only", "hmm", "--out", str(tmp_path / "speed.json")]


def test_tables_are_markdown_with_aligned_columns() -> None:
    table = Table({"method": "<8", "ESS": "6.1f", "steps": "d"})
    lines = table.text([("NVI", 12.34, 5), ("AVO", None, 20), ("none", math.nan, 0)]).splitlines()
    assert lines[0] == "| method   |    ESS | steps |"
    assert lines[1] == "| -------- | -----: | ----: |"
    assert lines[2:] == [
        "| NVI      |   12.3 |     5 |",
        "| AVO      |      - |    20 |",
        "| none     |    nan |     0 |",
    ]
    rows = [{"way": "SVI", "ms": 1.23456, "each": [1, 2]}, {"way": "traced", "ms": None, "each": []}]
    assert table_of(rows).splitlines()[2:] == ["| SVI    | 1.235 |", "| traced |     - |"]


def test_rows_are_printed_as_they_come_below_one_head(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table({"a": "<4", "b": "5.2f"})
    table.show("x", 1.0)
    table.show("y", 2.0)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["a", "----", "x", "y"]
