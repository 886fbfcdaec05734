"""Running programs: the densities of a run against Pyro's own traces, one particle at a time, for a zoo of programs."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import pplvi
from pplvi.programs.first_run import first_bad_site
from pplvi.programs.joint import execute
from pplvi.programs.sites import sample_sites
from pplvi.programs.unguided import run_model

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

    return Pair(model, autoguide.AutoNormal(model), (DATA,))


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


def constrained(guide=autoguide.AutoNormal):
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
    return Pair(model, autoguide.AutoNormal(model), (torch.arange(8.0).reshape(4, 2), DATA))


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
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoDiagonalNormal(poutine.block(model, expose=["mu", "theta"])))
    guide.append(autoguide.AutoDelta(poutine.block(model, expose=["tau"])))
    return guide


class Easy(EasyGuide):
    """Two global sites jointly, the local ones as a point estimate."""

    def guide(self, y):
        group = self.group(match="mu|tau")
        loc = pyro.param("loc", lambda: torch.full(group.event_shape, 0.2))
        group.sample("globals", dist.Normal(loc, 0.5).to_event(1))
        with self.plate("data", 4):
            self.map_estimate("theta")


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
    "constrained, full rank": lambda: constrained(autoguide.AutoMultivariateNormal),
    "sequential plate": sequential,
    "sequential plate, subsampled": sequential_subsampled,
    "AutoDelta": lambda: automatic(autoguide.AutoDelta),
    "AutoDiagonalNormal": lambda: automatic(autoguide.AutoDiagonalNormal),
    "AutoLowRank": lambda: automatic(autoguide.AutoLowRankMultivariateNormal),
    "AutoIAFNormal": lambda: automatic(autoguide.AutoIAFNormal),
    "AutoStructured": lambda: automatic(autoguide.AutoStructured),
    "AutoGaussian": lambda: automatic(autoguide.AutoGaussian),
    "EasyGuide": lambda: automatic(Easy),
    "AutoGuideList": lambda: automatic(guide_list),
    "AutoNormalMessenger": lambda: automatic(autoguide.AutoNormalMessenger),
    "AutoHierarchicalNormalMessenger": lambda: automatic(autoguide.AutoHierarchicalNormalMessenger),
    "AutoRegressiveMessenger": lambda: automatic(autoguide.AutoRegressiveMessenger),
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
    if "y_unobserved" in model.nodes:  # what obs_mask leaves to be drawn keeps its prior at every entry
        model.nodes["y_unobserved"]["mask"] = None
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


@pytest.mark.table(2)
def test_looped_and_vectorised_losses_agree_in_expectation(pair):
    """Different draws, one expectation: within five standard errors of the two means."""
    means, errors = [], []
    for vectorize in (True, False):
        loss = pplvi.ELBO(num_particles=6, vectorize_particles=vectorize)
        values = torch.tensor([loss.loss(pair.model, pair.guide, *pair.args) for _ in range(8)])
        means.append(values.mean())
        errors.append(values.std() / 8**0.5)
    assert abs(means[0] - means[1]) < 5 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5 + 1e-9


def test_densities_are_per_datum_and_leave_the_subsample_scale_out():
    pair = local(2)
    run = execute(pair.model, pair.guide, pair.args, {}, num_particles=3)
    z, index = run.guide.nodes["z"]["value"], run.guide.nodes["data"]["value"]
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(DATA[index])
    assert torch.allclose(run.log_target(), expected)
    assert run.scale == 2.0
    assert run.subsampled == ()


def test_the_scale_of_other_plates_stays_in_the_density():
    pair = nested(outer=2, inner=3)
    run = execute(pair.model, pair.guide, pair.args, {}, num_particles=3)
    assert (run.scale, run.subsampled) == (1.0, ("groups", "units"))
    assert float(run.model.nodes["y"]["scale"]) == pytest.approx(3 / 2 * 4 / 3)


@pytest.mark.parametrize("name", ["local, subsampled", "nested", "AutoNormalMessenger", "constrained"])
def test_one_particle_is_trace_elbo_with_the_same_seed(name):
    pair = ZOO[name]()
    Trace_ELBO().loss(pair.model, pair.guide, *pair.args)  # parameters start here
    values = []
    for loss in (Trace_ELBO(), pplvi.ELBO(), pplvi.ELBO()):  # the first run of ours inspects, the second does not
        torch.manual_seed(6)
        values.append(loss.loss(pair.model, pair.guide, *pair.args))
    assert values == pytest.approx([values[0]] * 3, rel=1e-12)


def test_the_inspection_leaves_the_random_state_alone():
    pair = local()
    execute(pair.model, pair.guide, pair.args, {}, num_particles=2)  # parameters exist
    draws = []
    for guide in (pair.guide, lambda y: pair.guide(y)):  # known pair, then a pair that is inspected first
        torch.manual_seed(1)
        draws.append(execute(pair.model, guide, pair.args, {}, num_particles=2).guide.nodes["z"]["value"])
    assert torch.equal(*draws)


def gaussian_loc(y):
    loc = pyro.param("loc", torch.tensor(0.5))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@pytest.mark.parametrize(
    ("loss", "sign"),
    [
        (pplvi.ELBO(), 1.0),
        (pplvi.ELBO(3, vectorize_particles=False), 1.0),
        (pplvi.ELBO(3, entropy="exact"), 1.0),
        (pplvi.ELBO(2, estimator="stl"), 1.0),
        (pplvi.ImportanceWeightedELBO(4), 1.0),
        (pplvi.ImportanceWeightedELBO(4, estimator="dreg"), 1.0),
        (pplvi.RenyiELBO(0.5, 4), 1.0),
        (pplvi.ThermodynamicELBO(4), 1.0),
        (pplvi.ChiELBO(4), -1.0),
    ],
    ids=str,
)
def test_maximum_likelihood_without_latent_sites(loss, sign):
    value = loss.loss_and_grads(gaussian_loc, lambda y: None, DATA)
    assert value == pytest.approx(-sign * float(dist.Normal(0.5, 1.0).log_prob(DATA).sum()))
    gradient = pyro.get_param_store()._params["loc"].grad
    assert float(gradient) == pytest.approx(-sign * float((DATA - 0.5).sum()))


def test_the_forward_kl_has_nothing_to_say_about_a_model_without_latents():
    assert pplvi.ForwardKL(4).loss_and_grads(gaussian_loc, lambda y: None, DATA) == 0.0
    assert pyro.get_param_store()._params["loc"].grad is None


def moved(model, guide, *args, loss=None):
    """Names of the parameters that one step of SVI moves, and of all."""
    svi = SVI(model, guide, Adam({"lr": 0.1}), loss=loss or pplvi.ELBO(num_particles=2))
    svi.loss(model, guide, *args)
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    svi.step(*args)
    after = dict(pyro.get_param_store().items())
    return {name for name in before if not torch.equal(before[name], after[name])}, set(after)


class Decoder(PyroModule):
    """PyroModule[nn.Linear] with ordinary weights, used on local latents."""

    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](2, 3)
        self.log_scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("y", dist.Normal(self.layer(z), self.log_scale.exp()).to_event(1), obs=y)


def test_parameters_of_modules_move_under_svi():
    y = torch.randn(4, 3)
    encoder = nn.Linear(3, 2)

    def guide(y):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(encoder(y), 0.5).to_event(1))

    changed, known = moved(Decoder(), guide, y)
    assert changed == known
    assert {"layer.weight", "layer.bias", "log_scale", "encoder$$$weight", "encoder$$$bias"} <= known


def test_parameters_of_an_effect_based_guide_move_under_svi():
    pair = automatic(autoguide.AutoNormalMessenger)
    changed, known = moved(pair.model, pair.guide, *pair.args)
    assert changed == known
    assert len(known) == 6


@pytest.mark.parametrize("loss", [pplvi.ELBO(), pplvi.ImportanceWeightedELBO(3, vectorize_particles=False)], ids=str)
def test_models_that_cannot_be_vectorised_run_their_particles_one_by_one(loss):
    pair = module()
    changed, known = moved(pair.model, pair.guide, *pair.args, loss=loss)
    assert changed == known
    run = execute(pair.model, pair.guide, pair.args, {})
    log_p, log_q = expected_sums(pair, run)
    assert torch.allclose(torch.stack([run.log_target()[0], run.log_forward()[0]]), torch.cat([log_p, log_q]))


def test_looped_particles_have_weights_of_their_own():
    pair = local()
    loss = pplvi.ImportanceWeightedELBO(num_particles=3, vectorize_particles=False)
    torch.manual_seed(3)
    (step,) = loss.steps(pair.model, pair.guide, *pair.args)
    torch.manual_seed(3)
    runs = [execute(pair.model, pair.guide, pair.args, {}) for _ in range(3)]
    assert torch.allclose(step.log_target, torch.cat([run.log_target() for run in runs]))
    assert step.log_weight.shape == (3, 4)


def deep(y):
    """Nests one plate for each dimension of y."""
    z = normal("z")
    with ExitStack() as plates:
        for d, size in enumerate(reversed(y.shape)):
            plates.enter_context(pyro.plate(f"p{d}", size, dim=-d - 1))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_one_objective_serves_deeper_models():
    loss = pplvi.ImportanceWeightedELBO(num_particles=3)
    for pair in (local(), nested(), twice_local()):
        assert loss.loss(pair.model, pair.guide, *pair.args) > 0.0


@pytest.mark.parametrize("shapes", [[(2,), (2, 3), (2, 3, 4), (2,)], [(), (4,), (2, 2), (4,)]], ids=str)
def test_one_model_may_nest_deeper_with_other_arguments(shapes):
    def guide(y):
        normal("z", 0.1, 0.5)

    for shape in shapes:
        y = torch.randn(shape)
        run = execute(deep, guide, (y,), {}, num_particles=3)
        z = run.guide.nodes["z"]["value"].reshape(3)
        data = dist.Normal(z, 1.0).log_prob(y.reshape(-1, 1)).sum(0)
        assert torch.allclose(run.log_target(), dist.Normal(0.0, 1.0).log_prob(z) + data)


def test_one_model_may_start_to_enumerate():
    def model(y, enumerate_):
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"} if enumerate_ else {})
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y, enumerate_):
        if not enumerate_:
            pyro.sample("z", dist.Bernoulli(0.5))

    loss = pplvi.ELBO(num_particles=2)
    loss.loss(model, guide, torch.tensor(0.4), False)
    densities = dist.Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(torch.tensor(0.4))
    exact = torch.logsumexp(densities + torch.tensor([0.7, 0.3]).log(), 0)
    assert -loss.loss(model, guide, torch.tensor(0.4), True) == pytest.approx(float(exact))


def by_index(y, index):
    with pyro.plate("data", 4, subsample=index) as i:
        z = normal("z")
        pyro.sample("y", dist.Normal(z, 0.5), obs=y if index is None else y[index])
        assert len(i) == len(z.reshape(-1, z.shape[-1])[0])


def by_index_guide(y, index):
    loc = pyro.param("loc", torch.linspace(-3.0, 3.0, 4))
    with pyro.plate("data", 4, subsample_size=None if index is None else len(index)) as i:
        normal("z", loc[i], 1e-3)


@pytest.mark.parametrize("guide", [by_index_guide, None], ids=["own", "AutoNormal"])
def test_indices_given_by_the_model_are_the_guides_too(guide):
    index = torch.tensor([3, 1])
    guide = guide or autoguide.AutoNormal(by_index)
    loss = pplvi.ELBO(num_particles=2)
    loss.loss_and_grads(by_index, guide, DATA, index)
    (leaf,) = [leaf for name, leaf in pyro.get_param_store()._params.items() if "loc" in name]
    assert set(leaf.grad.nonzero().flatten().tolist()) == {1, 3}


def test_indices_may_be_given_later_and_dropped_again():
    for index in (None, torch.tensor([3, 1]), None, torch.tensor([0]), torch.tensor([2, 3, 1])):
        run = execute(by_index, by_index_guide, (DATA, index), {}, num_particles=2)
        chosen = torch.arange(4) if index is None else index
        z = run.guide.nodes["z"]["value"]
        assert torch.allclose(z, torch.linspace(-3.0, 3.0, 4)[chosen].expand(z.shape), atol=0.01)
        expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(DATA[chosen])
        assert torch.allclose(run.log_target(), expected)


@pytest.mark.parametrize("kind", [autoguide.AutoNormal, autoguide.AutoNormalMessenger])
def test_frozen_densities_are_taken_on_the_subsample_of_the_draws(kind):
    """The second run of `stl` meets the same data: gradients stay with the two rows that were drawn."""

    def model(y):
        with pyro.plate("data", 4, subsample_size=2) as i:
            pyro.sample("y", dist.Normal(normal("z"), 0.5), obs=y[i])

    guide = kind(model)
    for seed in range(8):
        pyro.set_rng_seed(seed)
        pplvi.ELBO(estimator="stl").loss_and_grads(model, guide, DATA)
        leaves = [p for n, p in guide.named_parameters() if "loc" in n]
        leaves = leaves or [p for n, p in pyro.get_param_store()._params.items() if "loc" in n]
        assert len(leaves[0].grad.nonzero()) == 2
        leaves[0].grad = None


def test_a_factor_outside_the_plates_makes_weights_joint_and_says_so_once():
    def model(y):
        pyro.factor("penalty", -(pyro.param("theta", torch.tensor(1.0)) ** 2))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(normal("z"), 0.5), obs=y)

    guide = factors().guide
    loss = pplvi.ImportanceWeightedELBO(num_particles=3)
    with pytest.warns(UserWarning, match=r"factors \['penalty'\] stand outside the plates \['data'\]") as record:
        loss.loss(model, guide, DATA)
    assert len(record) == 1
    (step,) = loss.steps(model, guide, DATA)  # warnings are errors here: no second one
    assert step.log_weight.shape == (3,)


def test_a_factor_costs_nothing_where_weights_are_joint_anyway():
    def model(y):
        z = normal("z")
        pyro.factor("penalty", -(z**2))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    run = execute(model, lambda y: normal("z", 0.1, 0.5), (DATA,), {}, num_particles=3)
    z = run.guide.nodes["z"]["value"].reshape(3)
    data = dist.Normal(z, 0.5).log_prob(DATA.reshape(-1, 1)).sum(0)
    assert torch.allclose(run.log_target(), dist.Normal(0.0, 1.0).log_prob(z) - z**2 + data)


def test_a_factor_in_the_guide_counts_as_part_of_its_density():
    def guide(y):
        with pyro.plate("data", 4):
            z = normal("z", 0.1, 0.9)
            pyro.factor("correction", 0.25 * torch.ones_like(z), has_rsample=True)

    run = execute(local().model, guide, (DATA,), {}, num_particles=3)
    z = run.guide.nodes["z"]["value"]
    assert torch.allclose(run.log_forward(), dist.Normal(0.1, 0.9).log_prob(z) + 0.25)


def test_an_observation_outside_the_plate_ties_the_data_together():
    def model(y):
        with pyro.plate("data", 4):
            z = normal("z")
        pyro.sample("total", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=y.sum())

    guide = factors().guide
    assert execute(model, guide, (DATA,), {}, num_particles=3).batch == ()


def mixing(y):
    """A sum over all dimensions is one over the particles too."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=y)


