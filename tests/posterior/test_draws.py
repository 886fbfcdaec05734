"""Draws as plain tensors: shapes without padding, deterministic sites, likelihoods, predictions, given latents."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, AutoNormalMessenger

from pplvi.posterior.draws import draw, predict, score
from pplvi.posterior.stacking import stack
from pplvi.programs.sites import Plate

pytestmark = pytest.mark.usefixtures("float64")

S = 5
Y = torch.linspace(-2.0, 2.0, 12, dtype=torch.float64).reshape(3, 4)


def model(y, x=None):
    """Three levels, an event of two dimensions, deterministic sites at every level, a scalar observation."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    matrix = pyro.sample("matrix", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    pyro.deterministic("double", 2.0 * mu)
    pyro.deterministic("constant", torch.tensor([1.0, 2.0, 3.0]))
    pyro.deterministic("trace", (weights.unsqueeze(-1) * matrix), event_dim=2)
    with pyro.plate("groups", 3, dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.deterministic("half", 0.5 * theta)
        pyro.deterministic("pair", torch.stack([theta, -theta], -1), event_dim=1)
        with pyro.plate("units", 4, dim=-1):
            mean = pyro.deterministic("mean", theta + 0.1)
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)
    with pyro.plate("units_alone", 4, dim=-1):
        pyro.sample("e", dist.Normal(mu, 1.0))
    pyro.sample("total", dist.Normal(mu, 1.0), obs=torch.tensor(0.4))


LATENTS = {"mu": (), "weights": (2,), "matrix": (2, 3), "theta": (3,), "e": (4,)}
DETERMINISTICS = {"double": (), "constant": (3,), "trace": (2, 3), "half": (3,), "pair": (3, 2), "mean": (3, 4)}
OBSERVED = {"y": (3, 4), "total": ()}


def shapes(values):
    return {name: tuple(value.shape) for name, value in values.items()}


def with_draws(expected, size=S):
    return {name: (size, *shape) for name, shape in expected.items()}


@pytest.fixture(params=[AutoNormal, AutoMultivariateNormal, AutoDelta, AutoNormalMessenger], ids=lambda k: k.__name__)
def guide(request):
    return request.param(model)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("size", [1, S])
def test_shapes_have_draws_plates_and_events_and_no_padding(guide, size, vectorize):
    found = draw(model, guide, (Y,), num_draws=size, vectorize=vectorize)
    assert shapes(found.latents) == with_draws(LATENTS, size)
    assert shapes(found.deterministics) == with_draws(DETERMINISTICS, size)
    assert shapes(found.observed) == OBSERVED
    assert shapes(found.log_likelihood) == with_draws(OBSERVED, size)
    assert found.log_p.shape == found.log_q.shape == (size,)
    assert found.num_draws == size
    values = [*found.latents.values(), *found.deterministics.values(), found.log_p, found.log_q]
    assert not any(value.requires_grad for value in values)


def test_as_many_draws_as_a_plate_has_elements_are_not_mixed_up():
    for size in (2, 3, 4):
        found = draw(model, AutoNormal(model), (Y,), num_draws=size)
        assert shapes(found.latents) == with_draws(LATENTS, size)
        assert shapes(found.deterministics) == with_draws(DETERMINISTICS, size)
        assert torch.equal(found.deterministics["constant"], torch.tensor([1.0, 2.0, 3.0]).expand(size, 3))


def log_joint(latents):
    """The model's log density and its likelihoods by hand."""
    lp = dist.Normal(0.0, 1.0).log_prob(latents["mu"])
    lp = lp + dist.Dirichlet(torch.ones(2)).log_prob(latents["weights"])
    lp = lp + dist.Normal(0.0, 1.0).log_prob(latents["matrix"]).sum((-1, -2))
    lp = lp + dist.Normal(latents["mu"][:, None], 1.0).log_prob(latents["theta"]).sum(-1)
    lp = lp + dist.Normal(latents["mu"][:, None], 1.0).log_prob(latents["e"]).sum(-1)
    y = dist.Normal(latents["theta"][..., None] + 0.1, 0.5).log_prob(Y)
    total = dist.Normal(latents["mu"], 1.0).log_prob(torch.tensor(0.4))
    return lp + y.sum((-1, -2)) + total, {"y": y, "total": total}


def test_densities_and_values_belong_together(guide):
    found = draw(model, guide, (Y,), num_draws=S)
    log_p, likelihood = log_joint(found.latents)
    assert torch.allclose(found.log_p, log_p)
    for name, expected in likelihood.items():
        assert torch.allclose(found.log_likelihood[name], expected)
    assert torch.allclose(found.deterministics["double"], 2.0 * found.latents["mu"])
    assert torch.allclose(found.deterministics["half"], 0.5 * found.latents["theta"])
    assert torch.allclose(found.deterministics["pair"][..., 1], -found.latents["theta"])
    assert torch.allclose(found.deterministics["mean"], (found.latents["theta"] + 0.1)[..., None].expand(S, 3, 4))
    assert torch.equal(found.observed["y"], Y)


