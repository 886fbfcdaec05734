"""Expectation maximisation with continuous latents: the evidence against closed forms, its maximum, refusals."""

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pplvi
from pplvi import ExpectationMaximization

pytestmark = pytest.mark.usefixtures("float64")
POSITIVE = constraints.positive
GENERATOR = torch.Generator().manual_seed(0)
X = (
    torch.randn(40, 3, generator=GENERATOR, dtype=torch.float64)
    @ torch.tensor([[2.0, 1, 0], [0, 1, 1], [0, 0, 0.5]]).double()
)
SERIES = torch.randn(8, generator=GENERATOR, dtype=torch.float64).cumsum(0)
COUNTS = torch.tensor([0.0, 3, 1, 7, 2, 2, 12, 0, 1], dtype=torch.float64)


def maximum_likelihood(model: Any, x: Tensor, **options: Any) -> pplvi.Fit:
    algorithm = ExpectationMaximization(**options.pop("algorithm", {}))
    return pplvi.fit(model, algorithm, args=(x,), **{"seed": 0, "progress": False, **options})


def noisy(x: Tensor) -> None:
    sd = pyro.param("sd", torch.tensor(1.0), constraint=POSITIVE)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, sd), obs=x)


def factors(x: Tensor) -> None:
    w = pyro.param("w", torch.ones(3, 1))
    mu = pyro.param("mu", torch.zeros(3))
    sd = pyro.param("sd", torch.ones(3), constraint=POSITIVE)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ w.T + mu, sd).to_event(1), obs=x)


def level(x: Tensor) -> None:
    a = pyro.param("a", torch.tensor(0.5))
    q, r = (pyro.param(name, torch.tensor(1.0), constraint=POSITIVE) for name in ("q", "r"))
    z = pyro.sample("z_0", dist.Normal(0.0, 1.0))
    for t in range(len(x)):
        z = pyro.sample(f"z_{t}", dist.Normal(a * z, q)) if t else z
        pyro.sample(f"x_{t}", dist.Normal(z, r), obs=x[t])


def rates(x: Tensor) -> None:
    beta = pyro.param("beta", torch.tensor(1.0), constraint=POSITIVE)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, beta))
        pyro.sample("x", dist.Poisson(z), obs=x)


def log_evidence_of_factors(w: Tensor, mu: Tensor, sd: Tensor) -> Tensor:
    return dist.MultivariateNormal(mu, w @ w.T + torch.diag(sd**2)).log_prob(X).sum()


def log_evidence_of_level(a: Tensor, q: Tensor, r: Tensor) -> Tensor:
    steps = torch.arange(len(SERIES))
    moves = torch.where(steps[:, None] >= steps, a ** (steps[:, None] - steps).clamp(min=0), torch.zeros(()))
    noise = torch.where(steps == 0, torch.ones(()), q**2)
    covariance = moves @ torch.diag(noise) @ moves.T + r**2 * torch.eye(len(steps))
    return dist.MultivariateNormal(torch.zeros(len(steps)), covariance).log_prob(SERIES)


EVIDENCES: dict[Any, Any] = {
    noisy: (X[:, 0], lambda sd: dist.Normal(0.0, (1 + sd**2).sqrt()).log_prob(X[:, 0]).sum()),
    factors: (X, log_evidence_of_factors),
    level: (SERIES, log_evidence_of_level),
    rates: (COUNTS, lambda beta: dist.NegativeBinomial(2.0, probs=1 / (1 + beta)).log_prob(COUNTS).sum()),
}


@pytest.mark.parametrize("model", EVIDENCES, ids=lambda model: model.__name__)
def test_the_evidence_is_exact_and_rises(model: Any) -> None:
    data, log_evidence = EVIDENCES[model]
    seen: list[float] = []

    def note(run: Any) -> None:
        store = pyro.get_param_store()
        seen.append(float(log_evidence(**{name: value.detach() for name, value in store.items()})))

    fit = maximum_likelihood(model, data, num_steps=4, callbacks=[note])
    assert "L-BFGS" not in fit.notes["M-step"]
    assert list(-fit.losses[0, 1:]) == pytest.approx(seen[:-1], abs=1e-6)
    assert (torch.tensor(seen).diff() >= -1e-9).all()
    assert fit.posterior(50).total_log_evidence.value == pytest.approx(seen[-1], abs=1e-6)


