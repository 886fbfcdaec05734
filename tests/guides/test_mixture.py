"""Mixture guides: exact densities and path gradients, stratified draws, modes, boosting."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import Adam
from torch import Tensor

import pplvi
from pplvi import AutoMixture
from pplvi.compile.svi import CompiledSVI
from pplvi.guides.mixture import Component, StratifiedCategorical, mixture
from pplvi.losses.elbo import ELBO
from pplvi.programs.joint import execute

pytestmark = pytest.mark.usefixtures("float64")


def test_density_is_that_of_the_mixture_whatever_the_component() -> None:
    logits, locs, scales = torch.randn(3), torch.randn(3, 2), torch.randn(3, 2).exp()
    z = torch.randn(5, 2)
    exact = torch.logsumexp(logits.log_softmax(0) + dist.Normal(locs, scales).log_prob(z.unsqueeze(-2)).sum(-1), -1)
    for k in range(3):
        component = torch.full((5,), k)
        first = StratifiedCategorical(logits=logits).log_prob(component)
        assert torch.allclose(first + Component(component, logits, locs, scales).log_prob(z), exact)


@pytest.mark.parametrize("count", [1, 7, 100])
def test_components_are_stratified(count: int) -> None:
    categorical = StratifiedCategorical(logits=torch.tensor([0.0, 1.0]))
    expected = count * float(categorical.probs[1])
    drawn = torch.stack([categorical.expand((count,)).sample() for _ in range(400)])
    assert bool(((drawn.sum(1) - expected).abs() < 1.0).all())
    error = (float(categorical.probs[1]) * float(categorical.probs[0]) / 400) ** 0.5
    assert float(drawn[:, 0].double().mean()) == pytest.approx(float(categorical.probs[1]), abs=4 * error)


def exact_model() -> None:
    """A mixture of two normals, normalised."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    locs, scales = torch.tensor([[-3.0, 1.0], [3.0, 0.0]]), torch.tensor([[0.5, 1.0], [0.7, 0.4]])
    exact = mixture(torch.tensor([0.3, 0.7]).log(), locs, scales)
    pyro.factor("exact", exact.log_prob(x) - dist.Normal(0.0, 5.0).log_prob(x).sum(-1))


@pytest.mark.parametrize("enumerated", [False, True])
def test_gradients_are_those_of_the_elbo(enumerated: bool) -> None:
    """Against the sum over components, from many draws of each component."""

    def model() -> None:
        pyro.sample("x", dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])).to_event(1))

    guide = AutoMixture(model, 2, init_scale=0.7, enumerate_components=enumerated, full_rank=False)
    guide()
    loss = ELBO(num_particles=100)
    parameters = dict(guide.named_parameters())
    with torch.no_grad():
        parameters["logits_unconstrained"][0] += 0.5

    def gradient(seed: int) -> list[Tensor]:
        pyro.set_rng_seed(seed)
        return list(torch.autograd.grad(loss.differentiable_loss(model, guide), list(parameters.values())))

    def value() -> Tensor:
        pyro.set_rng_seed(7)
        base, transform = guide.get_base_dist(), guide.get_transform()
        weights = guide.logits.softmax(0)
        noise = torch.randn(200_000, 2)
        total = torch.zeros(())
        for k in range(2):
            x = guide.locs[k] + guide.scales[k] * noise
            z = transform(x)
            log_q = base.log_prob(x) - guide.scale.log().sum()
            log_p = dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])).log_prob(z).sum(-1)
            total = total - weights[k] * (log_p - log_q).mean()
        return total

    exact = torch.autograd.grad(value(), list(parameters.values()))
    many = [gradient(seed) for seed in range(100)]
    for index, theirs in enumerate(exact):
        found = torch.stack([row[index] for row in many])
        error = found.std(0) / 100**0.5 + 0.005
        assert bool(((found.mean(0) - theirs).abs() < 4 * error).all())


