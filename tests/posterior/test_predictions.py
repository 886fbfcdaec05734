"""Groups of ArviZ for new inputs and for the prior's densities, against the model run by hand."""

from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_results import elpd, pointwise
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pplvi
from pplvi.posterior.arviz.versions import is_legacy

X, NEW = torch.linspace(-1.0, 1.0, 8), torch.tensor([10.0, -10.0, 0.0])
Y = 2 * X + 0.1 * torch.sin(9 * X)


def line(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)


def around(x: Tensor, y: Tensor | None = None) -> None:
    pyro.sample("slope", dist.Normal(2.0, 0.05))


@pytest.fixture(scope="module")
def fit() -> pplvi.Fit:
    return pplvi.fit(
        line, AutoNormal, args=(X, Y), num_steps=300, learning_rate=0.05, seed=0, restarts=2, progress=False
    )


@pytest.mark.parametrize("inputs", [(NEW,), {"x": NEW}, (NEW.numpy(),)], ids=["args", "kwargs", "numpy"])
def test_predictions_go_with_the_exported_draws(fit: pplvi.Fit, inputs: Any) -> None:
    data = fit.to_arviz(num_prior=0, predictions=inputs, coords={"data": list("abcdefgh")})
    assert data.predictions.y.dims == ("chain", "draw", "data")
    assert data.predictions.y.shape == (2, 1000, 3)
    assert list(data.posterior_predictive.coords["data"].values) == list("abcdefgh")
    assert list(data.predictions.coords["data"].values) == [0, 1, 2]
    left = (
        data.predictions.y.values - data.posterior.slope.values[..., None] * NEW.numpy()
    )  # noise of sd 0.1, whatever the draw
    assert abs(left.std() - 0.1) < 4 * 0.1 / np.sqrt(2 * left.size)
    assert data.predictions_constant_data.x.values.tolist() == NEW.tolist()
    assert "y" not in data.predictions_constant_data


