"""AutoFlow: exact start, normalised densities, Pyro's guide contract, gradients that are never stale, refusals."""

import copy
import io
import itertools
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import banana
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuideList, AutoNormal, init_to_value
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor
from torch.distributions import constraints

from pplvi import ELBO, ForwardKL, ImportanceWeightedELBO, RenyiELBO, ThermodynamicELBO, fit
from pplvi.guides import AutoFlow
from pplvi.guides.flows import build
from pplvi.guides.flows.import_zuko import import_zuko

pytestmark = pytest.mark.usefixtures("float64")

NAMES = ["nsf", "maf", "iaf", "nice", "coupling", "bnaf"]
ORDERS = [
    ("nsf", True),
    ("nsf", False),
    ("maf", False),
    ("iaf", True),
    ("nice", False),
    ("nice", True),
    ("bnaf", False),
]
SMALL = {"transforms": 2, "hidden_features": (16,)}


def zuko_flow(name: str, **options: int) -> Callable:
    return lambda features: getattr(import_zuko().flows, name)(features, **options)


def model(data: Tensor | None = None) -> None:
    """Latents on a simplex, a half line, an interval, a vector and two plates: 2 + 1 + 3 + 2 + 6 = 14 coordinates."""
    data = torch.zeros(3, 2) if data is None else data
    pyro.sample("simplex", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    scale = pyro.sample("positive", dist.Gamma(2.0, 2.0))
    with pyro.plate("rows", 3, dim=-2):
        pyro.sample("interval", dist.Uniform(-1.0, 2.0))
        with pyro.plate("columns", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=data)
    pyro.sample("vector", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))


def one_latent() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))


def vector(features: int = 2) -> Callable[[], None]:
    return lambda: pyro.sample("x", dist.Normal(torch.zeros(features), 1.0).to_event(1))


def rough(guide: AutoFlow, *args: Tensor, size: float = 0.3) -> AutoFlow:
    """Run the guide once and move every parameter away from the identity."""
    guide(*args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return guide


# ---------------------------------------------------------------------- the start


OTHERS = [zuko_flow("CNF"), zuko_flow("BPF"), zuko_flow("NSF", transforms=1, bins=4)]


@pytest.mark.parametrize(
    ("program", "flow"),
    [*itertools.product([one_latent, vector(2), model], NAMES), *itertools.product([one_latent, vector(2)], OTHERS)],
)
def test_starts_as_the_diagonal_normal(program, flow):
    start = init_to_value(values={"positive": torch.tensor(1.5)})
    guides = []
    for kind in (AutoDiagonalNormal, AutoFlow):
        pyro.set_rng_seed(3)
        guide = kind(program, init_loc_fn=start, init_scale=0.3, **({"flow": flow} if kind is AutoFlow else {}))
        guide()
        guides.append(guide)
    normal, ours = guides
    assert torch.equal(normal.loc, ours.loc)
    z = normal.get_posterior().sample((50,))
    assert torch.allclose(ours.get_posterior().log_prob(z), normal.get_posterior().log_prob(z), rtol=0, atol=1e-9)


@pytest.mark.parametrize("flow", NAMES)
def test_first_draws_are_those_of_the_diagonal_normal(flow):
    draws = []
    for guide in (AutoDiagonalNormal(model, init_scale=0.2), AutoFlow(model, flow, init_scale=0.2)):
        guide()
        pyro.set_rng_seed(5)
        draws.append(guide.get_posterior().rsample((7,)) - guide.loc.detach())
    assert torch.allclose(*draws, rtol=0, atol=1e-12)


def test_a_flow_instance_keeps_its_weights_and_is_copied():
    flow = zuko_flow("MAF")(2)
    before = copy.deepcopy(flow.state_dict())
    guide = AutoFlow(vector(), flow, init_scale=1.0)
    guide()
    z = torch.randn(5, 2)
    assert torch.allclose(guide.get_posterior().log_prob(z + guide.loc), flow.to(z.dtype)().log_prob(z), atol=1e-5)
    svi_steps(vector(), guide, 2)
    assert all(torch.equal(before[k], v.to(before[k].dtype)) for k, v in flow.state_dict().items())


# ---------------------------------------------------------------------- densities


@pytest.mark.parametrize(("flow", "inverse"), ORDERS)
def test_density_integrates_to_one_on_a_grid(flow, inverse):
    posterior = rough(AutoFlow(vector(), flow, inverse=inverse, init_scale=0.8, **SMALL), size=0.15).get_posterior()
    side = torch.linspace(-9, 9, 401)
    points = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = sum(posterior.log_prob(part).exp().sum() for part in points.split(20_000)) * (side[1] - side[0]) ** 2
    assert mass.item() == pytest.approx(1.0, abs=2e-3)


def supports() -> None:
    pyro.sample("simplex", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    pyro.sample("positive", dist.Gamma(2.0, 2.0))
    pyro.sample("interval", dist.Uniform(-1.0, 2.0))
    pyro.sample("vector", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))


@pytest.mark.parametrize("flow", ["nsf", "nice"])
def test_density_on_constrained_supports_integrates_to_one(flow):
    guide = rough(AutoFlow(supports, flow, init_scale=1.0, **SMALL), size=0.05)
    with torch.no_grad(), pyro.plate("particles", 8_000):
        trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    draws = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}
    log_q = sum(trace.nodes[name]["log_prob"] for name in trace.stochastic_nodes if name != "particles")
    median = guide.median()
    log_p = (  # any normalised density inside the bulk of the guide: E_q[p / q] is the mass of p
        dist.Dirichlet(torch.tensor([2.5, 3.5, 4.5])).log_prob(draws["simplex"])
        + dist.LogNormal(median["positive"].log(), 0.8).log_prob(draws["positive"])
        + dist.Beta(2.5, 2.5).log_prob((draws["interval"] + 1) / 3)
        - math.log(3)
        + dist.Normal(median["vector"], 0.8).to_event(1).log_prob(draws["vector"])
    )
    ratio = (log_p - log_q).detach().exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert error < 0.03
    assert abs(ratio.mean() - 1) < 4 * error