def test_programs_that_mix_particles_are_carried():
    guide, args = autoguide.AutoNormal(mixing), (torch.tensor(1.0),)
    with pytest.raises(ValueError, match=r"site 'y' has another log density with two particles in one call"):
        pplvi.ELBO(3, vectorize_particles="broadcast").loss(mixing, guide, *args)
    for vectorize in (True, False):
        losses = [pplvi.ELBO(10, vectorize_particles=vectorize).loss(mixing, guide, *args) for _ in range(20)]
        assert torch.tensor(losses).std() < 1.0
    right = pplvi.ELBO(num_particles=3).loss(lambda y: None, lambda y: None, *args)
    assert right == 0.0


def test_programs_with_random_numbers_of_their_own_are_not_blamed():
    def noisy(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + torch.randn(()), 1.0), obs=y)

    assert execute(noisy, autoguide.AutoNormal(noisy), (torch.tensor(1.0),), {}, num_particles=4).num_particles == 4


def test_the_evidence_of_partly_observed_data_is_that_of_the_observed():
    """The guide's draws of what obs_mask leaves out have a prior to stand against, so that log p - log q is exact when
    the guide is: posterior of mu from two observations, prior of the rest."""
    seen = torch.tensor([True, False, True, False])
    observed = DATA[seen]
    precision = 1.0 + seen.sum()
    loc = observed.sum() / precision

    def guide(y):
        mu = pyro.sample("mu", dist.Normal(loc, precision**-0.5))
        with pyro.plate("data", 4):
            pyro.sample("y_unobserved", dist.Normal(mu, 1.0))

    pair = obs_mask()
    exact = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1.0).log_prob(observed)
    run = execute(pair.model, guide, pair.args, {}, num_particles=5)
    assert torch.allclose(run.log_target() - run.log_forward(), exact.expand(5), atol=1e-10)
    by_hand = poutine.mask(guide, mask=~seen)  # masked on both sides, as Pyro wants it: mu is masked out as well
    assert execute(pair.model, by_hand, pair.args, {}, num_particles=1).log_target().isfinite().all()


