"""``fit(model, "smc")``: from programs as users write them to draws, evidences, and what is said of them."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_results import elpd
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pplvi
from pplvi.fitting.recorded import RecordedDensity
from pplvi.fitting.smc import given_start, run_islands
from pplvi.programs.density import UnconstrainedDensity
from pplvi.samplers import TemperedSMC
from pplvi.samplers.metric import GaussianBase, Metric
from pplvi.samplers.tempered import TemperedLevel


@pytest.fixture(autouse=True, scope="module")
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def rates(y: Tensor) -> None:
    """Counts with a gamma prior on their rate: constrained, and conjugate."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


COUNTS = torch.tensor([3.0, 1.0, 4.0, 2.0])


def rates_evidence() -> float:
    total, n = COUNTS.sum(), len(COUNTS)
    value = torch.lgamma(2 + total) - (2 + total) * math.log(1.0 + n) - torch.lgamma(COUNTS + 1).sum()
    return float(value)


@pyro.infer.config_enumerate
def clusters(y: Tensor) -> None:
    """A mixture of two normals, whose assignments are enumerated."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        which = pyro.sample("which", dist.Bernoulli(0.4))
        pyro.sample("y", dist.Normal(mean * which, 1.0), obs=y)


POINTS = torch.tensor([0.1, 2.2, 1.8, -0.4, 2.5])


def clusters_evidence() -> tuple[float, float]:
    """Log evidence and posterior mean by quadrature."""
    m = torch.linspace(-12, 12, 20_001)
    parts = [math.log(p) + dist.Normal(x, 1.0).log_prob(POINTS[:, None]) for p, x in ((0.6, 0.0 * m), (0.4, m))]
    joint = torch.logaddexp(*parts).sum(0) + dist.Normal(0.0, 2.0).log_prob(m)
    weight = torch.softmax(joint, 0)
    return float(joint.logsumexp(0) + math.log(m[1] - m[0])), float((weight * m).sum())


def schools(sigma: np.ndarray, y: np.ndarray) -> None:
    """Centered, as many write it."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


SIGMA = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


@pytest.fixture(scope="module")
def fitted() -> pplvi.Fit:
    return pplvi.fit(schools, TemperedSMC(num_particles=400), args=(SIGMA, EFFECTS), num_steps=2000, seed=0)


def test_the_easiest_form_is_taken_and_the_posterior_is_right(fitted: pplvi.Fit) -> None:
    """Against the exact evidence, and moments of long NUTS runs of the centered model."""
    posterior = fitted.posterior()
    value, error = posterior.total_log_evidence
    assert abs(value - -31.3114) < 4 * max(error, 0.02)
    draws = {**posterior.draws.latents, **posterior.draws.deterministics}
    assert draws["theta"].shape[1:] == (8,)
    assert fitted.reformed
    assert abs(draws["mu"].mean() - 4.4) < 0.3
    assert abs(draws["mu"].std() - 3.3) < 0.3
    assert abs(draws["theta"][:, 0].mean() - 6.2) < 0.5


@pytest.mark.filterwarnings("ignore:Estimated shape")
def test_islands_are_chains(fitted: pplvi.Fit) -> None:
    posterior = fitted.posterior()
    assert posterior.num_chains == 4
    assert posterior.pareto_k.isnan()
    assert posterior.ess > 400
    assert posterior.verdict.word == "reliable"
    assert len(posterior.resample(50, seed=0)["mu"]) == 50
    data = fitted.to_arviz(num_prior=0, posterior_predictive=False)
    assert data.posterior.sizes["chain"] == 4
    assert "log_evidence" in data.posterior.attrs
    assert float(data.log_likelihood["y"].mean()) < 0
    assert fitted.predict().observed["y"].shape[1:] == (8,)
    assert -32 < elpd(fitted.loo()) < -29
    assert not math.isnan(pplvi.compare({"smc": fitted})["log_evidence"].iloc[0])


def test_the_report_tells_what_was_done(fitted: pplvi.Fit) -> None:
    text = fitted.summary()
    assert "temperatures from batch and match" in text
    assert "by islands" in text
    assert "reliable" in text
    assert repr(fitted) == "Fit(SMC, islands=4)"
    with pytest.raises(ValueError, match="draws of SMC are no parameters"):
        fitted.save("unused")


