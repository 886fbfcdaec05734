"""Enumeration: sums over discrete sites against brute force and against Pyro's TraceEnum_ELBO."""

from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuideList, AutoNormal

import pplvi
from pplvi.posterior.draws import draw
from pplvi.programs import enumeration
from pplvi.programs.joint import execute

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([0.3, -1.2, 0.8, 2.1, -0.4], dtype=torch.float64)
PROBS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
LOCS = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
PARALLEL = {"enumerate": "parallel"}


def no_guide(*args):
    """A guide without sites."""


def mixture(y):
    """The component of each datum is summed out; the rest is a parameter."""
    locs = pyro.param("locs", LOCS.clone())
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(PROBS), infer=PARALLEL)
        pyro.sample("y", dist.Normal(locs[z], 0.7), obs=y)


def mixture_density(y, locs=LOCS, probs=PROBS, scale=0.7):
    """log p(y) of each datum, by brute force."""
    return torch.logsumexp(probs.log() + dist.Normal(locs, scale).log_prob(y.unsqueeze(-1)), -1)


def test_a_mixture_is_summed_out_datum_by_datum():
    run = execute(mixture, no_guide, (Y,), {}, num_particles=3)
    assert run.log_target().shape == (3, 5)
    assert torch.allclose(run.log_target(), mixture_density(Y).expand(3, 5))
    assert torch.equal(run.log_forward(), torch.zeros(3, 5))


@pytest.mark.parametrize("loss", [pplvi.ELBO(), pplvi.ImportanceWeightedELBO(2), pplvi.ChiELBO(2)], ids=str)
def test_gradients_pass_through_the_sum(loss):
    sign = -1.0 if loss.monitor == "upper" else 1.0
    assert sign * loss.loss_and_grads(mixture, no_guide, Y) == pytest.approx(-float(mixture_density(Y).sum()))
    locs = LOCS.clone().requires_grad_()
    (exact,) = torch.autograd.grad(-mixture_density(Y, locs).sum(), locs)
    assert torch.allclose(sign * pyro.get_param_store()._params["locs"].grad, exact)


@pytest.mark.parametrize("subsample", [None, 2])
def test_weights_stay_per_datum_beside_continuous_local_latents(subsample):
    """Enumerated and continuous sites in one subsampled plate."""

    @config_enumerate
    def model(y):
        with pyro.plate("data", 5, subsample_size=subsample) as i:
            z = pyro.sample("z", dist.Categorical(PROBS))
            x = pyro.sample("x", dist.Normal(LOCS[z], 1.0))
            pyro.sample("y", dist.Normal(x, 0.7), obs=y[i])

    def guide(y):
        with pyro.plate("data", 5, subsample_size=subsample):
            pyro.sample("x", dist.Normal(0.1, 1.5))

    run = execute(model, guide, (Y,), {}, num_particles=4)
    x, index = run.guide.nodes["x"]["value"], run.guide.nodes["data"]["value"]
    expected = mixture_density(x, scale=1.0) + dist.Normal(x, 0.7).log_prob(Y[index])
    assert torch.allclose(run.log_target(), expected)
    assert torch.allclose(run.log_forward(), dist.Normal(0.1, 1.5).log_prob(x))
    assert run.scale == (1.0 if subsample is None else 2.5)


