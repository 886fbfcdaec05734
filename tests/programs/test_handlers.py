"""Pyro's effect handlers around models and guides: the same value and gradients as the program written out by hand."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LocScaleReparam, ProjectedNormalReparam, TransformReparam
from pyro.optim import Adam

import pplvi
from pplvi.posterior.draws import draw, predict
from pplvi.programs.joint import execute
from pplvi.programs.sites import sample_sites

pytestmark = pytest.mark.usefixtures("float64")

LOSSES = [
    pplvi.ELBO(),
    pplvi.ELBO(3),
    pplvi.ELBO(3, vectorize_particles=False),
    pplvi.ELBO(3, entropy="exact"),
    pplvi.ELBO(3, estimator="stl"),
    pplvi.ELBO(3, estimator="score"),
    pplvi.ELBO(3, estimator="vimco"),
    pplvi.ImportanceWeightedELBO(3),
    pplvi.ImportanceWeightedELBO(3, estimator="dreg"),
    pplvi.ImportanceWeightedELBO(3, estimator="vimco"),
    pplvi.RenyiELBO(0.5, 3),
    pplvi.ThermodynamicELBO(3),
    pplvi.ForwardKL(3),
    pplvi.ChiELBO(3),
    pplvi.ELBO(2) + 0.5 * pplvi.ForwardKL(2),
]
every_objective = pytest.mark.parametrize("loss", LOSSES, ids=str)

Y = torch.tensor([0.3, -1.2, 0.8, 2.1], dtype=torch.float64)


def value_and_gradients(loss, model, guide, *args):
    """Of a loss at a fixed seed, gradients by parameter."""
    loss.loss(model, guide, *args)  # parameters exist, the pair is inspected
    parameters = pyro.get_param_store()._params
    for leaf in parameters.values():
        leaf.grad = None
    torch.manual_seed(7)
    value = loss.loss_and_grads(model, guide, *args)
    zeros = {name: torch.zeros_like(leaf) for name, leaf in parameters.items()}
    return value, {name: zeros[name] if leaf.grad is None else leaf.grad for name, leaf in parameters.items()}


def assert_same(loss, one, other, *args):
    """Two pairs of a model and a guide have the same value and gradients."""
    value, gradients = value_and_gradients(loss, *one, *args)
    expected, exact = value_and_gradients(loss, *other, *args)
    assert value == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert set(gradients) == set(exact)
    for name in exact:
        assert torch.allclose(gradients[name], exact[name], atol=1e-10), name
    return value, gradients


def centre(name="mu"):
    return pyro.sample(name, dist.Normal(pyro.param("prior", torch.tensor(0.4)), 1.0))


def model(y):
    """A global and a local latent."""
    mu = centre()
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.7), obs=y)


def guide_mu():
    return pyro.sample("mu", dist.Normal(pyro.param("a", torch.tensor(0.1)), 0.8))


def guide_z():
    with pyro.plate("data", 4):
        pyro.sample("z", dist.Normal(pyro.param("b", torch.linspace(-0.5, 0.5, 4)), 0.6))


def guide(y):
    guide_mu()
    guide_z()


def local_model(y, prior=None):
    """The local latents alone, given mu."""
    mu = torch.tensor(0.2)
    if prior is not None:
        prior(mu)
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.7), obs=y)


MU = {"mu": torch.tensor(0.2, dtype=torch.float64)}


@every_objective
def test_condition_makes_a_latent_an_observation(loss):
    def observed(y):
        local_model(y, lambda mu: pyro.sample("mu", dist.Normal(pyro.param("prior", torch.tensor(0.4)), 1.0), obs=mu))

    conditioned = poutine.condition(model, data=MU), lambda y: guide_z()
    _, gradients = assert_same(loss, conditioned, (observed, lambda y: guide_z()), Y)
    if not isinstance(loss, pplvi.ForwardKL):
        assert float(gradients["prior"]) != 0.0


@every_objective
def test_condition_as_a_context_around_the_loss(loss):
    expected, _ = value_and_gradients(loss, poutine.condition(model, data=MU), lambda y: guide_z(), Y)
    torch.manual_seed(7)
    with poutine.condition(data=MU):
        value = loss.loss(model, lambda y: guide_z(), Y)
    assert value == pytest.approx(expected)


@every_objective
def test_condition_on_data(loss):
    def generative(y):
        mu = centre()
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 0.7))

    assert_same(loss, (poutine.condition(generative, data={"y": Y}), guide), (model, guide), Y)


@every_objective
def test_do_cuts_the_density_of_an_intervened_site(loss):
    """Pyro keeps a fresh site of that name, which nothing uses: the guide trains on its prior alone."""

    def by_hand(y):
        centre()
        local_model(y)

    assert_same(loss, (poutine.do(model, data=MU), guide), (by_hand, guide), Y)


@every_objective
def test_block_hides_a_site_from_the_objective(loss):
    """A hidden site of the guide neither needs a partner in the model nor counts."""

    def helped(y):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        guide_mu()
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(pyro.param("b", torch.linspace(-0.5, 0.5, 4)) + 0.0 * u, 0.6))

    def quiet(y):
        torch.randn(())
        guide(y)

    assert_same(loss, (model, poutine.block(helped, hide=["u"])), (model, quiet), Y)


@every_objective
def test_block_keeps_a_latent_of_the_model_out(loss):
    def narrow(y):
        mu = centre()
        with poutine.block():
            shift = pyro.sample("shift", dist.Delta(torch.tensor(0.5)))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(mu + shift, 1.0))
            pyro.sample("y", dist.Normal(z, 0.7), obs=y)

    def by_hand(y):
        mu = centre()
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(mu + 0.5, 1.0))
            pyro.sample("y", dist.Normal(z, 0.7), obs=y)

    assert_same(loss, (narrow, guide), (by_hand, guide), Y)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.monitor is not None], ids=str)
def test_replay_fixes_the_draws_of_a_guide(loss):
    """Every particle has the same draw, so every bound is that one log weight."""
    trace = poutine.trace(guide).get_trace(Y)
    value, _ = value_and_gradients(loss, model, poutine.replay(guide, trace=trace), Y)
    mu, z = (trace.nodes[name]["value"] for name in ("mu", "z"))
    log_p = dist.Normal(0.4, 1.0).log_prob(mu) + dist.Normal(mu, 1.0).log_prob(z).sum()
    log_p = (log_p + dist.Normal(z, 0.7).log_prob(Y).sum()).detach()
    log_q = float(trace.log_prob_sum().detach())
    if "exact" in str(loss):
        log_q = -float(dist.Normal(0.0, 0.8).entropy() + 4 * dist.Normal(0.0, 0.6).entropy())
    sign = 1.0 if loss.monitor == "upper" else -1.0
    assert value == pytest.approx(sign * float(log_p - log_q))


@every_objective
def test_replay_around_a_model_gives_way_to_the_guide(loss):
    trace = poutine.trace(poutine.uncondition(model)).get_trace(Y)
    assert_same(loss, (poutine.replay(model, trace=trace), guide), (model, guide), Y)


@every_objective
def test_lift_makes_a_parameter_a_latent_site(loss):
    def lifted_by_hand(y):
        prior = pyro.sample("prior", dist.Normal(0.0, 2.0))
        mu = pyro.sample("mu", dist.Normal(prior, 1.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 0.7), obs=y)

    def guide_of_all(y):
        pyro.sample("prior", dist.Normal(pyro.param("c", torch.tensor(0.3)), 0.9))
        guide(y)

    lifted = poutine.lift(model, prior={"prior": dist.Normal(0.0, 2.0)})
    _, gradients = assert_same(loss, (lifted, guide_of_all), (lifted_by_hand, guide_of_all), Y)
    assert float(gradients["c"]) != 0.0
    assert "prior" not in gradients


@every_objective
def test_loc_scale_reparam_is_the_noncentred_model(loss):
    def noncentred(y):
        mu = centre()
        with pyro.plate("data", 4):
            z = mu + pyro.sample("z_decentered", dist.Normal(0.0, 1.0))
            pyro.deterministic("z", z)
            pyro.sample("y", dist.Normal(z, 0.7), obs=y)

    def decentred_guide(y):
        guide_mu()
        with pyro.plate("data", 4):
            pyro.sample("z_decentered", dist.Normal(pyro.param("b", torch.linspace(-0.5, 0.5, 4)), 0.6))

    reparameterised = poutine.reparam(model, config={"z": LocScaleReparam(centered=0.0)})
    assert_same(loss, (reparameterised, decentred_guide), (noncentred, decentred_guide), Y)


def test_a_learned_centring_is_trained():
    reparameterised = poutine.reparam(model, config={"z": LocScaleReparam()})
    automatic = AutoNormal(reparameterised)
    loss = pplvi.ImportanceWeightedELBO(3)
    svi = SVI(reparameterised, automatic, Adam({"lr": 0.1}), loss)
    for _ in range(3):
        svi.step(Y)
    centred = [value for name, value in pyro.get_param_store().items() if "centered" in name and "locs" not in name]
    assert any(bool((value != value.new_tensor(0.5)).all()) for value in centred)


@every_objective
def test_transform_reparam_keeps_the_density(loss):
    def positive(y):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.LogNormal(0.2, 0.8))
            pyro.sample("y", dist.Normal(z, 0.7), obs=y)

    def by_hand(y):
        with pyro.plate("data", 4):
            z = pyro.sample("z_base", dist.Normal(0.2, 0.8)).exp()
            pyro.sample("y", dist.Normal(z, 0.7), obs=y)

    def base_guide(y):
        with pyro.plate("data", 4):
            pyro.sample("z_base", dist.Normal(pyro.param("b", torch.linspace(-0.5, 0.5, 4)), 0.6))

    reparameterised = poutine.reparam(positive, config={"z": TransformReparam()})
    assert_same(loss, (reparameterised, base_guide), (by_hand, base_guide), Y)


def test_a_reparameterised_posterior_has_its_own_sites_as_deterministic_ones():
    def directions(y):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.ProjectedNormal(torch.zeros(2)))
            pyro.sample("y", dist.Normal(z[..., 0], 0.7), obs=y)

    reparameterised = poutine.reparam(directions, config={"z": ProjectedNormalReparam()})
    automatic = AutoNormal(reparameterised)
    found = draw(reparameterised, automatic, (Y,), num_draws=5)
    assert set(found.latents) == {"z_normal"}
    assert found.deterministics["z"].shape == (5, 4, 2)
    assert torch.allclose(found.deterministics["z"].norm(dim=-1), torch.ones(5, 4))
    assert found.log_p.shape == (5, 4)
    assert set(found.observed) == set(found.log_likelihood) == {"y"}
    again = predict(reparameterised, found.latents, (Y,), num_draws=5)
    assert torch.equal(again.deterministics["z"], found.deterministics["z"])
    assert set(again.observed) == {"y"}


SEEN = torch.tensor([True, False, True, True])


@every_objective
def test_mask_leaves_entries_out(loss):
    def by_hand(y):
        mu = centre()
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(mu, 1.0).mask(SEEN))
            pyro.sample("y", dist.Normal(z, 0.7).mask(SEEN), obs=y)

    def handled(y):
        mu = centre()
        with pyro.plate("data", 4), poutine.mask(mask=SEEN):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 0.7), obs=y)

    def masked_guide(y):
        guide_mu()
        with poutine.mask(mask=SEEN):
            guide_z()

    _, gradients = assert_same(loss, (handled, masked_guide), (by_hand, masked_guide), Y)
    assert float(gradients["b"][1]) == 0.0
    assert float(gradients["b"][0]) != 0.0


@every_objective
def test_mask_false_around_model_and_guide_leaves_nothing(loss):
    value, gradients = value_and_gradients(loss, poutine.mask(model, mask=False), poutine.mask(guide, mask=False), Y)
    assert value == pytest.approx(0.0, abs=1e-12)
    assert all(float(gradient.abs().sum()) == 0.0 for gradient in gradients.values())


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if "exact" not in str(loss)], ids=str)
def test_scale_is_part_of_the_density(loss):
    """A tempered model and guide: a power of both, which is a power of the weight."""
    run = execute(poutine.scale(model, scale=0.5), poutine.scale(guide, scale=0.25), (Y,), {}, num_particles=3)
    mu, z = run.guide.nodes["mu"]["value"].reshape(3), run.guide.nodes["z"]["value"]
    log_p = dist.Normal(0.4, 1.0).log_prob(mu) + dist.Normal(mu[:, None], 1.0).log_prob(z).sum(-1)
    log_p = log_p + dist.Normal(z, 0.7).log_prob(Y).sum(-1)
    log_q = dist.Normal(0.1, 0.8).log_prob(mu) + dist.Normal(torch.linspace(-0.5, 0.5, 4), 0.6).log_prob(z).sum(-1)
    assert torch.allclose(run.log_target(), 0.5 * log_p)
    assert torch.allclose(run.log_forward(), 0.25 * log_q)

    def by_hand(y):
        with poutine.scale(scale=0.5):
            model(y)

    def guide_by_hand(y):
        with poutine.scale(scale=0.25):
            guide(y)

    handled = poutine.scale(model, scale=0.5), poutine.scale(guide, scale=0.25)
    assert_same(loss, handled, (by_hand, guide_by_hand), Y)


def test_scale_as_a_context_around_the_loss():
    torch.manual_seed(7)
    expected = pplvi.ELBO().loss(model, guide, Y)
    torch.manual_seed(7)
    with poutine.scale(scale=0.1):
        assert pplvi.ELBO().loss(model, guide, Y) == pytest.approx(0.1 * expected)


@every_objective
def test_seed_makes_a_program_reproducible(loss):
    seeded = poutine.seed(guide, rng_seed=3)
    loss.loss(model, seeded, Y)
    values = set()
    for state in (1, 2):
        torch.manual_seed(state)
        values.add(round(loss.loss(model, seeded, Y), 10))
    assert len(values) == 1
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    loss.loss(model, seeded, Y)
    assert torch.equal(torch.rand(1), expected)  # the global state is as it was


def test_infer_config_and_uncondition():
    def drop(site):
        return {"note": site["name"]}

    run = execute(poutine.infer_config(model, config_fn=drop), guide, (Y,), {}, num_particles=2)
    assert {site["infer"].get("note") for _, site in sample_sites(run.model)} >= {"y"}
    found = predict(poutine.condition(model, data=MU), None, (Y,), num_draws=3)
    assert "mu" in found.observed  # predictions draw conditioned sites as well


@pytest.mark.parametrize(
    "handled",
    [
        (poutine.condition(model, data=MU), lambda y: guide_z()),
        (poutine.do(model, data=MU), guide),
        (poutine.scale(model, scale=0.3), guide),
        (poutine.mask(model, mask=torch.tensor(True)), guide),
        (model, poutine.seed(guide, rng_seed=1)),
        (poutine.block(model, hide_types=["param"]), guide),
    ],
    ids=["condition", "do", "scale", "mask", "seed", "block"],
)
def test_one_particle_is_trace_elbo_under_handlers(handled):
    expected, exact = value_and_gradients(Trace_ELBO(), *handled, Y)
    value, gradients = value_and_gradients(pplvi.ELBO(), *handled, Y)
    assert value == pytest.approx(expected, rel=1e-12)
    for name in exact:
        assert torch.allclose(gradients[name], exact[name], atol=1e-12)
