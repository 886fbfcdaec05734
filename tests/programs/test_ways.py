"""Ways of running several particles: broadcast, carried by vmap, looped. Programs are written as people write them."""

import math
import random
from functools import partial
from itertools import product as product_of

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.effect import AutoNormalMessenger
from pyro.nn import PyroModule, PyroSample

import pplvi
from pplvi.objectives import NestedDivergence
from pplvi.programs.density import UnconstrainedDensity
from pplvi.programs.dreams import dream, prior_run
from pplvi.programs.joint import execute
from pplvi.programs.memo import recall
from pplvi.programs.unguided import run_model

pytestmark = pytest.mark.usefixtures("float64")
torch.manual_seed(0)
X = torch.randn(12, 3, dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.5 * torch.randn(12, dtype=torch.float64)
GROUP = torch.tensor([0, 1, 2, 3] * 3)
LAYER = torch.nn.Linear(3, 1, dtype=torch.float64)


def evidence(covariance, y):
    return dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y).item()


def coefficients():
    return pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def observe(mean, y):
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def product(x, y=None):
    b = coefficients()
    mean = x @ b
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def by_position(x, y):
    b = coefficients()
    observe(b[0] * x[:, 0] + b[1] * x[:, 1] + b[2] * x[:, 2], y)


def written(x, y):
    b = torch.zeros(3)
    for i in range(3):
        b[i] = pyro.sample(f"b{i}", dist.Normal(0.0, 1.0))
    observe(x @ b, y)


def contracted(x, y):
    observe(torch.einsum("nd,d->n", x, coefficients()), y)


def asserting(x, y):
    b = coefficients()
    assert b.shape == (3,)
    observe(x @ b, y)


def branching(x, y):
    b = coefficients()
    if b[0] > 100:
        raise ValueError("never")
    observe(x @ b, y)


def broadcasting(x, y):
    b = coefficients()
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((x * b).sum(-1), 0.5), obs=y)


def grouped(group, y):
    with pyro.plate("groups", 4):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    observe(a[group], y)


LINEAR = evidence(X @ X.T + 0.25 * torch.eye(12, dtype=torch.float64), Y)
GROUPED = evidence((GROUP[:, None] == GROUP).double() + 0.25 * torch.eye(12, dtype=torch.float64), Y)
PROGRAMS = {
    "X @ b": (product, (X, Y), LINEAR, "vmap"),
    "b[0] * x": (by_position, (X, Y), LINEAR, "vmap"),
    "x[i] = draw": (written, (X, Y), LINEAR, "vmap"),
    "einsum": (contracted, (X, Y), LINEAR, "vmap"),
    "a shape": (asserting, (X, Y), LINEAR, "vmap"),
    "a[group]": (grouped, (GROUP, Y), GROUPED, "vmap"),
    "a branch": (branching, (X, Y), LINEAR, "loop"),
    "broadcasting": (broadcasting, (X, Y), LINEAR, "broadcast"),
}


def found_way(model, guide, args, word=None):
    return recall(model, guide, args, {}).ways[word]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_way_is_found_and_the_evidence_is_right(name):
    model, args, exact, word = PROGRAMS[name]
    guide = AutoMultivariateNormal(model)
    execute(model, guide, args, {}, num_particles=2)
    assert found_way(model, guide, args).word == word
    draws = 1_000 if word != "loop" else 300
    options = {"optim": pyro.optim.Adam({"lr": 0.05}), "num_steps": 250, "seed": 0, "progress": False}
    fit = pplvi.fit(model, AutoMultivariateNormal, args=args, **options)
    posterior = fit.posterior(num_draws=draws)
    value, error = posterior.total_log_evidence
    assert abs(value - exact) < max(4 * error, 0.05)
    assert posterior.draws.log_likelihood["y"].shape == (draws, 12)


