"""Places where Pyro 1.9.2 gives a wrong number, or none, and pplvi the right one.

Each test first shows what Pyro does, so that it fails, and can be dropped, once Pyro has mended it.
"""

import math
from collections import namedtuple
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal, AutoNormal, AutoNormalMessenger
from pyro.infer.importance import vectorized_importance_weights
from pyro.optim import SGD, Adam

import pplvi
from pplvi.objectives.forward_kl import ForwardKLDivergence
from pplvi.posterior.draws import draw, predict
from pplvi.samplers.ancestral import Ancestral
from pplvi.training.optimizers import Update
from pplvi.weights.algebra import effective_sample_size, log_evidence, logmeanexp

pytestmark = pytest.mark.usefixtures("float64")


def gradients(loss, model, guide, *args):
    """Gradient of each unconstrained parameter after one `loss_and_grads`."""
    parameters = pyro.get_param_store()._params
    for leaf in parameters.values():
        leaf.grad = None
    loss.loss_and_grads(model, guide, *args)
    return {name: leaf.grad.clone() for name, leaf in parameters.items() if leaf.grad is not None}


# Independent data in a plate.

Y = torch.linspace(-1.0, 3.0, 6, dtype=torch.float64)


def local_model(y, subsample=None):
    with pyro.plate("data", len(y), subsample_size=subsample) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.6), obs=y[i])


def local_guide(y, subsample=None):
    loc = pyro.param("loc", lambda: torch.zeros(len(y)))
    with pyro.plate("data", len(y), subsample_size=subsample) as i:
        pyro.sample("z", dist.Normal(loc[i], 0.8))


def datum_log_weight(z, y, loc=0.0, scale=0.8):
    """log p(y, z) - log q(z) by hand."""
    log_q = dist.Normal(loc, scale).log_prob(z)
    return dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.6).log_prob(y) - log_q