def test_latents_masked_in_the_model_alone_are_refused():
    def model(y):
        with pyro.plate("data", 4), poutine.mask(mask=torch.tensor([True, False, True, True])):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    with pytest.raises(ValueError, match=r"'z' is masked at some elements in the model but not in the guide"):
        pplvi.ELBO().loss(model, autoguide.AutoNormal(model), DATA)


def test_masked_data_have_weight_zero_evidence():
    pair = masked()
    run = execute(pair.model, pair.guide, pair.args, {}, num_particles=3)
    assert torch.equal(run.log_target()[:, 1], torch.zeros(3))
    pair = masked_distribution()
    run = execute(pair.model, pair.guide, pair.args, {}, num_particles=3)
    z = run.guide.nodes["z"]["value"]
    assert torch.allclose(run.log_target()[:, 1:3], dist.Normal(0.0, 1.0).log_prob(z)[:, 1:3])


def test_entropies_of_a_guide_are_exact_where_they_exist():
    pair = local(2)
    run = execute(pair.model, pair.guide, pair.args, {}, num_particles=3)
    assert torch.allclose(run.entropies()["z"], dist.Normal(0.0, 0.6).entropy().expand(3, 2))


def test_draws_are_detached_before_a_later_site_sees_them():
    def guide(y):
        a = normal("mu", pyro.param("a", torch.tensor(0.2)), 0.5)
        with pyro.plate("groups", 3, dim=-2):
            theta = normal("theta", 2.0 * a, 0.5)
            with pyro.plate("units", 4, dim=-1):
                normal("eps", theta, 0.5)

    run = execute(nested().model, guide, (GROUPED,), {}, num_particles=3, detach=True)
    assert all(not s["value"].requires_grad for _, s in sample_sites(run.guide))
    assert not run.log_target().requires_grad
    (gradient,) = torch.autograd.grad(run.log_forward().sum(), pyro.get_param_store()._params["a"])
    draw = run.guide.nodes["mu"]["value"]
    assert float(gradient) == pytest.approx(float(((draw - 0.2) / 0.25).sum()))


