"""Programs with enumerated sites and with products of latents, against updates written by hand."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_sample, init_to_value
from sklearn.datasets import load_digits
from torch import Tensor

import pplvi
from benchmarks.conjugate import iris
from pplvi.guides.conjugate.ascent import BlockMeanField, ascend_bound, started
from pplvi.guides.conjugate.program import read_program

pytestmark = pytest.mark.usefixtures("float64")

MONOTONE = 1e-12


def field_of(model: Any, *args: Any, init: Any = init_to_sample, seed: int = 0) -> BlockMeanField:
    pyro.set_rng_seed(seed)
    return started(read_program(model, args, {}, init=init))


def concentrations(field: BlockMeanField) -> dict[str, Tensor]:
    return {block: family.canonical["concentration"].clone() for block, family in field.families.items()}


def never_falls(bounds: list[float]) -> bool:
    steps = torch.tensor(bounds).diff() / torch.tensor(bounds[1:]).abs()
    return bool((steps >= -MONOTONE).all())


def expected_log(c: Tensor) -> Tensor:
    return torch.digamma(c) - torch.digamma(c.sum(-1, keepdim=True))


# ---------------------------------------------------------------------- mixtures


def test_a_mixture_of_iris_has_the_known_bound() -> None:
    problem = iris()
    guide = pplvi.AutoConjugate(problem.model, init_loc_fn=problem.init).run(*problem.args)
    assert guide.bounds[-1] == pytest.approx(-509.861728, abs=1e-5)
    assert never_falls(guide.bounds)
    terms = guide.terms(*problem.args)
    assert sum(terms.values()) == pytest.approx(guide.bounds[-1], abs=1e-9)
    assert list(terms) == [
        *(f"E log p({site})" for site in ("weights", "tau", "mu", "z", "x")),
        *(f"H({site})" for site in ("z", "weights", "tau", "mu")),
    ]


def test_topics_equal_updates_by_hand() -> None:
    topics, size, documents, length = 3, 20, 10, 12
    pyro.set_rng_seed(0)
    words = torch.randint(size, (documents, length))

    def model(words: Tensor) -> None:
        with pyro.plate("topics", topics):
            phi = pyro.sample("phi", dist.Dirichlet(torch.full((size,), 0.1)))
        with pyro.plate("documents", documents, dim=-2):
            theta = pyro.sample("theta", dist.Dirichlet(torch.full((topics,), 0.5)))
            with pyro.plate("words", length, dim=-1):
                z = pyro.sample("z", dist.Categorical(theta))
                pyro.sample("w", dist.Categorical(phi[z]), obs=words)

    field = field_of(model, words)
    phi, theta = concentrations(field).values()
    bounds = ascend_bound(field, most=20, tolerance=0.0)
    for _ in range(20):
        r = torch.softmax(expected_log(theta) + expected_log(phi)[:, words].permute(1, 2, 0), -1)
        phi = 0.1 + torch.zeros(topics, size).index_add_(1, words.reshape(-1), r.reshape(-1, topics).T)
        theta = 0.5 + r.sum(1, keepdim=True)
    found = concentrations(field)
    assert torch.allclose(found["phi"], phi, rtol=0, atol=1e-10)
    assert torch.allclose(found["theta"], theta, rtol=0, atol=1e-10)
    assert never_falls(bounds)


def hidden_markov(x: Tensor) -> None:
    start = pyro.sample("start", dist.Dirichlet(torch.full((3,), 1 / 3)))
    moves = pyro.sample("moves", dist.Dirichlet(torch.full((3, 3), 1 / 3)).to_event(1))
    emissions = pyro.sample("emissions", dist.Dirichlet(torch.full((3, 4), 0.25)).to_event(1))
    z: Any = None
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(start if t == 0 else moves[z]))
        pyro.sample(f"x_{t}", dist.Categorical(emissions[z]), obs=x[t])


def baum_welch(x: Tensor, start: Tensor, moves: Tensor, emissions: Tensor, sweeps: int) -> list[float]:
    """Variational Bayes of a hidden Markov model by hand: forward-backward under expected logarithms."""
    priors = torch.full((3,), 1 / 3), torch.full((3, 3), 1 / 3), torch.full((3, 4), 0.25)
    bounds = []
    for _ in range(sweeps + 1):
        first, step, emit = (expected_log(c) for c in (start, moves, emissions))
        seen = emit[:, x].T
        forward = [first + seen[0]]
        for t in range(1, len(x)):
            forward.append(torch.logsumexp(forward[-1][:, None] + step, 0) + seen[t])
        log_z = torch.logsumexp(forward[-1], 0)
        backward = [torch.zeros(3)]
        for t in range(len(x) - 1, 0, -1):
            backward.insert(0, torch.logsumexp(step + seen[t] + backward[0], 1))
        kl = sum(
            torch.distributions.kl_divergence(dist.Dirichlet(q), dist.Dirichlet(p)).sum()
            for q, p in zip((start, moves, emissions), priors, strict=True)
        )
        bounds.append(float(log_z - kl))
        a, b = torch.stack(forward), torch.stack(backward)
        single = torch.softmax(a + b, -1)
        pairs = (a[:-1, :, None] + step + (seen[1:] + b[1:])[:, None] - log_z).exp()
        start, moves = priors[0] + single[0], priors[1] + pairs.sum(0)
        emissions = priors[2] + torch.zeros(3, 4).index_add_(1, x, single.T)
    return bounds


def test_a_markov_chain_equals_forward_backward_by_hand() -> None:
    pyro.set_rng_seed(0)
    x = torch.randint(4, (8,))
    field = field_of(hidden_markov, x)
    by_hand = baum_welch(x, *concentrations(field).values(), sweeps=6)
    bounds = ascend_bound(field, most=6, tolerance=0.0)
    assert bounds == pytest.approx(by_hand, abs=1e-8)


def test_paths_of_a_chain_are_drawn_from_their_exact_distribution() -> None:
    x = torch.tensor([0, 0, 1, 3])
    fit = pplvi.fit(hidden_markov, pplvi.AutoConjugate, args=(x,), seed=0, progress=False)
    posterior = fit.posterior(4000)
    assert posterior.elbo.value == pytest.approx(fit.guide.bounds[-1], abs=4 * posterior.elbo.error)


# ---------------------------------------------------------------------- products of latents


def test_probabilistic_pca_with_relevance_equals_updates_by_hand() -> None:
    x = torch.tensor(load_digits().data[:60, 16:32])
    x = (x - x.mean(0))[:, x.std(0) > 0.5]
    (n, d), k = x.shape, 3

    def model(x: Tensor) -> None:
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(k), 1.0).to_event(1))
        alpha = pyro.sample("alpha", dist.Gamma(1e-2, 1e-2).expand([k]).to_event(1))
        with pyro.plate("pixels", d):
            w = pyro.sample("w", dist.Normal(0.0, alpha.rsqrt()).to_event(1))
        tau = pyro.sample("tau", dist.Gamma(1e-2, 1e-2))
        with pyro.plate("rows", n):
            pyro.sample("x", dist.Normal(z @ w.T, tau.rsqrt()).to_event(1), obs=x)

    pyro.set_rng_seed(0)
    values = {"w": torch.randn(d, k), "z": torch.randn(n, k), "alpha": torch.ones(k), "tau": torch.tensor(1.0)}
    field = started(read_program(model, (x,), {}, init=init_to_value(values=values)), values)
    bounds = ascend_bound(field, most=15, tolerance=0.0)
    w, spread = values["w"], torch.eye(k).expand(d, k, k)
    alpha, tau = torch.ones(k), torch.tensor(1.0)
    for _ in range(15):
        inner = w.T @ w + spread.sum(0)
        s = torch.linalg.inv(torch.eye(k) + tau * inner)
        z = tau * x @ w @ s
        alpha = (1e-2 + d / 2) / (1e-2 + 0.5 * inner.diagonal())
        zz = z.T @ z + n * s
        spread = torch.linalg.inv(torch.diag(alpha) + tau * zz).expand(d, k, k)
        w = tau * x.T @ z @ spread[0]
        inner = w.T @ w + spread.sum(0)
        square = (x * x).sum() - 2 * (x * (z @ w.T)).sum() + (inner * zz).sum()
        tau = (1e-2 + n * d / 2) / (1e-2 + 0.5 * square)
    assert torch.allclose(field.families["w"].canonical["loc"], w, rtol=0, atol=1e-10)
    assert float(field.families["tau"].moment("tau", 1.0).detach()) == pytest.approx(float(tau), rel=1e-10)
    assert torch.allclose(field.families["alpha"].moment("alpha", 1.0).detach(), alpha, rtol=1e-10)
    assert never_falls(bounds)


# ---------------------------------------------------------------------- a sweep is coordinate maximisation


def test_updates_are_the_maximisers_that_a_search_finds() -> None:
    y = torch.tensor([1.2, 0.3, 2.5, -0.4])

    def model(y: Tensor) -> None:
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(2), (2 * tau).rsqrt()).to_event(1))
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("y", dist.Normal(b[z.long()] + 0.3 * b[0], tau.rsqrt()), obs=y)

    field = field_of(model, y)
    for _ in range(2):
        for block, family in field.families.items():
            field.expect()
            field.update(block)
            best, found = field.objective(block), dict(family.canonical)
            generator = torch.Generator().manual_seed(0)
            for size in (1e-1, 1e-2, 1e-3):  # every move from the maximiser loses, by an amount of second order
                for _ in range(3):
                    moved = {
                        n: v * (1 + size * (torch.rand(v.shape, generator=generator) - 0.5)) for n, v in found.items()
                    }
                    family.canonical = {n: (v + v.mT) / 2 if n == "precision" else v for n, v in moved.items()}
                    family.refresh()
                    loss = best - field.objective(block)
                    assert 0 < loss < 300 * size**2
            family.canonical = found
            family.refresh()


def test_centred_moments_do_not_fall_with_many_data_far_from_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    y = 1e4 + torch.randn(100_000, generator=generator)

    def model(y: Tensor) -> None:
        tau = pyro.sample("tau", dist.Gamma(1.0, 1.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 1e4))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)

    guide = pplvi.AutoConjugate(model, seed=0, tolerance=0.0, max_sweeps=30).run(y)
    assert never_falls(guide.bounds)
    assert guide.median(y)["mu"].item() == pytest.approx(y.mean().item(), abs=1e-4)