def test_renyi_elbo_puts_the_subsample_scale_inside_the_exponent():
    """Forty equal data, four at a time: every minibatch has the same exact bound."""
    y, repeats = torch.full((40,), 1.0), 300
    bounds = logmeanexp(datum_log_weight(0.8 * torch.randn(5, 200_000), torch.tensor(1.0)))
    exact, error = -40.0 * bounds.mean(), 40.0 * bounds.std() / 200_000**0.5
    pyros = RenyiELBO(alpha=0.0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    means, errors = [], []
    for loss in (pyros, pplvi.ImportanceWeightedELBO(5)):
        values = torch.tensor([loss.loss(local_model, local_guide, y, 4) for _ in range(repeats)])
        means.append(values.mean())
        errors.append((values.var() / repeats + error**2).sqrt())
    assert abs(means[0] - exact) > 20 * errors[0]
    assert means[0] < exact  # a larger bound than there is
    assert abs(means[1] - exact) < 4 * errors[1]


def first_datum(loss, others):
    """Gradient of the first datum's guide parameter, at fixed draws, beside other data."""
    y = torch.cat([torch.tensor([1.0]), others])
    gradients(loss, local_model, local_guide, y)
    torch.manual_seed(1)
    return gradients(loss, local_model, local_guide, y)["loc"][0]


@pytest.mark.parametrize(
    ("loss", "flattens"),
    [
        (ReweightedWakeSleep(num_particles=8, model_has_params=False, vectorize_particles=True), True),
        (TraceTailAdaptive_ELBO(num_particles=8, vectorize_particles=True), True),
        (pplvi.ForwardKL(8), False),
        (pplvi.ImportanceWeightedELBO(8), False),
        (pplvi.RenyiELBO(0.5, 8), False),
        (pplvi.ChiELBO(8), False),
        (pplvi.ThermodynamicELBO(8), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_weight_for_a_whole_minibatch(loss, flattens):
    """The gradient of one datum must not depend on what the other data are."""
    near, far = (first_datum(loss, others) for others in (torch.zeros(5), torch.full((5,), 2.0)))
    assert bool(abs(near - far) > 1e-3) is flattens


def test_flattened_weights_collapse():
    """200 data, 1,000 particles: an effective sample size of hundreds for each datum, of one or two for all."""
    y = torch.randn(200)
    found = draw(local_model, local_guide, (y,), num_draws=1000)
    log_weight = found.log_p - found.log_q
    joint, _, _ = vectorized_importance_weights(local_model, local_guide, y, num_samples=1000, max_plate_nesting=1)
    assert effective_sample_size(log_weight).median() > 500
    assert effective_sample_size(joint) < 5


# Wake-sleep.


def chain_model(y):
    z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
    z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
    pyro.sample("y", dist.Normal(z2, 1.0), obs=y)


def chain_guide(y):
    """The second site depends on the first."""
    z1 = pyro.sample("z1", dist.Normal(pyro.param("a", torch.tensor(0.2)), 1.0))
    pyro.sample("z2", dist.Normal(0.5 * z1, 1.0))


def test_wake_phi_is_biased_for_reparameterised_hierarchies():
    """Pyro detaches the draws after later sites have used them: d log q(z2 | z1) / d z1 leaks into z1's gradient."""
    y = torch.tensor(1.8)  # E[z1 | y] = y / 3, and -d/da E[log q] = a - E[z1]
    exact = 0.2 - 0.6
    pyros = ReweightedWakeSleep(num_particles=200_000, model_has_params=False, vectorize_particles=True)
    assert abs(gradients(pyros, chain_model, chain_guide, y)["a"] - exact) > 0.1
    assert abs(gradients(pplvi.ForwardKL(200_000), chain_model, chain_guide, y)["a"] - exact) < 0.02


def positive_model(y):
    z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.LogNormal(z.log(), 0.5), obs=y)


def test_wake_phi_leaks_the_jacobian_of_auto_normal():
    """log z is conjugate: its posterior mean is 0.8 log y, and -d/dloc E[log q] = (loc - E[log z]) / scale^2."""
    y = torch.tensor(2.0)
    guide = AutoNormal(positive_model, init_loc_fn=pyro.infer.autoguide.init_to_value(values={"z": torch.tensor(1.3)}))
    guide(y)
    guide.scales.z = torch.tensor(0.4)
    loc = math.log(1.3)
    exact = (loc - 0.8 * math.log(2.0)) / 0.16
    pyros = ReweightedWakeSleep(num_particles=100_000, model_has_params=False, vectorize_particles=True)
    assert abs(gradients(pyros, positive_model, guide, y)["AutoNormal.locs.z"] - exact) > 0.5
    assert abs(gradients(pplvi.ForwardKL(100_000), positive_model, guide, y)["AutoNormal.locs.z"] - exact) < 0.1


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal])
def test_sleep_phi_is_infinite_with_autoguides(kind):
    def model(y, observations=None):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    init = pyro.infer.autoguide.init_to_value(values={"z": torch.tensor(1.0)})
    guide, y = kind(model, init_loc_fn=init, init_scale=0.5), torch.tensor(0.4)
    guide(y)
    theirs = ReweightedWakeSleep(num_particles=2, insomnia=0.0, model_has_params=False, vectorize_particles=False)
    assert math.isinf(theirs.loss(model, guide, y)[1])

    ours = pplvi.WeightedELBO(ForwardKLDivergence(), Ancestral(), num_particles=400)
    value = ours.loss(model, guide, y)
    # log q(z) at z ~ LogNormal(0, 1) with q = LogNormal(0, 0.5): -E[log q] = log(0.5) + log(2 pi) / 2 + 2 + E[log z]
    exact = math.log(0.5) + 0.5 * math.log(2.0 * math.pi) + 2.0
    assert abs(value - exact) < 4.5 * 3.1 / 20.0


def test_reweighted_wake_sleep_needs_a_parameter():
    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.0, 0.8))

    theirs = ReweightedWakeSleep(num_particles=4, model_has_params=False, vectorize_particles=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        theirs.loss_and_grads(local_model, guide, Y)
    assert math.isfinite(pplvi.ForwardKL(4).loss_and_grads(local_model, guide, Y))


def test_reweighted_wake_sleep_reports_a_joint_bound():
    """Two particles: the bound of each datum, summed, is much tighter than that of all data together."""
    z = 0.8 * torch.randn(2, 100_000, 6)
    log_weight = datum_log_weight(z, Y)
    exact, joint = -logmeanexp(log_weight).sum(-1).mean(), -logmeanexp(log_weight.sum(-1)).mean()
    theirs = ReweightedWakeSleep(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    values = {}
    for name, loss in {"theirs": theirs, "ours": pplvi.ImportanceWeightedELBO(2)}.items():
        found = [loss.loss(local_model, local_guide, Y) for _ in range(400)]
        values[name] = torch.tensor([value[0] if isinstance(value, tuple) else value for value in found])
    error = {name: 4 * found.std() / 20.0 for name, found in values.items()}
    assert joint - exact > 2 * max(error.values())
    assert abs(values["theirs"].mean() - joint) < error["theirs"]
    assert abs(values["ours"].mean() - exact) < error["ours"]


# The interface of losses.


@pytest.mark.parametrize(
    "loss",
    [
        TraceGraph_ELBO(),
        RenyiELBO(alpha=0.0, num_particles=2, vectorize_particles=True),
        ReweightedWakeSleep(num_particles=2, model_has_params=False, vectorize_particles=True),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_losses_without_a_differentiable_loss(loss):
    with pytest.raises((NotImplementedError, AttributeError)):
        loss(local_model, AutoNormal(local_model))(Y)


@pytest.mark.parametrize("loss", [pplvi.ELBO(), pplvi.RenyiELBO(0.0, 2), pplvi.ForwardKL(2)], ids=str)
def test_losses_are_modules(loss):
    guide = AutoNormal(local_model)
    guide(Y)
    module = loss(local_model, guide)
    module(Y).backward()
    assert all(leaf.grad is not None for leaf in module.parameters())


def shallow_model(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.unsqueeze(-1), 1.0).expand(z.shape + y.shape).to_event(1), obs=y)


def shallow_guide(y):
    pyro.sample("z", dist.Normal(0.1, 0.9))


def deeper_model(y):
    with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y.reshape(2, 3))


def deeper_guide(y):
    with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
        pyro.sample("z", dist.Normal(0.1, 0.9))


def test_a_loss_keeps_the_plate_nesting_that_it_guessed_first():
    theirs, ours = Trace_ELBO(num_particles=2, vectorize_particles=True), pplvi.ELBO(2)
    for loss in (theirs, ours):
        loss.loss(shallow_model, shallow_guide, Y)
    with pytest.raises(ValueError, match=r"collide|dim"):
        theirs.loss(deeper_model, deeper_guide, Y)
    assert math.isfinite(ours.loss(deeper_model, deeper_guide, Y))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_jitted_loss_returns_the_first_models_number():
    def exact_guide(y):
        pyro.sample("z", dist.Delta(pyro.param("p", torch.tensor(0.3))))

    def twice(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(2.0 * z, 1.0).expand(y.shape).to_event(1), obs=y)

    right = [Trace_ELBO().loss(model, exact_guide, Y) for model in (shallow_model, twice)]
    theirs, ours = JitTrace_ELBO(ignore_jit_warnings=True), pplvi.ELBO()
    assert [theirs.loss_and_grads(m, exact_guide, Y) for m in (shallow_model, twice)] == pytest.approx([right[0]] * 2)
    assert [ours.loss_and_grads(m, exact_guide, Y) for m in (shallow_model, twice)] == pytest.approx(right)


# Weights and diagnostics.


def test_vectorized_importance_weights_cannot_normalise():
    with pytest.raises(TypeError):
        vectorized_importance_weights(
            shallow_model, shallow_guide, Y, num_samples=10, max_plate_nesting=0, normalized=True
        )
    found = draw(shallow_model, shallow_guide, (Y,), num_draws=10)
    assert float(torch.softmax(found.log_p - found.log_q, 0).sum()) == pytest.approx(1.0)


def test_importance_weights_of_effect_based_guides():
    """Pyro counts the data as part of the guide and loses the evidence."""
    y = torch.tensor([1.0, 2.0, 0.5])
    guide = AutoNormalMessenger(shallow_model)
    guide(y)
    covariance = torch.eye(3) + torch.ones(3, 3)
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(y)
    with pytest.warns(UserWarning, match=r"Found non-auxiliary vars in guide but not model"):
        theirs, _, _ = vectorized_importance_weights(shallow_model, guide, y, num_samples=20_000, max_plate_nesting=0)
    assert abs(logmeanexp(theirs.detach()) - exact) > 1.0
    guide.locs.z, guide.scales.z = y.sum() / 4.0, torch.tensor(0.7)
    found = draw(shallow_model, guide, (y,), num_draws=20_000)
    value, error = log_evidence(found.log_p - found.log_q)
    assert abs(value - exact) < 4 * error
    assert error < 0.01


def test_predictive_makes_unobserved_data_a_factor_of_an_effect_based_guide():
    def model(y=None):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + 10.0, 0.1), obs=y)

    guide = AutoNormalMessenger(model)
    guide(torch.tensor(10.0))
    theirs = Predictive(model, guide=guide, num_samples=50)()
    assert any("y" in name for name in pyro.get_param_store())  # parameters of a guide for y have appeared
    assert "y" in theirs
    pyro.clear_param_store()
    guide = AutoNormalMessenger(model)
    latents = draw(model, guide, (torch.tensor(10.0),), num_draws=50).latents
    found = predict(model, latents, (torch.tensor(10.0),), num_draws=50)
    assert torch.allclose(found.observed["y"], found.latents["z"] + 10.0, atol=0.6)
    assert not any("y" in name.split(".")[-1] for name in pyro.get_param_store())


