"""Small programs with their data that several tests run."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def correlated(dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a Gaussian that is no product."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, dim, generator=generator)
    return 3 * torch.randn(dim, generator=generator), factor @ factor.T + 0.1 * torch.eye(dim)


class Collinear:
    """A regression whose two predictors are nearly the same, with the exact mean, sd and covariance of its weights."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(100, generator=generator)
        self.design = torch.stack([torch.ones(100), x, x + 0.01 * torch.randn(100, generator=generator)], 1)
        self.y = 2 + self.design[:, 1] + 0.5 * torch.randn(100, generator=generator)
        covariance = torch.linalg.inv(self.design.T @ self.design / 0.25 + torch.eye(3) / 100)
        self.mean, self.sd = covariance @ self.design.T @ self.y / 0.25, covariance.diagonal().sqrt()

    def model(self) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 10.0).to_event(1))
        with pyro.plate("data", 100):
            pyro.sample("y", dist.Normal((self.design * w).sum(-1), 0.5), obs=self.y)


def counts() -> None:
    """Counts with a gamma prior."""
    rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Poisson(rate), obs=torch.tensor([3.0, 5.0, 2.0, 6.0]))


def words() -> None:
    """Counts of three words, with a Dirichlet prior."""
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("y", dist.Multinomial(10, p), obs=torch.tensor([5.0, 1.0, 4.0]))


def coin() -> None:
    """Six tosses, with a beta prior."""
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    with pyro.plate("data", 6):
        pyro.sample("y", dist.Bernoulli(p), obs=torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0]))


def nan_data() -> None:
    """An observation that is no number."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.sample("bad", dist.Normal(mean, 1.0), obs=torch.tensor(math.nan))


def subsampled() -> None:
    """Three of ten data at a time."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=3) as index:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.ones(10)[index])


def banana() -> None:
    """A normal, and another around its square."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.5))


def gamma_target() -> None:
    """A normal and a gamma."""
    pyro.sample("z", dist.Normal(1.0, 2.0))
    pyro.sample("s", dist.Gamma(3.0, 2.0))


def bimodal() -> None:
    """Z = 1/2, second moment 4.49."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
    modes = dist.Normal(torch.tensor([2.0, -2.0]), 0.7)
    pyro.factor("density", torch.logsumexp(modes.log_prob(z.unsqueeze(-1)), -1) - math.log(4.0))


def binary(count: int, width: int) -> Tensor:
    """Random states of ``count`` rows of binary units."""
    return torch.randint(2, (count, width)).double()


class Walk:
    """z[0] ~ N(0, 1), z[t] ~ N(z[t-1], 1), y[t] ~ N(z[t], 1), as a state-space model."""

    def init(self, state: dict[str, Tensor]) -> None:
        state["z"] = pyro.sample("z", dist.Normal(0.0, 1.0))

    def step(self, state: dict[str, Tensor], y: Any = None) -> None:
        state["z"] = pyro.sample("z", dist.Normal(state["z"], 1.0))
        pyro.sample("y", dist.Normal(state["z"], 1.0), obs=y)


class Proposal:
    """A proposal for :class:`Walk` that moves towards what was observed."""

    def init(self, state: dict[str, Tensor]) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def step(self, state: dict[str, Tensor], y: Any = None) -> None:
        weight = pyro.param("weight", torch.tensor(0.4))
        pyro.sample("z", dist.Normal(state["z"] + weight * (y - state["z"]), 0.8))


class Chains:
    """What ``Posterior.from_mcmc`` reads of an MCMC run, with draws made by hand."""

    def __init__(self, **samples: Tensor) -> None:
        self.samples = samples

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        assert group_by_chain
        return self.samples