def test_the_first_bad_site_is_named():
    def model(y):
        z = normal("z")
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(z, 1.0), obs=y)
            pyro.sample("y", dist.Normal(z * pyro.param("b", torch.tensor(1.0)), 1.0), obs=y)

    guide = autoguide.AutoNormal(model)
    assert first_bad_site(model, guide, (DATA,), {}) is None
    pyro.get_param_store()["b"] = torch.tensor(float("nan"))
    assert first_bad_site(model, guide, (DATA,), {}) == "y"
    pyro.get_param_store()["b"] = torch.tensor(1.0)
    guide(DATA)  # an inspection leaves no parameter in the store
    pyro.get_param_store()._params["AutoNormal.locs.z"].data.fill_(float("inf"))
    assert first_bad_site(model, guide, (DATA,), {}) in {"z", "z_unconstrained"}


def test_a_model_runs_on_given_latents():
    pair = nested()
    latents = {"mu": torch.randn(5), "theta": torch.randn(5, 3), "eps": torch.randn(5, 3, 4)}
    run = run_model(pair.model, pair.args, {}, num_particles=5, latents=latents)
    prior = dist.Normal(0.0, 1.0).log_prob(latents["mu"])
    middle = dist.Normal(latents["mu"][:, None], 1.0).log_prob(latents["theta"]).sum(-1)
    leaves = dist.Normal(latents["theta"][..., None], 0.5).log_prob(latents["eps"]).sum((-1, -2))
    data = dist.Normal(latents["eps"], 0.7).log_prob(GROUPED).sum((-1, -2))
    assert torch.allclose(run.log_target(), prior + middle + leaves + data)


