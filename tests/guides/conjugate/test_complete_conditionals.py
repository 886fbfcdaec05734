"""Sites that are drawn from their exact conditional distributions given all others."""

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pplvi

pytestmark = pytest.mark.usefixtures("float64")

Y = 1 + 2 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def groups() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", 3):
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=Y)


def fitted(model: Any, *names: str) -> Any:
    make = partial(pplvi.AutoConjugate, conditional=names)
    return pplvi.fit(model, lambda m: make(m), seed=0, progress=False)


def test_the_conditional_is_the_exact_one() -> None:
    guide = fitted(groups, "tau").guide
    trace = poutine.trace(guide).get_trace()
    fn, mu = trace.nodes["tau"]["fn"], trace.nodes["mu"]["value"]
    torch.testing.assert_close(fn.concentration, torch.full((3,), 4.5))
    torch.testing.assert_close(fn.rate, 2 + 0.5 * ((Y - mu) ** 2).sum(0))


def test_draws_at_once_are_nearer_to_the_posterior_than_the_mean_field() -> None:
    plain, exact = fitted(groups).posterior(4000), fitted(groups, "tau").posterior(4000)
    grid = torch.linspace(-6.0, 6.0, 4001)
    rates = 2 + 0.5 * ((Y - grid[:, None, None]) ** 2).sum(-2)
    marginal = 2 * torch.log(torch.tensor(2.0)) + torch.lgamma(torch.tensor(4.5)) - 4.5 * rates.log()
    constant = 2.5 * torch.log(torch.tensor(2 * torch.pi))
    joint = (marginal - constant).sum(-1) + dist.Normal(0.0, 3.0).log_prob(grid)
    evidence = float(torch.logsumexp(joint, 0) + (grid[1] - grid[0]).log())
    assert exact.total_log_evidence.value == pytest.approx(evidence, abs=0.02)
    assert plain.elbo.value < exact.elbo.value < evidence
    assert exact.pareto_k < 0.6


def test_what_cannot_be_conditional_is_refused() -> None:
    def pair() -> None:
        a = pyro.sample("a", dist.Gamma(2.0, 2.0))
        b = pyro.sample("b", dist.Gamma(2.0, a))
        pyro.sample("y", dist.Poisson(b), obs=torch.tensor(3.0))

    with pytest.raises(ValueError, match=r"conditional=\['mu'\] names 'mu': expected latent sites of gamma.*\['tau'\]"):
        fitted(groups, "mu")
    with pytest.raises(ValueError, match=r"conditional= names \['a', 'b'\], on which site 'b' depends"):
        fitted(pair, "a", "b")
