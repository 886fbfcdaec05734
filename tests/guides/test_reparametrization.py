"""Non-centered forms: the same posterior under the same names, for every kind of site, plate and program."""

import copy
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch.distributions import constraints

import pplvi
from pplvi import ELBO, AutoPathfinder, Posterior, noncentered
from pplvi.posterior.draws import score
from pplvi.programs.state import module_of

pytestmark = pytest.mark.usefixtures("float64")

fit = partial(pplvi.fit, progress=False, seed=0)
FAST = partial(torch.optim.Adam, lr=0.05)
Y = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
# mu ~ N(0, 1), x_i ~ N(mu, 1), y_i ~ N(x_i, 1): y ~ N(0, 2 I + 1 1')
EVIDENCE = float(dist.MultivariateNormal(Y.new_zeros(4), 2 * torch.eye(4).double() + 1.0).log_prob(Y))


def gaussian(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 4):
        x = pyro.sample("x", dist.Normal(mu, 1.0))
        return pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def hierarchy(family, shape=()):
    """A model whose site ``x``, in two nested plates, has a location and a scale that are drawn."""

    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))
        with pyro.plate("rows", 3, dim=-2):
            b = pyro.sample("b", dist.LogNormal(0.0, 0.5))
            with pyro.plate("columns", 2, dim=-1):
                x = pyro.sample("x", family(a, b))
                pyro.sample("y", dist.Normal(x.reshape((*x.shape[: x.dim() - len(shape)], -1)).sum(-1), 1.0))

    return poutine.condition(model, {"y": torch.ones(3, 2)})


def tril(b):
    return b[..., None, None] * torch.tensor([[1.0, 0.0], [0.7, 0.5]])


FAMILIES = {
    "normal": (lambda a, b: dist.Normal(a, b), ()),
    "event": (lambda a, b: dist.Normal(a, b.unsqueeze(-1).expand(*b.shape, 2)).to_event(1), (2,)),
    "student": (lambda a, b: dist.StudentT(4.0, a, b), ()),
    "laplace": (lambda a, b: dist.Laplace(a, b), ()),
    "lognormal": (lambda a, b: dist.LogNormal(a, b), ()),
    "multivariate": (lambda a, b: dist.MultivariateNormal(a, scale_tril=tril(b)), (2,)),
}


def log_joint(model, values):
    return poutine.trace(poutine.condition(model, values)).get_trace().log_prob_sum()