def test_the_guides_density_is_that_of_its_draws():
    def own(y):
        pyro.sample("mu", dist.Normal(0.3, 0.5))

    def small(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    found = draw(small, own, (torch.tensor(0.2),), num_draws=S)
    assert torch.allclose(found.log_q, dist.Normal(0.3, 0.5).log_prob(found.latents["mu"]))
    assert found.random
    assert not draw(small, AutoDelta(small), (torch.tensor(0.2),), num_draws=S).random


def test_plates_of_every_site_are_listed_left_to_right():
    found = draw(model, AutoNormal(model), (Y,), num_draws=2)
    groups, units = Plate("groups", -2, 3, 3), Plate("units", -1, 4, 4)
    assert found.plates["y"] == (groups, units)
    assert found.plates["theta"] == found.plates["half"] == (groups,)
    assert found.plates["mu"] == ()
    assert found.batch == ()


def local(y):
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -0.1 * z**2)
        with poutine.scale(scale=0.5), poutine.mask(mask=torch.tensor([True, True, False, True])):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_weights_per_datum_likelihood_without_scales_and_factors_apart():
    found = draw(local, AutoNormal(local), (Y[0],), num_draws=S)
    z, seen = found.latents["z"], torch.tensor([1.0, 1.0, 0.0, 1.0])
    data = dist.Normal(z, 1.0).log_prob(Y[0]) * seen
    assert found.batch == (Plate("data", -1, 4, 4),)
    assert torch.allclose(found.log_likelihood["y"], data)
    assert torch.allclose(found.log_p, dist.Normal(0.0, 1.0).log_prob(z) - 0.1 * z**2 + 0.5 * data)
    assert found.factors == {"penalty"}
    assert set(found.log_likelihood) == set(found.observed) == {"y"}
    assert set(found.latents) == {"z"}


def test_auxiliary_sites_of_the_guide_are_not_latents_of_the_model():
    found = draw(local, AutoMultivariateNormal(local), (Y[0],), num_draws=S)
    assert set(found.latents) == {"z"}
    assert found.log_q.shape == (S,)  # the guide is joint over the data


def test_a_model_without_latents_has_as_many_draws_as_asked_for():
    def likelihood(y):
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    for vectorize in (True, False):
        found = draw(likelihood, lambda y: None, (Y[0],), num_draws=S, vectorize=vectorize)
        assert found.num_draws == S
        assert torch.allclose(found.log_likelihood["y"], dist.Normal(0.0, 1.0).log_prob(Y[0]).expand(S, 4))


@pytest.mark.parametrize("vectorize", [True, False])
def test_score_takes_given_latents(vectorize):
    latents = predict(model, None, (Y,), num_draws=S).latents
    found = score(model, latents, (Y,), num_draws=S, vectorize=vectorize)
    log_p, likelihood = log_joint(latents)
    assert torch.allclose(found.log_p, log_p)
    assert torch.allclose(found.log_likelihood["y"], likelihood["y"])
    assert found.log_q is None
    assert shapes(found.deterministics) == with_draws(DETERMINISTICS)
    assert all(torch.equal(found.latents[name], value) for name, value in latents.items())


def test_score_is_what_draw_found():
    found = draw(model, AutoNormal(model), (Y,), num_draws=S)
    again = score(model, found.latents, (Y,), num_draws=S)
    assert torch.allclose(again.log_p, found.log_p)
    assert torch.allclose(again.deterministics["pair"], found.deterministics["pair"])


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("size", [1, S])
def test_predictions_sample_the_observed_sites_although_data_are_given(size, vectorize):
    latents = draw(model, AutoNormal(model), (Y,), num_draws=size).latents
    found = predict(model, latents, (Y,), num_draws=size, vectorize=vectorize)
    assert shapes(found.observed) == with_draws(OBSERVED, size)
    assert all(torch.equal(found.latents[name], value) for name, value in latents.items())
    assert not torch.any(found.observed["y"] == Y)
    assert found.log_p is None
    assert found.log_q is None
    assert found.log_likelihood == {}
    assert found.num_draws == size


def test_predictions_have_the_moments_of_the_likelihood():
    latents = {"mu": torch.zeros(4000), "weights": torch.full((4000, 2), 0.5), "matrix": torch.zeros(4000, 2, 3)}
    latents |= {"theta": torch.tensor([1.0, 2.0, 3.0]).expand(4000, 3), "e": torch.zeros(4000, 4)}
    found = predict(model, latents, (Y,), num_draws=4000).observed["y"]
    expected = torch.tensor([[1.1], [2.1], [3.1]]).expand(3, 4)
    assert torch.allclose(found.mean(0), expected, atol=5 * 0.5 / 4000**0.5)
    assert torch.allclose(found.std(0), torch.full((3, 4), 0.5), atol=5 * 0.5 / 8000**0.5)


