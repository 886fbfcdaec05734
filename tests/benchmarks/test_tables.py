"""The tables of the benchmarks, small: their rows, what they print, their files, and what they must show."""

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch


class Command:
    """A benchmark as it is run on the command line, and the file that its last run wrote."""

    def __init__(self, main: Callable[[list[str]], Any], out: Path) -> None:
        self.main, self.out = main, out

    def __call__(self, options: str, *more: str) -> Any:
        return self.main([*options.split(), *more, "--out", str(self.out)])

    @property
    def written(self) -> dict[str, Any]:
        return json.loads(self.out.read_text())


class Case(NamedTuple):
    """A benchmark, what it prints, how long a part of its file is, and what else must hold."""

    script: str
    printed: str
    part: str
    length: int
    check: Callable[[Command, ModuleType], None]


def kernels(run: Command, module: ModuleType) -> None:
    options = "--targets funnel --transitions 1 --particles 4 --draws 2000 --seeds 1"
    (trained,) = run(f"{options} --kernels CMCD --steps 60 --rate 0.02")
    rows = run(f"{options} --steps 3 --rate 0.001")
    assert [row.kernel for row in rows] == ["base", "MCVAE", "DAIS", "UHA", "MCD", "CMCD"]
    assert [row.gradients for row in rows] == [0, 2, 2, 2, 2, 2]
    assert all(row.gap > 0 for row in rows)
    assert trained.gap < rows[5].gap - 0.1


def bars(run: Command, module: ModuleType) -> None:
    """Exact gradients lead, and chains from the data trail."""
    found = run("--steps 1000 --seeds 1 --lr 0.5 --no-compile")
    rows = {(r.negative, r.centered, r.momentum): r.mean for r in found}
    assert rows["exact", True, 0.9] > -2.65
    assert rows["exact", True, 0.0] > rows["persistent", True, 0.0] > rows["contrastive", True, 0.0]
    assert rows["persistent", False, 0.0] > rows["contrastive", False, 0.0]
    assert max(rows.values()) < run.written["optimum"] == pytest.approx(-2.5993, abs=1e-4)


def partition(run: Command, module: ModuleType) -> None:
    run("--epochs 1 --betas 20 --chains 10 --sweeps 5 --hidden 4 --repeats 2 --speed-work 500 --rounds 1")
    rows = run.written["rows"]
    assert {row["table"] for row in rows} == {"large", "partition", "speed"}
    large = [row for row in rows if row["table"] == "large"]
    assert [row["what"].split(", ")[-1] for row in large] == ["averaged parameters", "last parameters"]
    for row in large:
        assert row["interval"][0] <= row["log_likelihood"] <= row["interval"][1]
    assert large[0]["log_likelihood"] != large[1]["log_likelihood"]
    assert all(row["chain_betas_a_second"] > 0 for row in rows if row["table"] == "speed")


def gradients(run: Command, module: ModuleType) -> None:
    """Rainforth et al. 2018: K^(-1/2); Tucker et al. 2019: K^(1/2), and a variance that falls with K."""
    rows = run("--particles 4 16 64 --replicas 600")
    by_name = {name: [row for row in rows if row.estimator == name] for name in ("reparam", "stl", "dreg", "vimco")}
    variance = [row.sd**2 for row in by_name["dreg"]]
    assert variance[0] > variance[1] > variance[2]
    ratio = {name: [row.snr for row in found] for name, found in by_name.items()}
    assert ratio["dreg"][0] < ratio["dreg"][1] < ratio["dreg"][2]
    assert ratio["reparam"][0] > ratio["reparam"][1] > ratio["reparam"][2]
    slopes = run.written["slopes"]
    assert slopes["dreg"] == pytest.approx(0.5, abs=0.2)
    assert slopes["reparam"] == pytest.approx(-0.5, abs=0.2)
    assert len(rows) == 12


def hidden_markov(run: Command, module: ModuleType) -> None:
    """Its two ways to log Z agree."""
    rows = run("--time-steps 5 --test-instances 20 --samples 400 --particles 10 --iterations 8 --mode eager")
    assert [row.method for row in rows] == ["none", "mixture", "learned"]
    for row in rows:
        assert row.log_z == pytest.approx(row.log_z_exact, abs=0.5)
        assert row.log_z_resampled == pytest.approx(row.log_z_exact, abs=0.5)
        assert 1 <= row.ess <= row.ess_exact + 20
    assert run.written["settings"]["time_steps"] == 5


def mixture(run: Command, module: ModuleType) -> None:
    """Weights per image beat one weight."""
    rows = run("--seconds 1 --fit-steps 250 --mode trace --test-batches 4")
    assert [row.method for row in rows] == ["labels", "prior", *["RWS"] * 3, *["NVI"] * 3]
    labels, prior, *_, rws = rows[:5]
    nvi = rows[-1]
    assert 0 < labels.error < nvi.error < rws.error
    assert nvi.error < prior.error
    assert nvi.ess_of_an_image > 5 * rws.ess_of_an_image
    assert nvi.accuracy > 0.5
    assert math.isnan(run.written["rows"][0]["ess"])