def test_predictions_of_chains_and_for_wrong_inputs(fit: pplvi.Fit) -> None:
    chains = pplvi.fit(line, "nuts", args=(X, Y), num_steps=20, restarts=2, seed=0, progress=False)
    assert chains.to_arviz(num_prior=0, predictions=(NEW,)).predictions.y.shape == (2, 20, 3)
    assert "predictions" not in fit.to_arviz(num_prior=0)
    with pytest.raises(ValueError, match=r"expected a tuple"):
        fit.to_arviz(predictions=NEW)

    def local(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    other = pplvi.fit(local, AutoNormal, args=(X,), num_steps=2, seed=0, progress=False)
    with pytest.raises(ValueError, match="the draws of latent site 'z'"):
        other.to_arviz(num_prior=0, predictions=(NEW,))


def test_one_restart_by_its_index(fit: pplvi.Fit) -> None:
    for index in (0, 1):
        data = pplvi.to_arviz(fit.posteriors, restarts=index, num_prior=0, draws="guide")
        assert np.array_equal(data.posterior.slope[0], fit.posteriors[index].draws.latents["slope"].numpy())
    with pytest.raises(ValueError, match="restarts=2; expected one of the 2 restarts"):
        pplvi.to_arviz(fit.posteriors, restarts=2)


# ---------------------------------------------------------------------- the prior's densities


def hierarchy(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", 3):
        m = pyro.sample("m", dist.MultivariateNormal(mu.expand(2), torch.eye(2)))
        pyro.sample("y", dist.Normal(m, 1.0).to_event(1), obs=y)


def test_densities_of_the_prior_are_those_of_its_distributions() -> None:
    fit = pplvi.fit(hierarchy, AutoNormal, args=(torch.ones(3, 2),), num_steps=5, seed=0, progress=False)
    data = fit.to_arviz(num_prior=0)
    assert data.log_prior.m.dims == ("chain", "draw", "groups")
    mu, m = (torch.as_tensor(data.posterior[name].values) for name in ("mu", "m"))
    expected = torch.distributions.Normal(0.0, 2.0).log_prob(mu)
    torch.testing.assert_close(torch.as_tensor(data.log_prior.mu.values), expected)
    expected = torch.distributions.Normal(mu[..., None, None], 1.0).log_prob(m).sum(-1)
    torch.testing.assert_close(torch.as_tensor(data.log_prior.m.values), expected)


def sensitivity(data: Any, part: str) -> float:
    return float(az.psens(data, component=part).z if is_legacy() else az.psense(data, group=part).z)


def test_power_scaling_tells_a_strong_prior() -> None:
    """The posterior follows a narrow prior, and hardly a wide one."""

    def model(width: float) -> Any:
        def program(y: Tensor) -> None:
            z = pyro.sample("z", dist.Normal(0.0, width))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

        return program

    found = {}
    for width in (0.3, 100.0):
        mean, scale = 8 / (4 + width**-2), (4 + width**-2) ** -0.5
        posterior = pplvi.Posterior(
            model(width),
            lambda y, mean=mean, scale=scale: pyro.sample("z", dist.Normal(mean, scale)),
            (torch.full((4,), 2.0),),
            num_draws=4000,
            seed=0,
        )
        data = pplvi.to_arviz(posterior, num_prior=0, seed=0)
        found[width] = {part: sensitivity(data, part) for part in ("prior", "likelihood")}
    assert found[0.3]["prior"] > 0.1  # 0.05 is where ArviZ begins to warn
    assert found[100.0]["prior"] < 0.02
    assert found[100.0]["likelihood"] > 0.05


def test_enumerated_models_have_no_densities_of_the_prior() -> None:
    @pyro.infer.config_enumerate
    def mixture(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(loc + k, 1.0), obs=y)

    fit = pplvi.fit(mixture, AutoNormal, args=(Y,), num_steps=3, seed=0, progress=False)
    assert "log_prior" not in fit.to_arviz(num_prior=0, posterior_predictive=False)


# ---------------------------------------------------------------------- several sites left out together


def two(a: Tensor, b: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4, dim=-2):
        pyro.sample("a", dist.Normal(z, 1.0), obs=a[:, None])
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("b", dist.Normal(z, 1.0), obs=b)


def exact_guide(a: Tensor, b: Tensor) -> None:
    values = torch.cat([a, b.flatten()])
    pyro.sample("z", dist.Normal(values.sum() / (1 + len(values)), (1 + len(values)) ** -0.5))


A, B = torch.tensor([0.5, -1.0, 2.0, 0.1]), torch.linspace(-1.0, 1.5, 12).reshape(4, 3)


@pytest.mark.parametrize("names", [["a", "b"], ["b", "a"]])
def test_sites_that_share_a_plate_are_left_out_together(names: list[str]) -> None:
    """A row is one observation of four numbers: its density given the other rows is a normal with a common mean."""
    posterior = pplvi.Posterior(two, exact_guide, (A, B), num_draws=20_000, seed=0)
    found = posterior.loo(names)
    rows = torch.cat([A[:, None], B], 1)
    exact = []
    for i in range(4):
        rest = torch.cat([rows[:i], rows[i + 1 :]]).flatten()
        variance = 1 / (1 + len(rest))
        covariance = torch.eye(4) + variance
        mean = (variance * rest.sum()).expand(4)
        exact.append(torch.distributions.MultivariateNormal(mean, covariance).log_prob(rows[i]).item())
    assert found.n_data_points == 4
    assert found.pareto_k.dims == ("rows",)
    assert pointwise(found).tolist() == pytest.approx(exact, abs=0.03)


def test_sites_without_a_common_plate_are_refused() -> None:
    def apart(a: Tensor, b: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("first", len(a)):
            pyro.sample("a", dist.Normal(z, 1.0), obs=a)
        with pyro.plate("second", len(b)):
            pyro.sample("b", dist.Normal(z, 1.0), obs=b)

    fit = pplvi.fit(apart, AutoNormal, args=(A, B[:, 0]), num_steps=400, seed=0, progress=False)
    with pytest.raises(ValueError, match=r"\['a', 'b'\] have no plate in common \('a' in \['first'\], 'b' in"):
        fit.loo(["a", "b"])
    with pytest.raises(ValueError, match=r"several observed sites \['a', 'b'\].*a list of those"):
        fit.loo()
    with pytest.raises(ValueError, match=r"names no observed site.*expected one of \['a', 'b'\]"):
        fit.loo(["a", "c"])
    assert elpd(fit.loo(["a"])) == elpd(fit.loo("a"))
