"""Programs as people write them, all the way: fit, report, posterior, export, leave-one-out, prediction."""

import io
from functools import partial
from itertools import product

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_results import elpd
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample

import pplvi

RNG = np.random.default_rng(0)
N = 24
X = RNG.normal(size=(N, 2))
CLINIC = RNG.integers(0, 4, size=N)
TIME = np.linspace(-1, 1, N)
COUNTS = RNG.poisson(np.exp(0.3 * X[:, 0] + 0.5)).astype(float)
CURED = (RNG.random(N) < 0.6).astype(float)
CURVE = 1 + TIME - TIME**2 + 0.3 * RNG.normal(size=N)
SERIES = np.cumsum(0.3 * RNG.normal(size=8))
SALARIES = [41_000.0, 52_500.0, 47_900.0, 60_100.0]


def claims(x, y):
    """A product of a matrix and a vector."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 0.5).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson(torch.exp(x @ b)), obs=y)


def clinics(clinic, x, y):
    """An index into a plate."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("clinics", 4):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=level[clinic] + slope * x[:, 0]), obs=y)


def polynomial(t, y):
    """Elements by their position."""
    c = pyro.sample("c", dist.Normal(0.0, torch.ones(3)).to_event(1))
    with pyro.plate("data", len(t)):
        pyro.sample("y", dist.Normal(c[0] + c[1] * t + c[2] * t**2, 0.3), obs=y)


def parts(t, y):
    """Scalars put together."""
    c = torch.stack([pyro.sample(f"c{i}", dist.Normal(0.0, 1.0)) for i in range(3)])
    powers = torch.stack([torch.ones_like(t), t, t**2], 1)
    with pyro.plate("data", len(t)):
        pyro.sample("y", dist.Normal(powers @ c, 0.3), obs=y)


def bilinear(x, y):
    """Two vectors in one contraction."""
    u = pyro.sample("u", dist.Normal(torch.ones(2), 0.5).to_event(1))
    v = pyro.sample("v", dist.Normal(torch.zeros(2), 0.5).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.einsum("ni,i,nj,j->n", x, u, x, v), 1.0), obs=y)


def smooth(t, y):
    """A function with a drawn length scale, at a drawn covariance."""
    length = pyro.sample("length", dist.LogNormal(0.0, 0.3))
    gram = torch.exp(-0.5 * ((t[:, None] - t) / length) ** 2) + 0.1 * torch.eye(len(t))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(t)), gram), obs=y)


def autoregression(y):
    """A loop over time, one site each."""
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    x = torch.tensor(0.0)
    for t in range(len(y)):
        x = pyro.sample(f"x_{t}", dist.Normal(rho * x, 0.3))
        pyro.sample(f"y_{t}", dist.Normal(x, 0.3), obs=y[t])


def one_after_another(clinic, y):
    """A plate that is a Python loop, with rows of different number."""
    for i in pyro.plate("clinics", 4):
        p = pyro.sample(f"p_{i}", dist.Beta(2.0, 2.0))
        rows = y[clinic == i]
        with pyro.plate(f"data_{i}", len(rows)):
            pyro.sample(f"y_{i}", dist.Bernoulli(p), obs=rows)


def checking(x, y):
    """A check of a shape."""
    b = pyro.sample("b", dist.StudentT(4.0, torch.zeros(2), 0.5).to_event(1))
    rows, columns = x.shape
    if tuple(b.shape) != (columns,):
        raise ValueError(f"{columns} coefficients are needed, not {tuple(b.shape)}")
    with pyro.plate("data", rows):
        pyro.sample("y", dist.Poisson(torch.exp(x.mv(b))), obs=y)


def sizeless(y):
    """A plate that does not say how large it is."""
    with pyro.plate("data"):
        rate = pyro.sample("rate", dist.Gamma(torch.full((len(y),), 2.0), 1.0))
        pyro.sample("y", dist.Poisson(rate), obs=y)


def beside(y):
    """A batch dimension right of a plate and in none."""
    with pyro.plate("rows", len(y), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y), 2), 1.0))
        pyro.sample("y", dist.StudentT(5.0, z, 0.5), obs=y)


def salaries(y):
    """Numbers of 1e4 in single precision."""
    mean = pyro.sample("mean", dist.Normal(4e4, 2e4))
    spread = pyro.sample("spread", dist.LogNormal(9.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, spread), obs=y)


def two_kinds(y):
    """A mixture, its assignments summed out."""
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    rates = pyro.sample("rates", dist.Gamma(torch.tensor([2.0, 8.0]), torch.tensor([2.0, 2.0])).to_event(1))
    with pyro.plate("data", len(y)):
        kind = pyro.sample("kind", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Poisson(rates[kind.long()]), obs=y)


def regimes(y):
    """A chain of states that index its transitions."""
    stay = pyro.sample("stay", dist.Dirichlet(torch.tensor([[4.0, 1.0], [1.0, 4.0]])).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(torch.tensor([0.3, 1.0])).to_event(1))
    s = 0
    for t in pyro.markov(range(len(y))):
        s = pyro.sample(f"s_{t}", dist.Categorical(stay[s]), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Normal(0.0, scale[s]), obs=y[t])


