"""Sites of other guide families: their factors by gradient, the rest in closed form, on the same bound."""

import copy
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal

import pplvi

pytestmark = pytest.mark.usefixtures("float64")

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 2, generator=GENERATOR, dtype=torch.float64)
Y = X @ torch.tensor([1.0, -0.5]).double() + 0.5 * torch.randn(40, generator=GENERATOR, dtype=torch.float64)
LABELS = (Y > 0.2).double()


def regression() -> None:
    alpha = pyro.sample("alpha", dist.Gamma(2.0, 2.0))
    tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), alpha.rsqrt()).to_event(1))
    with pyro.plate("data", len(Y)):
        pyro.sample("y", dist.Normal(X @ w, tau.rsqrt()), obs=Y)


def logistic() -> None:
    alpha = pyro.sample("alpha", dist.Gamma(2.0, 2.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), alpha.rsqrt()).to_event(1))
    with pyro.plate("data", len(Y)):
        pyro.sample("y", dist.Bernoulli(logits=X @ w), obs=LABELS)


def correlated() -> None:
    """Precisions and a mean that are conjugate given a matrix of correlations, which no closed form takes."""
    tril = pyro.sample("tril", dist.LKJCholesky(2, 2.0))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("x", dist.MultivariateNormal(mu, scale_tril=tril), obs=X)


