"""Amortised guides: exact posteriors, minibatches in any order, shapes, and what amortisation costs."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive
from pyro.optim import Adam
from torch import Tensor, nn

import pplvi
from pplvi import AutoAmortized, amortization_gap, refine
from pplvi.compile.svi import CompiledSVI
from pplvi.losses.base import WeightedELBO
from pplvi.losses.elbo import ELBO, ForwardKL, ImportanceWeightedELBO
from pplvi.objectives.forward_kl import ForwardKLDivergence
from pplvi.programs.joint import execute
from pplvi.samplers.ancestral import Ancestral

pytestmark = pytest.mark.usefixtures("float64")


def normal_model(x: Tensor, size: int | None = None, mask: Tensor | None = None) -> None:
    """``z ~ N(0, 1)``, ``x ~ N(z, 1)``: posterior ``N(x / 2, 1 / 2)``."""
    with pyro.plate("data", size or len(x), subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.poutine.mask(mask=True if mask is None else mask):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def column(inputs: int = 1) -> nn.Module:
    return nn.Sequential(nn.Unflatten(-1, (-1, 1)), nn.Linear(inputs, 4))


@pytest.fixture
def x() -> Tensor:
    return torch.linspace(-2.0, 2.0, 7)


def train(model: Any, guide: Any, *args: Any, steps: int = 600, lr: float = 0.02, loss: Any = None) -> None:
    """In recorded steps, which are those of Pyro's SVI and take a third of the time."""
    loss = loss or ELBO(num_particles=16, estimator="stl")
    CompiledSVI(model, guide, Adam({"lr": lr}), loss, mode="trace" if steps > 50 else False).run(steps, *args)


def test_a_posterior_that_it_contains_is_recovered_exactly(x: Tensor) -> None:
    guide = AutoAmortized(normal_model, column(), plates="data")
    train(normal_model, guide, x)
    assert torch.allclose(guide.median(x)["z"], x / 2, atol=0.02)
    posterior = pplvi.Posterior(normal_model, guide, (x,), num_draws=2000, seed=0)
    assert float(posterior.pareto_k.max()) < 0.5
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    assert torch.allclose(torch.as_tensor(posterior.log_evidence[0]).reshape(-1), exact, atol=0.01)


def test_new_data_of_another_size_need_no_training(x: Tensor) -> None:
    guide = AutoAmortized(normal_model, column(), plates="data")
    train(normal_model, guide, x)
    new = torch.tensor([1.5, -0.5, 0.2])
    assert torch.allclose(guide.median(new)["z"], new / 2, atol=0.03)
    draws = Predictive(normal_model, guide=guide, num_samples=20)(new)
    assert draws["z"].shape == (20, 3)


def correlated_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.3), obs=x)


def test_full_covariance_per_element(x: Tensor) -> None:
    guide = AutoAmortized(correlated_model, column(), plates="data", family="multivariate_normal")
    train(correlated_model, guide, x, steps=800)
    precision = torch.eye(2) + torch.ones(2, 2) / 0.09
    exact = torch.linalg.inv(precision)
    found = guide.get_posterior(x)
    assert torch.allclose(found.covariance_matrix, exact.expand(7, 2, 2), atol=0.04)
    assert torch.allclose(found.mean, (x[:, None] / 0.09) * exact.sum(-1), atol=0.03)
    scale = (guide.quantiles([0.5, 0.8413447], x)["z"]).diff(dim=0)[0]
    assert torch.allclose(scale, exact.diagonal().sqrt().expand(7, 2), atol=0.04)