def global_mixture(y, subsample=None):
    """Global latents over a data plate with enumerated components."""
    locs = pyro.sample("locs", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    with pyro.plate("data", 5, subsample_size=subsample) as i:
        z = pyro.sample("z", dist.Categorical(PROBS), infer=PARALLEL)
        loc = (locs * torch.nn.functional.one_hot(z, 3)).sum(-1)  # keeps the particles' own locations apart
        pyro.sample("y", dist.Normal(loc, 0.7), obs=y[i])


def point_guide(y, subsample=None):
    pyro.sample("locs", dist.Delta(pyro.param("where", LOCS.clone()), event_dim=1))


@pytest.mark.parametrize("subsample", [None, 2])
def test_global_latents_get_the_scaled_sum(subsample):
    run = execute(global_mixture, point_guide, (Y, subsample), {}, num_particles=4)
    prior = dist.Normal(0.0, 2.0).log_prob(LOCS).sum()
    index = run.model.nodes["data"]["value"]
    data = mixture_density(Y[index]).sum() * (1.0 if subsample is None else 2.5)
    assert run.batch == ()
    assert torch.allclose(run.log_target(), (prior + data).expand(4))


@pytest.mark.parametrize("num_particles", [1, 3])
def test_the_elbo_is_that_of_trace_enum_elbo_with_the_same_seed(num_particles):
    guide = AutoNormal(poutine.block(global_mixture, hide=["z"]))
    theirs = TraceEnum_ELBO(num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1)
    values, gradients = [], []
    for loss in (theirs, pplvi.ELBO(num_particles)):
        guide(Y)
        torch.manual_seed(3)
        values.append(loss.loss_and_grads(global_mixture, guide, Y))
        parameters = pyro.get_param_store()._params
        gradients.append(torch.cat([parameters[name].grad.flatten() for name in sorted(parameters)]))
        pyro.infer.util.zero_grads(parameters.values())
    assert values[1] == pytest.approx(values[0], rel=1e-10)
    assert torch.allclose(gradients[1], gradients[0], atol=1e-10)


TRANSITION = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
EMISSION = torch.tensor([-1.0, 1.0], dtype=torch.float64)


def hmm(y):
    """A hidden Markov chain for each row of y, in a plate of sequences."""
    with pyro.plate("sequences", len(y), dim=-1):
        state = torch.tensor(0)
        for t in pyro.markov(range(y.shape[1])):
            state = pyro.sample(f"state_{t}", dist.Categorical(TRANSITION[state]), infer=PARALLEL)
            pyro.sample(f"y_{t}", dist.Normal(EMISSION[state], 1.0), obs=y[:, t])


def chain_density(row):
    """log p of one sequence, summed over every path of states."""
    paths = []
    for path in product([0, 1], repeat=len(row)):
        previous, total = 0, torch.zeros(())
        for state, value in zip(path, row, strict=True):
            total = total + TRANSITION[previous, state].log() + dist.Normal(EMISSION[state], 1.0).log_prob(value)
            previous = state
        paths.append(total)
    return torch.logsumexp(torch.stack(paths), 0)


def test_a_hidden_markov_model_is_summed_out_sequence_by_sequence():
    y = torch.randn(3, 4)
    run = execute(hmm, no_guide, (y,), {}, num_particles=2)
    exact = torch.stack([chain_density(row) for row in y])
    assert torch.allclose(run.log_target(), exact.expand(2, 3))
    assert pplvi.ELBO().loss(hmm, no_guide, y) == pytest.approx(
        TraceEnum_ELBO(max_plate_nesting=1).loss(hmm, no_guide, y)
    )


SEEN = torch.tensor([True, False, True, True, False])


@pytest.mark.parametrize("everything", [True, False], ids=["latent too", "data only"])
def test_masked_data_leave_a_sum_of_one(everything):
    def model(y):
        with pyro.plate("data", 5), poutine.mask(mask=SEEN if everything else torch.tensor(True)):
            z = pyro.sample("z", dist.Categorical(PROBS), infer=PARALLEL)
            pyro.sample("y", dist.Normal(LOCS[z], 0.7).mask(torch.tensor(True) if everything else SEEN), obs=y)

    run = execute(model, no_guide, (Y,), {}, num_particles=1)
    expected = torch.where(SEEN, mixture_density(Y), 0.0)
    assert torch.allclose(run.log_target()[0], expected)
    assert pplvi.ELBO().loss(model, no_guide, Y) == pytest.approx(-float(expected.sum()))
    assert TraceEnum_ELBO(max_plate_nesting=1).loss(model, no_guide, Y) == pytest.approx(-float(expected.sum()))


def test_poutine_scale_around_all_is_applied_outside_the_sum():
    run = execute(poutine.scale(mixture, 0.3), no_guide, (Y,), {})
    assert torch.allclose(run.log_target()[0], 0.3 * mixture_density(Y))


def test_different_scales_on_one_enumerated_variable_are_refused():
    def model(y):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Categorical(PROBS), infer=PARALLEL)
            with poutine.scale(scale=0.5):
                pyro.sample("y", dist.Normal(LOCS[z], 0.7), obs=y)

    with pytest.raises(ValueError, match=r"share an enumerated variable.*expected one common.*drop poutine.scale"):
        pplvi.ELBO().loss(model, no_guide, Y)


