"""Guides that have parameters for a minibatch are refused; those with all of them have a posterior over all data."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer.autoguide as autoguide
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

import pplvi

SIZE = 12
Y = torch.linspace(-2.0, 3.0, SIZE, dtype=torch.float64)
EVIDENCE = dist.Normal(0.0, math.sqrt(2.0)).log_prob(Y).sum().item()


def model(y: Tensor, size: int | None = None) -> None:
    """A latent for each datum."""
    with pyro.plate("data", SIZE, subsample_size=size) as i:
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])


def with_global(y: Tensor, size: int | None = None) -> None:
    """One latent for all data."""
    z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
    with pyro.plate("data", SIZE, subsample_size=size) as i:
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])


@pyro.infer.config_enumerate
def discrete(y: Tensor, size: int | None = None) -> None:
    """A class for each datum."""
    with pyro.plate("data", SIZE, subsample_size=size) as i:
        x = pyro.sample("x", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("y", dist.Normal(x.float(), 1.0), obs=y[i])


SIZED = [
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
    autoguide.AutoIAFNormal,
    autoguide.AutoLaplaceApproximation,
    autoguide.AutoStructured,
    autoguide.AutoGaussian,
]
FULL = [
    autoguide.AutoNormal,
    autoguide.AutoNormalMessenger,
    autoguide.AutoHierarchicalNormalMessenger,
    autoguide.AutoRegressiveMessenger,
]


@pytest.mark.parametrize("objective", [None, Trace_ELBO()], ids=["ours", "Pyro's"])
@pytest.mark.parametrize("kind", SIZED, ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore:Singular matrix")
def test_guide_of_a_minibatch_is_refused_at_the_first_step(kind: Any, objective: Any) -> None:
    steps: list[int] = []
    options: dict[str, Any] = {"objective": objective, "num_steps": 3, "callbacks": [lambda run: steps.append(1)]}
    with pytest.raises(ValueError, match=r"has parameters for 5 elements of plate 'data', which has 12.*AutoNormal"):
        pplvi.fit(model, kind, args=(Y.float(), 5), progress=False, **options)
    assert not steps


@pytest.mark.parametrize("objective", [None, TraceEnum_ELBO()], ids=["ours", "Pyro's"])
def test_discrete_guide_of_a_minibatch_is_refused(objective: Any) -> None:
    with pytest.raises(ValueError, match="AutoDiscreteParallel has parameters for 5 elements of plate 'data'"):
        pplvi.fit(
            discrete,
            autoguide.AutoDiscreteParallel,
            args=(Y.float(), 5),
            objective=objective,
            num_steps=3,
            progress=False,
        )


def test_guides_in_a_list_are_looked_into() -> None:
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoDiagonalNormal(pyro.poutine.block(model, hide=["y"])))
    with pytest.raises(ValueError, match="AutoDiagonalNormal has parameters for 5 elements"):
        pplvi.ELBO().loss(model, guide, Y, 5)


@pytest.mark.parametrize("kind", FULL, ids=lambda kind: kind.__name__)
def test_posterior_is_over_all_data(kind: Any) -> None:
    """Whether asked for with the arguments of the fit or without the size of its minibatches."""
    fit = pplvi.fit(
        model,
        kind,
        args=(Y, 6),
        num_steps=600,
        optim=pyro.optim.Adam({"lr": 0.05}),
        seed=0,
        progress=False,
        dtype=torch.float64,
    )
    for args in (None, (Y,)):
        posterior = fit.posterior(args=args, num_draws=4000)
        assert posterior.draws.latents["z"].shape == (4000, SIZE)
        found = posterior.total_log_evidence
        assert abs(found.value - EVIDENCE) < 4 * found.error + 0.01
    assert fit.predict().observed["y"].shape == (1000, SIZE)
    assert fit.to_arviz(num_prior=5).log_likelihood.y.shape == (1, 1000, SIZE)


def test_global_latent_has_weights_over_all_data() -> None:
    exact = dist.MultivariateNormal(torch.zeros(SIZE).double(), torch.eye(SIZE).double() + 1).log_prob(Y).item()

    def guide(y: Tensor, size: int | None = None) -> None:
        scale = 1 / math.sqrt(SIZE + 1)
        pyro.sample("z", dist.Normal(y.sum() / (SIZE + 1), scale))

    posterior = pplvi.Posterior(with_global, guide, (Y, 5), seed=0)
    assert posterior.total_log_evidence.value == pytest.approx(exact, abs=1e-9)
    assert posterior.loo().n_data_points == SIZE


def test_arguments_that_are_a_minibatch_stay_one() -> None:
    """The data for the rest of the plate are not there, though one value could be repeated along it."""

    def batch(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
        with pyro.plate("data", SIZE, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("z", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))

    for size in (1, 5):
        posterior = pplvi.Posterior(batch, guide, (Y[:size],), seed=0)
        assert posterior.draws.observed["y"].shape == (size,)
        with pytest.raises(ValueError, match=r"are subsampled.*expected the full data"):
            _ = posterior.log_weight