@pytest.mark.parametrize("name", ["X @ b", "x[i] = draw", "a[group]", "a branch"])
def test_densities_are_those_of_each_particle_alone(name):
    model, args, _, word = PROGRAMS[name]
    for make in (AutoNormal, pplvi.AutoFlow):
        guide = make(model)
        run = execute(model, guide, args, {}, num_particles=5)
        for particle in range(5):
            values = run.draws_of(particle)
            alone = execute(model, guide, args, {}, values=values)
            assert torch.allclose(run.log_target()[particle], alone.log_target()[0], atol=1e-10)
            assert torch.allclose(run.log_forward()[particle], alone.log_forward()[0], atol=1e-10)
        assert len(torch.unique(run.log_target())) == 5
        assert found_way(model, guide, args).word == word


ESTIMATORS = (None, "reparam", "score", "vimco", "stl", "dreg")
BOUNDS = {
    "ELBO": (partial(pplvi.ELBO, 4), ESTIMATORS[:-1]),
    "exact entropy": (partial(pplvi.ELBO, 4, "exact"), ESTIMATORS[:-2]),
    "divergence": (partial(pplvi.ELBO, 4, "kl"), ESTIMATORS[:-2]),
    "importance weighted": (partial(pplvi.ImportanceWeightedELBO, 4), ESTIMATORS),
    "Renyi": (partial(pplvi.RenyiELBO, 0.5, 4), ESTIMATORS),
    "chi": (partial(pplvi.ChiELBO, 4), ESTIMATORS),
}
OTHERS = {
    "thermodynamic": partial(pplvi.ThermodynamicELBO, 4),
    "forward KL": partial(pplvi.ForwardKL, 4),
    "wake-sleep": partial(pplvi.WakeSleep, 4, 1),
    "reweighted": partial(pplvi.ReweightedWakeSleep, 4),
    "reweighted, half asleep": partial(pplvi.ReweightedWakeSleep, 4, 0.5, 1),
    "reweighted, mixed": partial(pplvi.ReweightedWakeSleep, 4, mixture=0.3),
    "nested": partial(pplvi.NestedELBO, "reverse_kl", 4),
    "nested, forward": partial(pplvi.NestedELBO, "forward_kl", 4),
    "nested, chi-square": partial(pplvi.NestedELBO, NestedDivergence("chi_square", estimator="score"), 4),
    "a sum": lambda **way: pplvi.ELBO(4, **way) + 0.5 * pplvi.ForwardKL(4, **way),
}
LOSSES = {
    **{
        f"{name}, {estimator}": partial(make, estimator=estimator)
        for name, (make, estimators) in BOUNDS.items()
        for estimator in estimators
    },
    **OTHERS,
}


def global_guide(x, y):
    loc, scale = pyro.param("loc", 0.1 * torch.arange(3.0)), pyro.param("scale", 0.3 * torch.ones(3))
    pyro.sample("b", dist.Normal(loc, scale).to_event(1))


def local_model(x, y):
    width = pyro.param("width", torch.tensor(0.7))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, width), obs=y)


def local_guide(x, y):
    loc = pyro.param("loc", 0.1 * torch.arange(3.0))
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(loc, 0.4))


def discrete_model(x, y):
    levels = pyro.param("levels", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("y", dist.Normal(levels[0] + (levels[1] - levels[0]) * z, 0.5), obs=y)


def discrete_guide(x, y):
    logits = pyro.param("logits", 0.1 * torch.arange(3.0))
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Bernoulli(logits=logits))


PAIRS = {
    "global": (broadcasting, global_guide),
    "local": (local_model, local_guide),
    "discrete": (discrete_model, discrete_guide),
}
OF_DRAWS = [f"{name}, {word}" for name in BOUNDS for word in (None, "score", "vimco") if name != "exact entropy"]


