"""AutoConjugate where guides go: fit, SVI, handlers, posteriors, files."""

import copy
import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_results import elpd
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import init_to_value
from torch import Tensor

import pplvi

pytestmark = pytest.mark.usefixtures("float64")

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 2, generator=GENERATOR, dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0], dtype=torch.float64) + torch.randn(40, generator=GENERATOR, dtype=torch.float64)


def regression(x: Tensor, y: Tensor | None = None) -> None:
    alpha = pyro.sample("alpha", dist.Gamma(2.0, 2.0).expand([2]).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, alpha.rsqrt()).to_event(1))
    tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
    mean = pyro.deterministic("mean", x @ b)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, tau.rsqrt()), obs=y)


def two_clusters(y: Tensor) -> None:
    w = pyro.sample("w", dist.Beta(2.0, 2.0))
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(w))
        pyro.sample("y", dist.Normal(mu[z.long()], 1.0), obs=y)


CLUSTERS = torch.cat([torch.randn(6, generator=GENERATOR) - 2, torch.randn(9, generator=GENERATOR) + 2]).double()


def fitted(model: Any = regression, args: Any = (X, Y), **options: Any) -> Any:
    return pplvi.fit(model, pplvi.AutoConjugate, args=args, seed=0, progress=False, **options)


def test_fit_records_the_bound_and_reports() -> None:
    fit = fitted()
    assert fit.losses.shape == (1, len(fit.guide.bounds))
    assert -fit.losses[0, -1] == fit.guide.bounds[-1]
    text = io.StringIO()
    fit.report(text)
    assert f"{fit.guide.bounds[-1]:.4f} nats after {len(fit.guide.bounds) - 1} sweeps" in text.getvalue()
    posterior = fit.posterior(2000)
    assert posterior.pareto_k < 0.7
    assert fit.guide.bounds[-1] < posterior.total_log_evidence.value < fit.guide.bounds[-1] + 1.0
    data = fit.to_arviz(num_prior=10)
    assert data.posterior["b"].shape[-1] == 2
    assert elpd(fit.loo()) < 0
    assert fit.predict(X[:3]).observed["y"].shape == (1000, 3)


@pytest.mark.parametrize("case", [(regression, (X, Y)), (two_clusters, (CLUSTERS,))], ids=["regression", "mixture"])
def test_svi_evaluates_the_same_bound(case: Any) -> None:
    model, args = case
    guide = pplvi.AutoConjugate(model, seed=0).run(*args)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pplvi.ELBO(20_000))
    pyro.set_rng_seed(0)
    assert -svi.evaluate_loss(*args) == pytest.approx(guide.bounds[-1], abs=0.05)


def test_what_the_model_enumerates_is_summed_out_and_the_bound_is_tighter() -> None:
    guide = pplvi.AutoConjugate(two_clusters, seed=0).run(CLUSTERS)
    model = pyro.infer.config_enumerate(two_clusters)
    fit = fitted(model, (CLUSTERS,))
    assert fit.guide.bounds[-1] == pytest.approx(guide.bounds[-1], abs=1e-6)
    assert set(fit.guide(CLUSTERS)) == {"w", "mu"}
    posterior = fit.posterior(4000)
    assert posterior.elbo.value > guide.bounds[-1] + 0.05


def test_restarts_start_elsewhere_and_the_best_bound_wins() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("components", 3):
            mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("y", dist.Normal(mu[z], 0.3), obs=y)

    y = torch.cat([torch.randn(8, generator=GENERATOR) * 0.3 + m for m in (-4.0, 0.0, 4.0)]).double()
    fit = fitted(model, (y,), restarts=4)
    ends = [guide.bounds[-1] for guide in fit.guides]
    assert len({guide.bounds[0] for guide in fit.guides}) == 4
    assert ends[fit.best] == pytest.approx(max(ends), abs=1e-9)


# ---------------------------------------------------------------------- handlers