@pytest.mark.parametrize(("flow", "inverse"), ORDERS)
def test_remembered_and_recomputed_densities_agree(flow, inverse):
    posterior = rough(AutoFlow(vector(4), flow, inverse=inverse, **SMALL)).get_posterior()
    z = posterior.rsample((6, 1, 3))
    assert z.shape == (6, 1, 3, 4)
    assert posterior.log_prob(z).shape == (6, 1, 3)
    assert torch.allclose(posterior.log_prob(z), posterior.log_prob(z.clone()), atol=1e-8)


@pytest.mark.parametrize("inverse", [True, False])
def test_a_draw_and_its_density_are_one_pass(inverse, monkeypatch):
    passes = []
    module = import_zuko().flows.MaskedAutoregressiveTransform
    original = module.meta
    monkeypatch.setattr(module, "meta", lambda self, c, x: passes.append(1) or original(self, c, x))
    posterior = rough(AutoFlow(vector(5), "maf", inverse=inverse, transforms=1)).get_posterior()
    passes.clear()
    posterior.log_prob(posterior.rsample((3,)))
    assert len(passes) == (1 if inverse else 5 + 1)


# ---------------------------------------------------------------------- gradients are those of the parameters in use


@pytest.mark.parametrize(("flow", "inverse"), ORDERS)
def test_rescoring_the_same_draw_under_frozen_parameters(flow, inverse):
    guide = rough(AutoFlow(vector(), flow, inverse=inverse, **SMALL))
    z = guide.get_posterior().rsample((4,))
    live = guide.get_posterior().log_prob(z.detach().requires_grad_())
    frozen = copy.deepcopy(guide)
    frozen.requires_grad_(False)
    density = frozen.get_posterior()
    leaf = z.detach().requires_grad_()
    (expected,) = torch.autograd.grad(density.log_prob(leaf).sum(), leaf)
    (through,) = torch.autograd.grad(density.log_prob(z).sum(), z, retain_graph=True)
    assert torch.allclose(through, expected)
    assert torch.allclose(live, density.log_prob(z))
    assert density.log_prob(z.detach()).requires_grad is False


@pytest.mark.parametrize(("flow", "inverse"), ORDERS)
def test_a_draw_made_without_gradients_is_scored_with_them(flow, inverse):
    guide = rough(AutoFlow(vector(), flow, inverse=inverse, **SMALL))
    posterior = guide.get_posterior()
    z = posterior.sample((8,))
    parameters = list(guide.parameters())
    got = torch.autograd.grad(posterior.log_prob(z).sum(), parameters, allow_unused=True)
    want = torch.autograd.grad(guide.get_posterior().log_prob(z.clone()).sum(), parameters, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b)
    assert sum(g is not None for g in got) == len(parameters)