def machine(run: Command, module: ModuleType) -> None:
    """A machine learns more than the means of the pixels."""
    rows, times = run("--no-compile --seeds 1 --share 6 --turns 1 --rows 2")
    assert set(times) == {"SVI", "SVI, centered", "scikit-learn", "bare torch", "matrix products"}
    train, test = module.images(None, "sampled")
    pixels = torch.distributions.Bernoulli(train.mean(0).clamp(0.01, 0.99)).log_prob(test).sum(-1).mean().item()
    assert rows[0].seeds[0] > pixels + 1.0
    assert [row["name"] for row in run.written["log_likelihood"]] == ["PCD-1, lr to 0"]


def ring(run: Command, module: ModuleType) -> None:
    options = "--targets 4 --methods AVO NVIR* --batches 10 --mode eager"
    short, long = run(f"{options} --steps 2"), run(f"{options} --steps 60")
    assert [row.method for row in long] == ["AVO", "NVIR*"]
    assert all(row.log_z == pytest.approx(math.log(8), abs=5 * row.log_z_sd + 0.2) for row in long)
    assert long[1].ess > short[1].ess
    assert long[0].betas == short[0].betas
    assert long[1].betas != short[1].betas


def levels(run: Command, module: ModuleType) -> None:
    """Memory is flat level by level, and grows with all levels."""
    found = run("--no-compiler --rounds 2 --targets 4 16 --particles 100")
    kept = {(row["step"], row["targets"]): row["bytes"] for row in found["memory"]}
    assert kept["level by level", 16] < 1.1 * kept["level by level", 4]
    assert kept["all levels", 16] > 4 * kept["all levels", 4]
    assert {row["step"] for row in found["time"]} == {"level by level", "all levels", "by hand", "CompiledSVI trace"}
    assert run.written["memory"] == found["memory"]


def nested(run: Command, module: ModuleType) -> None:
    """Nested gradients have more signal with more samples."""
    rows = run("--targets 3 --samples 4 64 --repetitions 30 --steps 3 --objectives NVI AVO")
    ratio = {(row.objective, row.trained_steps, row.num_samples): row.snr for row in rows}
    assert all(ratio[name, 0, 64] > ratio[name, 0, 4] for name in ("NVI", "AVO"))


def examples(run: Command, module: ModuleType) -> None:
    """Chains of all kinds, and what their example learns in minibatches, as under Pyro's own loss."""
    rows = run("--steps 3 --judge 2 --only hmm-1-* hmm-7-* lda")
    for row in rows:
        assert not row["failed"]
        assert row["first"] < 1e-5  # float32: rounding
        assert row["eager"] == pytest.approx(row["pyro"], rel=1e-4)
        assert row["trace"] == pytest.approx(row["pyro"], rel=1e-4)


def ways(run: Command, module: ModuleType) -> None:
    """Each way is timed where it is right, and the floor is the arithmetic of the program's density."""
    options = "--draws 3 --particles 2 --rounds 1 --seconds 0 --problems schools hierarchical --programs"
    found = run(options, "X @ b", "Gaussian process")
    product, process = found["loop"]
    assert product["floor ms"] is None
    assert all(process[f"{way} ms"] > 0 for way in ("loop", "vmap", "floor"))
    assert process["vmap gains"] > 0
    schools, hierarchical = found["broadcast"]
    assert schools["vmap / broadcast"] > 0
    assert hierarchical["vmap / broadcast"] is None  # it does not broadcast
    assert "cannot be run that way" in hierarchical["failed"]
    x, _, y = module.data()
    length = torch.tensor([0.5, 2.0])
    gram = torch.exp(-0.5 * torch.cdist(x, x).square() / length[:, None, None] ** 2) + 0.25 * torch.eye(len(x))
    exact = torch.distributions.MultivariateNormal(torch.zeros(len(x)), gram).log_prob(y)
    floor = module.process_floor(x, y, {"length": length}) - len(x) * math.log(2 * math.pi) / 2
    torch.testing.assert_close(floor, exact, rtol=1e-4, atol=1e-3)


def wake_sleep(run: Command, module: ModuleType) -> None:
    options = "--mode trace --seconds 1 --points 3 --draws 50 --hidden 8 --test-images 40"
    rows = run(f"{options} --methods WakeSleep", "RWS mixture")
    assert [row.method for row in rows] == ["WakeSleep", "RWS mixture"]
    for row in rows:
        assert len(row.curve) == 3
        first, last = row.curve[0], row.curve[-1]
        assert first.steps < last.steps
        assert -64 * math.log(2) < last.log_p  # better than fair coins
        assert first.log_p < last.log_p < -5
        assert all(point.gap >= 0 and point.gap_on_dreams >= 0 for point in row.curve)
    assert [row["method"] for row in run.written["rows"]] == ["WakeSleep", "RWS mixture"]