def mixture() -> None:
    """A scale that components share, on which an enumerated site's observations depend."""
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("data", len(Y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("y", dist.Normal(mu[z], sd), obs=Y)


def found(model: Any, **options: Any) -> pplvi.Fit:
    return pplvi.fit(model, lambda model: pplvi.AutoConjugate(model, **options), seed=0, progress=False)


def test_a_family_that_holds_the_closed_form_has_its_bound_and_its_factors() -> None:
    closed = pplvi.AutoConjugate(regression, seed=0).run()
    guide = pplvi.AutoConjugate(regression, fallback={"w": AutoMultivariateNormal}, seed=0).run()
    assert guide.bounds[-1] == pytest.approx(closed.bounds[-1], abs=0.02)
    assert sum(guide.terms().values()) == pytest.approx(guide.bounds[-1], abs=0.05)
    for site in ("alpha", "tau", "w"):
        assert torch.allclose(guide.median()[site], closed.median()[site], rtol=0.03)


@pytest.mark.slow
def test_draws_and_bound_are_those_of_natural_gradients_where_the_family_is_the_same() -> None:
    fit, other = found(logistic, fallback={"w": AutoMultivariateNormal}), found(logistic, fallback={"w": "cvi"})
    assert -fit.losses[0, -1] == pytest.approx(other.guide.bounds[-1], abs=0.05)
    posterior = fit.posterior(2000)
    assert posterior.elbo.value == pytest.approx(fit.guide.bounds[-1], abs=4 * posterior.elbo.error + 0.02)
    assert posterior.pareto_k < 1.0
    assert "nats by draws" in fit.guide.summary()


def log_evidence_of_correlations() -> float:
    """By quadrature over the one correlation; the mean is integrated in closed form."""
    rho = torch.linspace(-0.999, 0.999, 2001)
    total = []
    for r in rho[::4]:
        one = torch.tensor([[1.0, r], [r, 1.0]])
        covariance = torch.kron(torch.eye(len(X)), one) + 4 * torch.kron(torch.ones(len(X), len(X)), torch.eye(2))
        prior = dist.LKJCholesky(2, 2.0).log_prob(torch.linalg.cholesky(one)) - 0.5 * torch.log1p(-(r**2))
        total.append(prior + dist.MultivariateNormal(torch.zeros(2 * len(X)), covariance).log_prob(X.reshape(-1)))
    return float(torch.logsumexp(torch.stack(total), 0) + torch.log(4 * (rho[1] - rho[0])))


def test_correlations_and_what_is_conjugate_given_them() -> None:
    fit = found(correlated, fallback={"tril": AutoNormal})
    evidence = log_evidence_of_correlations()
    assert evidence - 0.1 < fit.guide.bounds[-1] < evidence + 0.02
    estimate, error = fit.posterior(2000).log_evidence
    assert abs(float(estimate) - evidence) < 4 * float(error) + 0.01


@pytest.mark.slow
def test_enumerated_sites_beside_a_family() -> None:
    guide = pplvi.AutoConjugate(mixture, fallback={"sd": AutoNormal}, seed=0, max_sweeps=60).run()
    other = pplvi.AutoConjugate(mixture, fallback={"sd": "cvi"}, seed=0).run()
    assert guide.median()["sd"].item() == pytest.approx(other.median()["sd"].item(), rel=0.15)
    assert guide()["z"].shape == (len(Y),)


@pytest.mark.slow
def test_a_point_leaves_the_rest_in_closed_form_and_families_share_sites() -> None:
    point = pplvi.AutoConjugate(regression, fallback={"tau": AutoDelta}, seed=0).run()
    other = pplvi.AutoConjugate(regression, fallback={"tau": "delta"}, seed=0).run()
    assert point.median()["tau"].item() == pytest.approx(other.median()["tau"].item(), rel=0.01)
    both = pplvi.AutoConjugate(regression, fallback={("tau", "alpha"): low_rank}, seed=0, max_sweeps=3).run()
    assert set(both()) == {"w", "tau", "alpha"}


def low_rank(model: Any) -> Any:
    return AutoLowRankMultivariateNormal(model, rank=1)


def test_what_was_found_is_kept_in_copies_and_files(tmp_path: Path) -> None:
    fit = found(logistic, fallback={"w": AutoNormal}, max_sweeps=40)
    fit.save(tmp_path / "fit.pplvi")
    make: Any = lambda model: pplvi.AutoConjugate(model, fallback={"w": AutoNormal})  # noqa: E731
    loaded = pplvi.load(tmp_path / "fit.pplvi", logistic, make)
    for other in (copy.deepcopy(fit.guide), loaded.guide):
        assert torch.equal(other.median()["w"], fit.guide.median()["w"])
        with pyro.poutine.trace() as one, pplvi.programs.state.random_state(1):
            other()
        with pyro.poutine.trace() as two, pplvi.programs.state.random_state(1):
            fit.guide()
        assert torch.equal(one.trace.nodes["w"]["value"], two.trace.nodes["w"]["value"])
        assert not [n for n in one.trace.nodes if one.trace.nodes[n]["type"] == "param"]


def not_a_guide(model: Any) -> Any:
    return lambda: None


def subsampled() -> None:
    with pyro.plate("data", 4, subsample_size=2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0), obs=torch.zeros(2))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (logistic, {"fallback": {"w": 3}}, r"fallback=\{'w': 3\}: expected a dictionary"),
        (logistic, {"fallback": {"v": AutoNormal}}, r"fallback= names \['v'\]: expected continuous latent sites"),
        (mixture, {"fallback": {"z": AutoNormal}}, r"fallback= names \['z'\]: expected continuous"),
        (logistic, {"fallback": {"w": not_a_guide}}, "made function of the program: expected an automatic guide"),
        (logistic, {"fallback": {("w", "w"): AutoNormal}}, "expected each site once"),
        (subsampled, {"fallback": {"a": AutoNormal}}, r"plates \['data'\] around them are subsampled"),
        (
            logistic,
            {"fallback": {"w": AutoNormal}, "rate": pplvi.RobbinsMonro(10, 0.7)},
            "is a guide family, which is trained on all data at once",
        ),
        (logistic, {"fallback": {"w": AutoNormal}, "conditional": ["alpha"]}, "beside a guide family"),
    ],
)
def test_refusals(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pplvi.AutoConjugate(model, **options).run()


def test_programs_that_look_at_draws_are_read_one_draw_at_a_time() -> None:
    def looking() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(a if a.detach().item() > -1e9 else 0.0, tau.rsqrt()), obs=Y[:5])

    def plain() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(a, tau.rsqrt()), obs=Y[:5])

    one, other = (
        pplvi.AutoConjugate(m, fallback={"a": AutoNormal}, seed=0, max_sweeps=2).run().bounds[:2]
        for m in (looking, plain)
    )
    assert one == pytest.approx(other, abs=1e-9)
