"""Structured guides: exact hierarchical posteriors, minibatches, shapes."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor

import pplvi
from pplvi import AutoHierarchical
from pplvi.compile.svi import CompiledSVI
from pplvi.losses.elbo import ELBO
from pplvi.programs.joint import execute

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)


def gaussian(y: Tensor, size: int | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", len(y), subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(mu, 0.3))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def log_evidence(y: Tensor) -> float:
    covariance = torch.ones(len(y), len(y)) + (0.09 + 1.0) * torch.eye(len(y))
    return float(dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y))


def train(model: Any, guide: Any, *args: Any, steps: int = 400, lr: float = 0.02) -> None:
    """In recorded steps, which are those of Pyro's SVI and take a third of the time."""
    CompiledSVI(model, guide, Adam({"lr": lr}), ELBO(num_particles=16, estimator="stl"), mode="trace").run(steps, *args)


def test_a_gaussian_hierarchy_is_recovered_exactly_where_mean_field_is_not() -> None:
    guide = AutoHierarchical(gaussian, plates="group")
    train(gaussian, guide, Y)
    train(gaussian, guide, Y, steps=200, lr=0.003)
    posterior = pplvi.Posterior(gaussian, guide, (Y,), num_draws=2000, seed=0)
    assert float(posterior.elbo.value) == pytest.approx(log_evidence(Y), abs=0.02)
    assert float(posterior.ess) > 0.93 * 2000
    mean_field = AutoNormal(gaussian)
    train(gaussian, mean_field, Y)
    assert -ELBO(num_particles=2000).loss(gaussian, mean_field, Y) < log_evidence(Y) - 0.1


@pytest.mark.parametrize("family", ["normal", "multivariate_normal", "flow"])
def test_density_integrates_to_one(family: Any) -> None:
    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        with pyro.plate("group", 3):
            pyro.sample("share", dist.Dirichlet(torch.full((3,), 2.0) + scale.unsqueeze(-1)))
            pyro.sample("rate", dist.Exponential(scale))

    guide = AutoHierarchical(model, plates="group", family=family, init_scale=1.5)
    guide(Y)
    with torch.no_grad():
        guide.head.weight.mul_(0.1)
        guide.global_guide.scale_unconstrained.fill_(1.0)
    run = execute(model, guide, (Y,), {}, num_particles=20_000)
    weight = (run.log_target() - run.log_forward()).detach().exp()
    error = float(weight.std()) / 20_000**0.5
    assert float(weight.mean()) == pytest.approx(1.0, abs=4 * error)
    assert error < 0.4


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_size_grows_by_two_numbers_for_each_latent_of_an_element(family: Any) -> None:
    sizes = []
    for size in (4, 40):
        pyro.clear_param_store()
        guide = AutoHierarchical(gaussian, plates="group", family=family)
        guide(torch.zeros(size))
        sizes.append(sum(p.numel() for p in guide.parameters()))
    assert sizes[1] - sizes[0] == 2 * (40 - 4)  # the transforms are shared: a dense flow has networks of that width


def test_minibatches_train_the_parameters_of_their_elements() -> None:
    guide = AutoHierarchical(gaussian, plates="group")
    train(gaussian, guide, Y, 2, steps=2)
    assert guide.elements.shape == (4, 2)
    before = guide.elements.detach().clone()
    svi = SVI(gaussian, guide, Adam({"lr": 0.1}), ELBO())
    trace = pyro.poutine.trace(guide).get_trace(Y, 2)
    assert trace.nodes["z"]["value"].shape == (2,)
    svi.step(Y, 2)
    moved = (guide.elements.detach() != before).any(-1)
    assert int(moved.sum()) == 2


def test_two_plates_and_an_inner_one() -> None:
    def model() -> None:
        with pyro.plate("row", 3, dim=-3), pyro.plate("column", 2, dim=-1):
            with pyro.plate("time", 4, dim=-2):
                pyro.sample("inner", dist.Normal(0.0, 1.0))
            pyro.sample("outer", dist.Gamma(2.0, 1.0))

    guide = AutoHierarchical(model, plates=["row", "column"])
    draws = guide()
    assert draws["inner"].shape == (3, 4, 2)
    assert draws["outer"].shape == (3, 1, 2)
    assert execute(model, guide, (), {}, num_particles=5).log_forward().shape == (5, 3, 2)
    assert guide.median()["inner"].shape == (3, 4, 2)


def test_the_contract() -> None:
    guide = AutoHierarchical(gaussian, plates="group")
    train(gaussian, guide, Y, steps=3)
    quantiles = guide.quantiles([0.1, 0.5, 0.9], Y)
    assert quantiles["z"].shape == (3, 4)
    assert bool((quantiles["z"].diff(dim=0) > 0).all())
    assert guide.get_posterior(Y).batch_shape == (4,)
    twin = copy.deepcopy(guide)
    state = {name: value.clone() for name, value in guide.state_dict().items()}
    train(gaussian, twin, Y, steps=2)
    assert all(torch.equal(value, guide.state_dict()[name]) for name, value in state.items())
    other = AutoHierarchical(gaussian, plates="group")
    other(Y)
    other.load_state_dict(state)
    assert torch.equal(other.quantiles([0.5], Y)["z"], guide.quantiles([0.5], Y)["z"])


def test_another_number_of_elements_is_refused() -> None:
    guide = AutoHierarchical(gaussian, plates="group")
    guide(Y)
    with pytest.raises(ValueError, match="was made for 4"):
        guide(Y[:3])
    with pytest.raises(ValueError, match="nothing to refine"):
        pplvi.refine(guide, (Y,))
    with pytest.raises(ValueError, match="hidden=0"):
        AutoHierarchical(gaussian, plates="group", hidden=0)


def test_fit_and_report() -> None:
    for mode in (False, "trace"):
        fit = pplvi.fit(
            gaussian,
            lambda model: AutoHierarchical(model, plates="group"),
            args=(Y,),
            num_steps=20,
            compile=mode,
            seed=0,
            progress=False,
        )
        assert "they grow with the data: 4 of 5 latent coordinates" in " ".join(fit.summary().split())