@pytest.mark.parametrize(
    ("pair", "name"),
    [
        *product_of(("global", "local"), LOSSES),
        *product_of(("discrete",), [*OF_DRAWS, *sorted(OTHERS.keys() - {"nested"})]),
    ],
)
def test_losses_and_gradients_of_the_ways_are_equal(pair, name):
    """So few numbers are drawn one by one, so that every way has the same noise after the same seed; of several dreams
    it would be in another order, latents and data in turn."""
    found = {}
    args = X[:3], Y[:3]
    for way in ("broadcast", "vmap", "loop"):
        pyro.clear_param_store()
        loss = LOSSES[name](vectorize_particles=way)
        loss.loss(*PAIRS[pair], *args)
        pyro.set_rng_seed(3)
        value = loss.loss_and_grads(*PAIRS[pair], *args)
        leaves = pyro.get_param_store()._params
        found[way] = value, {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    for way in ("vmap", "loop"):
        assert found[way][0] == pytest.approx(found["broadcast"][0], abs=1e-10)
        assert found[way][1].keys() == found["broadcast"][1].keys() != set()
        for key, gradient in found["broadcast"][1].items():
            assert gradient.abs().sum() > 0
            assert torch.allclose(found[way][1][key], gradient, atol=1e-10), (way, key)


def taking_the_first(x, y):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.Normal(z[0], 1e-3))
    pyro.sample("y", dist.Normal(s, 1e-3), obs=y)


def guide_of_the_first(x, y):
    pyro.sample("z", dist.Normal(pyro.param("w", torch.zeros(2)), 1.0).to_event(1))
    pyro.sample("s", dist.Normal(0.5 * y, 0.5))


@pytest.mark.parametrize("way", [None, "vmap", "loop"])
def test_dreams_and_draws_of_the_prior_are_each_particles_own(way):
    """Two particles of a vector of two: broadcasting would take the first particle for the first element, unseen."""
    args = X, Y[0]
    runs, log_forward = dream(taking_the_first, guide_of_the_first, args, {}, 2)
    nodes = [run.model.nodes for run in runs]
    z, s, y = (torch.cat([node[name]["value"].reshape(-1, *shape) for node in nodes]) for name, shape in SHAPES.items())
    assert len(torch.unique(z)) == 4
    assert torch.allclose(s, z[:, 0], atol=1e-2)
    assert torch.allclose(y, s, atol=1e-2)
    exact = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(0.5 * y, 0.5).log_prob(s)
    assert torch.allclose(log_forward, exact, atol=1e-10)
    prior = prior_run(taking_the_first, guide_of_the_first, args, {}, 2, {}, way)
    z, s = (prior.model.nodes[name]["value"].reshape(2, *SHAPES[name]) for name in "zs")
    assert torch.allclose(s, z[:, 0], atol=1e-2)


SHAPES = {"z": (2,), "s": (), "y": ()}


def test_a_way_that_is_named_and_not_right_is_refused():
    for loss in (
        pplvi.ELBO(2, vectorize_particles="broadcast"),
        pplvi.WakeSleep(2, vectorize_particles="broadcast"),
        pplvi.ReweightedWakeSleep(2, mixture=0.3, vectorize_particles="broadcast"),
    ):
        with pytest.raises(ValueError, match="cannot be run that way"):
            loss.loss(taking_the_first, guide_of_the_first, X, Y[0])


def test_a_seed_and_a_way_give_one_run():
    options = {"args": (X, Y), "num_steps": 4, "seed": 5, "progress": False}
    for way in ("broadcast", "vmap", "loop"):
        objective = pplvi.ImportanceWeightedELBO(3, vectorize_particles=way)
        runs = [pplvi.fit(broadcasting, AutoNormal, objective=objective, **options) for _ in range(2)]
        assert (runs[0].losses == runs[1].losses).all()
        draws = [
            pplvi.Posterior(broadcasting, fit.guide, (X, Y), num_draws=20, seed=1, vectorize=way).draws.latents["b"]
            for fit in runs
        ]
        assert torch.equal(*draws)