def test_condition_do_and_block() -> None:
    b = torch.tensor([1.0, -2.0])
    conditioned = pplvi.AutoConjugate(poutine.condition(regression, {"b": b}), seed=0).run(X, Y)

    def known(x: Tensor, y: Tensor) -> None:
        alpha = pyro.sample("alpha", dist.Gamma(2.0, 2.0).expand([2]).to_event(1))
        pyro.sample("b", dist.Normal(0.0, alpha.rsqrt()).to_event(1), obs=b)
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ b, tau.rsqrt()), obs=y)

    assert conditioned.bounds[-1] == pytest.approx(pplvi.AutoConjugate(known, seed=0).run(X, Y).bounds[-1], abs=1e-9)
    done = pplvi.AutoConjugate(poutine.do(regression, {"b": b}), seed=0).run(X, Y)
    assert set(done(X, Y)) == {"alpha", "b", "tau"}  # the b of before the intervention is left with its prior
    assert done.median(X, Y)["b"].abs().max() < 1e-6
    assert done.bounds[-1] > conditioned.bounds[-1]
    blocked = pplvi.AutoConjugate(poutine.block(poutine.do(regression, {"b": b}), hide=["alpha"]), seed=0).run(X, Y)
    assert set(blocked(X, Y)) == {"b", "tau"}


def test_a_scaled_model_has_the_tempered_posterior() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    guide = pplvi.AutoConjugate(model, seed=0).run(Y)
    precision = 1 + 0.5 * len(Y)
    assert guide.median(Y)["mu"].item() == pytest.approx(float(0.5 * Y.sum() / precision), abs=1e-10)
    loss = pplvi.ELBO(20_000).loss(model, guide, Y)
    assert -loss == pytest.approx(guide.bounds[-1], abs=0.03)


def test_masks_leave_data_out() -> None:
    seen = torch.arange(40) % 3 > 0
    missing = torch.where(seen, Y, torch.tensor(float("nan")))

    def masked(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)

    def imputed(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y, obs_mask=seen)

    x, y = X[seen], Y[seen]
    exact = float(dist.MultivariateNormal(torch.zeros(len(y)), x @ x.T + torch.eye(len(y))).log_prob(y))
    assert pplvi.AutoConjugate(masked, seed=0).run(X, missing).bounds[-1] == pytest.approx(exact, abs=1e-8)
    guide = pplvi.AutoConjugate(imputed, seed=0, blocks=[("b", "y_unobserved")]).run(X, missing)
    assert guide.bounds[-1] == pytest.approx(exact, abs=1e-8)


def test_float32_models_have_float32_draws() -> None:
    torch.set_default_dtype(torch.float32)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(5e4, 1e4))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 8e3), obs=y)

    y = torch.tensor([51200.0, 48700.0, 62100.0, 39900.0, 55500.0])
    guide = pplvi.AutoConjugate(model, seed=0).run(y)
    covariance = 1e8 * torch.ones(5, 5).double() + 64e6 * torch.eye(5).double()
    exact = dist.MultivariateNormal(torch.full((5,), 5e4).double(), covariance).log_prob(y.double()).item()
    assert guide.bounds[-1] == pytest.approx(exact, abs=1e-5)
    assert guide(y)["mu"].dtype == torch.float32


# ---------------------------------------------------------------------- shapes, copies, files


def test_matrices_with_joint_columns_keep_their_shape_and_density() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)

    y = torch.randn(40, 3, generator=GENERATOR, dtype=torch.float64)
    fit = fitted(model, (X, y))  # rows of w interact, its columns do not
    covariance = X @ X.T + 0.25 * torch.eye(40)
    exact = sum(float(dist.MultivariateNormal(torch.zeros(40), covariance).log_prob(column)) for column in y.T)
    assert fit.guide.bounds[-1] == pytest.approx(exact, abs=1e-8)
    assert fit.posterior(50).total_log_evidence.value == pytest.approx(exact, abs=1e-8)
    assert fit.guide(X, y)["w"].shape == (2, 3)


def test_copies_pickles_and_state_dicts_draw_the_same() -> None:
    guide = pplvi.AutoConjugate(regression, seed=0).run(X, Y)

    def drawn(g: Any) -> Tensor:
        pyro.set_rng_seed(1)
        found: Tensor = g(X, Y)["b"]
        return found

    fresh = pplvi.AutoConjugate(regression)
    fresh.load_state_dict(guide.state_dict())
    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide)), fresh):
        assert torch.equal(drawn(twin), drawn(guide))
    assert fresh.bounds == guide.bounds


def test_a_checkpoint_holds_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    first = fitted(checkpoint=path)
    again = fitted(resume=path)
    assert torch.equal(first.guide.median(X, Y)["b"], again.guide.median(X, Y)["b"])
    first.save(tmp_path / "fit.pt")
    loaded: Any = pplvi.load(tmp_path / "fit.pt", regression)
    assert loaded.guide.bounds == first.guide.bounds
    assert loaded.summary().split("Verdict")[0] == first.summary().split("Verdict")[0]