def plain_pair():
    """Global latents on several supports."""

    def model(y):
        mu = normal("mu")
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        loc = mu.unsqueeze(-1).expand(*mu.shape, 4)
        pyro.sample("y", dist.Normal(loc, tau.unsqueeze(-1)).to_event(1), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(pyro.param("a", torch.tensor(0.2)), pyro.param("s", torch.tensor(0.7))))
        pyro.sample("tau", dist.LogNormal(pyro.param("b", torch.tensor(-0.3)), 0.4))

    return model, guide


def plates_pair():
    """Local latents in a subsampled plate."""

    def model(y):
        with pyro.plate("data", 4, subsample_size=2) as i:
            z = normal("z")
            pyro.sample("y", dist.Normal(z * pyro.param("s", torch.tensor(0.7)), 0.5), obs=y[i])

    def guide(y):
        loc = pyro.param("a", torch.linspace(-0.5, 0.5, 4))
        with pyro.plate("data", 4, subsample_size=2) as i:
            normal("z", loc[i] + pyro.param("b", torch.tensor(0.1)), 0.6)

    return model, guide


def enumerated_pair():
    """A mixture whose components are summed out, with local continuous latents."""

    def model(y):
        locs = pyro.param("a", torch.tensor([-1.0, 1.0, 2.0]))
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])), infer={"enumerate": "parallel"})
            z = normal("z", locs[k], 1.0)
            pyro.sample("y", dist.Normal(z, pyro.param("s", torch.tensor(0.7))), obs=y)

    def guide(y):
        with pyro.plate("data", 4):
            normal("z", pyro.param("b", torch.tensor(0.3)), 0.8)

    return model, guide