def test_constrained_sites_and_enumerated_ones() -> None:
    method = TemperedSMC(num_particles=200, num_draws=2000)
    found = pplvi.fit(rates, method, args=(COUNTS,), seed=0).posterior()
    value, error = found.total_log_evidence
    assert abs(value - rates_evidence()) < 4 * error + 0.01
    mean, sd = 12 / 5, math.sqrt(12) / 5
    assert abs(found.draws.latents["rate"].mean() - mean) < 4 * sd / math.sqrt(float(found.ess))
    found = pplvi.fit(clusters, method, args=(POINTS,), seed=0, init="pathfinder").posterior()
    value, error = found.total_log_evidence
    exact, mean = clusters_evidence()
    assert abs(value - exact) < 4 * error + 0.01
    assert set(found.draws.latents) == {"mean"}
    assert abs(found.draws.latents["mean"].mean() - mean) < 0.1


@pytest.mark.parametrize(("model", "y", "evidence"), [(rates, COUNTS, rates_evidence()), (clusters, POINTS, None)])
def test_programs_are_properly_weighted(model: Callable[..., None], y: Tensor, evidence: float | None) -> None:
    """With schedule and kernels of a pilot run, for eight particles on each of many islands."""
    torch.manual_seed(0)
    exact = clusters_evidence()[0] if evidence is None else evidence
    density = RecordedDensity(model, (y,))
    base = GaussianBase.of(torch.ones(1), 1.5 * torch.eye(1))
    levels = TemperedSMC(num_particles=64, num_draws=64).run(density.value_and_gradient, base).levels

    def of_all(level: TemperedLevel) -> TemperedLevel:
        one = Metric(level.metric.covariance[:1], level.metric.root[:1])
        return TemperedLevel(level.beta, one, level.step_size, min(level.num_leapfrog, 6), level.num_moves)

    many = TemperedSMC(num_particles=1600, num_islands=200)
    found = many.run(density.value_and_gradient, base, levels=[of_all(level) for level in levels])
    ratio = (found.log_evidence - exact).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(200)


def test_it_starts_at_any_fitted_guide() -> None:
    guide = pplvi.fit(rates, AutoNormal, args=(COUNTS,), num_steps=200, seed=0, progress=False).guide
    method = TemperedSMC(num_particles=64, num_draws=200)
    found = pplvi.fit(rates, method, args=(COUNTS,), init=guide, seed=0)
    assert "from AutoNormal" in found.summary()
    value, error = found.posterior().total_log_evidence
    assert abs(value - rates_evidence()) < 4 * error + 0.05
    searched = pplvi.AutoPathfinder(rates, seed=0).run(COUNTS)
    islands = run_islands(method, rates, ((COUNTS,), {}), searched, "Pathfinder")
    assert islands.latents["rate"].shape[0] == 4


def test_modes_that_paths_find_are_all_visited() -> None:
    def apart() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
        pyro.factor("modes", torch.logaddexp(*(-50 * ((x - m) ** 2).sum(-1) for m in (-1.5, 1.5))))

    found = pplvi.fit(apart, TemperedSMC(num_particles=400, num_draws=400, max_leapfrog=8), seed=0).posterior()
    share = (found.draws.latents["x"][:, 0] > 0).double().mean()
    assert 0.4 < share < 0.6


