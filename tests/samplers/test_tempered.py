"""Tempered sequential Monte Carlo: evidences are unbiased, draws are the target's, and islands tell what they miss."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor

from pplvi.posterior.islands import evidence_of_islands
from pplvi.samplers.autocorrelation import best_lengths
from pplvi.samplers.metric import GaussianBase, Metric
from pplvi.samplers.tempered import Target, TemperedDraws, TemperedLevel, TemperedSMC

Density = Callable[[Tensor], Tensor]


def target_of(log_density: Density) -> Target:
    def both(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            value = log_density(leaf)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope

    return both


def normal(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return (-0.5 * ((z - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian(z: Tensor) -> Tensor:
    """Correlated; the evidence is one."""
    return normal(
        torch.stack([z[:, 0], z[:, 1] - 0.9 * z[:, 0]], 1), torch.tensor([1.0, -0.5]), torch.tensor([0.5, 0.2])
    )


def two_modes(z: Tensor) -> Tensor:
    """Weights of 0.3 and 0.7, and an evidence of e."""
    scale = torch.tensor([0.4])
    parts = [math.log(w) + normal(z, torch.tensor([m]), scale) for w, m in ((0.3, -1.5), (0.7, 1.5))]
    return torch.logaddexp(*parts) + 1.0


def exponential(z: Tensor) -> Tensor:
    """An exponential on the logarithmic scale: one tail is heavier than that of any Gaussian."""
    return z[:, 0] - z[:, 0].exp()


def base_of(dim: int, sd: float = 1.5) -> GaussianBase:
    return GaussianBase.of(torch.zeros(dim), sd**2 * torch.eye(dim))


CASES = {"gaussian": (gaussian, 2, 0.0), "two modes": (two_modes, 1, 1.0), "exponential": (exponential, 1, 0.0)}


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", CASES)
def test_frozen_levels_give_an_unbiased_evidence(name: str) -> None:
    """Schedule, metric, step sizes and numbers of moves are those of a pilot run: properly weighted for any number."""
    log_density, dim, log_evidence = CASES[name]
    target, base = target_of(log_density), base_of(dim)
    levels = TemperedSMC(num_particles=64, num_draws=64).run(target, base).levels
    many = TemperedSMC(num_particles=1600, num_islands=200)  # eight particles each, so that their logarithm is biased
    found = many.run(target, base, levels=[shared(level) for level in levels])
    ratio = (found.log_evidence - log_evidence).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(200)
    assert ratio.std() > 0.02  # there was something to be unbiased about


def shared(level: TemperedLevel) -> TemperedLevel:
    """A level of a pilot run whose first metric all islands of another one take, and whose moves are few."""
    metric = Metric(level.metric.covariance[:1], level.metric.root[:1])
    return replace(level, metric=metric, num_kept=0, num_leapfrog=min(level.num_leapfrog, 8))


def test_frozen_levels_weigh_draws_properly() -> None:
    """Averages of a function times the evidence of its island are unbiased too, not only the evidence."""
    target, base = target_of(two_modes), base_of(1)
    levels = TemperedSMC(num_particles=64, num_draws=64).run(target, base).levels
    found = TemperedSMC(num_particles=1600, num_islands=200).run(target, base, levels=[shared(x) for x in levels])
    right = (found.log_evidence - 1.0).exp() * (found.draws[..., 0] > 0).double().mean(1)
    assert abs(right.mean() - 0.7) < 4 * right.std() / math.sqrt(200)


def test_adaptive_runs_are_consistent() -> None:
    """With more particles, evidence, means and shares of the modes come to the exact ones."""
    for name, (log_density, dim, log_evidence) in CASES.items():
        found = TemperedSMC(num_particles=800, num_draws=800).run(target_of(log_density), base_of(dim))
        error = found.log_evidence.exp().std() / 2
        assert (found.log_evidence.exp().mean() - math.exp(log_evidence)).abs() < 5 * error + 0.02, name
        if name == "two modes":
            assert abs((found.draws > 0).double().mean() - 0.7) < 0.08


@pytest.mark.parametrize("dim", [20, 60])
def test_moves_of_an_island_do_not_know_its_own_spread(dim: int) -> None:
    """Full metrics of few particles, were they those of the particles themselves, would raise the evidence by nats."""
    scale = torch.linspace(0.3, 1.0, dim)
    target = target_of(lambda z: normal(z, torch.zeros(dim), scale))
    base = GaussianBase.of(torch.full((dim,), 0.1), 0.81 * torch.eye(dim))
    found = TemperedSMC(num_particles=256, num_draws=256).run(target, base)
    assert found.log_evidence.mean().abs() < 4 * (found.log_evidence.std() / 2 + 0.1)
    assert (found.draws.flatten(0, 1).std(0) / scale - 1).abs().mean() < 0.12


def test_log_evidence_lies_within_its_error() -> None:
    """In 19 of 20 runs, with the error for few islands that posteriors report."""
    inside = 0
    for seed in range(20):
        torch.manual_seed(seed)
        found = TemperedSMC(num_particles=200, num_draws=200).run(target_of(gaussian), base_of(2))
        value, error = evidence_of_islands(found.log_evidence)
        inside += bool(abs(value) < 2 * error)
    assert inside >= 18


def ranks_are_uniform(ranks: Tensor, bins: int = 10) -> bool:
    """By the chi-squared statistic, at a level of one in a thousand."""
    counts = torch.histc(ranks, bins, 0.0, 1.0)
    statistic = ((counts - len(ranks) / bins) ** 2 / (len(ranks) / bins)).sum()
    return bool(statistic < 27.9)


@pytest.mark.parametrize("kind", ["mean", "scale", "rate"])
def test_ranks_of_the_truth_are_uniform(kind: str) -> None:
    """Simulation-based calibration (Talts et al. 2018) of three models, a simulation on each island of one run."""
    size, count = 20, 200
    truth = torch.randn(count, 1)
    rows = torch.arange(count).repeat_interleave(size)

    def log_likelihood(z: Tensor) -> Tensor:
        y = data[rows]
        if kind == "mean":
            return -0.5 * ((y - z) ** 2).sum(-1)
        if kind == "scale":
            return -0.5 * (y**2 * (-2 * z).exp()).sum(-1) - 5 * z[:, 0]
        return (y * z - z.exp()).sum(-1)

    noise = torch.randn(count, 5)
    data = {"mean": truth + noise, "scale": truth.exp() * noise}.get(kind, torch.poisson(truth.exp().expand(count, 5)))
    target = target_of(lambda z: log_likelihood(z) - 0.5 * (z**2).sum(-1))
    method = TemperedSMC(num_particles=count * size, num_islands=count, num_draws=count * size, max_leapfrog=8)
    found = method.run(target, base_of(1, 1.2))
    assert ranks_are_uniform((found.draws[..., 0] < truth).double().mean(1))


def test_islands_that_disagree_show_it() -> None:
    """Modes that few particles cannot travel between, which islands find in other shares."""

    def apart(z: Tensor) -> Tensor:
        parts = [normal(z, torch.full((3,), m), torch.full((3,), 0.2)) for m in (-4.0, 4.0)]
        return torch.logaddexp(*parts)

    few = TemperedSMC(num_particles=32, num_draws=64, max_leapfrog=8, max_kept=10)
    assert split_gelman_rubin(few.run(target_of(apart), base_of(3, 5.0)).draws).max() > 1.1
    agreeing = TemperedSMC(num_particles=400, num_draws=1600).run(target_of(gaussian), base_of(2))
    assert split_gelman_rubin(agreeing.draws).max() < 1.01


def test_a_run_that_is_cut_says_so_and_has_draws() -> None:
    calls = iter([""] * 3 + ["budget"] * 100)
    narrow = target_of(lambda z: normal(z, torch.full((2,), 3.0), torch.full((2,), 0.01)))
    found = TemperedSMC(num_particles=64).run(narrow, base_of(2), stop=lambda: next(calls))
    assert found.ended == "budget"
    assert found.reached < 1
    assert found.draws.shape[0] == 4
    assert found.draws.isfinite().all()
    assert found.log_evidence.std() > 0.5


def test_levels_that_are_repeated_are_cut_as_others_are() -> None:
    settings, base = TemperedSMC(num_particles=64, num_draws=200), base_of(2)
    narrow = target_of(lambda z: normal(z, torch.full((2,), 3.0), torch.full((2,), 0.01)))
    levels = settings.run(narrow, base).levels
    assert len(levels) > 2
    calls = iter([""] * (levels[0].num_moves * levels[0].num_leapfrog) + ["budget"] * 1000)
    found = settings.run(narrow, base, levels=levels, stop=lambda: next(calls))
    assert (found.ended, found.reached) == ("budget", levels[0].beta)
    assert found.draws.shape == (4, 16, 2)  # the particles, none of them twice


def test_interrupting_gives_what_there_is() -> None:
    left = iter(range(60))

    def target(z: Tensor) -> tuple[Tensor, Tensor]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return target_of(gaussian)(z)

    found = TemperedSMC(num_particles=64, num_draws=10**6).run(target, base_of(2))
    assert found.ended == "interrupted"
    assert found.draws.isfinite().all()


def test_one_seed_gives_one_result() -> None:
    def once() -> TemperedDraws:
        torch.manual_seed(3)
        return TemperedSMC(num_particles=64, num_draws=200).run(target_of(gaussian), base_of(2))

    assert torch.equal(once().draws, once().draws)


@pytest.mark.parametrize(
    "wrong",
    [{"num_particles": 0}, {"num_islands": 1}, {"num_particles": 30}, {"threshold": 1.0}, {"max_moves": True}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        TemperedSMC(**wrong)  # type: ignore[arg-type]


def test_a_target_without_mass_is_refused() -> None:
    nowhere = target_of(lambda z: z.sum(-1) * 0.0 - math.inf)
    with pytest.raises(ValueError, match="finite at no particle of an island"):
        TemperedSMC(num_particles=32).run(nowhere, base_of(1))


def test_the_base_is_the_normal_of_its_covariance():
    torch.manual_seed(0)
    loc, covariance = torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 0.8], [0.8, 1.0]])
    base, z = GaussianBase.of(loc, covariance), torch.randn(5, 2).requires_grad_()
    value, gradient = base.value_and_gradient(z)
    expected = torch.distributions.MultivariateNormal(loc, covariance).log_prob(z)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), z)[0])


def test_particles_beyond_the_support_are_no_reason_to_refuse():
    torch.manual_seed(0)

    def half(z):  # twice the density of a standard normal, above zero
        value = math.log(2) - 0.5 * math.log(2 * math.pi) - 0.5 * z[:, 0] ** 2
        return torch.where(z[:, 0] > 0, value, -math.inf), -z

    found = TemperedSMC(num_particles=200, num_draws=400).run(half, GaussianBase.of(torch.zeros(1), torch.eye(1)))
    assert abs(float(found.log_evidence.mean())) < 0.3
    assert bool((found.draws > 0).all())


def test_particles_that_stay_in_their_modes_are_not_kept_for_ever():
    def apart(z: Tensor) -> Tensor:
        scale = torch.tensor([0.3])
        return torch.logaddexp(*(normal(z, torch.tensor([m]), scale) for m in (-9.0, 9.0)))

    settings = TemperedSMC(num_particles=64, num_islands=2, num_draws=2000, max_kept=400)
    found = settings.run(target_of(apart), base_of(1, 9.0))
    assert found.levels[-1].num_kept < 60


def test_a_run_ends_when_draws_are_enough_and_no_later():
    """As many of the median coordinate as are wanted, and half as many of the worst, from a few moves."""
    found = TemperedSMC(num_particles=512, num_draws=1000).run(target_of(gaussian), base_of(2))
    assert found.ess.median() >= 1000
    assert found.ess.min() >= 500
    assert found.levels[-1].num_kept <= 10


@pytest.mark.parametrize("dim", [3, 600])
def test_a_base_is_given_by_its_covariance_or_its_variances(dim: int) -> None:
    """In many dimensions only the variances of a covariance are kept."""
    variances = torch.linspace(0.5, 2.0, dim, dtype=torch.float64)
    loc, draws = torch.ones(dim, dtype=torch.float64), torch.zeros(2, dim, dtype=torch.float64)
    expected = torch.distributions.Normal(loc, variances.sqrt()).log_prob(draws).sum(1)
    for given in (variances, variances.diag()):
        value, gradient = GaussianBase.of(loc, given).value_and_gradient(draws)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, ((loc - draws) / variances))


def test_a_move_ends_where_the_clock_does() -> None:
    """A trajectory of many steps may take longer than all that is left."""
    places = torch.linspace(-1.0, 1.0, 20, dtype=torch.float64)
    calls = []

    def target(z: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(z))
        return -50 * (z - places).square().sum(1), -100 * (z - places)

    found = TemperedSMC(num_particles=64).run(target, base_of(20), stop=lambda: "budget" if len(calls) >= 30 else "")
    assert found.ended == "budget"
    assert len(calls) == 30
    assert found.reached < 1


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_trajectories_are_best_a_quarter_of_a_period_long(scale: float) -> None:
    """That is where a move forgets where it started; with a narrow coordinate it is the wide one's."""
    sds = torch.tensor([1.0, scale])
    start = sds * torch.randn(400, 2)
    step, path, position, momentum = 0.1, {}, start, torch.randn(400, 2)
    for steps in range(1, int(40 * scale)):
        position = position + step * momentum
        momentum = momentum - step * position / sds**2
        path[steps] = position
    assert best_lengths(start, path, torch.ones(400))[0] * step == pytest.approx(scale * math.pi / 2, rel=0.3)


def test_trajectories_follow_what_is_best() -> None:
    """On a sharp ridge that bends, which no metric straightens, they get longer; on a normal they get short."""

    def ridge(z: Tensor) -> Tensor:
        return -0.5 * z[:, 0] ** 2 - 0.5 * ((z[:, 1] - z[:, 0] ** 2) / 0.05) ** 2

    bent, plain = (
        TemperedSMC(num_particles=400, num_draws=400).run(target_of(density), base_of(2)).levels[-1].num_leapfrog
        for density in (ridge, gaussian)
    )
    assert plain <= 4 < 10 < bent
