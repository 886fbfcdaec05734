"""What has no closed form is refused by site and operation, or fitted with ``fallback=``, the rest in closed form."""

import re
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pplvi
from benchmarks.conjugate import logistic

pytestmark = pytest.mark.usefixtures("float64")

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(30, 2, generator=GENERATOR, dtype=torch.float64)
Y = 0.7 + 1.5 * torch.randn(30, generator=GENERATOR, dtype=torch.float64)


def data(fn: Any, y: Tensor = Y) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("y", fn, obs=y)


def gamma_scale() -> None:
    sd = pyro.sample("sd", dist.Gamma(2.0, 2.0))
    data(dist.Normal(0.0, sd))


def power() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    data(dist.Normal(a**3, 1.0))


def exponential() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    data(dist.Normal(a.exp(), 1.0))


def plate_that_interacts() -> None:
    with pyro.plate("features", 2):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    data(dist.Normal(X @ b, 1.0))


def logits() -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    data(dist.Bernoulli(logits=X @ b), (Y > 0).double())


def log_of_a_sum() -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    data(dist.Poisson(p @ torch.tensor([1.0, 2.0, 3.0])), torch.tensor([1.0, 2.0]))


def no_family() -> None:
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    data(dist.Normal(0.0, sd))


def shared_precision() -> None:
    tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
    data(dist.Normal(tau, tau.rsqrt()))


def branch() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    data(dist.Normal(0.0 if a > 0 else 1.0, 1.0))


def too_many() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(6000), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(0.0))


def correlations() -> None:
    tril = pyro.sample("tril", dist.LKJCholesky(2, 1.0))
    data(dist.MultivariateNormal(torch.zeros(2), scale_tril=tril), X)


