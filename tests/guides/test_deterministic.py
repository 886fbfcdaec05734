"""AutoDeterministicNormal: exact means and linear-response covariances, mean-field optima, contract, refusals."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Collinear, coin, correlated, counts, nan_data, subsampled, words
from torch.distributions import constraints

from pplvi import Posterior
from pplvi.guides.search.deterministic import AutoDeterministicNormal

pytestmark = pytest.mark.usefixtures("float64")


def gaussian(dim: int):
    loc, covariance = correlated(dim, seed=dim)
    return lambda: pyro.sample("x", dist.MultivariateNormal(loc, covariance))


@pytest.mark.parametrize("dim", [1, 4, 15])
def test_a_gaussian_posterior_is_found_exactly(dim):
    loc, covariance = correlated(dim, seed=dim)
    guide = AutoDeterministicNormal(gaussian(dim), seed=0).run()
    posterior = guide.get_posterior()
    assert torch.allclose(posterior.mean, loc, atol=1e-5)
    assert torch.allclose(posterior.parts.covariance[0], covariance, rtol=1e-5, atol=1e-6)
    value, error = Posterior(gaussian(dim), guide, num_draws=1000, seed=0).log_evidence
    assert abs(value) < 1e-4
    assert error < 1e-4


def test_mean_field_is_the_optimum_of_the_elbo():
    """For a Gaussian target the mean-field variances are 1 / precision, up to the error of the fixed draws."""
    _, covariance = correlated(4, seed=4)
    options = {"num_draws": 2000, "linear_response": False}
    guide = AutoDeterministicNormal(gaussian(4), seed=0, **options).run()
    precision = torch.linalg.inv(covariance)
    variance = guide.get_posterior().variance
    assert torch.allclose(variance, 1 / precision.diagonal(), rtol=4 * math.sqrt(2 / 1000))
    kl = 0.5 * (precision.diagonal().log().sum() + covariance.logdet())
    assert guide.elbo == pytest.approx(-float(kl), abs=0.15)


def test_a_collinear_regression_agrees_with_its_closed_form():
    known = Collinear()
    model, mean, sd = known.model, known.mean, known.sd
    posterior = AutoDeterministicNormal(model, seed=0).run().get_posterior()
    assert ((posterior.mean - mean).abs() < 0.01 * sd).all()
    assert torch.allclose(posterior.variance.sqrt(), sd, rtol=0.01)


def log_beta(*a: float) -> float:
    return sum(map(math.lgamma, a)) - math.lgamma(sum(a))


def test_evidence_and_moments_of_conjugate_models():
    poisson = 3 * math.log(2) - math.lgamma(3) + math.lgamma(19) - 19 * math.log(6)
    multinomial = math.lgamma(11) - math.lgamma(6) - math.lgamma(2) - math.lgamma(5)
    exact = {
        counts: (poisson - sum(math.lgamma(n + 1) for n in (3, 5, 2, 6)), dist.Gamma(19.0, 6.0)),
        words: (multinomial + log_beta(6, 3, 7) - log_beta(1, 2, 3), dist.Dirichlet(torch.tensor([6.0, 3.0, 7.0]))),
        coin: (log_beta(6, 5) - log_beta(2, 3), dist.Beta(6.0, 5.0)),
    }
    for model, (log_z, target) in exact.items():
        posterior = Posterior(model, AutoDeterministicNormal(model, seed=0).run(), num_draws=20_000, seed=1)
        value, error = posterior.log_evidence
        assert posterior.ess > 0.9 * 20_000, model  # k-hat is no use: exponential tails under a Gaussian have k = 1
        assert error < 0.02, model
        assert abs(value - log_z) < 4 * error, model
        draws, sd = next(iter(posterior.resample(seed=2).values())), target.variance.sqrt()
        assert ((draws.mean(0) - target.mean).abs() < 0.05 * sd).all(), model
        assert ((draws.std(0) / sd - 1).abs() < 0.05).all(), model


def test_reproducible_and_the_global_state_is_left_alone():
    before = torch.get_rng_state()
    first, second, other = (AutoDeterministicNormal(counts, seed=s).run() for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.loc, second.loc)
    assert not torch.equal(first.loc, other.loc)
    assert first.num_gradients > 0


def test_pickle_state_dict_copies_and_neighbours():
    guide, neighbour = AutoDeterministicNormal(words, seed=0), AutoDeterministicNormal(counts, seed=0)
    guide()
    neighbour()
    z = torch.randn(3, 2)
    expected = guide.get_posterior().log_prob(z)
    fresh = AutoDeterministicNormal(words, seed=4)
    fresh.load_state_dict(guide.state_dict())
    fresh()
    for other in (pickle.loads(pickle.dumps(guide)), copy.deepcopy(guide), fresh):
        assert torch.equal(other.get_posterior().log_prob(z), expected)
    assert guide.median()["p"].shape == (3,)
    assert guide.quantiles([0.1, 0.5])["p"].shape == (2, 3)
    assert neighbour.median().keys() == {"rate"}


def separable() -> None:
    slope = pyro.sample("slope", dist.ImproperUniform(constraints.real, (), ()))
    logits = slope[..., None] * torch.tensor([-1.0, -2.0, 1.0, 3.0])
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=torch.tensor([0.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: pyro.sample("k", dist.Poisson(3.0)), "discrete sample site 'k'"),
        (lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0)), "without latent sites"),
        (lambda: pyro.sample("x", dist.ImproperUniform(constraints.real, (), ())), "improper"),
        (subsampled, r"plates \['data'\] are subsampled"),
        (nan_data, "the first bad site is 'bad'"),
        (separable, "improper"),
    ],
)
def test_refused_models(model, message):
    with pytest.raises(ValueError, match=message):
        AutoDeterministicNormal(model, seed=0).run()


@pytest.mark.parametrize("options", [{"num_draws": 3}, {"num_draws": 0}, {"init_scale": 0.0}, {"init_radius": -1.0}])
def test_refused_settings(options):
    with pytest.raises(ValueError, match="expected"):
        AutoDeterministicNormal(coin, **options)