@pytest.mark.parametrize("centered", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_density_is_that_of_the_model_times_the_jacobian(family, centered):
    model = hierarchy(*FAMILIES[family])
    other = noncentered(model, centered=centered)
    trace = poutine.trace(other).get_trace()
    assert {n for n in other.sites if "_" not in n} == {"x"}
    noise = next(n for n in trace.nodes if n.endswith("_decentered"))
    free, x = trace.nodes[noise]["value"], trace.nodes["x"]["value"]
    values = {name: trace.nodes[name]["value"] for name in ("a", "b")}

    def write(z):
        return poutine.trace(poutine.condition(other, {**values, noise: z})).get_trace().nodes["x"]["value"]

    jacobian = torch.autograd.functional.jacobian(write, free).reshape(x.numel(), x.numel())
    expected = log_joint(model, {**values, "x": x}) + torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(trace.log_prob_sum(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_particles_in_one_call_are_those_of_one_after_another(family):
    model = noncentered(hierarchy(*FAMILIES[family]))
    guide = AutoNormal(model, init_scale=0.5)
    guide()
    together = Posterior(model, guide, num_draws=6).draws
    alone = score(model, together.latents, num_draws=6, vectorize=False)
    assert torch.allclose(together.log_p, alone.log_p)
    assert torch.allclose(together.deterministics["x"], alone.deterministics["x"])
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(7, vectorize_particles=True, max_plate_nesting=2))
    assert torch.isfinite(torch.tensor(svi.step()))


def test_both_forms_have_the_same_evidence_and_the_same_posterior_under_the_same_names():
    fits = [fit(model, AutoPathfinder, args=(Y,)) for model in (gaussian, noncentered(gaussian))]
    written, other = (each.posterior(4000) for each in fits)
    for posterior in (written, other):
        assert posterior.log_evidence[0] == pytest.approx(EVIDENCE, abs=0.01)
        assert posterior.gap[0] == pytest.approx(0.0, abs=0.01)
    assert set(other.draws.latents) == {"mu", "x_decentered"}
    x, again = written.draws.latents["x"], other.draws.deterministics["x"]
    assert x.shape == again.shape
    assert torch.allclose(x.mean(0), again.mean(0), atol=0.06)
    assert torch.allclose(x.std(0), again.std(0), atol=0.05)
    one, two = (posterior.draws.log_likelihood["y"].mean(0) for posterior in (written, other))
    assert torch.allclose(one, two, atol=0.05)


def test_arviz_and_predictions_do_not_know_the_difference():
    result = fit(noncentered(gaussian), AutoPathfinder, args=(Y,))
    data = result.to_arviz()
    assert data.posterior["x"].dims == ("chain", "draw", "group")
    assert set(data.log_likelihood) == set(data.posterior_predictive) == {"y"}
    drawn = result.predict(seed=1)
    assert set(drawn.observed) == {"y"}
    assert drawn.observed["y"].mean(0) == pytest.approx(result.posteriors[0].draws.deterministics["x"].mean(0), abs=0.2)
    predictive = pyro.infer.Predictive(noncentered(gaussian), guide=result.guide, num_samples=5)
    with result.runs[0].scope():
        assert predictive(Y)["x"].shape == (5, 4)


def test_resampled_draws_have_the_sites_of_the_model():
    posterior = fit(noncentered(gaussian), AutoPathfinder, args=(Y,)).posterior(500)
    assert posterior.resample(7, deterministics=False).keys() == {"mu", "x_decentered"}
    found = posterior.resample(7, seed=0)
    assert torch.allclose(found["x"], found["mu"][:, None] + found["x_decentered"])


def test_nuts_draws_from_it():
    result = fit(noncentered(gaussian), "nuts", args=(Y,), num_steps=200, num_warmup=100)
    draws = result.posterior().draws
    assert set(draws.latents) == {"mu", "x_decentered"}
    precision = torch.eye(4).double() * 2 + 1.0  # of y: E[x | y] = y - E[noise | y]
    expected = Y - torch.linalg.solve(precision, Y)
    assert torch.allclose(draws.deterministics["x"].mean(0), expected, atol=0.35)


def test_minibatches_train_it():
    data = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def model(rows):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 40, subsample=rows):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(z, 1.0), obs=data[rows])

    def plates(rows):
        return pyro.plate("data", 40, subsample=rows)

    batches = torch.utils.data.DataLoader(torch.arange(40), batch_size=10)
    other = noncentered(model)
    result = fit(
        other, lambda model: AutoNormal(model, create_plates=plates), data=batches, num_steps=300,
        args=(torch.arange(40),), optim=FAST,
    )  # fmt: skip
    assert other.sites == {"z"}
    posterior = result.posterior()
    assert posterior.draws.deterministics["z"].shape == (1000, 40)
    assert torch.corrcoef(torch.stack([posterior.draws.deterministics["z"].mean(0), data]))[0, 1] > 0.9