# Enumeration in the guide: exact expectations.


def coins(y):
    """A Bernoulli for each datum."""
    with pyro.plate("data", 5):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(2.0 * z, 0.7), obs=y)


@config_enumerate
def coins_guide(y):
    probs = pyro.param("probs", torch.linspace(0.2, 0.8, 5), constraint=dist.constraints.unit_interval)
    with pyro.plate("data", 5):
        pyro.sample("z", dist.Bernoulli(probs))


def exact_coins(probs):
    """The ELBO of each datum."""
    q = torch.stack([1.0 - probs, probs], -1)
    prior = torch.tensor([0.7, 0.3]).log()
    return (q * (prior + dist.Normal(torch.tensor([0.0, 2.0]), 0.7).log_prob(Y[:, None]) - q.log())).sum(-1)


def test_guide_side_enumeration_is_the_exact_elbo_and_gradient():
    probs = torch.linspace(0.2, 0.8, 5).requires_grad_()
    exact = exact_coins(probs)
    run = execute(coins, coins_guide, (Y,), {})
    assert torch.allclose(run.log_target() - run.log_forward(), exact.expand(1, 5))
    assert run.guide_enumerated

    assert pplvi.ELBO().loss_and_grads(coins, coins_guide, Y) == pytest.approx(-float(exact.detach().sum()))
    leaf = pyro.get_param_store()._params["probs"]
    (gradient,) = torch.autograd.grad(-exact.sum(), probs)
    ours, leaf.grad = leaf.grad.clone(), None
    assert torch.allclose(ours, gradient * (probs * (1.0 - probs)).detach())
    TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(coins, coins_guide, Y)
    assert torch.allclose(ours, leaf.grad)


def gradients_of(loss, model, guide, *args):
    """Value, and all gradients in one vector."""
    parameters = pyro.get_param_store()._params
    pyro.infer.util.zero_grads(parameters.values())
    value = loss.loss_and_grads(model, guide, *args)
    return value, torch.cat([parameters[name].grad.flatten() for name in sorted(parameters)])


def assert_like_trace_enum(model, guide, *args, nesting=1, num_particles=1):
    guide(*args)
    pplvi.ELBO().loss(model, guide, *args)  # every parameter exists
    torch.manual_seed(2)
    value, gradient = gradients_of(pplvi.ELBO(num_particles), model, guide, *args)
    torch.manual_seed(2)
    theirs = TraceEnum_ELBO(num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=nesting)
    expected, exact = gradients_of(theirs, model, guide, *args)
    assert value == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(gradient, exact, atol=1e-9)
    return value


def test_two_enumerated_sites_of_the_guide_that_depend_on_each_other():
    def model(y):
        a = pyro.sample("a", dist.Bernoulli(0.4))
        b = pyro.sample("b", dist.Bernoulli(0.3 + 0.4 * a))
        pyro.sample("y", dist.Normal(a + 2.0 * b, 1.0), obs=y)

    @config_enumerate
    def guide(y):
        a = pyro.sample("a", dist.Bernoulli(pyro.param("qa", torch.tensor(0.6))))
        pyro.sample("b", dist.Bernoulli(pyro.param("qb", torch.tensor(0.5)) * (0.5 + 0.5 * a)))

    y = torch.tensor(1.3)
    value = assert_like_trace_enum(model, guide, y, nesting=0)
    total = 0.0
    for a, b in product([0.0, 1.0], repeat=2):
        qb = 0.5 * (0.5 + 0.5 * a)
        log_q = dist.Bernoulli(0.6).log_prob(torch.tensor(a)) + dist.Bernoulli(qb).log_prob(torch.tensor(b))
        log_p = dist.Bernoulli(0.4).log_prob(torch.tensor(a)) + dist.Bernoulli(0.3 + 0.4 * a).log_prob(torch.tensor(b))
        total += float(log_q.exp() * (log_p + dist.Normal(a + 2.0 * b, 1.0).log_prob(y) - log_q))
    assert -value == pytest.approx(total)