@pytest.mark.parametrize("model", [noisy, rates], ids=lambda model: model.__name__)
def test_it_ends_where_the_likelihood_is_flat(model: Any) -> None:
    data, log_evidence = EVIDENCES[model]
    (value,) = maximum_likelihood(model, data).params[0].values()
    leaf = value.detach().requires_grad_()
    assert torch.autograd.grad(log_evidence(leaf), leaf)[0].abs() < 1e-3


@pytest.mark.parametrize("model", [noisy, rates], ids=lambda model: model.__name__)
def test_the_closed_m_step_is_where_a_search_ends(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = maximum_likelihood(model, EVIDENCES[model][0])
    assert "L-BFGS" not in closed.notes["M-step"]
    monkeypatch.setattr("pplvi.training.em.maximisation.closed_moments", lambda *_: None)
    searched = maximum_likelihood(model, EVIDENCES[model][0])
    assert "closed form" not in searched.notes["M-step"]
    assert closed.losses[0, -1] == pytest.approx(searched.losses[0, -1], abs=1e-8)


def test_restarts_begin_at_draws_of_the_prior() -> None:
    fit = maximum_likelihood(factors, X, restarts=2, num_steps=4)
    assert fit.losses[0, 1] != pytest.approx(fit.losses[1, 1], abs=1e-3)


def test_a_program_that_looks_at_its_parameters_is_run_as_it_is() -> None:
    def looking(x: Tensor) -> None:
        sd = pyro.param("sd", torch.tensor(1.0), constraint=POSITIVE)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, sd if sd > 0.5 else torch.tensor(0.5)), obs=x)

    one, other = (maximum_likelihood(model, X[:, 0], num_steps=3) for model in (looking, noisy))
    assert list(one.losses[0]) == pytest.approx(list(other.losses[0]), abs=1e-9)


def test_float32_programs_and_files(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    fit = maximum_likelihood(noisy, X[:, 0].float())
    exact = dist.Normal(0.0, (1 + fit.params[0]["sd"] ** 2).sqrt()).log_prob(X[:, 0].float()).sum()
    assert -fit.losses[0, -1] == pytest.approx(exact.item(), abs=1e-2)
    assert fit.guide(X[:, 0].float())["z"].dtype == torch.float32
    fit.save(tmp_path / "em.pplvi")
    loaded = pplvi.load(tmp_path / "em.pplvi", noisy, ExpectationMaximization())
    assert loaded.params[0]["sd"] == fit.params[0]["sd"]
    assert loaded.posterior(20).total_log_evidence.value == pytest.approx(exact.item(), abs=1e-2)


def subsampled(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=3) as index:
        z = pyro.sample("z", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def both_unknown(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(pyro.param("center", torch.tensor(0.0)), 1.0))
    tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, tau.rsqrt()), obs=x)


def cubic(x: Tensor) -> None:
    sd = pyro.param("sd", torch.tensor(1.0), constraint=POSITIVE)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)) ** 3, sd), obs=x)


@pytest.mark.parametrize(
    ("model", "algorithm", "message"),
    [
        (both_unknown, {}, r"site 'x' depends on \['mu', 'tau'\] at once, whose exact posterior is no product"),
        (subsampled, {}, r"plates \['data'\] are subsampled"),
        (cubic, {}, r"site 'x' is not conjugate"),
        (noisy, {"start": "kmeans"}, r"start='kmeans' is for discrete latents, not \['z'\]: expected 'random'"),
    ],
)
def test_refusals(model: Any, algorithm: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        maximum_likelihood(model, SERIES, algorithm=algorithm)
