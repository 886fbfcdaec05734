"""float32 and float64 programs under either default, values of thousands, and sites with nothing to choose."""

import io
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import ImproperUniform
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from torch import Tensor
from torch.distributions import constraints

import pplvi

SEARCHES = [pplvi.AutoPathfinder, pplvi.AutoDeterministicNormal, pplvi.AutoBatchAndMatch]
FAMILIES = [*SEARCHES, pplvi.AutoFlow, AutoNormal, AutoMultivariateNormal]


def name(family: Any) -> str:
    return str(family.__name__)


def regression(x: Tensor, y: Tensor) -> None:
    """``x`` is multiplied by a matrix, so that a weight of another type than the data is an error."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    mean = (x @ b.reshape(*b.shape[:-2], 2, 1)).squeeze(-1)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, torch.tensor(0.5, dtype=x.dtype)), obs=y)


def exact_regression(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    covariance = x @ x.T + 0.25 * torch.eye(len(y), dtype=torch.float64)
    return float(dist.MultivariateNormal(torch.zeros(len(y), dtype=torch.float64), covariance).log_prob(y))


@pytest.mark.table(5)
@pytest.mark.parametrize("family", FAMILIES, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_meets_constants_of_its_own_type(family: Callable[..., Any], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, generator=generator).to(dtype)
    y = x @ torch.tensor([0.5, -0.3], dtype=dtype) + 0.5 * torch.randn(20, generator=generator).to(dtype)
    options: dict[str, Any] = {"optim": pyro.optim.Adam({"lr": 0.03}), "num_steps": 400, "seed": 0, "progress": False}
    result = pplvi.fit(regression, family, args=(x, y), **options)
    posterior = result.posterior(num_draws=2000)
    assert posterior.draws.latents["b"].dtype == dtype
    value, error = posterior.total_log_evidence
    assert abs(value - exact_regression(x, y)) < 0.05 + 4 * error


def thousands(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(1e4, 1e3))
    scale = pyro.sample("scale", dist.LogNormal(3.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


@pytest.mark.parametrize("family", SEARCHES, ids=name)
def test_values_of_ten_thousand_are_not_improper(family: Callable[..., Any]) -> None:
    """A ridge leads to the mode, along which a float32 density changes by less than its rounding."""
    y = 1e4 + 30 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    posterior = pplvi.fit(thousands, family, args=(y,), seed=0, progress=False).posterior(num_draws=2000)
    drawn = posterior.resample()
    assert float(drawn["mean"].mean()) == pytest.approx(float(y.mean()), abs=2.0)
    assert float(drawn["scale"].mean()) == pytest.approx(float(y.std()), rel=0.1)


@pytest.mark.parametrize("family", SEARCHES, ids=name)
@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_scales_of_any_size_are_not_improper(family: Callable[..., Any], unit: float) -> None:
    """What is found has the unit of the data, which the priors tell."""

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.tensor(0.0, dtype=y.dtype), 10.0 * unit))
        scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(unit, dtype=y.dtype)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    y = 3 + 0.1 * torch.randn(20, generator=torch.Generator().manual_seed(0)).double()
    posterior = pplvi.fit(model, family, args=(y * unit,), seed=0, progress=False).posterior(num_draws=1000)
    latents = posterior.draws.latents
    assert float(latents["mean"].mean() / unit) == pytest.approx(float(y.mean()), abs=0.02)
    assert float(latents["mean"].std() / unit) == pytest.approx(float(y.std()) / 20**0.5, rel=0.3)
    assert float(latents["scale"].mean() / unit) == pytest.approx(float(y.std()), rel=0.2)


def test_an_improper_prior_of_float64_starts_in_float64() -> None:
    def model(y: Tensor) -> None:
        prior = ImproperUniform(constraints.real, (), ())
        mean = pyro.sample("mean", prior)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0, 4.5], dtype=torch.float64)
    found = pplvi.fit(model, pplvi.AutoPathfinder, args=(y,), seed=0, progress=False).posterior(num_draws=2000)
    assert float(found.draws.latents["mean"].mean()) == pytest.approx(2.5, abs=0.05)


def one_class(y: Tensor) -> None:
    probabilities = pyro.sample("p", dist.Dirichlet(torch.ones(1)))
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 1):
        pyro.sample("class", dist.Categorical(probabilities), obs=torch.zeros(1))
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.table(4)
@pytest.mark.parametrize("family", FAMILIES, ids=name)
def test_the_probability_of_one_class_is_a_constant(family: Callable[..., Any]) -> None:
    y = torch.tensor([1.3])
    options: dict[str, Any] = {"optim": pyro.optim.Adam({"lr": 0.05}), "num_steps": 300, "seed": 0, "progress": False}
    result = pplvi.fit(one_class, family, args=(y,), **options)
    posterior = result.posterior(num_draws=2000)
    assert not posterior.is_dirac
    value, error = posterior.total_log_evidence
    assert abs(value - float(dist.Normal(0.0, 2**0.5).log_prob(y))) < 0.03 + 4 * error
    result.report(io.StringIO())


@pytest.mark.parametrize("family", FAMILIES, ids=name)
def test_empty_data_are_told(family: Callable[..., Any]) -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"pyro.plate of size 0 .*at least one element"):
        pplvi.fit(model, family, args=(torch.zeros(0),), num_steps=3, seed=0, progress=False)


def improper(y: Tensor) -> None:
    mean = pyro.sample("mean", ImproperUniform(constraints.real, (), ()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.parametrize("guide", [AutoNormal, "nuts"])
def test_an_improper_prior_that_cannot_be_drawn_from_asks_for_a_start(guide: Any) -> None:
    with pytest.raises(ValueError, match=r"ImproperUniform.*init_to_value"):
        pplvi.fit(improper, guide, args=(torch.tensor([1.0, 2.0]),), num_steps=3, seed=0, progress=False)


def test_an_improper_prior_with_a_start_is_right() -> None:
    y = torch.tensor([1.0, 2.0, 4.5])
    start = init_to_value(values={"mean": torch.tensor(0.0)})
    options: dict[str, Any] = {"optim": pyro.optim.Adam({"lr": 0.05}), "num_steps": 500, "seed": 0, "progress": False}
    result = pplvi.fit(improper, lambda model: AutoNormal(model, init_loc_fn=start), args=(y,), **options)
    value, error = result.posterior(num_draws=4000).total_log_evidence
    exact = float(dist.Normal(y.mean(), 1.0).log_prob(y).sum()) + 0.5 * math.log(2 * math.pi / 3)
    assert abs(value - exact) < 0.02 + 4 * error