def test_posteriors_of_the_ways_are_equal():
    found = [
        pplvi.Posterior(broadcasting, global_guide, (X, Y), num_draws=4, seed=1, vectorize=way)
        for way in ("broadcast", "vmap", "loop")
    ]
    for other in found[1:]:
        assert torch.allclose(other.draws.latents["b"], found[0].draws.latents["b"], atol=1e-12)
        assert torch.allclose(other.log_weight, found[0].log_weight, atol=1e-10)
        theirs, ours = other.draws.log_likelihood["y"], found[0].draws.log_likelihood["y"]
        assert torch.allclose(theirs, ours, atol=1e-10)
        assert other.draws.plates == found[0].draws.plates
        assert torch.equal(other.draws.observed["y"], Y)


@pytest.mark.parametrize("vectorize", [None, "vmap", "loop"])
def test_predictions_of_programs_that_do_not_broadcast(vectorize):
    b = torch.randn(400, 3)
    run = run_model(
        product, (X, None), {}, num_particles=400, latents={"b": b}, sample_observed=True, vectorize=vectorize
    )
    y = run.model.nodes["y"]["value"].reshape(400, 12)
    residuals = (y - b @ X.T) / 0.5
    assert len(torch.unique(residuals)) == residuals.numel()
    assert abs(residuals.mean()) < 4 / math.sqrt(residuals.numel())
    assert abs(residuals.std() - 1.0) < 4 / math.sqrt(2 * residuals.numel())


def mixture(y):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(w), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def test_enumerated_sites_are_summed_out_in_each_particle():
    guide = AutoNormal(poutine.block(mixture, hide=["z"]))
    run = execute(mixture, guide, (Y,), {}, num_particles=6)
    w = run.guide.nodes["w"]["value"].reshape(6, 1, 2)
    mu = run.guide.nodes["mu"]["value"].reshape(6, 1, 2)
    data = (w.log() + dist.Normal(mu, 1.0).log_prob(Y[:, None])).logsumexp(-1).sum(-1)
    prior = dist.Dirichlet(torch.ones(2)).log_prob(w[:, 0]) + dist.Normal(0.0, 3.0).log_prob(mu[:, 0]).sum(-1)
    assert torch.allclose(run.log_target(), prior + data, atol=1e-10)
    assert found_way(mixture, guide, (Y,)).word == "vmap"


def chain(y):
    p = pyro.sample("p", dist.Dirichlet(3 * torch.eye(2) + 1).to_event(1))
    s = 0
    for t in pyro.markov(range(len(y))):
        s = pyro.sample(f"s_{t}", dist.Categorical(p[s]), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Normal(torch.tensor([-1.0, 1.0])[s], 0.5), obs=y[t])


def mixture_density(values, y):
    w, mu = values["w"], values["mu"]
    prior = dist.Dirichlet(torch.ones(2)).log_prob(w) + dist.Normal(0.0, 3.0).log_prob(mu).sum(-1)
    return prior + (w.log()[:, None] + dist.Normal(mu[:, None], 1.0).log_prob(y[:, None])).logsumexp(-1).sum(-1)


def chain_density(values, y):
    p = values["p"]
    forward = torch.eye(2)[0].log().expand(len(p), 2)
    for value in y:
        forward = (forward[:, :, None] + p.log()).logsumexp(1)
        forward = forward + dist.Normal(torch.tensor([-1.0, 1.0]), 0.5).log_prob(value)
    return dist.Dirichlet(3 * torch.eye(2) + 1).log_prob(p).sum(-1) + forward.logsumexp(-1)


@pytest.mark.parametrize(("program", "exact"), [(mixture, mixture_density), (chain, chain_density)])
def test_sums_over_enumerated_sites_are_carried_in_densities(program, exact):
    density = UnconstrainedDensity(program, (Y,))
    assert density.way.word == "vmap"
    u = (density.start + 0.3 * torch.randn(5, density.dim)).requires_grad_()
    jacobian = sum(block.constrain(part, len(block.batch))[1] for block, part in density._parts(u))
    expected = exact(density.unpack(u), Y) + jacobian
    value, gradient = density.value_and_gradient(u)
    assert torch.allclose(value, expected, atol=1e-10)
    assert torch.allclose(gradient, torch.autograd.grad(expected.sum(), u)[0], atol=1e-9)
    one = UnconstrainedDensity(program, (Y,), vectorize="loop")
    assert torch.allclose(density.hessian(u[0].detach()), one.hessian(u[0].detach()), atol=1e-8)


