"""AutoBatchAndMatch: closed-form updates, exact Gaussians, better full-rank fits than it started from, refusals."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import correlated
from torch.utils._python_dispatch import TorchDispatchMode

from pplvi import Posterior
from pplvi.guides import AutoBatchAndMatch
from pplvi.guides.search.explore import elbos
from pplvi.guides.search.gaussians import full_gaussian
from pplvi.guides.search.lbfgs import Options, minimise
from pplvi.guides.search.matching import Factored, update
from pplvi.programs.density import UnconstrainedDensity

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("dim", [4, 30])
def test_an_update_solves_its_quadratic_equation(dim):
    """The covariance S of the minimum satisfies S U S + S = V, with the paper's U and V, of full rank and of less."""
    torch.manual_seed(0)
    loc, covariance = correlated(dim, seed=4)
    z, g, rate = torch.randn(10, dim), torch.randn(10, dim), 3.0
    mean, s = update(loc, covariance, z, g, rate)
    share = rate / (1 + rate)
    u = rate * g.T.cov(correction=0) + share * torch.outer(g.mean(0), g.mean(0))
    away = loc - z.mean(0)
    v = covariance + rate * z.T.cov(correction=0) + share * torch.outer(away, away)
    assert torch.allclose(s @ u @ s + s, v)
    assert torch.allclose(mean, loc / (1 + rate) + share * (s @ g.mean(0) + z.mean(0)))


@pytest.mark.parametrize("dim", [2, 10])
def test_updates_alone_find_a_gaussian(dim):
    target_loc, target = correlated(dim, seed=dim)
    precision = torch.linalg.inv(target)
    loc, covariance = torch.zeros(dim), torch.eye(dim)
    torch.manual_seed(0)
    for t in range(60):
        z = loc + torch.randn(4 * dim, dim) @ torch.linalg.cholesky(covariance).T
        loc, covariance = update(loc, covariance, z, -(z - target_loc) @ precision, 4 * dim * dim / (t + 1))
    assert torch.allclose(loc, target_loc, atol=1e-2)
    assert torch.allclose(covariance, target, rtol=2e-2, atol=1e-2)


def test_a_gaussian_posterior_is_found_exactly():
    loc, covariance = correlated(6, seed=6)
    model = lambda: pyro.sample("x", dist.MultivariateNormal(loc, covariance))  # noqa: E731
    guide = AutoBatchAndMatch(model, seed=0).run()
    posterior = Posterior(model, guide, num_draws=1000, seed=0)
    assert posterior.gap[0] < 1e-3
    assert guide.elbo == pytest.approx(0.0, abs=1e-3)
    assert torch.allclose(guide.get_posterior().variance, covariance.diagonal(), rtol=1e-2)


def test_in_many_dimensions_small_batches_beat_the_laplace_approximation():
    """A log-Gaussian Cox process with nearly no counts: the mode is far from the mean in all of its 300 dimensions."""
    place = torch.arange(300.0)
    tril = torch.linalg.cholesky(2 * (-(place[:, None] - place).abs() / 2).exp())

    def model() -> None:
        f = pyro.sample("z", dist.Normal(torch.zeros(300), 1.0).to_event(1)) @ tril.T
        pyro.factor("y", -0.3 * f.exp().sum(-1))

    guide = AutoBatchAndMatch(model, seed=0, num_paths=1, num_iterations=60).run()
    with torch.no_grad():
        density = UnconstrainedDensity(model)
        (trail,) = minimise(density.descent, [torch.full((300,), 0.1)], Options())
        laplace = full_gaussian(
            trail.points[-1].position, -torch.linalg.inv(density.hessian(trail.points[-1].position))
        )
    assert guide.elbo > elbos(density, [laplace], 500)[0] + 5.0


def with_factors(dim: int, rank: int) -> Factored:
    torch.manual_seed(dim)
    return Factored(torch.randn(dim), torch.rand(dim) + 0.1, torch.randn(dim, rank), torch.ones(rank), rank)