def support_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("share", dist.Dirichlet(torch.full((3,), 2.0)))
        pyro.sample("order", dist.Uniform(-1.0, 2.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


@pytest.mark.parametrize("family", ["normal", "multivariate_normal", "flow"])
def test_densities_integrate_to_one_on_every_support(x: Tensor, family: Any) -> None:
    guide = AutoAmortized(support_model, column(), plates="data", family=family, init_scale=1.7)
    guide(x[:3])
    with torch.no_grad():
        guide.head.weight.zero_()
    run = execute(support_model, guide, (x[:3],), {}, num_particles=20_000)
    log_weight = (run.log_target() - run.log_forward()).detach() - dist.Normal(0.0, 1.0).log_prob(x[:3])
    weight = log_weight.exp()
    error = weight.std(0) / 20_000**0.5
    assert bool(((weight.mean(0) - 1.0).abs() < 4 * error).all())
    assert bool((error < 0.1).all())


def test_a_conditional_flow_learns_a_skewed_posterior() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(torch.exp(2 * z)), obs=x)

    counts = torch.tensor([0.0, 1.0])
    evidence = {}
    for family in ("normal", "flow"):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide = AutoAmortized(model, column(), plates="data", family=family)
        train(model, guide, counts, steps=400, lr=0.01, loss=ELBO(num_particles=128))
        evidence[family] = ELBO(num_particles=4000).loss(model, guide, counts)
    assert evidence["flow"] < evidence["normal"] - 0.02


def test_subsampling_by_the_model_draws_the_data_of_the_guide_s_minibatch() -> None:
    data = torch.linspace(-3.0, 3.0, 40)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=8) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = AutoAmortized(model, column(), plates="data")
    train(model, guide, data, steps=800)
    assert torch.allclose(guide.median(data[:8])["z"], data[:8] / 2, atol=0.05)
    assert ELBO().loss(model, guide, data) / 40 == pytest.approx(2.1, abs=0.8)  # scaled to all data


def test_minibatches_in_any_order_equal_the_whole() -> None:
    data = torch.linspace(-3.0, 3.0, 12)
    guide = AutoAmortized(normal_model, column(), plates="data")
    guide(data)
    whole = guide.median(data)["z"]
    order = torch.randperm(12)
    parts = torch.cat([guide.median(data[part], 12)["z"] for part in order.split(5)])
    assert torch.allclose(parts, whole[order])


