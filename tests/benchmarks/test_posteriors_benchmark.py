"""The table of benchmarks/posteriors.py, small and without data, and the parts that its numbers stand on."""

import importlib
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def module():
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_rows_are_measured_merged_and_printed(module, tmp_path, capsys):
    out = tmp_path / "table.json"
    main = module("posteriors").main
    options = ["--data", str(tmp_path), "--targets", "funnel", "--draws", "2000", "--out", str(out)]
    main([*options, "--guides", "deterministic", "--seeds", "0"])
    rows = main([*options, "--guides", "pathfinder", "deterministic", "--seeds", "0"])
    assert [row["guide"] for row in rows] == ["pathfinder", "deterministic"]  # the first was replaced, not repeated
    assert rows == json.loads(out.read_text())["rows"]
    for row in rows:
        assert 0.5 < row["gap"] < 1000.0
        assert row["gradients"] > 0
        assert row["w1"][0] > row["floor"]
    assert "best .014, reach .007" in capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.with_suffix(".md").read_text().splitlines()]
    assert sum(line.startswith("| funnel") for line in lines) == 2  # in the table, and in that of the reach
    assert any(line.startswith("| funnel | pathfinder") and "no: gap" in line for line in lines)


def test_wasserstein_of_shifted_and_scaled_normals(module):
    torch.manual_seed(0)
    x = torch.randn(20_000, 1)
    distance = module("posteriors").wasserstein
    assert distance(x, x + 0.3).item() == pytest.approx(0.3, abs=1e-6)
    assert distance(x, 2 * x).item() == pytest.approx(math.sqrt(2 / math.pi), rel=0.03)  # E|x|
    assert distance(x[:10_000], x[10_000:]).item() < 0.05


@pytest.mark.parametrize("length", [2, 3, 6, 7])
def test_the_forward_algorithm_sums_over_all_paths(module, length):
    torch.manual_seed(length)
    emission, transition = torch.randn(3, length, 2), torch.rand(3, 2, 2).log()
    found = module("posteriordb_models").forward_algorithm(emission, transition)
    paths = []
    for path in itertools.product(range(2), repeat=length):
        steps = sum(transition[:, a, b] for a, b in itertools.pairwise(path))
        paths.append(steps + sum(emission[:, t, s] for t, s in enumerate(path)))
    assert torch.allclose(found, torch.stack(paths).logsumexp(0))


def test_runge_kutta_solves_a_rotation(module):
    def slope(t: float, z: torch.Tensor) -> torch.Tensor:
        return torch.stack([z[..., 1], -z[..., 0]], -1)

    found = module("posteriordb_models").runge_kutta(slope, torch.tensor([1.0, 0.0]), [0.5, 2.0], 0.05)
    times = torch.tensor([0.5, 2.0])
    assert torch.allclose(found, torch.stack([times.cos(), -times.sin()]), atol=1e-6)


def test_evidence_of_the_targets_without_data(module):
    """The funnel is normalised; the wells' evidence is known by quadrature in one pair."""
    targets = module("posterior_targets")
    grid = torch.linspace(-4, 4, 40_001)
    one = (-(grid**4) + 6 * grid**2 + grid / 2).logsumexp(0) + (grid[1] - grid[0]).log() + 0.5 * math.log(2 * math.pi)
    assert 16 * float(one) == pytest.approx(164.696, abs=1e-3)
    assert targets.many_well(Path()).log_z == 164.696
    reference = targets.funnel(Path()).reference
    assert reference.shape == (10_000, 10)
    assert reference[:, 0].std().item() == pytest.approx(3.0, rel=0.05)


def test_the_reach_takes_the_worst_seed_and_the_floor(module):
    reach = module("posterior_reach")
    rows = [
        {"target": "kilpisjarvi_mod-kilpisjarvi", "guide": guide, "mean_error": (0.3, mean), "sd_error": (0.3, 0.02)}
        | {"cpu_seconds": seconds, "mean_floor": 0.04, "sd_floor": 0.01}
        for guide, mean, seconds in [("a", 0.02, 1.0), ("a", 0.047, 1.0), ("b", 0.05, 1.0), ("c", 0.01, 3.0)]
    ]
    claim = reach.Claim("kilpisjarvi_mod-kilpisjarvi", {"mean": 0.03, "sd": 0.03, "seconds": 2})
    guide, group = reach.best(claim, rows)
    cells = reach.worst(claim, group)
    assert (guide, len(group)) == ("a", 2)
    assert cells["mean"] == (0.047, pytest.approx(0.048), True)  # 1.2 times the floor is the larger one
    assert cells["sd"] == (0.02, 0.03, True)
    assert not reach.worst(claim, rows[3:])["seconds"][2]
    text = " ".join(reach.verdicts(rows).split())
    assert "| kilpisjarvi_mod-kilpisjarvi | a | 2 |" in text
    assert "| diamonds-diamonds | - | 0 | not run | - |" in text


def test_guides_of_numpyro_are_weighted_as_ours(module):
    pytest.importorskip("numpyro")
    guides = module("numpyro_guides")
    trained = guides.train("funnel", "numpyro AutoNormal", Path(), seed=0, steps=20)
    posterior = trained.posterior(1_000, seed=1, chunk=1_000)
    assert posterior.draws.latents["x"].shape == (1_000, 9)
    assert trained.gradients == 20 * guides.PARTICLES
    assert posterior.elbo[0] < 0.05  # log Z is 0
    assert posterior.log_weight.exp().mean() < 2.0
