"""The demo runs end to end at a small size, and its table says what was computed."""

import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import arviz as az
import pytest
import torch

from pplvi.examples import demo


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo with one example and few draws, in this process."""
    out = tmp_path_factory.mktemp("demo")
    demo.main(["--examples", "bioassay", "--draws", "60", "--processes", "1", "--out", str(out)])
    return out


def test_table_has_a_row_for_every_run(output: Path) -> None:
    lines = [line.split() for line in (output / "table.txt").read_text().splitlines()]
    nuts, auto = (next(line for line in lines if line[:1] == [name]) for name in demo.ALGORITHMS)
    assert nuts[1] == "NUTS"
    assert auto[1].startswith("Auto")
    assert float(auto[2]) < 1
    assert auto[-1] == "reliable"


def test_files_are_a_page_with_pictures_reports_and_arviz_data(output: Path) -> None:
    assert {path.suffix for path in output.iterdir()} == {".nc", ".png", ".txt", ".html"}
    page = (output / "index.html").read_text()
    pictures = [path.name for path in output.glob("*.png")]
    assert len(pictures) == 2
    assert all(f'src="{name}"' in page for name in pictures)
    assert "Verdict: reliable." in page
    for name in demo.ALGORITHMS:
        data = az.from_netcdf(output / f"bioassay-{name}.nc")
        assert data.posterior["a"].dims == ("chain", "draw")


def test_errors_are_in_standard_deviations_of_the_reference() -> None:
    x = torch.randn(4000, 2)
    x = (x - x.mean(0)) / x.std(0)
    reference = {"a": x[:, 0], "b": 10 * x}
    moved = {"a": reference["a"] + 0.5, "b": reference["b"] * 1.25}
    mean, spread = demo.errors(moved, reference)
    assert mean == pytest.approx(0.5, abs=1e-4)
    assert spread == pytest.approx(0.25, abs=1e-4)


def test_a_failure_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    """One without the reference to compare with, one that failed."""
    nuts, auto = demo.plan(["eight_schools"], 20, tmp_path)
    wrong = demo.run(replace(auto, example="seven_schools"))
    assert wrong.failure.startswith("ValueError: ")
    assert "seven_schools" in wrong.failure
    draws = {"mu": torch.randn(20)}
    done = demo.Outcome(auto, draws, 1.5, ("AutoNormal", "0.50", "9", "-1.00 +- 0.10"), verdict="reliable")
    outcomes = [demo.failed(nuts, "RuntimeError: no\nroom"), done]
    rows = demo.table(demo.rows_of(outcomes)).splitlines()
    assert any(line.startswith("NUTS") and line.endswith("failed: RuntimeError: no room") for line in rows)
    assert any("-1.00 +- 0.10" in line and line.endswith("1.5  reliable") for line in rows)
    assert "failed: RuntimeError: no room" in demo.page(outcomes)
    demo.plot_all(outcomes)
    assert not list(tmp_path.iterdir())


def test_a_dead_process_takes_one_run_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool breaks with the first run in it; then each run has a process of its own."""

    def in_processes(jobs: Sequence[demo.Job], processes: int) -> Iterator[demo.Outcome]:
        for job in jobs:
            if job.algorithm == "NUTS":
                raise BrokenProcessPool
            yield pickle.loads(pickle.dumps(demo.failed(job, "is done")))

    monkeypatch.setattr(demo, "_in_processes", in_processes)
    found = {each.job.algorithm: each.failure for each in demo.run_all(demo.plan(["eight_schools"], 20, tmp_path), 2)}
    assert found == {"NUTS": "its process died, for lack of memory perhaps", "auto": "is done"}
