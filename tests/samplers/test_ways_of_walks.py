"""Paths, filters, mixtures and dreams over programs as people write them: each way has the numbers of the others."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pplvi
from pplvi.kernels import ControlledLangevinKernel, HamiltonianKernel, LangevinKernel
from pplvi.programs.dreams import dream
from pplvi.programs.memo import recall
from pplvi.samplers import DefensiveMixture

pytestmark = pytest.mark.usefixtures("float64")
torch.manual_seed(0)
X = torch.randn(8, 3, dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.5 * torch.randn(8, dtype=torch.float64)
GROUP = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def start(x, y):
    pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def observe(mean, y):
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def product(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    observe(x @ b, y)


def broadcasting(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    observe((x * b.unsqueeze(-2)).sum(-1), y) if b.dim() == 1 else observe((x * b).sum(-1), y)


def branching(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    observe(x @ b if b[0] > -100 else None, y)


def turning(previous, x, y):
    pyro.sample("b", dist.Normal(torch.eye(3) @ previous["b"] * 0.8, 0.6).to_event(1))


def groups():
    with pyro.plate("groups", 3):
        return pyro.sample("b", dist.Normal(0.0, 1.0))


def grouped_start(group, y):
    groups()


def grouped(group, y):
    b = groups()
    observe(b[group], y)


def grouped_broadcasting(group, y):
    b = groups()
    observe(b[..., group], y)


PATHS = {
    "residual": lambda model, first: (pplvi.AnnealedGuide(model, first, 2), {}),
    "all levels at once": lambda model, first: (pplvi.AnnealedGuide(model, first, 2), {"vectorize_levels": True}),
    "another divergence": lambda model, first: (pplvi.AnnealedGuide(model, first, 2), {"divergence": "hellinger"}),
    "moves that are rejected": lambda model, first: (
        pplvi.AnnealedGuide(model, first, 2),
        {"rejection": pplvi.Rejection(2, log_threshold=-3.0), "num_particles": 2},
    ),
    "Langevin": lambda model, first: (pplvi.AnnealedGuide(model, first, 2, LangevinKernel(0.01)), {}),
    "controlled": lambda model, first: (pplvi.AnnealedGuide(model, first, 2, ControlledLangevinKernel(0.01)), {}),
    "Hamiltonian": lambda model, first: (
        pplvi.AnnealedGuide(model, first, 2, HamiltonianKernel(0.05), learn_path=True),
        {},
    ),
    "a kernel of one's own": lambda model, first: (pplvi.NestedGuide(first, [(model, turning, turning)]), {}),
}


def evaluated(model, first, args, path, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide, more = PATHS[path](model, first)
    loss = pplvi.NestedELBO(**{"num_particles": 4, **more}, **options)
    loss.loss(model, guide, *args)
    pyro.set_rng_seed(3)
    value = loss.loss_and_grads(model, guide, *args)
    return value, {key: leaf.grad for key, leaf in pyro.get_param_store()._params.items() if leaf.grad is not None}


@pytest.mark.parametrize("path", PATHS)
def test_paths_over_programs_that_do_not_broadcast(path):
    """Few numbers are drawn one by one: after the same seed every way has the same noise."""
    cases = {"X @ b": (product, broadcasting, start, (X, Y))}
    if path != "a kernel of one's own":
        cases["a[group]"] = grouped, grouped_broadcasting, grouped_start, (GROUP, Y)
    for model, same, first, args in cases.values():
        value, gradients = evaluated(same, first, args, path)
        for way in (None, "loop"):
            ours, slopes = evaluated(model, first, args, path, vectorize_particles=way)
            assert ours == pytest.approx(value, abs=1e-10)
            assert slopes.keys() == gradients.keys()
            for key, slope in slopes.items():
                assert torch.allclose(slope, gradients[key], atol=1e-9), (way, key)
    assert gradients or path == "a kernel of one's own"


def test_paths_over_programs_that_branch_on_draws_are_looped():
    ours, theirs = (evaluated(model, start, (X, Y), "residual")[0] for model in (branching, product))
    assert ours == pytest.approx(theirs, abs=1e-10)
    with pytest.raises(ValueError, match="cannot be run that way"):
        evaluated(branching, start, (X, Y), "residual", vectorize_particles="vmap")


def test_annealing_a_regression_finds_its_evidence():
    guide = pplvi.AnnealedGuide(product, start, 20, HamiltonianKernel(0.1, num_leapfrog=5))
    loss = pplvi.NestedELBO(num_particles=600)
    pyro.set_rng_seed(0)
    steps = list(loss.steps(product, guide, X, Y))
    weight = steps[-1].log_weight
    estimate = weight.logsumexp(0) - math.log(len(weight))
    error = weight.exp().div(weight.exp().mean()).std() / math.sqrt(len(weight))
    exact = dist.MultivariateNormal(torch.zeros(8), X @ X.T + 0.25 * torch.eye(8)).log_prob(Y)
    assert abs(estimate - exact) < 4 * error < 1.0


TURN = torch.tensor([[0.9, 0.1], [-0.2, 0.8]], dtype=torch.float64)
SERIES = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64)


def scale():
    return pyro.param("scale", torch.tensor([0.5, 0.3]), constraint=constraints.positive)


def chain(apply, read, width, ys):
    z = torch.zeros(2)
    for t in pyro.markov(range(len(ys))):
        z = pyro.sample(f"z_{t}", dist.Normal(apply(z), width()).to_event(1))
        if read is not None:
            pyro.sample(f"y_{t}", dist.Normal(read(z), 0.7), obs=ys[t])


def times(z):
    return TURN @ z


def broadcast_times(z):
    return (TURN * z.unsqueeze(-2)).sum(-1)


class Turning:
    """A state-space model, in the shapes of one particle."""

    def __init__(self, *, draws=0.4, observes=True, apply=times, read=lambda z: z[0] + z[1]):
        self.draws, self.observes, self.apply, self.read = draws, observes, apply, read

    def init(self, state):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if self.observes:
            state["z"], state["seen"] = z, [z.sum(), 0]

    def step(self, state, y):
        width = self.draws if self.observes else scale()
        z = pyro.sample("z", dist.Normal(self.apply(state["z"]), width).to_event(1))
        if self.observes:
            state["z"], state["seen"] = z, [z.sum(), state["seen"][1] + 1]
            pyro.sample("y", dist.Normal(self.read(z), 0.7), obs=y)


def loops(apply, read):
    return lambda ys: chain(apply, read, lambda: 0.4, ys), lambda ys: chain(apply, None, scale, ys)


def objects(apply, read):
    return Turning(apply=apply, read=read), Turning(apply=apply, observes=False)


@pytest.mark.parametrize("make", [loops, objects])
@pytest.mark.parametrize("objective", ["bound", "forward_kl"])
def test_filters_over_programs_that_do_not_broadcast(make, objective):
    found = []
    for apply, read, way in (
        (broadcast_times, lambda z: z.sum(-1), "broadcast"),
        (times, lambda z: z[0] + z[1], None),
        (times, lambda z: z[0] + z[1], "loop"),
        (times, lambda z: z[0] + (z[1] if z[1] > -100 else 0), None),
    ):
        pyro.clear_param_store()
        loss = pplvi.FilteringELBO(5, objective=objective, resample=True, vectorize_particles=way)
        pair = make(apply, read)
        loss.loss(*pair, SERIES)
        pyro.set_rng_seed(1)
        found.append((loss.loss_and_grads(*pair, SERIES), pyro.get_param_store()._params["scale"].grad))
    for value, slope in found[1:]:
        assert value == pytest.approx(found[0][0], abs=1e-10)
        assert torch.allclose(slope, found[0][1], atol=1e-10)


def test_filters_of_discrete_chains_index_their_tables():
    table, means = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([-1.0, 1.0])

    def model(ys):
        s = torch.tensor(0)
        for t in pyro.markov(range(len(ys))):
            s = pyro.sample(f"s_{t}", dist.Categorical(table[s]))
            pyro.sample(f"y_{t}", dist.Normal(means[s], 0.7), obs=ys[t])

    def proposal(ys):
        s = torch.tensor(0)
        for t in pyro.markov(range(len(ys))):
            s = pyro.sample(f"s_{t}", dist.Categorical(table[s]))

    forward = torch.tensor([0.0, -torch.inf])
    for y in SERIES:
        forward = (forward[:, None] + table.log()).logsumexp(0) + dist.Normal(means, 0.7).log_prob(y)
    pyro.set_rng_seed(0)
    loss = pplvi.FilteringELBO(4_000, objective="forward_kl")
    (*_, last) = loss.steps(model, proposal, SERIES)
    assert abs(last.log_weight.logsumexp(0) - math.log(4_000) - forward.logsumexp(0)) < 0.05


def guide(x, y):
    loc = pyro.param("loc", torch.zeros(3))
    pyro.sample("b", dist.Normal(loc, 0.7).to_event(1))


@pytest.mark.parametrize("component", [None, start])
def test_mixtures_over_programs_that_do_not_broadcast(component):
    found = []
    for model, way in ((broadcasting, "broadcast"), (product, None), (product, "loop")):
        pyro.clear_param_store()
        loss = pplvi.ReweightedWakeSleep(5, mixture=DefensiveMixture(0.3, component), vectorize_particles=way)
        loss.loss(model, guide, X, Y)
        pyro.set_rng_seed(1)
        found.append((loss.loss_and_grads(model, guide, X, Y), pyro.get_param_store()._params["loc"].grad))
    for value, slope in found[1:]:
        assert value == pytest.approx(found[0][0], abs=1e-10)
        assert torch.allclose(slope, found[0][1], atol=1e-10)


def test_models_that_do_not_broadcast_dream_in_one_call():
    def recognise(x, y):
        pyro.sample("b", dist.Normal((x.T @ y) * pyro.param("w", torch.tensor(0.1)), 0.7).to_event(1))

    dream(product, recognise, (X, Y), {})  # makes the parameter
    runs, log_forward = dream(product, recognise, (X, Y), {}, 400)
    assert len(runs) == 1
    assert recall(product, recognise, (X, Y), {}).ways[None].word == "vmap"
    b, y = (runs[0].model.nodes[name]["value"].reshape(400, -1) for name in ("b", "y"))
    assert torch.allclose(log_forward, dist.Normal(0.1 * y @ X, 0.7).log_prob(b).sum(-1), atol=1e-10)
    joint = dist.Normal(0.0, 1.0).log_prob(b).sum(-1) + dist.Normal(b @ X.T, 0.5).log_prob(y).sum(-1)
    assert torch.allclose(runs[0].log_target(), joint, atol=1e-10)
    residual = (y - b @ X.T) / 0.5
    assert abs(residual.std() - 1.0) < 4 / math.sqrt(2 * residual.numel())
    assert len(torch.unique(residual)) == residual.numel()