def test_score_of_the_guide_has_mean_zero():
    posterior = rough(AutoFlow(vector(), "nsf", **SMALL)).get_posterior()
    z = posterior.sample((4_000,)).requires_grad_()
    (score,) = torch.autograd.grad(posterior.log_prob(z).sum(), z)  # E_q[d log q / dz] = 0
    assert (score.mean(0).abs() < 4 * score.std(0) / math.sqrt(len(z))).all()


# ---------------------------------------------------------------------- training


def svi_steps(program: Callable, guide: Callable, steps: int, *args: Tensor, lr: float = 0.01) -> float:
    """Train with Pyro's own loop; the loss over 3,200 fresh draws."""
    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True)
    optim = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "gamma": 0.02 ** (1 / max(steps, 1))}
    )
    svi = SVI(program, guide, optim, elbo)
    for _ in range(steps):
        svi.step(*args)
        optim.step()
    return Trace_ELBO(num_particles=3200, vectorize_particles=True).loss(program, guide, *args)


def correlated() -> None:
    chol = torch.tensor([[1.0, 0.0], [0.95, math.sqrt(1 - 0.95**2)]])
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=chol))


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 1.5))
    pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


@cache
def mean_field(program: Callable) -> float:
    """The loss of a trained mean field, for all the flows of a program."""
    pyro.clear_param_store()
    return svi_steps(program, AutoDiagonalNormal(program, init_scale=0.5), 300)


@pytest.mark.table(3)
@pytest.mark.parametrize(
    ("program", "flow"),
    [(correlated, "iaf"), (correlated, "maf"), (banana, "nsf"), (banana, "nice"), (funnel, "nsf"), (funnel, "iaf")],
)
def test_beats_mean_field(program, flow):
    # log Z = 0, so the loss is KL(q || p). Mean field: 1.16, 0.56 and 0.38 nats at best; draws of the loss have an sd
    # of about 1, so 3,200 of them give it to 0.02.
    loss = svi_steps(program, AutoFlow(program, flow, init_scale=0.5, transforms=2, hidden_features=(32,)), 300)
    assert -0.06 < loss < 0.25
    assert loss < mean_field(program) - 0.25


@pytest.mark.parametrize("flow", [*NAMES, zuko_flow("CNF"), zuko_flow("BPF")])
def test_steps_move_every_parameter(flow):
    guide = AutoFlow(vector(3), flow)
    guide()
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    svi = SVI(vector(3), guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=8, vectorize_particles=True))
    for _ in range(3):  # the first step moves the last layers away from zero, which then let the gradient through
        svi.step()
    still = [name for name, p in guide.named_parameters() if torch.equal(p, before[name])]
    assert not still
    store = pyro.get_param_store()
    assert {id(p) for _, p in store.named_parameters()} == {id(p) for p in guide.parameters()}


def test_the_first_step_moves_every_parameter_of_a_flow_that_is_not_the_identity():
    guide = rough(AutoFlow(vector(3), "nsf", **SMALL))
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    SVI(vector(3), guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=8, vectorize_particles=True)).step()
    assert all(not torch.equal(p, before[name]) for name, p in guide.named_parameters())


def conjugate() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("flow", ["nsf", "maf", "nice"])
@pytest.mark.parametrize("objective", [ELBO(4, estimator="stl"), ImportanceWeightedELBO(4, estimator="dreg")])
def test_frozen_gradients_vanish_at_the_exact_posterior(flow, objective):
    posterior = init_to_value(values={"z": torch.tensor([0.5, -0.5])})
    guide = AutoFlow(conjugate, flow, init_loc_fn=posterior, init_scale=math.sqrt(0.5), **SMALL)
    loss = objective.differentiable_loss(conjugate, guide)
    assert loss.item() == pytest.approx(-dist.Normal(0.0, math.sqrt(2)).log_prob(torch.ones(2)).sum().item())
    gradients = torch.autograd.grad(loss, list(guide.parameters()), allow_unused=True)
    assert all(g is None or g.abs().max() < 1e-6 for g in gradients)


