"""Structured guides of Boltzmann machines: TAP, recognition networks, Gibbs draws."""

import copy
import pickle

import pyro
import pytest
import torch
from models import binary
from pyro.infer import SVI, Predictive
from pyro.optim import SGD, Adam
from torch import Tensor

import pplvi
from pplvi.energies import (
    BernoulliUnits,
    BoltzmannMachine,
    DeepBoltzmannMachine,
    GibbsGuide,
    MeanFieldGuide,
    RecognitionGuide,
    RestrictedBoltzmannMachine,
    TAPGuide,
)
from pplvi.energies.learning.boltzmann_elbo import BoltzmannELBO
from pplvi.energies.machines.training_step import training_step

pytestmark = pytest.mark.usefixtures("float64")


def deep(*, scale: float = 1.0, **options: object) -> DeepBoltzmannMachine:
    dbm = DeepBoltzmannMachine([5, 4, 3, 2], init_scale=scale, **options)
    for bias in dbm.biases().values():
        bias.data.normal_()
    for layer in dbm.layers:
        dbm.offset(layer).uniform_(0.2, 0.8)
    return dbm


def exact_means(machine: BoltzmannMachine, v: Tensor) -> dict[str, Tensor]:
    """Posterior means by enumeration, through the gradient of the marginal in the biases."""
    total = machine.log_marginal({"v": v}).sum()
    names = machine.hidden
    return dict(zip(names, torch.autograd.grad(total, [machine.biases()[n] for n in names]), strict=True))


# ---------------------------------------------------------------------- TAP


@pytest.mark.parametrize("kind", ["deep", "general"])
def test_tap_is_of_one_order_more_than_mean_field(kind: str) -> None:
    errors = []
    for scale in (0.05, 0.025):
        torch.manual_seed(0)
        if kind == "deep":
            machine, options = deep(scale=scale), {}
        else:
            layers, pairs = {"v": BernoulliUnits(4), "h": BernoulliUnits(5)}, [("v", "h"), ("h", "h")]
            machine, options = BoltzmannMachine(layers, pairs, init_scale=scale), {"parallel": True}
        v = binary(6, machine.layers["v"].width)
        exact = machine.log_marginal({"v": v}).detach()
        naive, tap = MeanFieldGuide(machine, 200).bound(v), TAPGuide(machine, 200, **options).bound(v)
        errors.append([(exact - naive).abs().mean(), (exact - tap).abs().mean()])
        assert errors[-1][1] < 0.25 * errors[-1][0]
        marginals = exact_means(machine, v)
        for layer in machine.hidden:
            off = [
                (guide.means(v)[layer].sum(0) - marginals[layer]).abs().mean()
                for guide in (MeanFieldGuide(machine, 200), TAPGuide(machine, 200, **options))
            ]
            assert off[1] < off[0]
    assert 3 < errors[0][0] / errors[1][0] < 5.5  # second order in the weights
    assert errors[0][1] / errors[1][1] > 6  # third


def test_gradient_of_tap_has_the_correction() -> None:
    dbm, v = deep(scale=0.3, centered=False), binary(4, 5)
    guide = TAPGuide(dbm, 300)
    with training_step(), torch.no_grad():
        entropy = guide.factorised(v).entropy
    assert entropy.requires_grad  # the correction depends on the weights
    parameters = [*dbm.edges().values(), *dbm.biases().values()]
    loss = BoltzmannELBO(negative="exact").differentiable_loss(dbm.model, guide, v)
    found = torch.autograd.grad(loss, parameters)
    exact = torch.autograd.grad((dbm.log_partition() - dbm.log_marginal({"v": v})).mean(), parameters)
    plain = BoltzmannELBO(negative="exact").differentiable_loss(dbm.model, MeanFieldGuide(dbm, 300), v)
    naive = torch.autograd.grad(plain, parameters)
    tap_error, naive_error = (
        sum((a - b).square().sum() for a, b in zip(x, exact, strict=True)) for x in (found, naive)
    )
    assert tap_error < 0.1 * naive_error


def test_tap_refuses_what_it_has_no_equations_for() -> None:
    with pytest.raises(ValueError, match=r"Bernoulli units.*\['y'\]"):
        TAPGuide(deep(num_labels=3))
    lateral = BoltzmannMachine({"v": BernoulliUnits(3), "h": BernoulliUnits(3)}, [("v", "h"), ("h", "h")])
    with pytest.raises(ValueError, match="parallel=True"):
        TAPGuide(lateral)


# ---------------------------------------------------------------------- recognition networks


@pytest.mark.parametrize("centered", [True, False])
def test_network_starts_as_the_first_pass(centered: bool) -> None:
    dbm, v = deep(centered=centered, num_labels=3), binary(6, 5)
    for sweeps in (0, 3):
        found, expected = RecognitionGuide(dbm, sweeps).means(v), MeanFieldGuide(dbm, sweeps).means(v)
        for layer in dbm.hidden:
            torch.testing.assert_close(found[layer], expected[layer])


