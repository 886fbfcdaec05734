"""Directed models with latents: exact where they can be, and bounds below what is exact."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch import nn

import pplvi
from pplvi import DeepLatentGaussian, FactorAnalysis, GaussianBeliefNetwork, ProbabilisticPCA, SigmoidBeliefNetwork

pytestmark = pytest.mark.usefixtures("float64")

LINEAR: dict[str, Callable[[], Any]] = {
    "factor analysis": lambda: FactorAnalysis(5, 2),
    "PCA": lambda: ProbabilisticPCA(5, 2),
    "network": lambda: GaussianBeliefNetwork([5, 3, 2, 2]),
}


@pytest.fixture(params=LINEAR)
def linear(request: pytest.FixtureRequest) -> Any:
    model = LINEAR[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def test_linear_marginal_is_that_of_draws(linear: Any) -> None:
    """Means and covariances of ancestral draws, within five standard errors."""
    p, x = linear.distribution(), linear.model(size=20_000).detach()
    error = p.variance.sqrt() / 20_000**0.5
    assert ((x.mean(0) - p.mean).abs() < 5 * error).all()
    spread = p.variance.outer(p.variance).sqrt() * (2 / 20_000) ** 0.5
    assert ((x.T.cov() - p.covariance_matrix).abs() < 5 * spread).all()


def test_exact_guide_has_no_gap(linear: Any) -> None:
    """Every draw's ELBO is the evidence, with numbers missing too; its gradient is that of the evidence."""
    x, mask = torch.randn(4, 5), torch.rand(4, 5) < 0.6
    assert -pplvi.ELBO().loss(linear.model, linear.guide, x) == pytest.approx(
        linear.distribution().log_prob(x).sum().item()
    )
    parameters = list(linear.parameters())
    exact = torch.autograd.grad(linear.distribution().log_prob(x).sum(), parameters, allow_unused=True)
    loss = pplvi.ELBO(estimator="stl").differentiable_loss(linear.model, linear.guide, x)
    found = torch.autograd.grad(-loss, parameters, allow_unused=True)
    assert all(one is not None for one in found)
    seen = [linear.distribution().mean[m] for m in mask]
    covariance = linear.distribution().covariance_matrix
    each = [
        torch.distributions.MultivariateNormal(mean, covariance[m][:, m]).log_prob(row[m])
        for mean, m, row in zip(seen, mask, x, strict=True)
    ]
    x[~mask] = torch.nan
    torch.testing.assert_close(linear.log_marginal(x, mask), torch.stack(each))
    bound = -pplvi.ELBO().loss(linear.model, linear.guide, x, mask=mask)
    assert bound == pytest.approx(torch.stack(each).sum().item())
    assert exact[0] is not None


def test_pca_is_at_its_maximum() -> None:
    x = torch.randn(300, 2) @ torch.randn(2, 5) + 0.3 * torch.randn(300, 5)
    pca = ProbabilisticPCA(5, 2)
    pca.maximise(x)
    gradients = torch.autograd.grad(pca.distribution().log_prob(x).mean(), list(pca.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-8
    with pytest.raises(ValueError, match="fewer than the 5"):
        ProbabilisticPCA(5, 5).maximise(x)


def test_an_amortised_guide_meets_the_exact_marginal_of_factor_analysis() -> None:
    """Within 0.02 nats a datum."""
    pyro.set_rng_seed(1)
    model, x = FactorAnalysis(4, 1), torch.randn(100, 1) @ torch.randn(1, 4) + 0.5 * torch.randn(100, 4)
    guide = pplvi.AutoAmortized(
        model.model, nn.Linear(4, 4), plates="data", family="multivariate_normal", init_scale=0.5
    )
    pplvi.fit(
        model.model,
        guide,
        args=(x,),
        num_steps=700,
        seed=0,
        learning_rate=0.03,
        progress=False,
        compile="trace",
        stop=None,
    )
    exact = model.distribution().log_prob(x).mean().item()
    elbo = -pplvi.ELBO(num_particles=200).loss(model.model, guide, x) / 100
    assert exact - 0.02 < elbo < exact + 0.005


def test_sigmoid_network_sums_out_its_layers() -> None:
    network = SigmoidBeliefNetwork([4, 3, 2])
    everything = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    log_p = network.distribution().log_prob(everything)
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0))
    bound = -pplvi.ImportanceWeightedELBO(4000).loss(network.model, network.guide, everything)
    assert bound == pytest.approx(log_p.sum().item(), abs=0.3)
    assert network.sample(3).shape == (3, 4)
    with pytest.raises(ValueError, match="at most 14"):
        SigmoidBeliefNetwork([4, 15]).distribution()