def test_indices_that_the_model_gives_are_the_guide_s() -> None:
    data = torch.linspace(-3.0, 3.0, 10)

    def model(x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = AutoAmortized(model, column(), plates="data", init_scale=1e-6)
    index = torch.tensor([7, 1, 4])
    trace = pyro.poutine.trace(guide).get_trace(data, index)
    expected = guide.get_posterior(data, index)
    assert torch.equal(trace.nodes["data"]["value"], index)
    features = guide.head(guide.encoder(data[index]))[..., 0]
    assert torch.allclose(trace.nodes["z"]["value"], features, atol=1e-4)
    assert expected.batch_shape == (3,)


def test_missing_entries_reach_the_encoder_by_a_mask() -> None:
    data = torch.tensor([2.0, -1.0, 0.5, 9.0])
    mask = torch.tensor([True, True, True, False])

    def inputs(x: Tensor, size: Any, mask: Tensor) -> Tensor:
        return torch.stack([torch.where(mask, x, 0.0), mask.to(x)], -1)

    guide = AutoAmortized(normal_model, nn.Linear(2, 4), plates="data", inputs=inputs)
    train(normal_model, guide, data, 4, mask, steps=1000)
    found = guide.quantiles([0.1586553, 0.5], data, 4, mask)["z"]
    assert torch.allclose(found[1], torch.tensor([1.0, -0.5, 0.25, 0.0]), atol=0.05)
    assert float(found[1, 3] - found[0, 3]) == pytest.approx(1.0, abs=0.1)  # the prior where nothing was seen


def nested_model(x: Tensor) -> None:
    """Latents of an element in an inner plate left of the data's, and one without; ``x`` is ``(3, N)``."""
    location = pyro.sample("location", dist.Normal(0.0, 2.0))
    with pyro.plate("data", x.shape[-1], dim=-1):
        level = pyro.sample("level", dist.Normal(location, 1.0))
        with pyro.plate("time", 3, dim=-2):
            step = pyro.sample("step", dist.Dirichlet(torch.ones(4)))
            pyro.sample("x", dist.Normal(level + step[..., 0], 0.5), obs=x)


def test_inner_plates_are_packed_and_unpacked() -> None:
    x = torch.randn(3, 5)
    guide = AutoAmortized(nested_model, nn.Linear(3, 6), plates="data", inputs=lambda x: x.T, init_scale=1.0)
    latents = guide(x)
    assert latents["step"].shape == (3, 5, 4)
    assert latents["level"].shape == (5,)
    for particles in (1, 6):
        run = execute(nested_model, guide, (x,), {}, num_particles=particles)
        assert run.log_forward().shape == (particles,)
        values = {n: run.model.nodes[n]["value"] for n in ("level", "step", "location")}
        packed = guide.auxiliary_values(values)[f"_{guide._pyro_name}_latent"]
        drawn = run.guide.nodes[f"_{guide._pyro_name}_latent"]["value"]
        assert torch.allclose(packed.reshape(drawn.shape), drawn)


def test_two_amortised_plates() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("row", x.shape[0], dim=-2), pyro.plate("column", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.linspace(-2.0, 2.0, 12).reshape(3, 4)
    encoder = nn.Sequential(nn.Unflatten(-1, (-1, 1)), nn.Linear(1, 4))
    guide = AutoAmortized(model, encoder, plates=["row", "column"])
    train(model, guide, x)
    assert torch.allclose(guide.median(x)["z"], x / 2, atol=0.03)


def test_global_latents_have_a_guide_of_their_own() -> None:
    x = torch.randn(3, 5)
    guide = AutoAmortized(
        nested_model, nn.Linear(3, 6), "data", inputs=lambda x: x.T, global_guide=pplvi.AutoFlow, init_scale=0.5
    )
    train(nested_model, guide, x, steps=5)
    names = set(pyro.get_param_store())
    assert any(".global_guide." in name for name in names)
    assert any(".encoder." in name for name in names)
    assert set(guide.median(x)) == {"location", "level", "step"}


def test_weights_are_per_element(x: Tensor) -> None:
    guide = AutoAmortized(normal_model, column(), plates="data")
    assert execute(normal_model, guide, (x,), {}, num_particles=3).log_forward().shape == (3, 7)
    loss = ImportanceWeightedELBO(num_particles=8, estimator="dreg")
    train(normal_model, guide, x, steps=500, loss=loss)
    assert torch.allclose(guide.median(x)["z"], x / 2, atol=0.05)


def test_it_is_scored_at_dreams() -> None:
    def model(observations: dict[str, Tensor]) -> None:
        with pyro.plate("data", 16):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=observations["x"])

    guide = AutoAmortized(model, column(), "data", inputs=lambda observations: observations["x"])
    loss = WeightedELBO(ForwardKLDivergence(), Ancestral(), num_particles=4)
    svi = SVI(model, guide, Adam({"lr": 0.02}), loss)
    x = torch.linspace(-2.0, 2.0, 16)
    for _ in range(500):
        svi.step(observations={"x": x})
    assert torch.allclose(guide.median(observations={"x": x})["z"], x / 2, atol=0.1)
    assert ForwardKL(num_particles=8).loss(model, guide, observations={"x": x}) > 0


def test_refinement_takes_back_what_the_network_costs(x: Tensor) -> None:
    guide = AutoAmortized(normal_model, nn.Sequential(nn.Unflatten(-1, (-1, 1)), nn.Linear(1, 1)), "data")
    guide(x)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    refined = refine(guide, (x,), num_steps=400, seed=1)
    assert torch.allclose(refined.median(x)["z"], x / 2, atol=0.05)
    assert all(torch.equal(value, guide.state_dict()[name]) for name, value in before.items())
    gap = amortization_gap(guide, (x,), num_steps=400, seed=1)
    bound = ELBO(num_particles=4000).loss(normal_model, guide, x) + dist.Normal(0.0, 2**0.5).log_prob(x).sum()
    assert gap.value == pytest.approx(float(bound) / 7, abs=4 * gap.standard_error + 0.02)
    with pytest.raises(ValueError, match="refined for data of shape"):
        refined(x[:3])


def test_copies_and_pickles_leave_the_original_alone(x: Tensor) -> None:
    guide = AutoAmortized(normal_model, column(), plates="data")
    train(normal_model, guide, x, steps=3)
    twin, median = copy.deepcopy(guide), guide.median(x)["z"]
    train(normal_model, twin, x, steps=3)
    assert torch.equal(guide.median(x)["z"], median)
    assert not torch.equal(twin.median(x)["z"], median)
    state = guide.state_dict()
    other = AutoAmortized(normal_model, column(), plates="data")
    other(x)
    assert other._pyro_name != guide._pyro_name
    other.load_state_dict(state)
    assert torch.equal(other.median(x)["z"], median)
    loaded = pickle.loads(pickle.dumps(guide))
    with pytest.raises(ValueError, match="unpickled"):
        _ = loaded.model
    assert guide.model is normal_model


def test_fit_and_compiled_fit(x: Tensor) -> None:
    for mode in (False, "trace"):
        pyro.clear_param_store()
        fit = pplvi.fit(
            normal_model,
            lambda model: AutoAmortized(model, column(), plates="data"),
            args=(x,),
            objective=ELBO(num_particles=16),
            num_steps=400,
            compile=mode,
            seed=0,
            progress=False,
        )
        assert float(fit.posterior().pareto_k.max()) < 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plates": "rows"}, "no latent site inside"),
        ({"family": "student"}, "family='student': expected 'normal'"),
        ({"init_scale": -1.0}, "positive"),
        ({"encoder": lambda x: x}, "torch.nn.Module"),
        ({"encoder": nn.Flatten(0)}, "Put plates"),
    ],
)
def test_bad_input(x: Tensor, arguments: dict[str, Any], message: str) -> None:
    chosen = {"encoder": column(), "plates": "data", **arguments}
    with pytest.raises(ValueError, match=message):
        AutoAmortized(normal_model, **chosen)(x)