@pytest.mark.parametrize("objective", [ForwardKL(8), ThermodynamicELBO(8), RenyiELBO(0.5, 8)])
def test_other_objectives_train_it(objective):
    guide = AutoFlow(conjugate, "nice", **SMALL)
    judge = ELBO(200)  # no objective's own loss, some of which are no bounds
    before = judge.loss(conjugate, guide)
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.02}), objective)
    assert all(math.isfinite(svi.step()) for _ in range(60))
    assert judge.loss(conjugate, guide) < before - 0.4  # standard error 0.1


def test_restarts_of_fit_keep_their_parameters_apart():
    result = fit(conjugate, AutoFlow, num_steps=5, restarts=2, seed=0, progress=False)
    first, second = result.params
    assert set(first) == set(second)
    assert "AutoFlow.loc" in first
    assert not torch.equal(first["AutoFlow.loc"], second["AutoFlow.loc"])


# ---------------------------------------------------------------------- Pyro's contract


@pytest.mark.parametrize("flow", ["nsf", "maf", "nice"])
@pytest.mark.parametrize("dim", [-3, -4])
def test_vectorised_particles_at_any_leftmost_dim(flow, dim):
    guide = rough(AutoFlow(model, flow, **SMALL), size=0.05)
    with pyro.plate("particles", 5, dim=dim):
        trace = poutine.trace(guide).get_trace()
    left = (5, *(1,) * (-dim - 3))
    shapes = {"simplex": (*left, 1, 1, 3), "positive": (*left, 1, 1), "interval": (*left, 3, 1), "z": (*left, 3, 2)}
    assert {name: trace.nodes[name]["value"].shape for name in shapes} == shapes
    trace.compute_log_prob()
    assert trace.nodes["_AutoFlow_latent"]["log_prob"].shape == (*left, 1, 1)
    assert trace.nodes["_AutoFlow_latent"]["infer"]["is_auxiliary"]


def test_vectorised_and_looped_particles_agree():
    guide, data = rough(AutoFlow(model, "nsf", **SMALL), torch.zeros(3, 2), size=0.05), torch.zeros(3, 2)
    losses = []
    for vectorize in (True, False):
        elbo = Trace_ELBO(num_particles=200, vectorize_particles=vectorize)
        losses.append(elbo.differentiable_loss(model, guide, data).item())
    assert losses[0] == pytest.approx(losses[1], abs=2.0)  # sd of a draw 5: 0.5 is one standard error


def test_guide_draws_score_in_the_model():
    guide = rough(AutoFlow(model, "nsf", **SMALL), size=0.05)
    trace = poutine.trace(guide).get_trace()
    scored = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
    assert torch.isfinite(scored.log_prob_sum())
    assert all(torch.equal(scored.nodes[n]["value"], trace.nodes[n]["value"]) for n in ("simplex", "positive", "z"))


def test_quantiles_and_median_of_the_start_are_the_normals():
    guide, normal = AutoFlow(model, init_scale=0.3), AutoDiagonalNormal(model, init_scale=0.3)
    for g in (guide, normal):
        pyro.set_rng_seed(1)
        g()
    state = torch.get_rng_state()
    probs = [0.05, 0.5, 0.9]
    ours, theirs = guide.quantiles(probs), normal.quantiles(probs)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in theirs.items():
        assert ours[name].shape == value.shape
        assert torch.allclose(ours[name], value, atol=0.02)  # 0.3 sqrt(p (1 - p) / 10,000) / 0.103 = 0.006
        assert torch.allclose(guide.median()[name], normal.median()[name], atol=1e-6)  # antithetic draws: exact
    assert torch.equal(guide.median()["z"], guide.median()["z"])
    loc, scale = guide._loc_scale()
    assert torch.allclose(loc, normal.loc, atol=1e-6)
    assert torch.allclose(scale, normal.scale, atol=0.012)  # 4 standard errors of an sd, 0.3 / sqrt(2 * 10,000) each


def test_medians_lie_in_the_supports_and_fit_the_model():
    guide = rough(AutoFlow(model, "nsf", **SMALL), size=0.1)
    median = guide.median()
    poutine.trace(poutine.condition(model, data=median)).get_trace().log_prob_sum()  # validation is on
    assert median["simplex"].sum().item() == pytest.approx(1.0)
    quantiles = guide.quantiles(torch.tensor([0.1, 0.9]))
    assert (quantiles["interval"][0] < quantiles["interval"][1]).all()


