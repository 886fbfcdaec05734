"""What is built and installed: one version, the Pythons that are promised, and every file in the wheel."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import pplvi

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSIONS = ["3.11", "3.12", "3.13"]


def test_the_version_is_written_once() -> None:
    assert "version" in PROJECT["dynamic"]
    assert f"\nversion: {pplvi.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_promised_versions_of_python_are_those_that_are_tested() -> None:
    prefix = "Programming Language :: Python :: 3."
    assert [f"3.{line.removeprefix(prefix)}" for line in PROJECT["classifiers"] if line.startswith(prefix)] == VERSIONS
    assert PROJECT["requires-python"] == f">={VERSIONS[0]}"
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert f"python-version: {VERSIONS}".replace("'", '"') in workflow


def test_versions_that_were_tested_are_of_what_is_required() -> None:
    pinned = {re.split("==", line)[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    required = {re.split(r"[><=!;\[ ]", each)[0].lower() for each in PROJECT["dependencies"]}
    assert required <= pinned


def test_the_source_distribution_builds_a_wheel_with_everything(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run([*build, "-t", "sdist"], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as source:
        source.extractall(tmp_path, filter="data")
    subprocess.run([*build, "-t", "wheel"], cwd=next(tmp_path.glob("pplvi-*/")), check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        files, metadata = set(wheel.namelist()), next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        assert f"\nVersion: {pplvi.__version__}\n" in wheel.read(metadata).decode()
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "pplvi").rglob("*") if path.is_file()}
    assert {name for name in own if "__pycache__" not in name} == {name for name in files if name.startswith("pplvi/")}
    assert {"pplvi/py.typed", "pplvi/examples/grunfeld.csv"} <= files