@pytest.mark.parametrize("subsample", [None, 3])
def test_enumeration_in_both_guide_and_model(subsample):
    """The group is enumerated in the guide, the component of each datum in the model."""

    def model(y):
        group = pyro.sample("group", dist.Bernoulli(0.4))
        with pyro.plate("data", 5, subsample_size=subsample) as i:
            z = pyro.sample("z", dist.Bernoulli(0.2 + 0.5 * group), infer=PARALLEL)
            pyro.sample("y", dist.Normal(pyro.param("gap", torch.tensor(2.0)) * z + group, 0.7), obs=y[i])

    @config_enumerate
    def guide(y):
        pyro.sample("group", dist.Bernoulli(pyro.param("q", torch.tensor(0.7))))
        pyro.plate("data", 5, subsample_size=subsample)

    value = assert_like_trace_enum(model, guide, Y)
    if subsample is None:
        bounds = []
        for g, q in ((0.0, 0.3), (1.0, 0.7)):
            probs = torch.tensor([0.8 - 0.5 * g, 0.2 + 0.5 * g])
            data = mixture_density(Y, torch.tensor([g, 2.0 + g]), probs).sum()
            prior = dist.Bernoulli(0.4).log_prob(torch.tensor(g))
            bounds.append(q * (prior + data - torch.tensor(q).log()))
        assert -value == pytest.approx(float(sum(bounds)))


def test_guide_enumeration_beside_reparameterised_particles():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(x + 2.0 * z, 0.7), obs=y)

    def guide(y):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 0.8))
        with pyro.plate("data", 5):
            probs = pyro.param("probs", torch.linspace(0.2, 0.8, 5), constraint=dist.constraints.unit_interval)
            pyro.sample("z", dist.Bernoulli(probs), infer=PARALLEL)

    assert_like_trace_enum(model, guide, Y)
    assert_like_trace_enum(model, guide, Y, num_particles=3)


def test_the_discrete_autoguide_beside_a_continuous_one():
    def model(y):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=y)

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["z"])))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["z"])))
    assert_like_trace_enum(model, guide, Y)
    assert_like_trace_enum(model, guide, Y, num_particles=3)


def test_a_group_variable_is_summed_over_all_its_members():
    """One component for each group of observations: weights per group."""
    groups = torch.randn(3, 4)

    def model(y):
        with pyro.plate("groups", 3, dim=-2):
            z = pyro.sample("z", dist.Categorical(PROBS), infer=PARALLEL)
            with pyro.plate("units", 4, dim=-1):
                pyro.sample("y", dist.Normal(LOCS[z], 0.7), obs=y)

    densities = dist.Normal(LOCS, 0.7).log_prob(groups.unsqueeze(-1)).sum(1)
    run = execute(model, no_guide, (groups,), {}, num_particles=2)
    assert run.shape == (2, 3)
    assert torch.allclose(run.log_target(), torch.logsumexp(PROBS.log() + densities, -1).expand(2, 3))


@pytest.mark.parametrize("inner", [None, 2])
def test_a_group_variable_over_a_subsample_of_its_members_is_refused(inner):
    def model(y):
        with pyro.plate("groups", 3, dim=-2):
            z = pyro.sample("z", dist.Categorical(PROBS), infer=PARALLEL)
            with pyro.plate("units", 4, subsample_size=inner, dim=-1) as i:
                pyro.sample("y", dist.Normal(LOCS[z], 0.7), obs=y[:, i])

    if inner is None:
        assert pplvi.ELBO().loss(model, no_guide, torch.randn(3, 4)) > 0
        return
    with pytest.raises(ValueError, match=r"share an enumerated variable have the scales"):
        pplvi.ELBO().loss(model, no_guide, torch.randn(3, 4))


@pytest.mark.parametrize(
    "loss", [pplvi.ImportanceWeightedELBO(2), pplvi.RenyiELBO(0.5, 2), pplvi.ForwardKL(2), pplvi.ChiELBO(2)], ids=str
)
def test_nonlinear_objectives_refuse_enumeration_in_the_guide(loss):
    with pytest.raises(ValueError, match=r"not linear.*the guide enumerates sites.*Use ELBO, draw these sites"):
        loss.loss(coins, coins_guide, Y)


