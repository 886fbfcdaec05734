"""Models with sites marked for enumeration, and guides of every kind, written without a thought for these sites."""

import io
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoDiscreteParallel,
    AutoGaussian,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)
from torch import Tensor

import pplvi
from pplvi.programs.density import UnconstrainedDensity

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([-2.1, -1.4, 1.7, 2.3, 2.6])


@config_enumerate
def mixture(y: Tensor) -> None:
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("y", dist.Normal(shift + 4 * z - 2, 0.8), obs=y)


def evidence(y: Tensor) -> float:
    """``log p(y)`` of ``mixture``, by a sum over a grid."""
    shift = torch.linspace(-6, 6, 4001)[:, None]
    parts = [math.log(w) + dist.Normal(shift + at, 0.8).log_prob(y) for w, at in ((0.6, -2.0), (0.4, 2.0))]
    log_joint = torch.logaddexp(*parts).sum(-1) + dist.Normal(0.0, 1.0).log_prob(shift[:, 0])
    return float(torch.logsumexp(log_joint, 0) + math.log(12 / 4000))


def fitted(guide: Any, steps: int = 250) -> pplvi.Fit:
    optim = pyro.optim.Adam({"lr": 0.05})
    return pplvi.fit(mixture, guide, args=(Y,), optim=optim, num_steps=steps, seed=0, progress=False)


SPREAD = [
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    lambda model: AutoLowRankMultivariateNormal(model, rank=1),
    AutoNormalMessenger,
    AutoHierarchicalNormalMessenger,
    AutoStructured,
    AutoGaussian,
    pplvi.AutoFlow,
]


@pytest.mark.table(2)
@pytest.mark.parametrize("guide", SPREAD, ids=lambda guide: guide.__name__)
def test_a_guide_leaves_out_what_the_model_sums_out(guide: Callable[..., Any]) -> None:
    result = fitted(guide)
    posterior = result.posterior(num_draws=2000)
    assert set(posterior.draws.latents) == {"shift"}
    value, error = posterior.total_log_evidence
    assert abs(value - evidence(Y)) < 0.02 + 4 * error
    result.report(io.StringIO())


@pytest.mark.parametrize(
    "guide", [pplvi.AutoPathfinder, pplvi.AutoDeterministicNormal, pplvi.AutoBatchAndMatch], ids=lambda g: g.__name__
)
def test_a_search_sums_out_too(guide: Callable[..., Any]) -> None:
    value, error = fitted(guide).posterior(num_draws=2000).total_log_evidence
    assert abs(value - evidence(Y)) < 0.02 + 4 * error


@pytest.mark.parametrize("guide", [AutoDelta, AutoLaplaceApproximation, AutoIAFNormal, AutoRegressiveMessenger])
def test_other_guides_run_to_a_report(guide: Callable[..., Any]) -> None:
    @config_enumerate
    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("y", dist.Normal(4 * z - 2, scale.sum(-1)), obs=y)

    result = pplvi.fit(model, guide, args=(Y,), num_steps=3, seed=0, progress=False)
    assert set(result.posterior(num_draws=20).draws.latents) == {"scale"}
    result.report(io.StringIO())


def test_a_guide_object_and_a_posterior_made_by_hand() -> None:
    guide = AutoNormal(mixture)
    assert set(fitted(guide, steps=3).posterior(num_draws=20).draws.latents) == {"shift"}
    assert set(pplvi.Posterior(mixture, AutoMultivariateNormal(mixture), (Y,)).draws.latents) == {"shift"}


@config_enumerate
def classes(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=y)


@config_enumerate
def classes_guide(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Categorical(logits=pyro.param("logits", lambda: torch.zeros(len(y), 2))))


@pytest.mark.parametrize("guide", [AutoDiscreteParallel, classes_guide])
def test_a_guide_that_enumerates_has_a_posterior_and_a_report(guide: Any) -> None:
    options: dict[str, Any] = {"optim": pyro.optim.Adam({"lr": 0.1}), "num_steps": 300, "seed": 0, "progress": False}
    result = pplvi.fit(classes, guide, args=(Y,), **options)
    posterior = result.posterior(num_draws=4000)
    log_joint = torch.stack([math.log(w) + dist.Normal(at, 1.0).log_prob(Y) for w, at in ((0.3, 0.0), (0.7, 2.0))])
    exact = torch.softmax(log_joint, 0)[1]
    error = (exact * (1 - exact) / 4000).sqrt()
    assert bool(((posterior.resample()["z"].double().mean(0) - exact).abs() < 0.01 + 5 * error).all())
    assert posterior.total_log_evidence.value == pytest.approx(float(torch.logsumexp(log_joint, 0).sum()), abs=0.05)
    assert "log evidence" in result.summary()