TRACED = [
    pplvi.ELBO(),
    pplvi.ELBO(4),
    pplvi.ELBO(4, estimator="stl"),
    pplvi.ELBO(4, estimator="vimco"),
    pplvi.ELBO(4, entropy="exact"),
    pplvi.ImportanceWeightedELBO(4, estimator="dreg"),
    pplvi.RenyiELBO(0.5, 4),
    pplvi.ChiELBO(4),
    pplvi.ThermodynamicELBO(4),
    pplvi.ForwardKL(4),
    pplvi.ELBO(3, vectorize_particles=False),
]


@pytest.mark.parametrize("programs", [plain_pair, plates_pair, enumerated_pair], ids=lambda f: f.__name__)
@pytest.mark.parametrize("loss", TRACED, ids=str)
@pytest.mark.table(3)
def test_a_training_step_is_a_pure_function_that_can_be_traced(programs, loss):
    """The graph has nothing baked in: it gives the loss and gradients of other parameters, data and noise."""
    current = {}
    model, guide = programs()

    def substituted(program):
        def run(y):
            with poutine.substitute(data=current):
                program(y)

        return run

    pair = substituted(model), substituted(guide)

    def step(parameters, y):
        current.update(parameters)
        value = loss.differentiable_loss(*pair, y)
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        return value.detach(), [g for g in gradients if g is not None]

    for program in (guide, model):
        poutine.trace(program).get_trace(DATA)  # parameters exist
    start = {name: value.detach().clone().requires_grad_() for name, value in pyro.get_param_store().items()}
    with pyro.validation_enabled(False):
        step(start, DATA)  # what needs values is looked at before the first step
        graph = make_fx(step)(start, DATA)
        for seed in (1, 2):
            other = {name: (value.detach() * 1.1 + 0.01).requires_grad_() for name, value in start.items()}
            y = DATA.flip(0) + 0.1 * seed
            torch.manual_seed(seed)
            value, gradients = step(other, y)
            torch.manual_seed(seed)
            traced, traced_gradients = graph(other, y)
            assert torch.allclose(traced, value, atol=1e-12)
            assert len(gradients) == len(traced_gradients) > 0
            assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(gradients, traced_gradients, strict=True))