def test_quantiles_of_a_decreasing_transform_are_in_order():
    def explicit() -> None:
        pyro.sample("x", BelowThree())

    class BelowThree(dist.Exponential):
        support = constraints.less_than(3.0)

        def __init__(self) -> None:
            super().__init__(torch.tensor(1.0), validate_args=False)

        def expand(self, batch_shape, _instance=None):
            return self

        def sample(self, sample_shape=()):
            return torch.full(sample_shape, 2.0)

    guide = AutoFlow(explicit)
    guide()
    low, high = guide.quantiles([0.05, 0.95])["x"]
    assert low < high < 3


def test_neural_transport_takes_the_guide():
    data = torch.zeros(3, 2)

    def program() -> None:
        model(data)

    guide = AutoFlow(program, "iaf", **SMALL)
    svi_steps(program, guide, 20)
    neutra = NeuTraReparam(guide)
    kernel = NUTS(poutine.reparam(program, config=lambda _: neutra), max_tree_depth=2)
    mcmc = MCMC(kernel, num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["simplex_shared_latent"].shape == (3, 14)


def test_part_of_a_guide_list_over_a_model_with_other_parts():
    guide = AutoGuideList(model)
    guide.append(AutoFlow(poutine.block(model, hide=["z"]), "nsf", **SMALL))
    guide.append(AutoNormal(poutine.block(model, expose=["z"])))
    svi_steps(model, guide, 2)
    assert set(guide()) == {"simplex", "positive", "interval", "vector", "z"}
    assert all(name.startswith("AutoGuideList.") for name in pyro.get_param_store())


def test_a_plate_that_holds_only_data_may_be_subsampled():
    def program(data: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data), subsample_size=2) as index:
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=data[index])

    svi_steps(program, AutoFlow(program, "nsf", **SMALL), 2, torch.zeros(6))


def test_handlers_reach_the_parameters():
    guide = AutoFlow(vector(), "nice", **SMALL)
    guide()
    name = "AutoFlow.loc"
    moved = poutine.trace(poutine.substitute(guide, data={name: torch.tensor([100.0, 200.0])})).get_trace()
    assert torch.allclose(moved.nodes["x"]["value"], torch.tensor([100.0, 200.0]), atol=1.0)
    weight = "AutoFlow.flow.transforms.0.hyper.2.bias"
    shifted = poutine.trace(poutine.substitute(guide, data={weight: torch.tensor([50.0, 0.0])})).get_trace()
    assert shifted.nodes["x"]["value"].abs().max() > 1


# ---------------------------------------------------------------------- parameters, names, copies, dtypes


def test_two_guides_side_by_side_share_nothing():
    first, second = (AutoFlow(vector(), "nsf", **SMALL) for _ in range(2))
    svi_steps(vector(), first, 3)
    trained = {k: v.clone() for k, v in first.state_dict().items()}
    svi_steps(vector(), second, 3)
    assert all(torch.equal(v, trained[k]) for k, v in first.state_dict().items())
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert {name.split(".")[0] for name in pyro.get_param_store()} == {"AutoFlow", "AutoFlow_1"}


def test_each_scope_of_the_parameter_store_has_the_plain_name():
    guides = []
    for _ in range(2):
        guide = AutoFlow(vector(), "nsf", **SMALL)
        with pyro.get_param_store().scope() as state:
            guide()
        guides.append((guide, state))
        assert "AutoFlow.loc" in state["params"]
    assert guides[0][1]["params"]["AutoFlow.loc"] is not guides[1][1]["params"]["AutoFlow.loc"]


def test_values_loaded_into_the_store_are_taken_over(tmp_path):
    guide = rough(AutoFlow(vector(), "nsf", **SMALL))
    z = torch.randn(3, 2)
    expected = guide.get_posterior().log_prob(z)
    pyro.get_param_store().save(str(tmp_path / "store.pt"))
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "store.pt"))
    fresh = AutoFlow(vector(), "nsf", **SMALL)
    fresh()
    assert torch.equal(fresh.get_posterior().log_prob(z), expected)