def test_predictive_pads_its_samples_to_the_plate_nesting():
    guide = AutoNormal(deeper_and_global)
    guide(Y)
    theirs = Predictive(deeper_and_global, guide=guide, num_samples=5, parallel=True)(Y)
    assert theirs["mu"].shape == (5, 1)
    found = draw(deeper_and_global, guide, (Y,), num_draws=5)
    assert found.latents["mu"].shape == (5,)


def deeper_and_global(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


# Guides.


def test_mean_field_elbo_drops_the_jacobian_of_delta_based_guides():
    """Gamma prior, Poisson data: E_q[log p(x, z)] + H[q] on a grid, for q = LogNormal."""

    def model():
        z = pyro.sample("z", dist.Gamma(3.0, 1.0))
        pyro.sample("y", dist.Poisson(z), obs=torch.tensor(5.0))

    init = pyro.infer.autoguide.init_to_value(values={"z": torch.tensor(4.0)})
    guide = AutoNormal(model, init_loc_fn=init, init_scale=0.3)
    guide()
    u = torch.linspace(-4.0, 4.0, 20_001) * 0.5 * 0.3 * 4 + math.log(4.0)
    q = dist.Normal(math.log(4.0), 0.3)
    density = q.log_prob(u).exp() * (u[1] - u[0])
    log_p = dist.Gamma(3.0, 1.0).log_prob(u.exp()) + dist.Poisson(u.exp()).log_prob(torch.tensor(5.0))
    exact = float((density * log_p).sum() + dist.LogNormal(math.log(4.0), 0.3).entropy())
    errors = {}
    for name, loss in {
        "theirs": TraceMeanField_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=0),
        "sampled": pplvi.ELBO(4000),
        "exact": pplvi.ELBO(4000, entropy="exact"),
    }.items():
        errors[name] = abs(-loss.loss(model, guide) - exact)
    assert errors["theirs"] > 1.0
    assert errors["sampled"] < 0.1
    assert errors["exact"] < 0.1