def test_guides_that_enumerate_are_carried():
    def guide(y):
        pyro.sample("w", dist.Dirichlet(pyro.param("a", torch.tensor([2.0, 3.0]))))
        with pyro.plate("components", 2):
            pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor([-1.0, 1.0])), 0.1))
        with pyro.plate("data", len(y)):
            probs = pyro.param("p", torch.full((12, 2), 0.5))
            pyro.sample("z", dist.Categorical(probs), infer={"enumerate": "parallel"})

    loss = pplvi.ELBO(200)
    alone = pplvi.ELBO(1)
    pyro.set_rng_seed(0)
    each = torch.tensor([alone.loss(mixture, guide, Y) for _ in range(200)])
    assert abs(loss.loss(mixture, guide, Y) - each.mean()) < 4 * each.std() * math.sqrt(2 / 200)


class Network(PyroModule):
    def __init__(self):
        super().__init__()
        self.first = PyroModule[torch.nn.Linear](3, 4)
        self.first.weight = PyroSample(dist.Normal(0.0, 1.0).expand([4, 3]).to_event(2))
        self.first.bias = PyroSample(dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        self.last = torch.nn.Linear(4, 1)

    def forward(self, x, y):
        observe(self.last(torch.tanh(self.first(x))).squeeze(-1), y)


def test_modules_hold_no_particles_afterwards():
    network = Network()
    guide = AutoNormal(network)
    loss = pplvi.ImportanceWeightedELBO(5)
    loss.loss_and_grads(network, guide, X, Y)
    assert found_way(network, guide, (X, Y)).word == "vmap"
    assert network.last.weight.grad.abs().sum() > 0
    torch.save(network.state_dict(), "/dev/null")
    assert network(X, Y) is None


class Keeping(PyroModule):
    """A module that keeps what it has drawn."""

    def forward(self, x, y):
        self.kept = coefficients()
        observe(x @ self.kept, y)


def test_programs_that_keep_their_draws_are_looped():
    model = Keeping()
    guide = AutoNormal(model)
    pplvi.ELBO(3).loss(model, guide, X, Y)
    assert found_way(model, guide, (X, Y)).word == "loop"
    assert model.kept.shape == (3,)
    assert bool(model.kept.isfinite().all())


@pytest.mark.parametrize("draw", [np.random.standard_normal, lambda: random.gauss(0.0, 1.0)], ids=["numpy", "random"])
def test_random_numbers_from_outside_are_each_particles_own(draw):
    def noisy(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + draw(), 1.0), obs=y[0])

    guide = AutoNormal(noisy)
    pyro.set_rng_seed(0)
    run = execute(noisy, guide, (Y,), {}, num_particles=5)
    assert found_way(noisy, guide, (Y,)).word == "loop"
    z = run.guide.nodes["z"]["value"]
    noise = run.model.nodes["y"]["fn"].log_prob(None) - dist.Normal(z, 1.0).log_prob(Y[0])
    assert len(torch.unique(noise)) == 5


def test_random_numbers_of_torch_are_each_particles_own():
    def noisy(x, y):
        observe(x @ coefficients() + torch.randn(()), y)

    run = execute(noisy, AutoNormal(noisy), (X, Y), {}, num_particles=4)
    b = run.guide.nodes["b"]["value"].reshape(4, 3)
    shift = run.log_probs(run.model)["y"] - dist.Normal(b @ X.T, 0.5).log_prob(Y).sum(-1)
    assert len(torch.unique(shift)) == 4