@pytest.mark.parametrize("iterations", [1, 10])
def test_training_moves_the_network_towards_its_targets(iterations: int) -> None:
    dbm, v = deep(scale=1.2), binary(30, 5)
    guide = RecognitionGuide(dbm, iterations)
    dbm.requires_grad_(False)  # only the network learns
    network, full = guide.refined(0), MeanFieldGuide(dbm, 100).bound(v)
    before = (full - network.bound(v)).mean(), guide.divergence(v).mean().item()
    svi = SVI(dbm.model, guide, Adam({"lr": 0.03}), BoltzmannELBO(5, 1))
    for _ in range(200):
        svi.step(v)
    after = (full - network.bound(v)).mean(), guide.divergence(v).mean().item()
    assert after[1] < 0.5 * before[1]
    assert after[0] < 0.7 * before[0]


def test_gradient_of_the_network_is_that_of_the_divergence_and_the_value_is_the_bound() -> None:
    dbm, v = deep(), binary(6, 5)
    guide = RecognitionGuide(dbm, 2)
    parameters = list(guide.network.parameters())
    loss = BoltzmannELBO(negative="exact").differentiable_loss(dbm.model, guide, v)
    expected = torch.autograd.grad(guide.divergence(v).mean(), parameters)
    for found, exact in zip(torch.autograd.grad(loss, parameters, retain_graph=True), expected, strict=True):
        torch.testing.assert_close(found, exact)
    torch.testing.assert_close(
        loss.detach(), BoltzmannELBO(negative="exact").differentiable_loss(dbm.model, copy.deepcopy(guide), v).detach()
    )


def test_machine_and_network_are_trained_in_one_step() -> None:
    dbm, v = DeepBoltzmannMachine([6, 5, 4]), torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]).repeat(10, 1)
    guide = RecognitionGuide(dbm, 1)
    svi = SVI(dbm.model, guide, SGD({"lr": 0.1}), BoltzmannELBO(50, 3))
    for _ in range(400):
        svi.step(v)
    assert (dbm.log_marginal({"v": v}) - dbm.log_partition()).mean() > -1.8
    gap = MeanFieldGuide(dbm, 50).bound(v) - guide.refined(0).bound(v)
    assert gap.mean() < 0.25


def test_recognition_guide_is_an_amortised_guide_under_any_loss() -> None:
    dbm, v = deep(scale=1.2).requires_grad_(False), binary(20, 5)
    guide = RecognitionGuide(dbm, 0)
    before = guide.bound(v).mean()
    svi = SVI(dbm.model, guide, Adam({"lr": 0.02}), pplvi.ELBO(num_particles=20))
    for _ in range(150):
        svi.step(v)
    assert guide.bound(v).mean() > before
    assert Predictive(dbm.model, guide=guide, num_samples=7, parallel=True)(v)["h3"].shape == (7, 20, 2)


def test_recognition_guide_keeps_its_parameters_through_state_dict_pickle_and_fit() -> None:
    dbm, v = deep(), binary(6, 5)
    guide = RecognitionGuide(dbm, 1)
    result = pplvi.fit(
        dbm.model, guide, args=(v,), objective=BoltzmannELBO(10, 1), num_steps=10, seed=0, progress=False
    )
    assert any(name.startswith("recognition") for name in result.params[0])
    assert not any(name.startswith("network.units") for name in guide.state_dict())
    other = RecognitionGuide(dbm, 1)
    assert not torch.allclose(other.means(v)["h2"], guide.refined(0).means(v)["h2"])
    other.load_state_dict(guide.state_dict())
    again = pickle.loads(pickle.dumps(guide))
    for copied in (other, again, copy.deepcopy(guide)):
        torch.testing.assert_close(copied.refined(0).means(v)["h2"], guide.refined(0).means(v)["h2"])


def test_network_is_within_half_a_nat_of_mean_field_on_held_out_digits() -> None:
    from sklearn.datasets import load_digits

    images = torch.as_tensor(load_digits(return_X_y=True)[0])
    v = (images[torch.randperm(len(images))] > 7.5).double()
    dbm = DeepBoltzmannMachine([64, 30, 20])
    train(dbm, MeanFieldGuide(dbm, 5), v[:1300], SGD({"lr": 0.1}), 150)
    dbm.requires_grad_(False)
    dbm.forget_chains()
    guide, held_out = RecognitionGuide(dbm, 10), v[1300:]
    full = MeanFieldGuide(dbm, 100, tol=1e-5).bound(held_out).mean()
    untrained = full - guide.refined(0).bound(held_out).mean()
    train(dbm, guide, v[:1300], Adam({"lr": 0.01}), 250)
    gap = full - guide.refined(0).bound(held_out).mean()
    assert gap < 0.5
    assert gap < 0.5 * untrained
    assert full - guide.refined(1).bound(held_out).mean() < gap