@pytest.mark.parametrize("centered", [0.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_the_model_are_carried_to_its_other_form(family, centered):
    model = hierarchy(*FAMILIES[family])
    other = noncentered(model, centered=centered)
    trace = poutine.trace(model).get_trace()
    values = {name: trace.nodes[name]["value"] for name in ("a", "b", "x")}
    found = other.values_at(values, (), {})
    assert set(found) == {"a", "b", next(name for name in found if name.endswith("_decentered"))}
    again = poutine.trace(poutine.condition(other, found)).get_trace()
    assert all(torch.allclose(again.nodes[name]["value"], value) for name, value in values.items())


def test_only_latents_of_hierarchies_are_rewritten():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        pyro.sample("free", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 2.0))
        rate = pyro.sample("rate", dist.Gamma(2.0, mu.exp()))
        pyro.sample("x", dist.Normal(0.0, rate))
        pyro.sample("half", dist.HalfNormal(rate))
        with pyro.plate("data", 100, subsample_size=3) as chosen:
            pyro.sample("local", dist.Normal(chosen.double(), 1.0))
        pyro.sample("y", dist.Normal(mu, rate), obs=torch.tensor(1.0))

    other = noncentered(model)
    pyro.set_rng_seed(0)
    before = torch.get_rng_state()
    assert other.look((), {}) == {"x"}
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(pyro.get_param_store().keys())
    other()
    assert list(pyro.get_param_store().keys()) == ["loc"]


def test_what_depends_on_enumerated_sites_is_left_alone():
    @config_enumerate
    def model(y):
        spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("mixed", dist.Normal(torch.tensor([-1.0, 1.0])[k], spread))
            x = pyro.sample("x", dist.Normal(0.0, spread))
            pyro.sample("y", dist.Normal(x + k, 1.0), obs=y)

    other = noncentered(model)
    result = fit(other, AutoPathfinder, args=(Y,))
    assert other.sites == {"x"}
    draws = result.posterior(20).draws
    assert (draws.latents["mixed"].shape, draws.deterministics["x"].shape) == ((20, 4), (20, 4))


def test_the_first_run_may_be_inside_of_other_programs_and_handlers():
    other = noncentered(gaussian)
    with poutine.trace() as recorder, pyro.plate("particles", 5, dim=-2):
        other(Y)
    assert other.sites == {"x"}
    assert set(recorder.trace.nodes) == {"particles", "mu", "group", "x_decentered", "x", "y"}
    assert recorder.trace.nodes["x_decentered"]["value"].shape == (5, 4)


def test_data_that_are_left_out_later_stay_a_site_of_their_own():
    other = noncentered(gaussian)
    other(Y)
    assert "y_decentered" not in poutine.trace(other).get_trace().nodes
    assert other().shape == (4,)


def test_a_learned_centering_is_a_parameter_that_trains_below_the_evidence():
    other = noncentered(gaussian, centered=None)
    options = {"num_steps": 600, "objective": ELBO(8), "optim": FAST, "compile": "trace"}
    result = fit(other, AutoNormal, args=(Y,), **options)
    (name,) = [name for name in result.params[0] if name == "x_centered"]
    learned = float(result.params[0][name])
    assert 0.0 < learned < 1.0
    assert learned != 0.5
    # Mean field is exact where no coordinate depends on another: cov(mu, x - c mu | y) = 0 at c = 1 / 2 here.
    posterior = result.posterior(4000)
    assert posterior.log_evidence[0] == pytest.approx(EVIDENCE, abs=0.02)
    written = fit(gaussian, AutoNormal, args=(Y,), **options).posterior(4000)
    assert 0 <= posterior.gap[0] + 0.01 < 0.5 * written.gap[0]


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.offset = torch.nn.Parameter(torch.tensor(0.0))
        self.scale = PyroSample(dist.LogNormal(0.0, 1.0))

    def forward(self, y):
        scale = self.scale
        with pyro.plate("group", 4):
            x = pyro.sample("x", dist.Normal(self.offset, scale))
            return pyro.sample("y", dist.Normal(x, 1.0), obs=y)


@pytest.mark.parametrize("restarts", [1, 2])
def test_modules_are_trained_and_keep_the_names_of_their_parameters(restarts):
    module = Regression()
    other = noncentered(module)
    assert module_of(other) is module
    assert module_of(noncentered(module.forward)) is module
    result = fit(other, AutoNormal, args=(Y + 3,), num_steps=300, restarts=restarts, optim=FAST, compile="trace")
    assert "offset" in result.params[0]
    assert module.offset.item() == pytest.approx(3.4, abs=0.7)


@pytest.mark.parametrize("centered", [0.0, None])
def test_steps_can_be_recorded(centered):
    options = {"args": (Y,), "num_steps": 40, "stop": None, "objective": ELBO(64)}
    recorded, plain = (
        fit(noncentered(gaussian, centered=centered), AutoMultivariateNormal, compile=compile, **options)
        for compile in ("trace", False)
    )
    assert recorded.losses[0, -5:].mean() == pytest.approx(plain.losses[0, -5:].mean(), abs=0.5)


def test_copies_and_pickles():
    other = noncentered(gaussian, centered=0.25)
    other(Y)
    for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert (twin.sites, twin.centered) == ({"x"}, 0.25)
        assert twin(Y).shape == (4,)
    assert repr(other) == "noncentered(gaussian, sites=['x'])"


def test_sites_can_be_named():
    other = noncentered(gaussian, sites=["mu"])
    assert "mu_decentered" in poutine.trace(other).get_trace(Y).nodes
    assert other.sites == {"mu"}


def count():
    pyro.sample("k", dist.Gamma(1.0, 1.0))


def interval():
    pyro.sample("x", dist.TransformedDistribution(dist.Uniform(0.0, 1.0), dist.transforms.ExpTransform()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: noncentered(3), "model=3: expected a Pyro program"),
        (lambda: noncentered(Regression), "expected a Pyro program"),
        (lambda: noncentered(gaussian, centered=1.0), r"centered=1.0: expected a number in"),
        (lambda: noncentered(gaussian, centered=True), "centered=True"),
        (lambda: noncentered(gaussian, sites="x"), r"expected a list of names, \['x'\]"),
        (lambda: noncentered(count, sites=["k"])(), "site 'k' has the distribution Gamma"),
        (lambda: noncentered(interval, sites=["x"])(), "site 'x'.* has the distribution"),
    ],
)
def test_what_cannot_be_rewritten_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_support_of_a_site_is_kept():
    other = noncentered(hierarchy(*FAMILIES["lognormal"]))
    site = poutine.trace(other).get_trace().nodes["x"]
    assert constraints.positive.check(site["value"]).all()