def test_one_minibatch_for_all_particles():
    seen = []

    def model(x, y):
        b = coefficients()
        with pyro.plate("data", 12, subsample_size=4) as index:
            seen.append(index)
            pyro.sample("y", dist.Normal(x[index] @ b, 0.5), obs=y[index])

    guide = AutoNormal(model)
    guide(X, Y)
    pyro.set_rng_seed(0)
    for vectorize in ("vmap", "loop"):
        run = execute(model, guide, (X, Y), {}, num_particles=5, vectorize=vectorize)
        index = run.model.nodes["data"]["value"]
        assert index.shape == (4,)
        b = run.guide.nodes["b"]["value"].reshape(5, 3)
        data = 3 * dist.Normal(b @ X[index].T, 0.5).log_prob(Y[index]).sum(-1)
        assert torch.allclose(run.log_probs(run.model)["y"], data)
    runs = [execute(model, guide, (X, Y), {}, num_particles=2) for _ in range(9)]
    assert len({tuple(run.model.nodes["data"]["value"].tolist()) for run in runs}) > 1


def test_parameters_that_appear_later_are_made_once_for_all():
    def model(x, y, late):
        scale = pyro.param("late", lambda: torch.rand(())) if late else 0.5
        b = coefficients()
        with pyro.plate("data", 12):
            pyro.sample("y", dist.Normal(x @ b, scale), obs=y)

    guide = AutoNormal(model)
    loss = pplvi.ELBO(3)
    loss.loss(model, guide, X, Y, False)
    assert "late" not in pyro.get_param_store()
    loss.loss_and_grads(model, guide, X, Y, True)
    assert pyro.param("late").shape == ()
    assert pyro.get_param_store()._params["late"].grad.abs() > 0


def test_a_failed_factorisation_is_one_particles_own():
    def model(y):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        covariance = torch.eye(2) + s * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        assert covariance.shape == (2, 2)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=y[:2])

    def guide(y):
        pyro.sample("s", dist.Uniform(-0.9, 0.9))

    execute(model, guide, (Y,), {}, num_particles=2)  # the way is found where all is well
    values = {"s": torch.tensor([0.5, 2.0, 0.1])}
    density = execute(model, guide, (Y,), {}, num_particles=3, values=values).log_target()
    assert density.isneginf().tolist() == [False, True, False]
    assert density[[0, 2]].isfinite().all()


def test_effect_based_guides_are_one_program_with_their_model():
    guide = AutoNormalMessenger(product)
    pplvi.ELBO(4).loss(product, guide, X, Y)
    way = found_way(product, guide, (X, Y))
    assert (way.word, way.guide) == ("vmap", False)
    fit = pplvi.fit(product, AutoNormalMessenger, args=(X, Y), num_steps=300, seed=0, progress=False)
    assert fit.posterior(num_draws=200).elbo.value == pytest.approx(-fit.losses[0, -20:].mean(), abs=2.0)


@pytest.mark.parametrize(("model", "way"), [(branching, "loop"), (product, "vmap")])
def test_a_report_says_where_draws_are_looped(model, way):
    fit = pplvi.fit(model, AutoNormal, args=(X, Y), num_steps=10, seed=0, progress=False)
    fit.__dict__["posteriors"] = [posterior := fit.posterior(40)]  # 1,000 in a loop are slow
    assert posterior.way == way
    assert ("run one after another, 40 runs of the programs" in fit.summary()) == (way == "loop")


class Machine:
    """A model that is a bound method, made anew at every access."""

    def __init__(self):
        self.runs = 0

    def model(self, x, y):
        self.runs += 1
        product(x, y)


def test_bound_methods_are_remembered():
    machine = Machine()
    guide = AutoNormal(machine.model)
    loss = pplvi.ELBO(4)
    loss.loss(machine.model, guide, X, Y)
    machine.runs = 0
    loss.loss(machine.model, guide, X, Y)
    assert machine.runs == 1


def test_recorded_steps_of_programs_that_do_not_broadcast():
    options = {"args": (X, Y), "num_steps": 60, "seed": 0, "progress": False}
    objective = pplvi.ImportanceWeightedELBO(3)
    eager = pplvi.fit(product, AutoNormal, objective=objective, **options)
    recorded = pplvi.fit(product, AutoNormal, objective=objective, compile="trace", **options)
    assert recorded.losses[0, -20:].mean() == pytest.approx(eager.losses[0, -20:].mean(), abs=1.5)
    assert found_way(product, eager.guide, (X, Y)).word == "vmap"