def test_discrete_locals_and_subsampled_inner_plates_are_refused(x: Tensor) -> None:
    def discrete(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5))

    def inner(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), pyro.plate("time", 9, subsample_size=3, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'z' has support"):
        AutoAmortized(discrete, column(), plates="data")(x)
    with pytest.raises(ValueError, match="subsampled inside"):
        AutoAmortized(inner, column(), plates="data")(x)


def test_the_report_says_what_grows_with_the_data_and_what_amortisation_costs(x: Tensor) -> None:
    fit = pplvi.fit(
        normal_model,
        lambda model: AutoAmortized(model, column(), plates="data"),
        args=(x,),
        num_steps=30,
        seed=0,
        progress=False,
    )
    text = fit.summary()
    assert "they do not grow with the data" in text
    assert re.search(r"amortisation +costs -?\d\.\d+ \+- \d\.\d+ nats for each datum", text)
    other = pplvi.fit(normal_model, pyro.infer.autoguide.AutoNormal, args=(x,), num_steps=3, seed=0, progress=False)
    assert "14; they grow with the data: 7 of 7 latent coordinates are in plate 'data'" in " ".join(
        other.summary().split()
    )


def test_parameters_that_the_first_compiled_run_makes_keep_their_initial_values(x: Tensor) -> None:
    svi = pplvi.CompiledSVI(
        normal_model, AutoAmortized(normal_model, column(), "data"), Adam({"lr": 0.0}), ELBO(), mode="trace"
    )
    svi.step(x)
    weight = svi.guide.head.weight.detach()
    assert torch.equal(weight[1:], torch.zeros(1, 4))
    assert 0 < float(weight[0].abs().max()) <= 0.5
