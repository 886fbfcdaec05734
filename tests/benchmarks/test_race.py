"""The race: its table of medians, files of results side by side, and programs of other packages that are ours."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import race
from benchmarks.race_peers import PEERS, log_densities
from benchmarks.race_problems import NAMES, load


def row(problem: str, method: str, seed: int, usable: bool, seconds: float) -> dict:
    return {"problem": problem, "method": method, "seed": seed, "usable": usable, "cpu_seconds": seconds}


ROWS = [row("gp", "auto", seed, True, seconds) for seed, seconds in enumerate([5.0, 9.0, 6.0])]
THEIRS = [row("gp", "nutpie", 0, True, 37.0), row("gp", "nutpie", 1, False, 31.0)]
THEIRS += [{"problem": "sv", "method": "nutpie", "seed": 0, "failure": "not done after 200 CPU s"}]


def test_files_are_shown_side_by_side(tmp_path, capsys):
    paths = [tmp_path / "ours.json", tmp_path / "theirs.json"]
    for path, rows in zip(paths, (ROWS, THEIRS), strict=True):
        path.write_text(json.dumps({"rows": rows}))
    race.main(["--show", *map(str, paths)])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.strip().splitlines()]
    assert lines[0] == ["problem", "auto", "nutpie"]
    assert lines[2:] == [["gp", "6.0", "(34.0: 1 of 2)"], ["sv", "-", "(-: 0 of 1)"]]


def test_a_run_is_killed_by_its_cpu_seconds(tmp_path):
    order = {"problem": "gp", "method": "auto", "seed": 3, "data": str(tmp_path), "budget": None}
    assert race.apart(order, 1.0) == {
        "problem": "gp",
        "method": "auto",
        "seed": 3,
        "failure": "not done after 1 CPU s",
    }


# ---------------------------------------------------------------------- the same posterior


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Small data for every problem, in the folders of the real ones."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("race", "targets", "posteriordb"):
        (folder / name).mkdir()
    y = rng.normal(size=12)
    x, design = rng.normal(size=12), rng.normal(size=(12, 3))
    groups = {"g": np.arange(12), "x": x, "y": np.abs(y).round()}
    of_race = {name: {"X": design, "y": y} for name in ("hs10", "hs100")}
    of_race |= {"gp": {"x": x, "y": y}, "sv": {"y": y}, "garch": {"y": y}, "pois": groups, "radon": groups}
    for name, arrays in of_race.items():
        known = {f"data_{key}": value for key, value in arrays.items()}
        np.savez(folder / "race" / f"{name}.npz", reference_mean=0.0, reference_sd=1.0, **known)
    targets = {"eight_schools": {"y": y[:8], "sigma": 1 + x[:8] ** 2}, "ionosphere": {"X": design, "y": 1.0 * (y > 0)}}
    for name, arrays in targets.items():
        np.savez(folder / "targets" / f"{name}.npz", reference_draws=np.zeros((2, 2)), **arrays)
    stan = {
        "low_dim_gauss_mix-low_dim_gauss_mix": {"y": y},
        "hmm_example-hmm_example": {"y": 5 + y},
        "kidiq-kidscore_interaction": {"kid_score": y, "mom_hs": 1.0 * (x > 0), "mom_iq": design[:, 0]},
        "diamonds-diamonds": {"Y": y, "X": rng.normal(size=(12, 25))},
    }
    for name, arrays in stan.items():
        content = json.dumps({key: value.tolist() for key, value in arrays.items()})
        (folder / "posteriordb" / f"{name}.data.json").write_text(content)
        np.savez(folder / "posteriordb" / f"{name}.draws.npz", x=np.zeros((2, 2)))
    return folder / "race"


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("peer", "name"),
    [*(("numpyro", name) for name in NAMES), *(("nutpie", name) for name in ("schools", "mixture", "hmm", "gp"))],
)
def test_programs_of_other_packages_are_ours(peer, name, data):
    """Log densities are equal at draws of the prior."""
    if not PEERS[peer].installed:
        pytest.skip(f"{peer} is not installed")
    ours, theirs = log_densities(load(data, name), peer, points=3)
    assert torch.tensor(ours).isfinite().all()
    np.testing.assert_allclose(theirs, ours, rtol=1e-7)
