"""Models as people write them: the bound never falls, and is that of draws from the guide under the same program."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor

import pplvi

pytestmark = pytest.mark.usefixtures("float64")

G = torch.Generator().manual_seed(0)
N = 40
X = torch.randn(N, 3, generator=G, dtype=torch.float64)
Y = torch.randn(N, generator=G, dtype=torch.float64)
PAIRS = torch.randn(N, 2, generator=G, dtype=torch.float64)
COUNTS = torch.poisson(2 * torch.ones(N, dtype=torch.float64), generator=G)
GROUP = torch.arange(N) % 5
ROW, COLUMN = torch.arange(N) % 6, torch.arange(N) % 7
LABELS = torch.randint(3, (8, 4), generator=G)
TABLE = torch.randn(2, 3, 4, generator=G, dtype=torch.float64)
LENGTHS = torch.tensor([5, 3, 4])


def hierarchy() -> None:
    m = pyro.sample("m", dist.Normal(0.0, 5.0))
    between, within = (pyro.sample(name, dist.Gamma(2.0, 2.0)) for name in ("between", "within"))
    with pyro.plate("groups", 5):
        mu = pyro.sample("mu", dist.Normal(m, between.rsqrt()))
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(mu[GROUP], 1 / within.sqrt()), obs=Y)


def nested_plates() -> None:
    m = pyro.sample("m", dist.Normal(0.0, 3.0))
    with pyro.plate("outer", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(m, 1.0))
        with pyro.plate("inner", 4, dim=-1):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            with pyro.plate("times", 2, dim=-3):
                pyro.sample("y", dist.Normal(b, 0.5), obs=TABLE)


def varying_slopes() -> None:
    precision = pyro.sample("precision", dist.Wishart(torch.tensor(4.0), torch.eye(2) / 4))
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("groups", 5):
        ab = pyro.sample("ab", dist.MultivariateNormal(mean, precision_matrix=precision))
    tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(ab[GROUP, 0] + ab[GROUP, 1] * X[:, 0], tau.rsqrt()), obs=Y)


def full_mixture() -> None:
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        precision = pyro.sample("precision", dist.Wishart(torch.tensor(4.0), torch.eye(2) / 4))
        mean = pyro.sample("mean", dist.MultivariateNormal(torch.zeros(2), 4 * torch.eye(2)))
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.MultivariateNormal(mean[z], precision_matrix=precision[z]), obs=PAIRS)


def matrix_factorisation() -> None:
    with pyro.plate("rows", 6):
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("columns", 7):
        v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("ratings", N):
        pyro.sample("r", dist.Normal((u[ROW] * v[COLUMN]).sum(-1), 0.5), obs=Y)


def counts() -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("groups", 5):
        level = pyro.sample("level", dist.Gamma(2.0, rate))
    with pyro.plate("data", N):
        pyro.sample("c", dist.Poisson(level[GROUP] * torch.linspace(0.5, 2.0, N)), obs=COUNTS)


def scale_mixture() -> None:
    """Student t as a normal with a latent precision for each datum."""
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", N):
        own = pyro.sample("own", dist.Gamma(2.0, 2.0))
        pyro.sample("y", dist.Normal(X @ b, (tau * own).rsqrt()), obs=Y)


def outliers() -> None:
    share = pyro.sample("share", dist.Beta(1.0, 1.0))
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Bernoulli(share))
        pyro.sample("y", dist.Normal(0.0, torch.where(z > 0, torch.tensor(3.0), torch.tensor(0.5))), obs=Y)


def annotators() -> None:
    """Dawid and Skene 1979: true classes, and what each annotator makes of them."""
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("annotators", 4):
        confusion = pyro.sample("confusion", dist.Dirichlet(torch.ones(3, 3) + 2 * torch.eye(3)).to_event(1))
    with pyro.plate("items", 8, dim=-2):
        z = pyro.sample("z", dist.Categorical(share))
        with pyro.plate("annotations", 4, dim=-1):
            pyro.sample("label", dist.Categorical(Vindex(confusion)[torch.arange(4), z]), obs=LABELS)


def smoothed_vector() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(N), 1.0).to_event(1))
    q = pyro.sample("q", dist.Gamma(2.0, 2.0))
    pyro.sample("steps", dist.Normal(x[1:] - x[:-1], q.rsqrt()).to_event(1), obs=torch.zeros(N - 1))
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(x, 0.5), obs=Y)


def factor_analysis() -> None:
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    variance = pyro.sample("variance", dist.InverseGamma(torch.full((2,), 3.0), 2.0).to_event(1))
    with pyro.plate("rows", N):
        pyro.sample("y", dist.Normal(z.unsqueeze(-1) * w, variance.sqrt()).to_event(1), obs=PAIRS)


def ragged_chains() -> None:
    """Sequences of several lengths under a mask, as in Pyro's own example."""
    moves = pyro.sample("moves", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    z: Any = 0
    with pyro.plate("sequences", 3, dim=-1):
        for t in pyro.markov(range(5)):
            with poutine.mask(mask=t < LENGTHS):
                z = pyro.sample(f"z_{t}", dist.Categorical(moves[z]), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Normal(loc[z], 0.5), obs=X[3 * t : 3 * t + 3, 0])


MODELS = [
    hierarchy, nested_plates, varying_slopes, full_mixture, matrix_factorisation, counts, scale_mixture, outliers,
    annotators, smoothed_vector, factor_analysis, ragged_chains,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Singular sample detected")  # torch says so of every draw of a Wishart prior
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_the_bound_never_falls_and_is_that_of_draws(model: Any) -> None:
    guide = pplvi.AutoConjugate(model, seed=0, max_sweeps=60).run()
    bounds = torch.tensor(guide.bounds)
    assert (bounds.diff() >= -1e-12 * bounds[1:].abs()).all()
    assert sum(guide.terms().values()) == pytest.approx(guide.bounds[-1], abs=1e-9)
    posterior = pplvi.Posterior(model, guide, (), num_draws=1000, seed=0)
    slack = 4 * posterior.elbo.error
    if model is ragged_chains:  # its sites are summed out given draws of the others: tighter
        assert bounds[-1] < posterior.elbo.value + slack
    else:
        assert posterior.elbo.value == pytest.approx(guide.bounds[-1], abs=slack)


def test_a_named_block_is_at_least_as_tight() -> None:
    apart = pplvi.AutoConjugate(hierarchy, seed=0).run().bounds[-1]
    together = pplvi.AutoConjugate(hierarchy, seed=0, blocks=[("m", "mu")]).run()
    assert together.bounds[-1] > apart + 1e-3
    drawn: dict[str, Tensor] = together()
    assert drawn["mu"].shape == (5,)