def test_a_patch_leaves_factors_and_joins_what_can_be_joined():
    one = with_factors(20, 3)
    dense = one.gaussian().covariance
    assert torch.allclose(dense, one.diagonal.diag() + one.factors @ one.factors.T)
    assert torch.allclose(one.patched().gaussian().covariance, dense)
    longer = one.plus(one.factors.T, 1.0).patched()  # sqrt(2) times the same factors
    assert longer.factors.shape == (20, 3)
    assert torch.allclose(longer.gaussian().covariance, dense + one.factors @ one.factors.T)
    assert torch.allclose(Factored.of(one.gaussian(), 3).gaussian().covariance, dense)
    assert torch.allclose(one.towards(longer, 0.5).gaussian().covariance, dense + 0.5 * one.factors @ one.factors.T)


def test_factors_of_a_gaussian_posterior_are_found():
    target = with_factors(300, 2)

    def model() -> None:
        pyro.sample("x", dist.LowRankMultivariateNormal(target.loc, target.factors, target.diagonal))

    guide = AutoBatchAndMatch(model, seed=0, rank=4, num_paths=1, num_iterations=50).run()
    assert guide.gaussians.basis.shape == (1, 300, 4)
    assert guide.elbo > -0.01  # the log evidence is 0, the path's Gaussian is at -31
    assert torch.allclose(guide.get_posterior().variance, target.variance, rtol=0.01)


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest result had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.untyped_storage().nbytes():
            self.elements = max(self.elements, found.untyped_storage().nbytes() // found.element_size())
        return found


def test_nothing_is_of_the_square_of_many_dimensions():
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(4000), 1.0).to_event(1))
        pyro.factor("y", -(z**4).sum(-1))

    with LargestTensor() as largest:
        guide = AutoBatchAndMatch(model, seed=0, num_paths=1, num_iterations=4).run()
    assert guide.gaussians.basis.shape[-1] <= 32
    assert largest.elements <= 1000 * 4000  # a chunk of rows


def skewed() -> None:
    """A logistic regression with few data: its mode is far from its mean."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 4, generator=generator)
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 3.0).to_event(1))
    pyro.factor("y", torch.nn.functional.logsigmoid(w @ x.T).sum(-1))


def test_a_skewed_posterior_is_fitted_better_than_by_its_laplace_approximation():
    from pplvi.guides import AutoPathfinder

    elbos = {}
    for kind, options in ((AutoBatchAndMatch, {}), (AutoPathfinder, {"moment_matching": 0})):
        guide = kind(skewed, seed=0, **options).run()
        elbos[kind] = float(Posterior(skewed, guide, num_draws=20_000, seed=0).elbo[0])
    assert elbos[AutoBatchAndMatch] > elbos[AutoPathfinder] + 0.05


def test_seeds_copies_and_state():
    one, two = (AutoBatchAndMatch(skewed, seed=3).run() for _ in range(2))
    assert torch.equal(one.loc, two.loc)
    z = torch.randn(5, 4)
    expected = one.get_posterior().log_prob(z)
    fresh = AutoBatchAndMatch(skewed)
    fresh.load_state_dict(one.state_dict())
    fresh()
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one)), fresh):
        assert torch.equal(other.get_posterior().log_prob(z), expected)
    assert one.num_gradients > 0


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 2.0}, {"num_iterations": 0}, {"num_paths": 0}])
def test_refused_settings(options):
    with pytest.raises(ValueError, match="expected"):
        AutoBatchAndMatch(skewed, **options)


def test_refused_models():
    def nan_data() -> None:
        pyro.sample("bad", dist.Normal(pyro.sample("mean", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(math.nan))

    with pytest.raises(ValueError, match="the first bad site is 'bad'"):
        AutoBatchAndMatch(nan_data).run()
    with pytest.raises(ValueError, match="discrete sample site 'k'"):
        AutoBatchAndMatch(lambda: pyro.sample("k", dist.Poisson(3.0))).run()


def test_scores_beyond_what_can_be_squared_leave_what_was_found(monkeypatch):
    """They are no error of the guide's: rows of such scores are left out, and what there is to go on with is kept."""

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    first = AutoBatchAndMatch(model, num_iterations=5, seed=0).run()
    plain = UnconstrainedDensity.value_and_gradient

    def enormous(self, u):
        value, score = plain(self, u)
        return value, 1e200 * score

    monkeypatch.setattr(UnconstrainedDensity, "value_and_gradient", enormous)
    found = AutoBatchAndMatch(model, start=first, num_iterations=5, seed=0).run()
    torch.testing.assert_close(found.loc, first.loc)