def train(dbm: DeepBoltzmannMachine, guide: object, v: Tensor, optim: object, num_steps: int) -> None:
    svi = SVI(dbm.model, guide, optim, BoltzmannELBO(50, 2))
    for _ in range(num_steps):
        svi.step(v[torch.randint(len(v), (50,))])


def test_network_says_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="expected data"):
        RecognitionGuide(deep()).means()
    lateral = BoltzmannMachine({"v": BernoulliUnits(3), "h": BernoulliUnits(3)}, [("v", "h"), ("h", "h")])
    with pytest.raises(ValueError, match="lateral"):
        RecognitionGuide(lateral)


# ---------------------------------------------------------------------- Gibbs draws


@pytest.mark.parametrize("kind", ["deep", "general"])
def test_gibbs_draws_are_posterior_draws(kind: str) -> None:
    if kind == "deep":
        machine = deep(num_labels=3)
    else:
        layers = {"v": BernoulliUnits(5), "h": BernoulliUnits(4)}
        machine = BoltzmannMachine(layers, [("v", "h"), ("h", "h"), ("v", "v")], init_scale=1.0)
    v, count = binary(1, 5), 4000
    marginals = exact_means(machine, v)
    guide = GibbsGuide(machine, 30)
    draws = Predictive(machine.model, guide=guide, num_samples=count, parallel=True)(v)
    means = guide.factorised(v.expand(count, 5)).means
    for layer, p in marginals.items():
        error = 4.5 * (p * (1 - p) / count).sqrt() + 1e-9
        assert ((draws[layer].mean(0).squeeze(0) - p).abs() < error).all()
        assert ((means[layer].mean(0) - p).abs() < error).all()


def test_bound_of_gibbs_draws_is_below_the_exact_one() -> None:
    dbm, v = deep(), binary(5, 5)
    exact = dbm.log_marginal({"v": v}).detach()
    average = torch.stack([GibbsGuide(dbm, 10).bound(v) for _ in range(200)]).mean(0)
    assert (average < exact).all()
    assert -pplvi.ELBO(num_particles=500).loss(dbm.model, GibbsGuide(dbm, 10), v) < exact.sum().item()


def test_gradient_with_gibbs_draws_is_that_of_the_likelihood() -> None:
    dbm, v = deep(centered=False), binary(4, 5)
    parameters = {**dbm.edges(), **dbm.biases()}
    exact = torch.autograd.grad((dbm.log_partition() - dbm.log_marginal({"v": v})).mean(), list(parameters.values()))
    elbo, guide = BoltzmannELBO(negative="exact"), GibbsGuide(dbm, 20)
    many = v.repeat(100, 1)
    found = []
    for _ in range(60):
        loss = elbo.differentiable_loss(dbm.model, guide, many)
        found.append(torch.autograd.grad(loss, list(parameters.values())))
    for key, expected, sampled in zip(parameters, exact, zip(*found, strict=True), strict=True):
        stacked = torch.stack(sampled)
        assert ((stacked.mean(0) - expected).abs() < 4 * stacked.std(0) / 60**0.5 + 1e-9).all(), key


def test_gibbs_guide_of_a_restricted_machine_is_its_posterior() -> None:
    rbm = RestrictedBoltzmannMachine(4, 3, init_scale=1.0)
    v = binary(5, 4)
    torch.testing.assert_close(GibbsGuide(rbm).bound(v), -rbm.free_energy(v).detach())
    loss = pplvi.ELBO(num_particles=2).loss(rbm.model, GibbsGuide(rbm), v)
    assert loss == pytest.approx(rbm.free_energy(v).sum().item())


def test_posterior_and_missing_units_with_gibbs_draws() -> None:
    dbm, v = deep(), binary(3, 5)
    pyro.set_rng_seed(0)
    posterior = pplvi.Posterior(dbm.model, GibbsGuide(dbm), (v,), num_draws=20, seed=0)
    draws = posterior.draws.latents["h1"]
    assert draws.shape == (20, 3, 4)
    assert (draws.std(0) > 0).any()
    mask = torch.tensor([True, False, True, False, True])
    filled = GibbsGuide(dbm).fill_in(v, mask)
    assert torch.equal(filled[:, mask], v[:, mask])


def test_gibbs_guide_refuses_continuous_units() -> None:
    with pytest.raises(ValueError, match="discrete"):
        GibbsGuide(RestrictedBoltzmannMachine(3, 2, hidden="gaussian"))
    with pytest.raises(ValueError, match="at least 1"):
        GibbsGuide(deep(), 0)