def test_state_dict_after_one_run():
    guide, other = rough(AutoFlow(vector(), "nsf", **SMALL)), AutoFlow(vector(), "nsf", **SMALL)
    other()
    other.load_state_dict(guide.state_dict())
    z = torch.randn(3, 2)
    assert torch.equal(guide.get_posterior().log_prob(z), other.get_posterior().log_prob(z))


@pytest.mark.parametrize("flow", NAMES)
def test_copies_leave_the_original_alone(flow):
    guide = rough(AutoFlow(vector(), flow, **SMALL))
    z = torch.randn(3, 2)
    expected = guide.get_posterior().log_prob(z)
    clone = copy.deepcopy(guide)
    revived = pickle.loads(pickle.dumps(guide))
    assert clone.model is guide.model is not None
    for other in (clone, revived):
        assert torch.equal(other.get_posterior().log_prob(z), expected)
        other()
        assert not {id(p) for p in other.parameters()} & {id(p) for p in guide.parameters()}
        with torch.no_grad():
            other.loc.add_(1.0)
    assert torch.equal(guide.get_posterior().log_prob(z), expected)
    svi_steps(vector(), guide, 1)


def test_copy_before_the_first_run_and_torch_save_after_it():
    guide = copy.deepcopy(AutoFlow(vector(), lambda features: import_zuko().flows.NSF(features, transforms=1)))
    guide()
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again.median()["x"].shape == (2,)
    with pytest.raises(ValueError, match="unpickled"):
        _ = again.model


@pytest.fixture
def float32_default(float64: None) -> Iterator[None]:
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.mark.usefixtures("float32_default")
@pytest.mark.parametrize("flow", [*NAMES, zuko_flow("CNF")])
def test_follows_the_dtype_of_the_latents(flow):
    def program() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    guide = AutoFlow(program, flow)
    assert guide()["x"].dtype == torch.float64
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    assert AutoFlow(one_latent, flow)()["x"].dtype == torch.float32


