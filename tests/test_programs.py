"""Running programs: the densities of a run against Pyro's own traces, one particle at a time, for a zoo of programs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.infer.autoguide.effect import AutoRegressiveMessenger
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from torch import nn

import pplvi
from pplvi.programs import execute
from pplvi.runs import sample_sites

pytestmark = pytest.mark.usefixtures("float64")


@dataclass
class Pair:
    """A model, a guide, their arguments, and the batch plates (name, size) that a run should find."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple = ()
    batch: tuple = ()
    kwargs: dict = field(default_factory=dict)


DATA = torch.tensor([0.3, -1.2, 0.8, 2.1], dtype=torch.float64)
GROUPED = torch.linspace(-2.0, 2.0, 12, dtype=torch.float64).reshape(3, 4)


def normal(name, loc=0.0, scale=1.0):
    return pyro.sample(name, dist.Normal(torch.as_tensor(loc), torch.as_tensor(scale)))


def learned(name, shape=(), event=0):
    """A learned normal guide site with a seeded start."""
    loc = pyro.param(f"{name}_loc", lambda: 0.3 * torch.randn(shape))
    scale = pyro.param(f"{name}_scale", lambda: torch.rand(shape) + 0.5, constraint=dist.constraints.positive)
    return pyro.sample(name, dist.Normal(loc, scale).to_event(event))


def nested(outer=None, inner=None):
    """Latents at three levels; `outer` and `inner` are subsample sizes."""

    def model(y):
        mu = normal("mu")
        with pyro.plate("groups", 3, subsample_size=outer, dim=-2) as i:
            theta = normal("theta", mu)
            with pyro.plate("units", 4, subsample_size=inner, dim=-1) as j:
                eps = normal("eps", theta, 0.5)
                pyro.sample("y", dist.Normal(eps, 0.7), obs=y[i][:, j])

    def guide(y):
        learned("mu")
        with pyro.plate("groups", 3, subsample_size=outer, dim=-2):
            normal("theta", pyro.param("t", torch.tensor(0.2)), 0.8)
            with pyro.plate("units", 4, subsample_size=inner, dim=-1):
                normal("eps", -0.1, 0.9)

    return Pair(model, guide, (GROUPED,))


def local(subsample=None):
    """All latents inside the data plate: weights per datum."""

    def model(y):
        with pyro.plate("data", 4, subsample_size=subsample) as i:
            z = normal("z")
            pyro.sample("y", dist.Normal(z, 0.5), obs=y[i])

    def guide(y):
        loc = pyro.param("loc", torch.linspace(-0.5, 0.5, 4))
        with pyro.plate("data", 4, subsample_size=subsample) as i:
            normal("z", loc[i], 0.6)

    return Pair(model, guide, (DATA,), (("data", subsample or 4),))


def twice_local():
    """Two plates common to every site."""

    def model(y):
        with pyro.plate("groups", 3, dim=-2), pyro.plate("units", 4, dim=-1):
            pyro.sample("y", dist.Normal(normal("z"), 1.0), obs=y)

    def guide(y):
        with pyro.plate("groups", 3, dim=-2), pyro.plate("units", 4, dim=-1):
            normal("z", 0.1, 0.9)

    return Pair(model, guide, (GROUPED,), (("groups", 3), ("units", 4)))


def half_common():
    """Local latents of a group, several observations in each: the outer plate alone is common."""

    def model(y):
        with pyro.plate("groups", 3, dim=-2):
            theta = normal("theta")
            with pyro.plate("units", 4, dim=-1):
                pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    def guide(y):
        with pyro.plate("groups", 3, dim=-2):
            normal("theta", 0.1, 0.9)

    return Pair(model, guide, (GROUPED,), (("groups", 3),))


def factors():
    """One factor inside the plate of everything."""

    def model(y):
        with pyro.plate("data", 4):
            z = normal("z")
            pyro.factor("penalty", -0.3 * z**2)
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def guide(y):
        with pyro.plate("data", 4):
            normal("z", 0.1, 0.9)

    return Pair(model, guide, (DATA,), (("data", 4),))


def masked():
    """A boolean mask by handler, with NaN under it, and a masked latent in model and guide."""
    seen = torch.tensor([True, False, True, True])
    y = torch.where(seen, DATA, torch.nan)

    def model(y):
        with pyro.plate("data", 4), poutine.mask(mask=seen):
            z = normal("z")
            pyro.sample("y", dist.Normal(z, 0.5), obs=torch.where(seen, y, 0.0))

    def guide(y):
        with pyro.plate("data", 4), poutine.mask(mask=seen):
            normal("z", 0.1, 0.9)

    return Pair(model, guide, (y,), (("data", 4),))