@pytest.mark.parametrize("options", [{}, {"likelihood": "normal"}, {"given": 2}], ids=str)
def test_ladder_learns(options: Any) -> None:
    """The bound rises, more draws tighten it, and what is missing is not looked at."""
    given = (torch.randn(40, 2),) if "given" in options else ()
    model = DeepLatentGaussian(6, [3, 2], hidden=8, **options)
    x = torch.bernoulli(torch.full((40, 1), 0.5)).expand(40, 6).clone()
    run = pplvi.fit(
        model.model,
        model.guide,
        args=(x, *given),
        num_steps=300,
        learning_rate=0.05,
        seed=0,
        progress=False,
        compile="trace",
    )
    assert run.losses[0, -10:].mean() < 0.7 * run.losses[0, :10].mean()
    one, many = (pplvi.ImportanceWeightedELBO(k).loss(model.model, model.guide, x, *given) for k in (1, 300))
    assert many < one
    mask = torch.rand(40, 6) < 0.5
    x[~mask] = torch.nan
    assert 0 < pplvi.ELBO().loss(model.model, model.guide, x, *given, mask=mask) < 1e3
    assert model.sample(40, *given).shape == (40, 6)
    path = model.traverse(torch.zeros(3), 1, torch.linspace(-3, 3, 4), *(part[0] for part in given))
    assert path.shape == (4, 6)
    assert (path[0] - path[-1]).abs().max() > 1e-4


def test_weighted_objective_is_marked_and_its_posterior_is_not_weighted() -> None:
    model, x = DeepLatentGaussian(6, [2], hidden=8), torch.randint(2, (10, 6)).double()
    pair = (model.model, model.guide, x)
    pyro.set_rng_seed(1)
    terms = pplvi.ELBO(3).terms(*pair, per_site=True)["sites"]
    pyro.set_rng_seed(1)
    found = pplvi.BetaELBO(4.0, 3).loss(*pair)
    latent = terms["expected_log_prob"]["z1"] + terms["entropy"]["z1"]
    assert found == pytest.approx(-terms["expected_log_prob"]["x"] - 4.0 * latent)
    assert pplvi.BetaELBO(4.0).monitor is None
    run = pplvi.fit(*pair[:2], args=(x,), objective=pplvi.BetaELBO(4.0), num_steps=30, seed=0, progress=False)
    with pyro.poutine.trace() as recorder:
        run.guide(x)
    assert recorder.trace.nodes["z1"]["scale"] == 1.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: GaussianBeliefNetwork([3]), "at least one latent layer"),
        (lambda: SigmoidBeliefNetwork([3, 0]), r"widths=\[3, 0\]"),
        (lambda: DeepLatentGaussian(3, [2], likelihood="poisson"), "'bernoulli' or 'normal'"),
        (lambda: DeepLatentGaussian(3, [2], given=1).model(torch.zeros(2, 3)), r"\(N, 1\)"),
        (lambda: DeepLatentGaussian(3, [2]).traverse(torch.zeros(2), 2, torch.zeros(3)), "index=2"),
        (lambda: FactorAnalysis(3, 1).model(torch.zeros(2, 4)), r"\(N, 3\)"),
        (lambda: FactorAnalysis(3, 1).guide(), "expected data"),
        (lambda: pplvi.BetaELBO(0.0), "positive"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