def test_a_maximum_likelihood_fit_reports_its_likelihood() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.param("mean", lambda: torch.tensor(0.0)), 1.0), obs=y)

    options: dict[str, Any] = {"optim": pyro.optim.Adam({"lr": 0.1}), "num_steps": 400, "seed": 0, "progress": False}
    result = pplvi.fit(model, lambda y: None, args=(Y,), **options)
    best = float(dist.Normal(Y.mean(), 1.0).log_prob(Y).sum())
    assert f"log likelihood    {best:.3f} nats" in result.summary()
    assert "maximum likelihood estimate" in result.summary()


def test_point_estimates_are_run_a_few_times_and_not_once_for_each_draw() -> None:
    runs = []

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        runs.append(z.shape)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoDelta(model)
    posterior = pplvi.Posterior(model, guide, (Y,), num_draws=500, vectorize=False)
    assert len(runs) < 20
    assert posterior.draws.latents["z"].shape == (500,)
    assert posterior.is_dirac


def test_methods_of_gaussian_process_models_export() -> None:
    from pyro.contrib import gp

    x = torch.linspace(0, 5, 12)
    sparse = gp.models.VariationalSparseGP(
        x, x.sin(), gp.kernels.RBF(1), Xu=torch.linspace(0, 5, 4), likelihood=gp.likelihoods.Gaussian()
    )
    data = pplvi.fit(sparse.model, sparse.guide, num_steps=3, seed=0, progress=False).to_arviz(num_prior=5)
    assert data.posterior["u"].shape[-1] == 4
    exact = gp.models.GPRegression(x, x.sin(), gp.kernels.RBF(1))
    assert "log likelihood" in pplvi.fit(exact.model, exact.guide, num_steps=3, seed=0, progress=False).summary()


@config_enumerate
def minibatch_model(y: Tensor, size: int | None = None) -> None:
    with pyro.plate("data", len(y), subsample_size=size) as index:
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=y[index])


def local_minibatch_model(y: Tensor, size: int | None = None) -> None:
    with pyro.plate("data", len(y), subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


@pytest.mark.parametrize(
    ("model", "guide"),
    [
        (minibatch_model, AutoDiscreteParallel),
        (local_minibatch_model, AutoMultivariateNormal),
        (local_minibatch_model, AutoDiagonalNormal),
        (local_minibatch_model, AutoIAFNormal),
        (local_minibatch_model, AutoStructured),
        (local_minibatch_model, AutoGaussian),
        (local_minibatch_model, AutoLaplaceApproximation),
    ],
)
def test_local_parameters_of_the_size_of_a_minibatch_are_refused(model: Any, guide: Any) -> None:
    with pytest.raises(ValueError, match="parameters for 3 elements of plate 'data', which has 5"):
        pplvi.fit(model, guide, args=(Y, 3), num_steps=2, seed=0, progress=False)


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta, AutoNormalMessenger])
def test_guides_with_parameters_for_every_datum_take_minibatches(guide: Any) -> None:
    result = pplvi.fit(local_minibatch_model, guide, args=(Y, 3), num_steps=2, seed=0, progress=False)
    sizes = {tuple(torch.as_tensor(value).shape) for value in result.params[0].values()}
    assert sizes == {(5,)}


def test_the_laplace_approximation_of_pyro_sums_out_what_is_enumerated() -> None:
    """It is the inverse Hessian of the density of the latents that are left, and the same at every call."""
    y = torch.cat([torch.randn(10) - 3, torch.randn(10) + 3])

    @config_enumerate
    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)

    fit = pplvi.fit(model, AutoLaplaceApproximation, args=(y,), num_steps=30, seed=0, progress=False)
    hessian = UnconstrainedDensity(model, (y,)).hessian(fit.guide.loc.detach())
    for _ in range(2):
        found = fit.guide.laplace_approximation(y)
        assert torch.allclose(found.get_posterior().covariance_matrix, torch.linalg.inv(-hessian), rtol=1e-4, atol=1e-5)
    assert sorted(found(y)) == ["mu", "weights"]


def test_the_density_is_that_of_constrained_values_and_the_jacobian():
    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Gamma(2.0, scale))

    density = UnconstrainedDensity(model)
    u = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(4, 3)
    values = density.unpack(u)
    log_p = dist.LogNormal(0.0, 1.0).log_prob(values["scale"]).reshape(4)
    log_p = log_p + dist.Gamma(2.0, values["scale"].reshape(4, 1)).log_prob(values["x"].reshape(4, 2)).sum(1)
    torch.testing.assert_close(density(u), log_p + density.log_jacobian(u))
    torch.testing.assert_close(density.log_jacobian(u), u.sum(1))  # of logarithms