def by_index(y, index):
    with pyro.plate("data", 6, subsample=index) as i:
        assert len(i) == len(index)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def touched(loss, *args):
    pyro.clear_param_store()
    guide = AutoNormal(by_index)
    found = gradients(loss, by_index, guide, *args)["AutoNormal.locs.z"]
    return set(found.nonzero().flatten().tolist())


def test_indices_of_the_model_are_overridden_by_autoguides():
    """The minibatch 5, 4 trains the parameters of the guide's own random draw."""
    index = torch.tensor([5, 4])
    theirs, ours = [], []
    for seed in range(8):
        for loss, found in ((Trace_ELBO(), theirs), (pplvi.ELBO(), ours)):
            pyro.set_rng_seed(seed)
            found.append(touched(loss, Y, index))
    assert any(rows != {4, 5} for rows in theirs)
    assert all(rows == {4, 5} for rows in ours)


def test_a_bare_block_hides_what_is_to_be_trained():
    """SVI trains nothing and says nothing; here the sites are missed."""
    guide = AutoNormal(local_model)
    guide(Y)
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    SVI(poutine.block(local_model), poutine.block(guide), Adam({"lr": 0.1}), Trace_ELBO()).step(Y)
    assert all(torch.equal(before[name], value) for name, value in pyro.get_param_store().items())
    for model, hidden in ((local_model, poutine.block(guide)), (poutine.block(local_model), guide)):
        with pytest.raises(ValueError, match=r"\['z'\]"):
            SVI(model, hidden, Adam({"lr": 0.1}), pplvi.ELBO()).step(Y)


def test_two_guides_of_one_class_share_their_parameters():
    """A fact of Pyro's global store, and the way around it that Pyro has."""
    first, second = AutoNormal(shallow_model), AutoNormal(shallow_model)
    first(Y)
    second(Y)
    assert first.locs.z.unconstrained() is second.locs.z.unconstrained()
    with pyro.get_param_store().scope(), pyro.settings.context(module_local_params=True):
        first, second = AutoNormal(shallow_model), AutoNormal(shallow_model)
        svi = SVI(shallow_model, first, Adam({"lr": 0.1}), pplvi.ELBO())
        first(Y), second(Y)
        before = second.locs.z.detach().clone(), first.locs.z.detach().clone()
        svi.step(Y)
        assert torch.equal(second.locs.z, before[0])
        assert not torch.equal(first.locs.z, before[1])