def two_modes() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    logits = torch.stack([-((x - 2.0) ** 2).sum(-1), -((x + 2.0) ** 2).sum(-1) + 0.25])
    pyro.factor("modes", 4 * logits.logsumexp(0))


def train(model: Any, guide: Any, *args: Any, steps: int = 500, lr: float = 0.02, loss: Any = None) -> None:
    """In recorded steps, which are those of Pyro's SVI and take a third of the time."""
    CompiledSVI(model, guide, Adam({"lr": lr}), loss or ELBO(num_particles=32), mode="trace").run(steps, *args)


def test_it_finds_both_modes_and_their_weights() -> None:
    guide = AutoMixture(
        exact_model, num_components=2, init_scale=1.0, init_spread=3.0, full_rank=False, enumerate_components=True
    )
    for lr in (0.02, 0.02, 0.02, 0.004):
        train(exact_model, guide, steps=150, lr=lr)
    posterior = pplvi.Posterior(exact_model, guide, (), num_draws=4000, seed=0)
    value, error = posterior.total_log_evidence
    assert value == pytest.approx(0.0, abs=4 * error + 0.01)
    assert float(posterior.ess) > 0.9 * 4000
    assert sorted(guide.logits.softmax(0).tolist()) == pytest.approx([0.3, 0.7], abs=0.03)
    sides = posterior.draws.latents["x"][:, 0] < 0
    assert float(sides.double().mean()) == pytest.approx(0.3, abs=0.03)


def test_boosting_adds_a_component_where_the_guide_is_wanting() -> None:
    guide = AutoMixture(two_modes, num_components=1, init_scale=0.5, enumerate_components=True)
    train(two_modes, guide, steps=200)
    before = ELBO(num_particles=4000).loss(two_modes, guide)
    old = guide.locs.detach().clone()
    grown = guide.grow(widen=15.0)
    assert torch.equal(guide.locs, old)  # the guide is left alone
    train(two_modes, grown, steps=200)
    assert torch.equal(grown.locs[:1], old)
    after = ELBO(num_particles=4000).loss(two_modes, grown)
    assert after < before - 0.2
    train(two_modes, grown.release(), steps=20)
    assert not torch.equal(grown.locs[:1], old)


def test_the_contract() -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        with pyro.plate("group", 3):
            pyro.sample("share", dist.Dirichlet(torch.full((3,), 2.0) + scale.unsqueeze(-1)))

    guide = AutoMixture(model, num_components=3, init_scale=1.0)
    run = execute(model, guide, (), {}, num_particles=20_000)
    weight = (run.log_target() - run.log_forward()).detach().exp()
    assert float(weight.mean()) == pytest.approx(1.0, abs=4 * float(weight.std()) / 20_000**0.5)
    assert guide.median()["share"].shape == (3, 3)
    assert guide.quantiles([0.1, 0.9])["scale"].shape == (2,)
    twin = copy.deepcopy(guide)
    state = guide.state_dict()
    train(model, guide, steps=2)
    twin.load_state_dict(state)
    assert {"logits_unconstrained", "locs_unconstrained", "scales_unconstrained", "scale_tril_unconstrained"} <= set(
        state
    )


def test_fit_compiled(tmp_path: Any) -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])).to_event(1))

    fits = [
        pplvi.fit(
            model,
            lambda m: AutoMixture(m, 2, init_scale=0.5),
            objective=ELBO(num_particles=4),
            num_steps=30,
            compile=mode,
            seed=3,
            progress=False,
        )
        for mode in (False, "trace")
    ]
    assert all(len(fit.losses[0]) == 30 for fit in fits)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="num_components=0"):
        AutoMixture(two_modes, num_components=0)
    with pytest.raises(ValueError, match="has not seen"):
        AutoMixture(two_modes, num_components=2).grow()

    def nowhere() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x.abs() > 1e6, 0.0, -torch.inf))

    guide = AutoMixture(nowhere, num_components=1)
    guide()
    with pytest.raises(ValueError, match="finite at none"):
        guide.grow()
