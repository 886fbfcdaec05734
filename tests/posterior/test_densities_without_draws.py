"""Data whose distribution has a density and no draws, as people write them for censored or survival data."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pplvi
from pplvi.posterior.posterior import Posterior

X = torch.tensor([[0.1, 1.0], [-0.5, 0.3], [0.9, -1.2]])
TIMES = torch.tensor([0.5, 1.2, 0.3])


class Survival(dist.TorchDistribution):  # type: ignore[misc]
    """An exponential waiting time by its density alone."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.positive

    def __init__(self, log_rate: Tensor) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.shape, validate_args=False)

    def expand(self, shape: Any, _instance: Any = None) -> Survival:
        return Survival(self.log_rate.expand(shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_rate - value * self.log_rate.exp()


def model(X: Tensor, times: Tensor | None = None) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("patients", len(X)):
        pyro.sample("times", Survival(X @ b), obs=times)
        pyro.sample("visits", dist.Poisson((X @ b).exp()), obs=None if times is None else torch.ones(3))


def guide(X: Tensor, times: Tensor | None = None) -> None:
    pyro.sample("b", dist.Normal(0.0, 0.8).expand([2]).to_event(1))


def test_the_other_data_are_predicted_and_exported() -> None:
    posterior = Posterior(model, guide, (X, TIMES), num_draws=50, seed=0)
    with pytest.warns(UserWarning, match="'times' is left out of the predictions: Survival has no sample()"):
        data = pplvi.to_arviz(posterior)
    assert list(data["posterior_predictive"].data_vars) == ["visits"]
    assert list(data["prior_predictive"].data_vars) == ["visits"]
    assert set(data["log_likelihood"].data_vars) == {"times", "visits"}


def test_what_has_to_be_drawn_is_named() -> None:
    posterior = Posterior(model, guide, (X, TIMES), num_draws=10, seed=0)
    with pytest.raises(ValueError, match=r"site 'times' has a Survival, which has a density and no draws: expected"):
        posterior.predict(X)