def test_quantiles_are_those_of_the_draws() -> None:
    guide = pplvi.AutoConjugate(regression, seed=0).run(X, Y)
    found = guide.quantiles([0.1, 0.5, 0.9], X, Y)
    draws = pplvi.Posterior(regression, guide, (X, Y), num_draws=20_000, seed=0).draws.latents
    for name, values in found.items():
        assert torch.allclose(
            values, torch.quantile(draws[name], torch.tensor([0.1, 0.5, 0.9]), 0), rtol=0.1, atol=0.02
        )
    with pytest.raises(ValueError, match="expected a flat list of probabilities"):
        guide.quantiles([1.5])


# ---------------------------------------------------------------------- minibatches


def test_minibatches_end_where_sweeps_do() -> None:
    n = 2000
    labels = torch.randint(2, (n,), generator=GENERATOR)
    y = torch.where(labels == 1, 3.0, -3.0).double() + torch.randn(n, generator=GENERATOR, dtype=torch.float64)

    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 10.0).to_event(1))
        with pyro.plate("data", n, subsample_size=len(y)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)

    start = init_to_value(values={"mu": torch.tensor([-1.0, 1.0])})
    full = pplvi.AutoConjugate(model, seed=0, init_loc_fn=start).run(y)
    batches = [(y[i],) for _ in range(4) for i in torch.randperm(n, generator=GENERATOR).split(100)]
    make = partial(pplvi.AutoConjugate, init_loc_fn=start, rate=pplvi.RobbinsMonro(10, 0.7))
    fit = pplvi.fit(model, lambda model: make(model), data=batches, num_steps=80, seed=0, progress=False)
    assert fit.losses.shape == (1, 80)
    assert full.bounds[-1] - 0.5 < sum(fit.guide.terms(y).values()) <= full.bounds[-1]
    with pytest.raises(ValueError, match=r"plate 'data', which is subsampled.*rate="):
        pplvi.AutoConjugate(model).run(y[:100])


def test_local_continuous_sites_of_a_minibatch_are_at_their_maximisers() -> None:
    n = 200
    y = 2.0 + torch.randn(n, generator=GENERATOR, dtype=torch.float64) * 2**0.5

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", n, subsample_size=len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = pplvi.AutoConjugate(model, rate=pplvi.RobbinsMonro(1, 0.55), seed=0)
    for _ in range(10):
        for part in y.split(50):
            guide.step(part)
    full = pplvi.AutoConjugate(model, seed=0).run(y)
    part = y[:50]
    pyro.set_rng_seed(0)
    draws = torch.stack([guide(part)["z"] for _ in range(60)])
    mu = guide.median(part)["mu"]
    assert mu.item() == pytest.approx(full.median(y)["mu"].item(), abs=0.15)
    assert torch.allclose(draws.mean(0), (mu + part) / 2, atol=4 * 0.5**0.5 / 60**0.5)


def test_a_model_that_draws_its_minibatch_gives_the_guide_the_same_one() -> None:
    n = 60
    y = torch.where(torch.arange(n) < 30, -4.0, 4.0).double() + torch.randn(n, generator=GENERATOR, dtype=torch.float64)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 10.0).to_event(1))
        with pyro.plate("data", n, subsample_size=20) as rows:
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(mu[z.long()], 1.0), obs=y[rows])

    make = partial(
        pplvi.AutoConjugate,
        rate=pplvi.RobbinsMonro(1, 0.8),
        init_loc_fn=init_to_value(values={"mu": torch.tensor([-1.0, 1.0])}),
    )
    fit = pplvi.fit(model, lambda model: make(model), args=(y,), num_steps=60, seed=0, progress=False)
    means = torch.stack([y[:30].mean(), y[30:].mean()])
    assert torch.allclose(fit.guide.median(y)["mu"], means, atol=0.4)
    pyro.set_rng_seed(0)
    trace = poutine.trace(fit.guide).get_trace(y)
    rows, z = trace.nodes["data"]["value"], trace.nodes["z"]["value"]
    assert torch.equal(z, (rows >= 30).double())  # clusters are far apart: each draw is that of its own datum
