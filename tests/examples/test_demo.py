"""The demo runs end to end at a small size, and its table says what was computed."""

import os
from dataclasses import replace
from pathlib import Path

import arviz as az
import pytest
import torch

from pplvi.examples import demo


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo with one example and few steps, in this process."""
    out = tmp_path_factory.mktemp("demo")
    arguments = ["--examples", "eight_schools", "--steps", "40", "--draws", "100", "--processes", "1"]
    demo.main([*arguments, "--out", str(out)])
    return out


def test_table_has_a_row_for_every_run(output: Path) -> None:
    rows = [
        line.split() for line in (output / "table.txt").read_text().splitlines() if line.startswith(("Auto", "NUTS"))
    ]
    pairs = {(guide, objective) for guide in demo.GUIDES for objective in demo.OBJECTIVES}
    assert {tuple(row[:2]) for row in rows[1:]} == pairs
    assert rows[0][0] == "NUTS"
    assert len(rows) == 10


def test_files_are_plots_reports_and_arviz_data(output: Path) -> None:
    shown = "eight_schools-" + "-".join(demo.SHOWN)
    assert (output / f"{shown}.txt").read_text()
    assert {path.suffix for path in output.iterdir()} == {".nc", ".png", ".txt"}
    for stem in (shown, "eight_schools-NUTS"):
        data = az.from_netcdf(output / f"{stem}.nc")
        assert list(data.posterior["theta"].coords["school"].values) == list("ABCDEFGH")


def test_errors_are_in_standard_deviations_of_the_reference() -> None:
    x = torch.randn(4000, 2)
    x = (x - x.mean(0)) / x.std(0)
    reference = {"a": x[:, 0], "b": 10 * x}
    moved = {"a": reference["a"] + 0.5, "b": reference["b"] * 1.25}
    mean, spread = demo.errors(moved, reference)
    assert mean == pytest.approx(0.5, abs=1e-4)
    assert spread == pytest.approx(0.25, abs=1e-4)


def test_processes_give_what_one_process_gives_and_a_failure_is_a_row(tmp_path: Path) -> None:
    jobs = [job for job in demo.plan(["eight_schools"], 5, 20, tmp_path) if job.guide == "AutoNormal"][:2]
    wrong = replace(jobs[0], example="seven_schools")
    parallel = {outcome.job: outcome for outcome in demo.run_all([wrong, *jobs], 2)}
    for outcome in demo.run_all(jobs, 1):
        assert outcome.quality == parallel[outcome.job].quality
        for name, draws in outcome.draws.items():
            assert torch.equal(draws, parallel[outcome.job].draws[name])
    assert parallel[wrong].failure.startswith("ValueError: ")
    assert "seven_schools" in parallel[wrong].failure


def test_the_table_goes_on_where_runs_failed(tmp_path: Path) -> None:
    """One without the reference to compare with, one that failed."""
    jobs = [job for job in demo.plan(["eight_schools"], 5, 20, tmp_path) if job.guide in ("AutoNormal", "NUTS")][:3]
    draws = {"mu": torch.randn(20)}
    done = demo.Outcome(jobs[1], draws, draws, 1.5, ("-1.00", "0.50", "9", "-1.00 +- 0.10"))
    outcomes = [demo.failed(jobs[0], "RuntimeError: no\nroom"), done, demo.failed(jobs[2], "its process died")]
    rows = demo.table(outcomes).splitlines()
    assert "NUTS                                          failed: RuntimeError: no room" in rows
    assert sum(line.endswith("failed: its process died") for line in rows) == 1
    assert sum("-1.00 +- 0.10" in line and line.endswith("1.5") for line in rows) == 1
    demo.plot_all(outcomes)
    assert not list(tmp_path.iterdir())


def dies(job: demo.Job) -> demo.Outcome:
    """In place of a run: the first one takes its process with it."""
    if job.objective == "ELBO":
        os._exit(1)
    return demo.failed(job, "is done")


@pytest.mark.slow
def test_a_dead_process_takes_one_run_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [job for job in demo.plan(["eight_schools"], 5, 20, tmp_path) if job.guide == "AutoNormal"][:2]
    monkeypatch.setattr(demo, "run", dies)
    found = {outcome.job.objective: outcome.failure for outcome in demo.run_all(jobs, 2)}
    assert found == {"ELBO": "its process died, for lack of memory perhaps", "ImportanceWeightedELBO": "is done"}