@pytest.mark.parametrize("vectorize", [True, False])
def test_prior_draws_are_ancestral(vectorize):
    found = predict(model, None, (Y,), num_draws=S, vectorize=vectorize)
    assert shapes(found.latents) == with_draws(LATENTS)
    assert shapes(found.observed) == with_draws(OBSERVED)
    assert len(set(found.latents["mu"].tolist())) == S
    assert torch.allclose(found.deterministics["half"], 0.5 * found.latents["theta"])


def test_latents_left_out_are_drawn_from_the_model_given_the_others():
    theta = torch.arange(3.0).expand(S, 3)
    found = predict(model, {"theta": theta}, (Y,), num_draws=S)
    assert torch.equal(found.latents["theta"], theta)
    assert len(set(found.latents["mu"].tolist())) == S


def test_predictions_for_new_data_follow_their_shape():
    def regression(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 1e-6), obs=y)

    latents = draw(regression, AutoNormal(regression), (Y[0], Y[0]), num_draws=S).latents
    x = torch.arange(7.0)
    found = predict(regression, latents, (x, torch.zeros(7)), num_draws=S)
    assert torch.allclose(found.observed["y"], latents["slope"][:, None] * x, atol=1e-4)


def test_local_latents_of_other_data_are_refused():
    latents = draw(local, AutoNormal(local), (Y[0],), num_draws=S).latents
    latents["z"] = latents["z"][:, :3]
    with pytest.raises(ValueError, match=r"latent site 'z' have shape \(3,\), expected \(4,\).*drop them"):
        predict(local, latents, (Y[0],), num_draws=S)


def test_no_draws_are_refused():
    with pytest.raises(ValueError, match=r"num_draws=0: expected at least one"):
        draw(model, AutoNormal(model), (Y,), num_draws=0)


def test_stacked_parts_keep_their_order():
    guide = AutoNormal(model)
    parts = [draw(model, guide, (Y,), num_draws=size) for size in (2, 3)]
    both = stack(parts, sum(part.num_draws for part in parts))
    assert both.num_draws == 5
    assert torch.equal(both.log_p, torch.cat([part.log_p for part in parts]))
    assert torch.equal(both.observed["y"], Y)


def test_draws_are_reproducible_and_new_each_time():
    guide = AutoNormal(model)
    draw(model, guide, (Y,), num_draws=2)
    torch.manual_seed(1)
    first = [draw(model, guide, (Y,), num_draws=2).latents["mu"] for _ in range(2)]
    torch.manual_seed(1)
    again = draw(model, guide, (Y,), num_draws=2).latents["mu"]
    assert torch.equal(first[0], again)
    assert not torch.equal(first[0], first[1])


def test_observations_that_are_partly_missing():
    seen = torch.tensor([True, False, True, True])

    def partial(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)

    found = draw(partial, AutoNormal(partial), (Y[0],), num_draws=S)
    assert shapes(found.latents) == {"mu": (S,), "y_unobserved": (S, 4)}
    assert shapes(found.deterministics) == {"y": (S, 4)}
    assert torch.equal(found.deterministics["y"][:, seen], Y[0][seen].expand(S, 3))
    expected = dist.Normal(found.latents["mu"][:, None], 1.0).log_prob(Y[0]) * seen
    assert torch.allclose(found.log_likelihood["y_observed"], expected)


def test_batches_of_vectors_and_matrices_keep_their_event_dims():
    def vectors(y):
        with pyro.plate("data", 3):
            loc = pyro.sample("loc", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
            pyro.sample("y", dist.MultivariateNormal(loc, torch.eye(2)), obs=y)

    found = draw(vectors, AutoNormal(vectors), (Y[:, :2],), num_draws=S)
    assert shapes(found.latents) == {"loc": (S, 3, 2)}
    assert shapes(found.observed) == {"y": (3, 2)}
    assert shapes(found.log_likelihood) == {"y": (S, 3)}
    assert found.log_p.shape == (S, 3)
    expected = dist.MultivariateNormal(found.latents["loc"], torch.eye(2)).log_prob(Y[:, :2])
    assert torch.allclose(found.log_likelihood["y"], expected)


def test_draws_of_a_point_estimate_do_not_move_with_its_parameters():
    guide = AutoDelta(local)
    found = draw(local, guide, (Y[0],), num_draws=1)
    before = found.latents["z"].clone()
    with torch.no_grad():
        pyro.get_param_store()["AutoDelta.z"].add_(1.0)
    assert torch.equal(found.latents["z"], before)
    assert not torch.equal(draw(local, guide, (Y[0],), num_draws=1).latents["z"], before)


def test_draws_without_deterministic_sites_take_one_run():
    """Shapes of deterministic sites are read off a run without particles, where there are any."""
    runs = []

    def model():
        runs.append(1)
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(0.5))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    draw(model, guide, num_draws=3)
    runs.clear()
    draw(model, guide, num_draws=3)
    assert len(runs) == 1