def test_plates_without_a_size_and_dimensions_beside_a_plate():
    def sizeless(y):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def beside(y):
        with pyro.plate("rows", 4, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(4, 3), 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    table = Y.reshape(4, 3)
    for model, y in ((sizeless, Y), (beside, table)):
        options = {"optim": pyro.optim.Adam({"lr": 0.05}), "num_steps": 250, "seed": 0, "progress": False}
        fit = pplvi.fit(model, AutoNormal, args=(y,), **options)
        value, error = fit.posterior().total_log_evidence
        exact = dist.Normal(0.0, math.sqrt(1.25)).log_prob(y).sum().item()
        assert abs(value - exact) < max(4 * error, 0.05)
        draws = fit.predict(num_samples=7)
        assert draws.observed["y"].shape == (7, *y.shape)
        assert draws.latents["z"].shape == (7, *y.shape)


def test_minibatches_that_only_the_guide_draws_in_any_order():
    y = torch.randn(50) + 1

    def model(y, size):
        with pyro.plate("data", 50) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    def guide(y, size):
        with pyro.plate("data", 50, size) as index:
            pyro.sample("z", dist.Normal(0.5 * y[index], math.sqrt(0.5)))  # the posterior: weights are the evidence

    exact = -dist.Normal(0.0, math.sqrt(2.0)).log_prob(y)
    for size in (10, None, 10):
        for num_particles in (1, 4):
            losses = torch.tensor([pplvi.ELBO(num_particles).loss(model, guide, y, size) for _ in range(40)])
            error = 0.0 if size is None else 50 * exact.std() / math.sqrt(10 * 40)
            assert abs(losses.mean() - exact.sum()) < 4 * error + 1e-8


def counts(x, y, mask=True):
    rate = (x @ coefficients()).exp()
    with pyro.plate("data", len(x)), poutine.mask(mask=mask):
        pyro.sample("y", dist.Poisson(rate), obs=y)


@pytest.mark.parametrize("way", [None, "vmap", "loop"])
def test_later_data_are_checked_in_every_way(way):
    guide, loss, good = AutoNormal(counts), pplvi.ELBO(3, vectorize_particles=way), torch.ones(12)
    for value in (-1.0, 0.5):
        before = loss.loss(counts, guide, X, good)
        assert math.isfinite(before)
        bad = good.clone()
        bad[4] = value
        with pytest.raises(ValueError, match=r"log density at site 'y' cannot be computed.*support"):
            loss.loss(counts, guide, X, bad)
        assert math.isfinite(loss.loss(counts, guide, X, bad, mask=bad == good))


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("way", [None, "vmap", "loop"])
def test_codes_of_missing_data_under_a_mask_count_for_nothing(summed, way):
    codes = torch.tensor([0, 2, -1, 1, -1])

    def model(y, there):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(2, 3)).to_event(1))
        with pyro.plate("data", len(y)), poutine.mask(mask=there):
            kind = 0
            if summed:
                kind = pyro.sample("kind", dist.Bernoulli(0.3), infer={"enumerate": "parallel"}).long()
            pyro.sample("y", dist.Categorical(p[kind]), obs=y)

    guide = AutoNormal(poutine.block(model, hide=["kind"]))
    found = {}
    for y in (codes, codes[codes >= 0]):
        loss = pplvi.ELBO(3, vectorize_particles=way)
        loss.loss(model, guide, y, y >= 0)
        pyro.set_rng_seed(0)
        guide.zero_grad()
        found[len(y)] = loss.loss_and_grads(model, guide, y, y >= 0), guide.locs.p_unconstrained.grad.clone()
    assert found[5][0] == pytest.approx(found[3][0], abs=1e-10)
    assert torch.allclose(found[5][1], found[3][1], atol=1e-10)