def masked_distribution():
    """dist.mask on the observation only: the latent of a masked datum keeps its prior."""

    def model(y):
        with pyro.plate("data", 4):
            z = normal("z")
            pyro.sample("y", dist.Normal(z, 0.5).mask(torch.tensor([True, False, False, True])), obs=y)

    return Pair(model, factors().guide, (DATA,), (("data", 4),))


def obs_mask():
    """Entries that are not observed become latent."""
    seen = torch.tensor([True, False, True, False])

    def model(y):
        mu = normal("mu")
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)

    return Pair(model, AutoNormal(model), (DATA,))


def scaled():
    """poutine.scale is part of the density."""

    def model(y):
        with pyro.plate("data", 4):
            z = normal("z")
            with poutine.scale(scale=0.5):
                pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    return Pair(model, factors().guide, (DATA,), (("data", 4),))


def observed_only():
    """A plate that holds data and no latents, and two of them."""

    def model(x, y):
        mu = normal("mu")
        with pyro.plate("first", 4):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        with pyro.plate("second", 2):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    return Pair(model, lambda x, y: learned("mu"), (DATA, DATA[:2]))


def deterministic():
    """Deterministic sites in model and guide, outside the data plate: they do not tie data together."""

    def model(y):
        slope = pyro.deterministic("slope", torch.tensor([1.0, 2.0]), event_dim=1)
        with pyro.plate("data", 4):
            z = normal("z")
            twice = pyro.deterministic("twice", slope[1] * z)
            pyro.sample("y", dist.Normal(twice, 0.5), obs=y)

    def guide(y):
        shift = pyro.deterministic("shift", torch.tensor(0.1))
        with pyro.plate("data", 4):
            normal("z", shift, 0.9)

    return Pair(model, guide, (DATA,), (("data", 4),))


def auxiliary():
    """A guide with an auxiliary draw, whose density is part of the guide's."""

    def model(y):
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(normal("z"), 0.5), obs=y)

    def guide(y):
        with pyro.plate("data", 4):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            normal("z", 0.3 * u, 0.9)

    return Pair(model, guide, (DATA,), (("data", 4),))


def extra_plate():
    """A guide with a plate of its own around an auxiliary draw."""

    def guide(y):
        with pyro.plate("helpers", 5, dim=-2):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        with pyro.plate("data", 4, dim=-1):
            normal("z", 0.3 * u.mean(-2, keepdim=True), 0.9)

    return Pair(auxiliary().model, guide, (DATA,))