def walk(y: Tensor) -> None:
    """A random walk, by its steps: where it is seen are sums of many, so that Pathfinder's low ranks do not fit."""
    steps = pyro.sample("steps", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    pyro.sample("y", dist.Normal(steps.cumsum(-1), 0.3).to_event(1), obs=y)


def walk_evidence(y: Tensor) -> float:
    sums = torch.ones(len(y), len(y)).tril()
    return float(dist.MultivariateNormal(torch.zeros(len(y)), sums @ sums.mT + 0.09 * torch.eye(len(y))).log_prob(y))


def test_paths_that_are_given_are_matched_first() -> None:
    y = torch.sin(torch.arange(40.0))
    paths = pplvi.AutoPathfinder(walk, seed=0, exact_hessian=False, moment_matching=0, num_components=1).run(y)
    torch.manual_seed(0)
    guide, named = given_start(paths, walk, ((y,), {}), None)
    assert isinstance(guide, pplvi.AutoBatchAndMatch)
    assert named == "AutoPathfinder, matched"
    best = max(path.elbo for path in paths.paths)
    assert best < walk_evidence(y) - 5
    assert abs(guide.elbo - walk_evidence(y)) < 0.1
    assert 16 * 512 <= guide.num_gradients < 18 * 512  # few large batches, as for any model of few dimensions
    other = pplvi.AutoDeterministicNormal(rates, seed=0).run(COUNTS)
    assert given_start(other, rates, ((COUNTS,), {}), None) == (other, "AutoDeterministicNormal")


def test_a_guide_that_is_matched_already_is_where_particles_start() -> None:
    y = torch.sin(torch.arange(110.0))
    guide = pplvi.AutoPathfinder(walk, seed=0, num_components=1).run(y)
    assert guide.is_matched
    assert given_start(guide, walk, ((y,), {}), None) == (guide, "AutoPathfinder")


def test_paths_to_several_modes_are_not_matched() -> None:
    def apart() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
        pyro.factor("modes", torch.logaddexp(*(-50 * ((x - m) ** 2).sum(-1) for m in (-1.5, 1.5))))

    paths = pplvi.AutoPathfinder(apart, seed=0, num_paths=8).run()
    assert (paths.get_posterior().parts.loc[:, 0] > 0).double().mean() not in (0, 1)
    assert given_start(paths, apart, ((), {}), None)[0] is paths


def test_one_seed_has_one_result_and_leaves_the_global_state() -> None:
    method = TemperedSMC(num_particles=32, num_draws=64)
    before = torch.get_rng_state()
    one, two = (pplvi.fit(rates, method, args=(COUNTS,), seed=5).posterior().draws.latents["rate"] for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_budget_that_is_too_short_is_told_and_not_called_reliable() -> None:
    """The clock ends the path at once; what is handed over are few draws many times."""
    far = 1000.0 * COUNTS
    guide = pplvi.fit(rates, AutoNormal, args=(far,), num_steps=1, seed=0, progress=False).guide
    found = pplvi.fit(rates, "smc", args=(far,), seed=0, budget=1e-9, init=guide)
    assert found.reasons == ["budget"]
    assert "cut (budget)" in found.summary()
    assert found.posterior().verdict.word != "reliable"


def test_recording_is_the_same_density() -> None:
    recorded, plain = (kind(clusters, (POINTS,)) for kind in (RecordedDensity, UnconstrainedDensity))
    rows = torch.randn(40, 1)
    found = recorded.value_and_gradient(rows)
    assert not recorded.programs
    recorded.value_and_gradient(rows)
    assert list(recorded.programs) == [40]
    assert recorded.programs[40] is not None
    other = torch.randn(40, 1)
    for a, b in zip(recorded.value_and_gradient(other), plain.value_and_gradient(other), strict=True):
        assert torch.allclose(a, b)
    assert torch.allclose(found[0], plain.value_and_gradient(rows)[0])


def test_a_few_rows_are_recorded_once_however_many_there_are_left() -> None:
    """As paths have them, which end one after another."""
    recorded, plain = (kind(clusters, (POINTS,)) for kind in (RecordedDensity, UnconstrainedDensity))
    for number in [4] * 5 + [3] * 5:
        assert not recorded.programs
        recorded.value_and_gradient(torch.randn(number, 1))
    assert list(recorded.programs) == [4]
    assert recorded.programs[4] is not None
    for number in (4, 2, 1):
        rows = torch.randn(number, 1)
        for a, b in zip(recorded.value_and_gradient(rows), plain.value_and_gradient(rows), strict=True):
            assert a.shape == b.shape
            assert torch.allclose(a, b)


def test_programs_that_branch_on_draws_are_run_one_by_one() -> None:
    def branching() -> None:
        if pyro.sample("z", dist.Normal(0.0, 1.0)) > 0:
            pyro.factor("right", torch.tensor(math.log(3.0)))

    density = RecordedDensity(branching)
    rows = torch.randn(20, 1)
    for _ in range(26):
        value, _ = density.value_and_gradient(rows)
    assert not density.programs
    expected = dist.Normal(0.0, 1.0).log_prob(rows[:, 0]) + math.log(3.0) * (rows[:, 0] > 0)
    assert torch.allclose(value, expected)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"data": [COUNTS]}, "SMC has no use for"),
        ({"compile": True}, "SMC has no use for"),
        ({"num_warmup": 5}, "SMC has no use for"),
        ({"budget": -1.0}, "expected a positive number"),
        ({"init": "laplace"}, "expected one of"),
        ({"num_steps": 0}, "expected a whole number"),
    ],
)
def test_bad_input_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pplvi.fit(rates, "smc", args=(COUNTS,), seed=0, **wrong)  # type: ignore[arg-type]


def test_models_without_one_density_are_refused() -> None:
    def minibatch(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Poisson(rate), obs=y[rows])

    def discrete(y: Tensor) -> None:
        which = pyro.sample("which", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(which, 1.0).expand([len(y)]).to_event(1), obs=y)

    for model, said in ((minibatch, "subsampled"), (discrete, "discrete")):
        with pytest.raises(ValueError, match=said):
            pplvi.fit(model, "smc", args=(COUNTS,), seed=0)
