"""Expectation maximisation with discrete latents, and continuous ones given them: mixtures of low-rank Gaussians."""

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


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


X = torch.cat([normal(20, 1) @ normal(1, 3) + shift + 0.3 * normal(20, 3) for shift in (-2.0, 2.0)])


def analysers(x: Tensor) -> None:
    w = pyro.param("w", torch.ones(2) / 2, constraint=constraints.simplex)
    loadings, mu = pyro.param("loadings", torch.ones(2, 3, 1)), pyro.param("mu", torch.zeros(2, 3))
    sd = pyro.param("sd", torch.ones(2, 3), constraint=POSITIVE)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        h = pyro.sample("h", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        mean = (loadings[z] @ h.unsqueeze(-1)).squeeze(-1) + mu[z]
        pyro.sample("x", dist.Normal(mean, sd[z]).to_event(1), obs=x)


def log_evidence_of_analysers(w: Tensor, loadings: Tensor, mu: Tensor, sd: Tensor) -> Tensor:
    law = dist.MultivariateNormal(mu, loadings @ loadings.mT + torch.diag_embed(sd**2))
    return (law.log_prob(X[:, None]) + w.log()).logsumexp(-1).sum()


def replicates(x: Tensor) -> None:
    q = pyro.param("q", torch.tensor(0.4), constraint=constraints.unit_interval)
    a = pyro.param("a", torch.tensor([0.3, -0.2]))
    mu = pyro.param("mu", torch.tensor([[-2.0, 0.0], [1.0, 3.0]]))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=POSITIVE)
    with pyro.plate("data", len(x), dim=-2):
        b, c = pyro.sample("b", dist.Bernoulli(q)), pyro.sample("c", dist.Categorical(logits=a))
        h = pyro.sample("h", dist.Normal(mu[b.long(), c], 1.0))
        with pyro.plate("replicates", 3, dim=-1):
            pyro.sample("x", dist.Normal(h, sd), obs=x)


def log_evidence_of_replicates(q: Tensor, a: Tensor, mu: Tensor, sd: Tensor) -> Tensor:
    prior = torch.stack([1 - q, q]).log()[:, None] + a.log_softmax(-1)
    law = dist.MultivariateNormal(mu.reshape(4, 1).expand(4, 3), torch.ones(3, 3) + sd**2 * torch.eye(3))
    return (law.log_prob(X[:, None]) + prior.flatten()).logsumexp(-1).sum()


@pytest.mark.parametrize(
    ("model", "log_evidence"),
    [(analysers, log_evidence_of_analysers), (replicates, log_evidence_of_replicates)],
    ids=["analysers", "replicates"],
)
def test_the_evidence_is_that_of_a_mixture_and_rises(model: Any, log_evidence: Any) -> None:
    seen: list[float] = []

    def note(run: Any) -> None:
        store = pyro.get_param_store()
        seen.append(float(log_evidence(**{name: value.detach() for name, value in store.items()})))

    algorithm = ExpectationMaximization()
    fit = pplvi.fit(model, algorithm, args=(X,), seed=0, progress=False, num_steps=4, callbacks=[note])
    assert "L-BFGS" not in fit.notes["M-step"]
    assert list(-fit.losses[0, 1:]) == pytest.approx(seen[:-1], abs=1e-8)
    assert (torch.tensor(seen).diff() >= -1e-9).all()
    assert seen[-1] > seen[0] + 1
    assert fit.posterior(10).total_log_evidence.value == pytest.approx(seen[-1], abs=1e-8)
    found = fit.guide.marginals(X)
    assert all(torch.allclose(probs.sum(-1), torch.ones(())) for probs in found.values())
    if model is analysers:  # whose components are alike in the program: k-means tells them apart
        assert (found["z"][:20].argmax(-1) != found["z"][20:].argmax(-1)).double().mean() > 0.8


def chain(x: Tensor) -> None:
    mu, z = pyro.param("mu", torch.tensor([-1.0, 1.0])), torch.tensor(0)
    for t in range(8):
        z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.9, 0.1], [0.1, 0.9]])[z]))
        h = pyro.sample(f"h_{t}", dist.Normal(mu[z], 1.0))
        pyro.sample(f"x_{t}", dist.Normal(h, 1.0), obs=x[t, 0])


def nested(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(x), dim=-2):
        b = pyro.sample("b", dist.Bernoulli(0.5))
        with pyro.plate("features", 3, dim=-1):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(pyro.sample("h", dist.Normal(mu[c.long()] + b, 1.0)), 1.0), obs=x)


def shared(x: Tensor) -> None:
    h = pyro.sample("h", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(h + pyro.param("mu", torch.tensor([-1.0, 1.0]))[z], 1.0), obs=x[:, 0])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (chain, r"discrete latents 'z_0' to 'z_7' have 256 joint values.*with pyro.plate\('data', n\).*AutoNormal"),
        (nested, r"discrete latents \['b', 'c'\] are in different plates .*too many"),
        (shared, r"sites \['h'\] are not in plates \['data'\] of the discrete latents \['z'\]"),
    ],
)
def test_latents_that_are_not_local_are_refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pplvi.fit(model, ExpectationMaximization(), args=(X,), progress=False)