def test_flows_cache_by_identity_and_stl_still_freezes_them():
    """The frozen density's gradient against finite differences, with the density at its old parameters."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(x[..., 0] * x[..., 1], 1.0), obs=torch.tensor(0.7))

    guide = AutoIAFNormal(model, hidden_dim=[4])
    guide()
    with torch.no_grad():
        for leaf in guide.parameters():
            leaf.add_(0.1 * torch.randn_like(leaf))
    frozen = {name: leaf.detach().clone() for name, leaf in guide.named_parameters()}

    def path(step, leaf, position):
        """log p - log q at draws that move with the parameters, q's density held at the old ones."""
        with torch.no_grad():
            leaf.view(-1)[position] += step
            torch.manual_seed(4)
            z = guide.get_posterior().rsample([3])
            for name, value in guide.named_parameters():
                value.copy_(frozen[name])
            log_q = guide.get_posterior().log_prob(z.clone())
            log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
            log_p = log_p + dist.Normal(z[:, 0] * z[:, 1], 1.0).log_prob(torch.tensor(0.7))
        return float(-(log_p - log_q).mean())

    for _, leaf in guide.named_parameters():
        leaf.grad = None
    torch.manual_seed(4)
    pplvi.ELBO(3, estimator="stl").loss_and_grads(model, guide)
    checked = 0
    for _, leaf in guide.named_parameters():
        if leaf.grad is None:
            continue
        position = int(leaf.grad.abs().argmax())
        numeric = (path(1e-5, leaf, position) - path(-1e-5, leaf, position)) / 2e-5
        assert float(leaf.grad.view(-1)[position]) == pytest.approx(numeric, rel=1e-4, abs=1e-7)
        checked += 1
    assert checked >= 4


# Training.

Pair = namedtuple("Pair", ["loss", "error"])


class PairELBO(Trace_ELBO):
    """A loss with a name for each of its parts."""

    def loss(self, *args):
        return Pair(super().loss(*args), 0.0)

    def loss_and_grads(self, *args):
        return Pair(super().loss_and_grads(*args), 0.0)


@pytest.mark.parametrize("how", ["step", "evaluate_loss"])
def test_svi_takes_no_namedtuple(how):
    """Our losses that have parts (`terms`) still report one float."""
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        getattr(SVI(shallow_model, shallow_guide, Adam({"lr": 0.1}), PairELBO()), how)(Y)
    for loss in (pplvi.ELBO(2), pplvi.ELBO(2, "exact"), pplvi.ForwardKL(2), pplvi.ELBO() + 0.5 * pplvi.ChiELBO(2)):
        assert type(getattr(SVI(shallow_model, shallow_guide, Adam({"lr": 0.1}), loss), how)(Y)) is float


def slope_model():
    """The gradient of the loss is (-30, -40): of norm 50."""
    a, b = (pyro.param(name, torch.tensor(0.0)) for name in "ab")
    pyro.factor("slope", 30.0 * a + 40.0 * b)


def test_pyro_clips_each_parameter_by_itself():
    """A norm of 5 for all of it is the step (3, 4); Pyro's optimisers make (5, 5) and turn the gradient."""
    found = []
    for optim, loss in (
        (SGD({"lr": 1.0}, {"clip_norm": 5.0}), Trace_ELBO()),
        (Update(partial(torch.optim.SGD, lr=1.0), schedule=None, clip=5.0), pplvi.ELBO()),
        (Update(SGD({"lr": 1.0}), schedule=None, clip=5.0), Trace_ELBO()),
    ):
        pyro.clear_param_store()
        SVI(slope_model, lambda: None, optim, loss).step()
        found.append([pyro.param(name).item() for name in "ab"])
    assert found[0] == pytest.approx([5.0, 5.0])
    assert found[1] == found[2] == pytest.approx([3.0, 4.0])


def test_a_tensor_outside_the_parameter_store_is_not_trained():
    """SVI goes on for ever with nothing to train; `fit` and `Update` say that there is nothing."""
    loc = torch.tensor(0.2, requires_grad=True)

    def guide(y):
        pyro.sample("z", dist.Normal(loc, 0.9))

    svi = SVI(shallow_model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step(Y)
    assert loc.item() == 0.2
    with pytest.raises(ValueError, match="nothing to train"):
        SVI(shallow_model, guide, Update(Adam({"lr": 0.1})), pplvi.ELBO()).step(Y)
    with pytest.raises(ValueError, match="nothing to train"):
        pplvi.fit(shallow_model, guide, args=(Y,), num_steps=3, seed=0, progress=False)
    assert loc.item() == 0.2