def constrained(guide=AutoNormal):
    """Supports other than the real line, and batched event dims."""

    def model(y):
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        chol = pyro.sample("chol", dist.LKJCholesky(2, 1.0))
        matrix = pyro.sample("matrix", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        with pyro.plate("data", 4):
            p = pyro.sample("p", dist.Beta(2.0, 3.0))
            loc = torch.stack([p, p + (weights[..., None, :] * matrix).sum((-1, -2))], -1)
            pyro.sample("y", dist.MultivariateNormal(loc, scale_tril=scale[..., None, None] * chol), obs=y)

    return Pair(model, guide(model), (torch.stack([DATA, DATA.flip(0)], -1),))


class Regression(PyroModule):
    """A Bayesian regression as a PyroModule with a nested PyroModule[nn.Linear]."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.offset = PyroParam(torch.tensor(0.1))

    def forward(self, x, y):
        mean = self.linear(x).squeeze(-1) + self.offset
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def module():
    model = Regression()
    return Pair(model, AutoNormal(model), (torch.arange(8.0).reshape(4, 2), DATA))


def sequential():
    """A plate that is a loop: its sites are ordinary ones with names of their own."""

    def model(y):
        mu = normal("mu")
        for i in pyro.plate("data", 3):
            pyro.sample(f"y_{i}", dist.Normal(normal(f"z_{i}", mu), 1.0), obs=y[i])

    def guide(y):
        learned("mu")
        for i in pyro.plate("data", 3):
            learned(f"z_{i}")

    return Pair(model, guide, (DATA,))


def sequential_subsampled():
    def model(y):
        for i in pyro.plate("data", 4, subsample_size=2):
            pyro.sample(f"y_{i}", dist.Normal(normal(f"z_{i}"), 1.0), obs=y[i])

    def guide(y):
        for i in pyro.plate("data", 4, subsample_size=2):
            learned(f"z_{i}")

    return Pair(model, guide, (DATA,))


def automatic(kind):
    """An automatic guide over a hierarchical model with a positive site."""

    def model(y):
        mu = normal("mu")
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", 4):
            theta = normal("theta", mu, tau)
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    return Pair(model, kind(model), (DATA,))


def guide_list(model):
    guide = AutoGuideList(model)
    guide.append(AutoDiagonalNormal(poutine.block(model, expose=["mu", "theta"])))
    guide.append(AutoDelta(poutine.block(model, expose=["tau"])))
    return guide


def maximum_likelihood():
    def model(y):
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    return Pair(model, lambda y: None, (DATA,), (("data", 4),))


ZOO = {
    "nested": nested,
    "nested, outer subsampled": lambda: nested(outer=2),
    "nested, both subsampled": lambda: nested(outer=2, inner=3),
    "local": local,
    "local, subsampled": lambda: local(2),
    "twice local": twice_local,
    "half common": half_common,
    "factor": factors,
    "mask": masked,
    "masked distribution": masked_distribution,
    "obs_mask": obs_mask,
    "scale": scaled,
    "observed only": observed_only,
    "deterministic": deterministic,
    "auxiliary": auxiliary,
    "extra plate": extra_plate,
    "constrained": constrained,
    "constrained, full rank": lambda: constrained(AutoMultivariateNormal),
    "sequential plate": sequential,
    "sequential plate, subsampled": sequential_subsampled,
    "AutoDelta": lambda: automatic(AutoDelta),
    "AutoDiagonalNormal": lambda: automatic(AutoDiagonalNormal),
    "AutoLowRank": lambda: automatic(AutoLowRankMultivariateNormal),
    "AutoIAFNormal": lambda: automatic(AutoIAFNormal),
    "AutoStructured": lambda: automatic(AutoStructured),
    "AutoGuideList": lambda: automatic(guide_list),
    "AutoNormalMessenger": lambda: automatic(AutoNormalMessenger),
    "AutoHierarchicalNormalMessenger": lambda: automatic(AutoHierarchicalNormalMessenger),
    "AutoRegressiveMessenger": lambda: automatic(AutoRegressiveMessenger),
    "maximum likelihood": maximum_likelihood,
}


@pytest.fixture(params=ZOO, ids=str)
def pair(request):
    return ZOO[request.param]()


class Fix(Messenger):
    """Give sample sites these values."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def guide_trace(pair, values):
    with Fix(values):
        trace = poutine.trace(pair.guide).get_trace(*pair.args)
    return pair.guide.get_traces()[1] if isinstance(pair.guide, GuideMessenger) else trace


def one_particle(value, shape, k):
    """Particle k of a site's value, in the shape that the site has without particles."""
    return (value[k] if value.numel() > shape.numel() else value).reshape(shape)


def by_hand(pair, run, k):
    """log p and log q of particle k: traces of the plain programs at its draws, in Pyro's own sums."""
    fixed = run.subsample_indices()
    plain = {n: s for n, s in sample_sites(guide_trace(pair, fixed)) if not s["is_observed"]}
    values = {n: one_particle(run.guide.nodes[n]["value"], s["value"].shape, k) for n, s in plain.items()}
    with Fix({**fixed, **values}):
        model = poutine.trace(pair.model).get_trace(*pair.args)
    return model.log_prob_sum(), guide_trace(pair, {**fixed, **values}).log_prob_sum()


def total(run, density):
    """A density with its batch summed and its subsample scale put back: Pyro's convention."""
    return run.scale * density.reshape(run.num_particles, -1).sum(-1)


def expected_sums(pair, run):
    sums = [by_hand(pair, run, k) for k in range(run.num_particles)]
    return [torch.stack([torch.as_tensor(s[i], dtype=torch.float64).reshape(()) for s in sums]) for i in (0, 1)]


def test_densities_of_every_particle_are_those_of_poutine_traces(pair):
    run = execute(pair.model, pair.guide, pair.args, {}, num_particles=5)
    log_p, log_q = expected_sums(pair, run)
    assert torch.allclose(total(run, run.log_target()), log_p, atol=1e-10)
    assert torch.allclose(total(run, run.log_forward()), log_q, atol=1e-10)


def test_one_particle_runs_the_plain_programs(pair):
    run = execute(pair.model, pair.guide, pair.args, {}, num_particles=1)
    log_p, log_q = expected_sums(pair, run)
    assert torch.allclose(total(run, run.log_target()), log_p, atol=1e-10)
    assert torch.allclose(total(run, run.log_forward()), log_q, atol=1e-10)


def test_batch_is_the_plates_common_to_every_site(pair):
    run = execute(pair.model, pair.guide, pair.args, {}, num_particles=3)
    assert tuple((p.name, p.size) for p in run.batch) == pair.batch
    assert run.log_target().shape == run.log_forward().shape == (3, *(size for _, size in pair.batch))


def test_looped_and_vectorised_losses_agree_in_expectation(pair):
    """Different draws, one expectation: within four standard errors of the two means."""
    means, errors = [], []
    for vectorize in (True, False):
        loss = pplvi.ELBO(num_particles=20, vectorize_particles=vectorize)
        values = torch.tensor([loss.loss(pair.model, pair.guide, *pair.args) for _ in range(8)])
        means.append(values.mean())
        errors.append(values.std() / 8**0.5)
    assert abs(means[0] - means[1]) < 4 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5 + 1e-9
