"""Matrices of draws that are not positive definite: a density of zero there, in every way and for every method."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor

import pplvi
from pplvi.posterior.draws import predict
from pplvi.posterior.posterior import Posterior
from pplvi.programs.factorising import run_sound
from pplvi.programs.joint import execute

Y = torch.tensor([[0.7, 0.5], [-1.0, -1.2], [0.3, 0.1]])


def correlated(y: Tensor) -> None:
    r = pyro.sample("r", dist.Normal(0.0, 1.5))
    covariance = torch.stack([torch.stack([torch.ones_like(r), r], -1), torch.stack([r, torch.ones_like(r)], -1)], -2)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=y)


def factorised(y: Tensor) -> None:
    r = pyro.sample("r", dist.Normal(0.0, 1.5))
    chol = torch.linalg.cholesky(torch.eye(2) * (1 - r) + r)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=chol), obs=y)


def prior(y: Tensor) -> None:
    pyro.sample("r", dist.Normal(0.0, 1.5))


MODELS = pytest.mark.parametrize("model", [correlated, factorised])


def log_joint(r: Tensor) -> Tensor:
    """Log density at each ``r`` between -1 and 1, minus infinity elsewhere."""
    y, det = Y.to(r), 1 - r**2
    square = ((y**2).sum(1) - 2 * r[:, None] * y.prod(1)) / det[:, None]
    log_p = -0.5 * square.sum(1) - len(y) * (0.5 * det.log() + torch.tensor(2 * torch.pi).log())
    return (log_p + dist.Normal(0.0, 1.5).log_prob(r)).where(det > 0, -torch.inf)


def log_evidence() -> Tensor:
    r = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[1:-1]
    return torch.logsumexp(log_joint(r), 0) + (r[1] - r[0]).log()


@MODELS
@pytest.mark.parametrize("vectorize", [None, "vmap", "loop"])
def test_the_density_is_zero_for_that_particle_alone(model: Any, vectorize: Any) -> None:
    pyro.set_rng_seed(0)
    run = execute(model, prior, (Y,), {}, num_particles=20, vectorize=vectorize)
    r = run.guide.nodes["r"]["value"].reshape(-1)
    assert 3 < r.abs().gt(1).sum() < 17
    assert torch.allclose(run.log_target(), log_joint(r), rtol=1e-4)


@MODELS
@pytest.mark.parametrize("r", [0.2, 1.7])
def test_one_particle_counts_as_several_do(model: Any, r: float) -> None:
    value = torch.tensor(r)
    run = execute(model, prior, (Y,), {}, values={"r": value})
    assert torch.allclose(run.log_target(), log_joint(value[None]), rtol=1e-5)


@MODELS
def test_the_evidence_is_that_of_the_draws_which_have_a_density(model: Any) -> None:
    pyro.set_rng_seed(0)
    posterior = Posterior(model, prior, (Y,), num_draws=4_000)
    assert (posterior.log_weight == -torch.inf).float().mean() > 0.4
    found = posterior.total_log_evidence
    assert abs(found.value - log_evidence()) < 4 * found.error
    assert bool(posterior.resample(500)["r"].abs().lt(1).all())


@MODELS
@pytest.mark.parametrize(
    ("guide", "options"),
    [
        (AutoNormal, {"num_steps": 3}),
        (AutoNormal, {"num_steps": 3, "compile": "trace"}),
        (pplvi.AutoPathfinder, {}),
        ("nuts", {"num_steps": 2, "num_warmup": 3}),
    ],
)
def test_a_fit_starts_where_most_draws_of_the_prior_have_none(model: Any, guide: Any, options: Any) -> None:
    fit = pplvi.fit(model, guide, args=(Y,), seed=0, progress=False, **options)
    draws = fit.mcmc.get_samples() if guide == "nuts" else fit.posterior(20).resample(5)
    assert bool((draws["r"].abs() < 1).all())  # elsewhere there is no density


def test_predictions_there_are_no_draws() -> None:
    drawn = predict(correlated, {"r": torch.tensor([0.5, 3.0])}, (Y,), {}, num_draws=2).observed["y"]
    assert bool(drawn[0].isfinite().all())
    assert bool(drawn[1].isnan().all())


def test_the_gradient_of_the_others_is_their_own() -> None:
    pyro.clear_param_store()

    def guide(y: Tensor) -> None:
        pyro.sample("r", dist.Delta(pyro.param("at", torch.tensor(0.3))))

    loss = SVI(factorised, guide, Adam({"lr": 0.1}), pplvi.ELBO()).evaluate_loss(Y)
    assert loss == pytest.approx(-float(log_joint(torch.tensor([0.3]))), rel=1e-5)


def test_a_matrix_that_never_is_one_raises_its_own_error() -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance_matrix=-scale * torch.eye(2)))

    with pytest.raises((ValueError, torch.linalg.LinAlgError), match=r"(?i)positive.?definite"):
        pplvi.fit(model, AutoNormal, num_steps=2, progress=False)


def test_a_recording_expects_it() -> None:
    def factor(x: Tensor) -> Tensor:
        found, failed = run_sound(lambda: torch.linalg.cholesky(x), guarded=True)
        assert failed is not None
        return found.where(~failed, torch.nan)

    recorded = torch.fx.experimental.proxy_tensor.make_fx(factor)(torch.eye(2))
    assert torch.equal(recorded(4 * torch.eye(2)), 2 * torch.eye(2))
    assert bool(recorded(-torch.eye(2)).isnan().all())