def slopes(clinic, x, y):
    """Correlated effects by a diagonal times a factor."""
    factor = pyro.sample("factor", dist.LKJCholesky(2, 1.5))
    sd = pyro.sample("sd", dist.Exponential(torch.ones(2)).to_event(1))
    with pyro.plate("clinics", 4):
        effects = pyro.sample("effects", dist.MultivariateNormal(torch.zeros(2), scale_tril=sd.diag() @ factor))
    with pyro.plate("data", len(y)):
        logits = (effects[clinic] * torch.stack([torch.ones(len(y)), x[:, 0]], 1)).sum(-1)
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


class Layers(PyroModule):
    """Modules of torch with priors on their weights."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = PyroModule[torch.nn.Linear](2, 3), PyroModule[torch.nn.Linear](3, 1)
        self.hidden.weight = PyroSample(dist.Normal(0.0, torch.ones(3, 2)).to_event(2))
        self.out.weight = PyroSample(dist.Normal(0.0, torch.ones(1, 3)).to_event(2))

    def forward(self, x, y):
        logits = self.out(self.hidden(x).relu()).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def deciding(y):
    """A branch on a draw."""
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    noise = dist.StudentT(4.0, 0.0, spread) if spread > 0.8 else dist.Normal(0.0, spread)
    with pyro.plate("data", len(y)):
        pyro.sample("y", noise, obs=y)


PROGRAMS = {
    "X @ b": (lambda: claims, (X, COUNTS)),
    "a[group]": (lambda: clinics, (CLINIC, X, CURED)),
    "b[0] * x": (lambda: polynomial, (TIME, CURVE)),
    "torch.stack": (lambda: parts, (TIME, CURVE)),
    "einsum": (lambda: bilinear, (X, CURVE)),
    "a Gaussian process": (lambda: smooth, (TIME, CURVE)),
    "a loop over time": (lambda: autoregression, (SERIES,)),
    "a sequential plate": (lambda: one_after_another, (CLINIC, CURED)),
    "a check of a shape": (lambda: checking, (X, COUNTS)),
    "a plate without size": (lambda: sizeless, (COUNTS,)),
    "a batch beside a plate": (lambda: beside, (X[:5],)),
    "large numbers": (lambda: salaries, (SALARIES,)),
    "a mixture": (lambda: two_kinds, (COUNTS,)),
    "a Markov chain": (lambda: regimes, (SERIES,)),
    "LKJ slopes": (lambda: slopes, (CLINIC, X, CURED)),
    "nn.Linear": (Layers, (X, CURED)),
    "a branch": (lambda: deciding, (CURVE,)),
}
GUIDES = {
    "AutoNormal": (AutoNormal, {"num_steps": 40}),
    "AutoMultivariateNormal": (AutoMultivariateNormal, {"num_steps": 40}),
    "four particles": (AutoNormal, {"num_steps": 20, "objective": pplvi.ImportanceWeightedELBO(4)}),
    "recorded": (AutoNormal, {"num_steps": 20, "compile": "trace"}),
    "AutoFlow": (partial(pplvi.AutoFlow, flow="nsf", transforms=2, hidden_features=(8,)), {"num_steps": 10}),
    "AutoPathfinder": (pplvi.AutoPathfinder, {}),
    "AutoBatchAndMatch": (pplvi.AutoBatchAndMatch, {}),
    "AutoDeterministicNormal": (pplvi.AutoDeterministicNormal, {}),
    "auto": ("auto", {"budget": 10.0}),
    "nuts": ("nuts", {"num_steps": 30, "num_warmup": 8}),  # ArviZ 1.x fits a tail to no fewer
}
CHEAP = {"a check of a shape", "a Markov chain", "LKJ slopes", "nn.Linear"}  # with a guide that is
DIAGONAL = {(name, list(GUIDES)[i % len(GUIDES)]) for i, name in enumerate(PROGRAMS)}
FIRST = {(n, "AutoNormal" if n in CHEAP else guide) for n, guide in DIAGONAL if n != "a branch"} | {
    ("a branch", "recorded")
}
LATER = [pytest.mark.slow, pytest.mark.exhaustive]
CELLS = [pytest.param(*cell, marks=[] if cell in FIRST else LATER) for cell in product(PROGRAMS, GUIDES)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "guide"), CELLS)
def test_a_program_goes_all_the_way(name, guide):
    make, args = PROGRAMS[name]
    model, (kind, options) = make(), GUIDES[guide]
    fit = partial(pplvi.fit, model, kind, args=args, seed=0, progress=False, **options)
    if (name, guide) == ("a branch", "recorded"):
        with pytest.raises(ValueError, match=r"test_ordinary_programs.py.*line \d+"):
            fit()
        return
    found = fit()
    text = io.StringIO()
    found.report(text)
    assert "Traceback" not in text.getvalue()
    posterior = found.posterior()
    latents = posterior.draws.latents
    assert latents
    assert all(bool(torch.as_tensor(value).isfinite().all()) for value in latents.values())
    data = found.to_arviz(num_prior=3)
    assert set(data.posterior.data_vars) == {*latents, *posterior.draws.deterministics}
    observed = list(data.observed_data.data_vars)
    if len(observed) == 1:
        assert np.isfinite(elpd(found.loo()))
    predicted = found.predict(num_samples=5).observed
    assert set(predicted) == set(observed)
    assert all(predicted[site].shape == (5, *data.observed_data[site].shape) for site in observed)