REFUSED = {
    too_many: r"block 'x' has 6,000 elements that interact.*fallback=\{'x': AutoNormal\}",
    correlations: r"latent site 'tril' is LKJCholesky, which has no conjugate family.*fallback=\{'tril': AutoNormal\}",
    gamma_scale: r"'y' is not conjugate.*standard deviation.*power -2 of site 'sd'.*gamma.*fallback=\{'sd': 'cvi'\}",
    power: r"'y' is not conjugate.*\(a\^1 a\^1 a\^1|site 'a'",
    exponential: r"'y' is not conjugate: the loc of Normal is torch.exp of 'a'.*fallback=\{'a': AutoNormal\}",
    plate_that_interacts: r"elements of site 'b' along \['features'\] interact.*blocks=\[\('b',\)\].*to_event",
    logits: r"'y' is not conjugate: the logits of Bernoulli depend on latent sites.*fallback=\{'b': 'cvi'\}",
    log_of_a_sum: r"'y' is not conjugate: the logarithm of a sum with 'p'",
    no_family: r"latent site 'sd' is HalfNormal, which has no conjugate family.*fallback=\{'sd': 'cvi'\}",
    shared_precision: r"'y' is not conjugate",
    branch: r"looks at the value of an expression of 'a'",
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_refusals_name_site_operation_and_remedy(model: Any) -> None:
    with pytest.raises(ValueError, match=REFUSED[model]):
        pplvi.fit(model, pplvi.AutoConjugate, seed=0, progress=False)


@pytest.mark.parametrize("model", [m for m in REFUSED if m is not branch], ids=lambda model: model.__name__)
def test_what_a_refusal_advises_works(model: Any) -> None:
    with pytest.raises(ValueError, match=r"fallback=|blocks=") as refused:
        pplvi.AutoConjugate(model, seed=0).run()
    (said,) = re.findall(r"(?:blocks=\[.*?\]|fallback=\{.*?\})", str(refused.value))[:1]
    name, value = said.split("=", 1)
    options = {name: eval(value, {"AutoNormal": AutoNormal})}
    guide = pplvi.AutoConjugate(model, seed=0, max_sweeps=4, **options).run()
    assert np.isfinite(guide.bounds[-1])
    assert set(guide()) == set(guide.median())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": [("b", "nowhere")]}, r"blocks= and fallback= name \['nowhere'\]: expected.*'b'"),
        ({"blocks": [("b",), ("b", "c")]}, "every site in at most one block"),
        ({"fallback": {"b": "guess"}}, r"fallback for site 'b' is 'guess'; expected one of \('cvi'"),
        ({"max_sweeps": 0}, "max_sweeps=0"),
        ({"tolerance": 2.0}, "tolerance=2.0"),
    ],
)
def test_options_are_checked(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pplvi.AutoConjugate(logits, **options).run()


def test_a_block_of_another_family_is_refused() -> None:
    def model() -> None:
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        data(dist.Normal(mu, tau.rsqrt()))

    with pytest.raises(ValueError, match=r"the block \('mu', 'tau'\) holds \['tau'\].*gamma"):
        pplvi.AutoConjugate(model, blocks=[("mu", "tau")]).run()


def test_steps_need_a_rate_and_rates_are_checked() -> None:
    with pytest.raises(ValueError, match="step is for minibatches"):
        pplvi.AutoConjugate(logits).step()
    with pytest.raises(ValueError, match="delay=0"):
        pplvi.RobbinsMonro(0)
    with pytest.raises(ValueError, match=r"exponent=0\.5"):
        pplvi.RobbinsMonro(1, 0.5)


# ---------------------------------------------------------------------- fallbacks


def interacting(model: Any, **options: Any) -> Any:
    return pplvi.fit(model, lambda model: pplvi.AutoConjugate(model, **options), seed=0, progress=False)


def test_a_named_block_takes_a_plate_that_interacts() -> None:
    fit = interacting(plate_that_interacts, blocks=[("b",)])
    exact = float(dist.MultivariateNormal(torch.zeros(30), X @ X.T + torch.eye(30)).log_prob(Y))
    assert fit.guide.bounds[-1] == pytest.approx(exact, abs=1e-8)
    assert fit.posterior(50).total_log_evidence.value == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize("model", [gamma_scale, no_family])
def test_a_standard_deviation_is_fitted_by_its_logarithm(model: Any) -> None:
    fit = interacting(model, fallback={"sd": "cvi"})
    bounds = torch.tensor(fit.guide.bounds)
    assert (bounds.diff() >= -1e-12 * bounds[1:].abs()).all()
    u = torch.linspace(-4.0, 4.0, 4001)
    prior = dist.Gamma(2.0, 2.0) if model is gamma_scale else dist.HalfNormal(1.0)
    joint = prior.log_prob(u.exp()) + u + dist.Normal(0.0, u.exp()[:, None]).log_prob(Y).sum(-1)
    evidence = float(torch.logsumexp(joint, 0) + torch.log(u[1] - u[0]))
    assert evidence - 0.02 < bounds[-1] < evidence
    assert fit.posterior(4000).total_log_evidence.value == pytest.approx(evidence, abs=0.01)


def test_natural_gradients_are_at_the_maximum_of_the_bound() -> None:
    """Logistic regression: the bound by quadrature in one dimension at a time, maximised by a search from the fit."""
    y = (Y > 0).double()
    fit = interacting(logits, fallback={"b": "cvi"})
    (mean,) = (fit.guide.median()["b"],)
    covariance = torch.linalg.inv(fit.guide.state_dict()["q:b:precision"])
    nodes, weights = (torch.as_tensor(part) for part in np.polynomial.hermite_e.hermegauss(60))
    weights = weights / weights.sum()

    def bound(m: Tensor, tril: Tensor) -> Tensor:
        s = tril @ tril.T
        f = (X @ m)[:, None] + ((X @ s) * X).sum(-1).sqrt()[:, None] * nodes
        likelihood = (dist.Bernoulli(logits=f).log_prob(y[:, None]) @ weights).sum()
        prior = -0.5 * (m @ m + s.trace()) - torch.log(torch.tensor(2 * torch.pi))
        return likelihood + prior + 1 + torch.log(torch.tensor(2 * torch.pi)) + tril.diagonal().log().sum()

    m, tril = mean.clone().requires_grad_(), torch.linalg.cholesky(covariance).requires_grad_()
    value = bound(m, tril)
    assert value.item() == pytest.approx(fit.guide.bounds[-1], abs=1e-7)
    g_m, g_tril = torch.autograd.grad(value, (m, tril))
    assert g_m.abs().max() < 1e-4
    assert g_tril.tril().abs().max() < 1e-4


def test_laplace_is_at_the_mode_and_a_point_has_no_spread() -> None:
    laplace = interacting(logits, fallback={"b": "laplace"}).guide
    point = interacting(logits, fallback={"b": "delta"}).guide
    mode = laplace.median()["b"].clone().requires_grad_()

    def log_joint(b: Tensor) -> Tensor:
        y = (Y > 0).double()
        return dist.Bernoulli(logits=X @ b).log_prob(y).sum() - 0.5 * b @ b

    (gradient,) = torch.autograd.grad(log_joint(mode), mode)
    assert gradient.abs().max() < 1e-8
    curvature = -torch.autograd.functional.hessian(log_joint, mode.detach())
    assert torch.allclose(laplace.state_dict()["q:b:precision"], curvature, rtol=1e-8)
    assert torch.allclose(point.median()["b"], mode.detach(), atol=1e-8)
    assert torch.equal(point()["b"], point()["b"])


def test_a_robust_regression_of_two_fallbacks() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        sd = pyro.sample("sd", dist.HalfCauchy(1.0))
        data(dist.StudentT(4.0, a, sd))

    fit = interacting(model, fallback={"a": "cvi", "sd": "cvi"})
    bounds = torch.tensor(fit.guide.bounds)
    assert (bounds.diff() >= -1e-12 * bounds[1:].abs()).all()
    posterior = fit.posterior(4000)
    assert posterior.elbo.value == pytest.approx(bounds[-1].item(), abs=0.05)
    assert posterior.total_log_evidence.value - bounds[-1] < 0.1


def test_predictors_that_no_fallback_covers_are_refused() -> None:
    def model() -> None:
        f = pyro.sample("f", dist.Normal(torch.zeros(30), 1.0).to_event(1))
        data(dist.Bernoulli(logits=f.tanh().cumsum(0)), (Y > 0).double())

    with pytest.raises(ValueError, match="'y' is not conjugate: a density whose elements depend on several predictors"):
        interacting(model, fallback={"f": "cvi"})


# ---------------------------------------------------------------------- softmax


def softmax(classes: int) -> Any:
    """Classes of the data by the softmax of linear maps, of which the first is zero."""
    labels = (Y.argsort().argsort() * classes) // len(Y)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, classes - 1), 1.0).to_event(2))
        data(dist.Categorical(logits=torch.cat([torch.zeros(len(X), 1), X @ w], -1)), labels)

    return model


def test_a_softmax_of_two_classes_is_a_logistic_function() -> None:
    def two() -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        data(dist.Bernoulli(logits=X @ b), (Y.argsort().argsort() >= 15).double())

    one, other = interacting(softmax(2), fallback={"w": "cvi"}), interacting(two, fallback={"b": "cvi"})
    assert one.guide.bounds[-1] == pytest.approx(other.guide.bounds[-1], abs=1e-6)
    assert torch.allclose(one.guide.median()["w"][:, 0], other.guide.median()["b"], atol=1e-4)


@pytest.mark.parametrize("classes", [3, 5])
def test_the_bound_of_a_softmax_is_that_of_draws(classes: int) -> None:
    fit = interacting(softmax(classes), fallback={"w": "cvi"})
    bounds = torch.tensor(fit.guide.bounds)
    assert (bounds.diff() >= -1e-12 * bounds[1:].abs()).all()
    posterior = fit.posterior(4000)
    assert posterior.elbo.value == pytest.approx(bounds[-1].item(), abs=4 * posterior.elbo.error + 0.01)
    assert posterior.pareto_k < 0.7


@pytest.mark.slow
def test_logistic_regression_with_a_gamma_precision_of_breast_cancer() -> None:
    problem = logistic("cvi")
    cvi = pplvi.AutoConjugate(problem.model, fallback={"w": "cvi"}, seed=0).run(*problem.args)
    laplace = pplvi.AutoConjugate(problem.model, fallback={"w": "laplace"}, seed=0).run(*problem.args)
    assert cvi.bounds[-1] > -56.54
    assert laplace.bounds[-1] == pytest.approx(-58.44, abs=0.01)
    make = partial(pplvi.AutoConjugate, fallback={"w": "cvi"}, conditional=["alpha"], seed=0)
    found = [
        pplvi.Posterior(problem.model, make(problem.model), problem.args, num_draws=4000, seed=s) for s in range(4)
    ]
    assert sum(float(posterior.pareto_k) for posterior in found) / 4 < 0.75
    assert found[0].elbo.value > -56.3