def test_sequential_enumeration_is_refused():
    @config_enumerate(default="sequential")
    def guide(y):
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match=r"'z' asks for sequential enumeration: expected .*parallel"):
        pplvi.ELBO().loss(coins, guide, Y)


# The log likelihood of single observations.


def plain_draws(model, guide, *args, num_draws=4):
    return draw(model, guide, args, num_draws=num_draws)


def test_log_likelihood_of_a_mixture_is_marginal():
    found = plain_draws(mixture, no_guide, Y)
    assert torch.allclose(found.log_likelihood["y"], mixture_density(Y).expand(4, 5))


def test_log_likelihood_of_a_mixture_with_drawn_locations():
    guide = AutoNormal(poutine.block(global_mixture, hide=["z"]))
    found = plain_draws(global_mixture, guide, Y)
    expected = torch.stack([mixture_density(Y, locs) for locs in found.latents["locs"]])
    assert torch.allclose(found.log_likelihood["y"], expected)
    assert torch.allclose(found.log_p, dist.Normal(0.0, 2.0).log_prob(found.latents["locs"]).sum(-1) + expected.sum(-1))


def test_log_likelihood_of_a_chain_is_conditional_on_the_rest():
    """log p(y_t | y_-t) = log p(y) - log p(y_-t), by brute force over the paths."""
    y = torch.randn(2, 3)
    run = execute(hmm, no_guide, (y,), {})
    for t in range(3):
        found = enumeration.log_likelihood(run.model, run.guide, f"y_{t}")
        expected = torch.stack([chain_density(row) - without(row, t) for row in y])
        assert torch.allclose(found.reshape(-1), expected)


def without(row, t):
    """log p of a sequence with entry t left out."""
    paths = []
    for path in product([0, 1], repeat=len(row)):
        previous, total = 0, torch.zeros(())
        for s, (state, value) in enumerate(zip(path, row, strict=True)):
            total = total + TRANSITION[previous, state].log()
            total = total + (dist.Normal(EMISSION[state], 1.0).log_prob(value) if s != t else 0.0)
            previous = state
        paths.append(total)
    return torch.logsumexp(torch.stack(paths), 0)


def test_observations_that_share_an_enumerated_variable_have_no_terms_of_their_own():
    def model(y):
        z = pyro.sample("z", dist.Bernoulli(0.3), infer=PARALLEL)
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    run = execute(model, no_guide, (Y,), {})
    assert enumeration.log_likelihood(run.model, run.guide, "y") is None
    with pytest.warns(UserWarning, match=r"'y' has no log likelihood per element"):
        assert plain_draws(model, no_guide, Y, num_draws=1).log_likelihood == {}
    densities = dist.Normal(torch.tensor([[0.0], [1.0]]), 1.0).log_prob(Y).sum(-1)
    exact = torch.logsumexp(torch.tensor([0.7, 0.3]).log() + densities, 0)
    assert torch.allclose(run.log_target()[0], exact)


def test_observations_beside_the_enumerated_variable_keep_their_plain_density():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Categorical(PROBS), infer=PARALLEL)
            pyro.sample("y", dist.Normal(LOCS[z], 0.7), obs=y)
        with pyro.plate("others", 5):
            pyro.sample("w", dist.Normal(x, 1.0), obs=y)

    def guide(y):
        pyro.sample("x", dist.Normal(0.1, 0.9))

    found = plain_draws(model, guide, Y)
    assert torch.allclose(found.log_likelihood["y"], mixture_density(Y).expand(4, 5))
    assert torch.allclose(found.log_likelihood["w"], dist.Normal(found.latents["x"][:, None], 1.0).log_prob(Y))