def test_import_and_use_leave_torch_validation_on():
    code = """
import sys, torch, pyro, pyro.distributions as dist
import pplvi, pplvi.guides
assert "zuko" not in sys.modules
flag = torch.distributions.Distribution._validate_args
guide = pplvi.guides.AutoFlow(lambda: pyro.sample("x", dist.Normal(0., 1.)))
assert "zuko" not in sys.modules
guide()
assert "zuko" in sys.modules
assert torch.distributions.Distribution._validate_args is flag is True
try:
    torch.distributions.Normal(0., -1.)
except ValueError:
    print("validated")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "validated", done.stderr


# ---------------------------------------------------------------------- refusals


def coin() -> None:
    pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("coin", dist.Bernoulli(0.5))


def local(data: Tensor) -> None:
    with pyro.plate("data", len(data), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=data[index])


def spread() -> None:
    pyro.sample("z", dist.Wishart(torch.tensor(5.0), torch.eye(2)))


def sequential() -> None:
    for i in pyro.plate("rows", 2):
        pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))


@pytest.mark.filterwarnings("ignore:Singular sample")
def test_refuses_models_it_cannot_guide():
    with pytest.raises(ValueError, match=r"PositiveDefinite.*Expected a support that has coordinates"):
        AutoFlow(spread)()
    with pytest.raises(ValueError, match=r"sequential pyro\.plate.*with pyro\.plate"):
        AutoFlow(sequential)()
    with pytest.raises(ValueError, match=r"discrete sample site 'coin'.*enumerating"):
        AutoFlow(coin)()
    with pytest.raises(ValueError, match="without latent sites; expected at least one"):
        AutoFlow(lambda: None)()
    with pytest.raises(ValueError, match=r"plate 'data', which is subsampled \(2 of 6\).*AutoNormal"):
        AutoFlow(local)(torch.zeros(6))


def test_a_refused_first_run_leaves_nothing_behind():
    guide = AutoFlow(local)
    for _ in range(2):
        with pytest.raises(ValueError, match="subsampled"):
            guide(torch.zeros(6))
    assert len(pyro.get_param_store()) == 0
    guide(torch.zeros(2))
    assert guide.latent_dim == 2


def test_hiding_discrete_sites_works():
    assert set(AutoFlow(poutine.block(coin, hide=["coin"]))()) == {"loc"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flow": "spline"}, "expected one of"),
        ({"flow": 3}, "flow=3: expected a string or a callable"),
        ({"init_scale": 0.0}, "expected a positive"),
        ({"init_scale": math.inf}, "expected a positive"),
        ({"init_scale": "wide"}, "expected a positive"),
        ({"transforms": 0}, "transforms=0: expected a whole number of at least 1"),
        ({"hidden_features": (16, -1)}, "each a whole number of at least 1"),
        ({"flow": torch.nn.Identity(), "transforms": 2}, "already built"),
    ],
)
def test_refuses_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoFlow(vector(), **arguments)


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (zuko_flow("NCSF"), "base is"),
        (zuko_flow("GMM"), r"expected a zuko\.lazy\.Flow"),
        (lambda features: torch.nn.Linear(features, features), r"expected a zuko\.lazy\.Flow"),
        (zuko_flow("MAF", context=3), "does not map 2 coordinates"),
        (lambda features: import_zuko().flows.NSF(features + 1), "does not map 2 coordinates"),
        (zuko_flow("GF"), "cannot start at the identity"),
        (zuko_flow("NAF"), "cannot start at the identity"),
        (zuko_flow("SOSPF"), "cannot start at the identity"),
    ],
    ids=["NCSF", "GMM", "module", "context", "features", "GF", "NAF", "SOSPF"],
)
def test_refuses_flows_that_do_not_fit(flow, message):
    with pytest.raises(ValueError, match=message):
        AutoFlow(vector(), flow)()


def test_refuses_options_that_the_family_does_not_know():
    with pytest.raises(ValueError, match=r"did not take \(2, bends\).*unexpected keyword"):
        AutoFlow(vector(), "maf", bends=3)()


def test_parts_of_a_flow_that_do_not_train_stay_as_they_are():
    flow = zuko_flow("MAF", transforms=1)(2)
    flow.transform.transforms[0].hyper[0].requires_grad_(False)
    guide = AutoFlow(vector(), flow)
    guide()
    assert len(list(guide.parameters())) == 3 + len([p for p in flow.parameters() if p.requires_grad])


def test_other_flows_start_from_their_own_weights_on_request():
    guide = AutoFlow(vector(), zuko_flow("GF"), identity_init=False)
    assert guide()["x"].shape == (2,)


def test_refuses_questions_before_the_first_run_and_bad_probabilities():
    guide = AutoFlow(vector())
    for question in (guide.median, guide.get_transform, lambda: guide.quantiles([0.5])):
        with pytest.raises(ValueError, match="call guide"):
            question()
    guide()
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\]"):
        guide.quantiles([0.5, 1.5])


def test_refuses_parameters_of_another_model_in_the_store():
    AutoFlow(vector(2), "nsf", **SMALL)()
    state = {k: v.detach().clone() for k, v in pyro.get_param_store().named_parameters()}
    constraint = dict(pyro.get_param_store()._constraints)
    pyro.clear_param_store()
    pyro.get_param_store().set_state({"params": state, "constraints": constraint})
    with pytest.raises(ValueError, match=r"AutoFlow\.loc with shape \(2,\).*clear_param_store"):
        AutoFlow(vector(3), "nsf", **SMALL)()


def test_splines_are_couplings_unless_told_otherwise():
    """Points from elsewhere cost two passes in every dimension, and not one for each coordinate."""
    module = import_zuko().flows.MaskedAutoregressiveTransform
    few, all_of_them = AutoFlow(vector(5)), AutoFlow(vector(5), "nsf", passes=None)
    passes = []
    for guide in (few, all_of_them):
        guide()
        passes.append({part.passes for part in guide._structure[0].modules() if isinstance(part, module)})
    assert passes == [{2}, {5}]


def test_memory_for_a_slow_direction_is_told_before_it_is_taken(monkeypatch):
    guide = AutoFlow(vector(6), "iaf", transforms=2, hidden_features=(16,))
    points = torch.randn(64, 6)
    guide()
    monkeypatch.setattr(build, "MUCH", 1000)
    transform = guide.get_transform()
    with pytest.warns(UserWarning, match=r"density of 64 draws.*over 6 coordinates keeps about.*flow='nice'"):
        transform.inv(points)
    guide.get_transform().inv(points)  # once is enough: a second warning would be an error
    few, more, all_of_them = (transform._kept(points[:count]) for count in (2, 4, 64))
    assert all_of_them == pytest.approx(few + 31 * (more - few), rel=0.02)  # what a few keep says what all will