def sparse(run: Command, module: ModuleType) -> None:
    """EM ends where scikit-learn does; restarts save steps; mean field in turn never falls."""
    found = run(
        "--rounds 1 --em-steps 45 --images 300 --digits 60 --atoms 20 --steps 8 --lista-steps 30 --starts 1 "
        "--modes recorded"
    )
    em, lasso, dictionary, lista, binary = (found[name] for name in ("em", "lasso", "dictionary", "lista", "binary"))
    assert float(em[1]["log_p"]) == pytest.approx(float(em[0]["log_p"]), abs=1e-7)
    assert em[1]["iterations"] <= 1.1 * em[0]["iterations"] < em[2]["iterations"]
    steps = {row["method"]: row["steps"] for row in lasso}
    assert steps["fista, restarts"] < steps["fista"] < steps["ista"]
    assert all(row["gap"] <= 1e-6 for row in lasso[1:])
    assert dictionary[1]["objective"] < 1.1 * dictionary[0]["objective"]
    assert lista[-1]["excess"] < lista[-2]["excess"]
    assert all(row["falls_in_turn"] == 0 and row["bound"] < row["log_p"] for row in binary)
    assert binary[2]["falls_at_once"] > binary[2]["falls_damped"] > 0


def undirected(run: Command, module: ModuleType) -> None:
    """Machines of all kinds learn something, and their likelihoods lie in their intervals."""
    tables = run(
        "--tables labels music images --machines conditional discriminative --frames 20 --betas 4 --share 0.0003"
    )
    assert [row["model"].split(",")[0] for row in tables["labels"]] == ["discriminative"]
    assert all(0 <= row["test error"] <= 1 for row in tables["labels"])
    for row in tables["music"]:
        assert row["low"] < row["test nats"] < row["high"]
        assert row["test nats"] > -88 * math.log(2)
    assert tables["images"][0]["ms an update"] > 0


def directed(run: Command, module: ModuleType) -> None:
    """Exact densities beat independent pixels, a bound is below the exact marginal, moments come nearer than noise."""
    found = run("--only nade made factors dlgm gmmn gan speed --seconds 0.2 --hidden 16 --draws 20 --test-images 50")
    pixels = torch.distributions.Bernoulli(module.images(None).train.mean(0).clamp(0.01, 0.99))
    independent = pixels.log_prob(module.images(None).test[:50]).sum(-1).mean().item()
    assert all(found[name][0]["test"] > independent for name in ("nade", "made"))
    (factors,) = found["factors"]
    assert factors["elbo"] < factors["exact"] == pytest.approx(factors["elbo_of_exact_guide"], abs=1e-3)
    assert [row["batch"] for row in found["gmmn"]] == [50, 100, 500, None]
    assert found["gmmn"][-1]["mmd2"] < found["gmmn"][0]["mmd2"] < 2.0
    assert [row["of"] for row in found["gan"]] == [8, 8, 25, 25]
    assert set(run.written["tables"]) == set(found)


CASES = [
    Case("annealed_kernels", "ESS/N", "rows", 6, kernels),
    Case("bars_and_stripes", "negative phase", "rows", 7, bars),
    Case("boltzmann", "averaged parameters", "rows", 2 + 1 + 6, partition),
    Case("directed", "blocks", "tables", 7, directed),
    Case("gradients", "SNR goes as K^", "rows", 12, gradients),
    Case("hmm_heuristics", "log Z (R)", "rows", 3, hidden_markov),
    Case("mixture_vae", "accuracy", "rows", 8, mixture),
    Case("restricted_boltzmann", "times bare torch", "log_likelihood", 1, machine),
    Case("sparse_coding", "fista, restarts", "binary", 3, sparse),
    Case("annealing_ring", "log Z (R)", "rows", 2, ring),
    Case("levels", "level by level", "memory", 4, levels),
    Case("nested_gradients", "NVI", "rows", 8, nested),
    Case("particle_ways", "vmap / broadcast", "loop", 2, ways),
    Case("pyro_examples", "hmm-7", "rows", 3, examples),
    Case("undirected", "test error", "tables", 3, undirected),
    Case("wake_sleep", "log p", "rows", 2, wake_sleep),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.script)
@pytest.mark.table(3)
def test_table(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"benchmarks.{case.script}")
    run = Command(module.main, tmp_path / "table.json")
    case.check(run, module)
    assert len(run.written[case.part]) == case.length
    assert case.printed in capsys.readouterr().out