def test_two_unconnected_enumerated_plates():
    """Each site's log likelihood sums the variables that it depends on, whatever is enumerated elsewhere."""

    def model(y):
        for name in ("a", "b"):
            with pyro.plate(name, 5):
                z = pyro.sample(f"z_{name}", dist.Categorical(PROBS), infer=PARALLEL)
                pyro.sample(f"y_{name}", dist.Normal(LOCS[z], 0.7), obs=y)

    found = plain_draws(model, no_guide, Y)
    assert all(torch.allclose(found.log_likelihood[f"y_{n}"], mixture_density(Y).expand(4, 5)) for n in "ab")
    assert torch.allclose(found.log_p, 2.0 * mixture_density(Y).sum().expand(4))


def test_two_observations_of_one_component_are_conditional_on_each_other():
    def model(x, y):
        with pyro.plate("data", 5, dim=-1):
            z = pyro.sample("z", dist.Categorical(PROBS), infer=PARALLEL)
            pyro.sample("x", dist.Normal(LOCS[z], 1.0), obs=x)
            with pyro.plate("repeats", 2, dim=-2):
                pyro.sample("y", dist.Normal(LOCS[z], 0.7), obs=y)

    x, y = torch.randn(5), torch.randn(2, 5)
    log_x = dist.Normal(LOCS, 1.0).log_prob(x[:, None])
    log_y = dist.Normal(LOCS, 0.7).log_prob(y[..., None]).sum(0)
    joint = torch.logsumexp(PROBS.log() + log_x + log_y, -1)
    run = execute(model, no_guide, (x, y), {})
    assert torch.allclose(run.log_target()[0], joint)
    found = enumeration.log_likelihood(run.model, run.guide, "x")
    assert torch.allclose(found.reshape(-1), joint - torch.logsumexp(PROBS.log() + log_y, -1))
    assert enumeration.log_likelihood(run.model, run.guide, "y") is None  # the two repeats share one component


def test_missing_entries_of_an_enumerated_model():
    """NaN under a mask, in values and in gradients."""
    y = torch.where(SEEN, Y, torch.nan)

    def model(y):
        locs = pyro.param("locs", LOCS.clone())
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Categorical(PROBS), infer=PARALLEL)
            with poutine.mask(mask=SEEN):
                pyro.sample("y", dist.Normal(locs[z], 0.7), obs=y)

    exact = torch.where(SEEN, mixture_density(Y), 0.0)
    assert pplvi.ELBO().loss_and_grads(model, no_guide, y) == pytest.approx(-float(exact.sum()))
    assert pyro.get_param_store()._params["locs"].grad.isfinite().all()
    found = plain_draws(model, no_guide, y)
    assert torch.allclose(found.log_likelihood["y"], exact.expand(4, 5))
    assert torch.equal(found.observed["y"].isnan(), ~SEEN)


@pytest.mark.parametrize("num_draws", [1, 3, 4])
def test_deterministic_sites_of_an_enumerated_variable_have_no_draws(num_draws):
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.deterministic("double", 2.0 * x)
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Categorical(PROBS), infer=PARALLEL)
            mean = pyro.deterministic("mean", LOCS[z] + x)
            pyro.sample("y", dist.Normal(mean, 0.7), obs=y)

    def guide(y):
        pyro.sample("x", dist.Normal(0.1, 0.9))

    with pytest.warns(UserWarning, match=r"deterministic site 'mean' depends on an enumerated site"):
        found = plain_draws(model, guide, Y, num_draws=num_draws)
    assert set(found.deterministics) == {"double"}
    expected = torch.stack([mixture_density(Y, LOCS + x) for x in found.latents["x"]])
    assert torch.allclose(found.log_likelihood["y"], expected)
    assert set(found.latents) == {"x"}


def test_unconnected_enumerated_plates_may_have_scales_of_their_own():
    def model(x, y):
        for name, data, size in (("a", x, 2), ("b", y, None)):
            with pyro.plate(name, 5, subsample_size=size) as i:
                z = pyro.sample(f"z_{name}", dist.Categorical(PROBS), infer=PARALLEL)
                pyro.sample(f"y_{name}", dist.Normal(LOCS[z], 0.7), obs=data[i])

    x = torch.full((5,), 0.4)  # every subsample is the same
    exact = mixture_density(x).sum() + mixture_density(Y).sum()
    assert pplvi.ELBO().loss(model, no_guide, x, Y) == pytest.approx(-float(exact))
