"""Deep Boltzmann machines and their mean-field guide against enumeration."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import binary
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import SGD
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pplvi
from pplvi.energies import (
    BernoulliUnits,
    BoltzmannMachine,
    DeepBoltzmannMachine,
    GaussianUnits,
    MeanFieldGuide,
    RestrictedBoltzmannMachine,
)
from pplvi.energies.learning.boltzmann_elbo import BoltzmannELBO
from pplvi.energies.machines.training_step import training_step

pytestmark = pytest.mark.usefixtures("float64")


def randomised(machine: BoltzmannMachine) -> BoltzmannMachine:
    for bias in machine.biases().values():
        bias.data.normal_()
    for layer in machine.layers:
        machine.offset(layer).uniform_(0.2, 0.8)
    return machine


def deep(*, scale: float = 1.0, **options: object) -> DeepBoltzmannMachine:
    dbm = DeepBoltzmannMachine([5, 4, 3, 2], init_scale=scale, **options)
    assert isinstance(randomised(dbm), DeepBoltzmannMachine)
    return dbm


def general() -> BoltzmannMachine:
    layers = {"v": BernoulliUnits(4), "h": BernoulliUnits(5)}
    return randomised(BoltzmannMachine(layers, [("v", "h"), ("v", "v"), ("h", "h")], init_scale=1.0))


MACHINES = {
    "restricted": lambda: randomised(RestrictedBoltzmannMachine(5, 4, init_scale=1.0)),
    "deep": deep,
    "deep, not centered": lambda: deep(centered=False),
    "deep, with labels": lambda: deep(num_labels=3),
    "deep, Gaussian": lambda: deep(scale=0.5, visible=GaussianUnits(5, variance=0.5)),
    "general": general,
}


def test_layers_and_connections() -> None:
    dbm = DeepBoltzmannMachine([5, 4, 3], num_labels=7)
    assert dbm.levels == ("v", "h1", "h2")
    assert [units.width for units in dbm.layers.values()] == [5, 4, 3, 7]
    assert set(dbm.edges()) == {("v", "h1"), ("h1", "h2"), ("h2", "y")}


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        ([784], {}, "at least a visible and a hidden layer"),
        ([5, 4, 3], {"hidden": [BernoulliUnits(4)]}, "1 units for 2 hidden layers"),
        ([5, 4, 3], {"hidden": [BernoulliUnits(4), BernoulliUnits(2)]}, r"make layers of \[5, 4, 2\]"),
        ([5, 4], {"visible": "gaussian", "hidden": "gaussian"}, "Gaussian"),
    ],
)
def test_bad_graphs_are_refused(widths: list[int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepBoltzmannMachine(widths, **options)


@pytest.mark.parametrize("kind", MACHINES)
def test_bound_rises_at_every_sweep_and_stays_below_the_exact_log_likelihood(kind: str) -> None:
    machine = MACHINES[kind]()
    v = binary(6, machine.layers["v"].width)
    bounds = torch.stack([MeanFieldGuide(machine, iterations=k).bound(v) for k in range(12)])
    exact = -machine.free_energy(v).detach()
    assert (bounds.diff(dim=0) > -1e-12).all()
    assert (bounds <= exact + 1e-12).all()
    if kind == "restricted":
        torch.testing.assert_close(bounds[0], exact)  # its posterior is factorised
    else:
        assert (bounds[-1] > bounds[0] + 1e-6).all()


def test_bound_with_log_z_is_below_the_log_likelihood() -> None:
    dbm = deep()
    v = binary(6, 5)
    log_z = dbm.log_partition().detach()
    exact = dbm.log_marginal({"v": v}).detach() - log_z
    bound = MeanFieldGuide(dbm, 30).bound(v, log_z=log_z)
    assert (bound <= exact).all()
    assert (exact - bound).max() < 1.0


def test_fixed_point_solves_the_mean_field_equations() -> None:
    dbm = deep()
    means = MeanFieldGuide(dbm, 500, tol=1e-13).means(binary(3, 5))
    for layer in dbm.hidden:
        torch.testing.assert_close(means[layer], torch.sigmoid(dbm.field(layer, means)))


def test_tolerance_ends_the_sweeps_outside_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    dbm, v, sweeps = deep(), binary(3, 5), []
    plain = MeanFieldGuide._sweep
    monkeypatch.setattr(MeanFieldGuide, "_sweep", lambda *args: (sweeps.append(1), plain(*args))[1])
    guide = MeanFieldGuide(dbm, iterations=200, tol=1e-3)
    guide.bound(v)
    assert 1 < len(sweeps) < 100
    for training in (lambda: guide.factorised(v), lambda: within_step(guide, v)):
        sweeps.clear()
        training()
        assert len(sweeps) == 200


def within_step(guide: MeanFieldGuide, v: Tensor) -> None:
    with training_step(), torch.no_grad():
        guide.factorised(v)


def test_damped_parallel_updates_reach_the_fixed_point_of_the_alternating_ones() -> None:
    dbm, v = deep(), binary(4, 5)
    alternating = MeanFieldGuide(dbm, 300).means(v)
    parallel = MeanFieldGuide(dbm, 600, parallel=True, damping=0.5).means(v)
    torch.testing.assert_close(parallel["h2"], alternating["h2"], rtol=0, atol=1e-8)


def test_first_pass_counts_what_comes_from_below_twice() -> None:
    dbm, v = deep(centered=False), binary(4, 5)
    means = MeanFieldGuide(dbm, iterations=0).means(v)
    h1 = torch.sigmoid(2 * v @ dbm.weight("v", "h1") + dbm.bias("h1"))
    h2 = torch.sigmoid(2 * h1 @ dbm.weight("h1", "h2") + dbm.bias("h2"))
    h3 = torch.sigmoid(h2 @ dbm.weight("h2", "h3") + dbm.bias("h3"))
    for found, expected in zip((means["h1"], means["h2"], means["h3"]), (h1, h2, h3), strict=True):
        torch.testing.assert_close(found, expected.detach())


def test_masked_input_changes_the_first_layer_through_the_second() -> None:
    """Top-down feedback: q(h1) answers to units of v that it is not connected with."""
    dbm = deep(scale=1.5)
    with torch.no_grad():
        dbm.edges()["v", "h1"][0, 0] = dbm.edges()["v", "h1"][4, 0] = 0.0  # unit 0 of h1 does not see v_0 and v_4
    v = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.0]])
    h1 = MeanFieldGuide(dbm, 50).means(v)["h1"][:, 0]
    assert abs(h1[0] - h1[1]) > 1e-3
    mask = torch.tensor([False, True, True, True, False])
    hidden = MeanFieldGuide(dbm, 50).means(v, mask=mask)["h1"]
    torch.testing.assert_close(hidden[0], hidden[1])  # what is masked is not looked at
    assert abs(hidden[0, 0] - h1[0]) > 1e-4
    with torch.no_grad():
        dbm.edges()["h1", "h2"].zero_()
    alone = MeanFieldGuide(dbm, 50)
    torch.testing.assert_close(alone.means(v)["h1"][:, 0], alone.means(v, mask=mask)["h1"][:, 0])


@pytest.mark.parametrize("kind", ["deep", "general"])
def test_missing_units_are_mean_field_units(kind: str) -> None:
    machine = MACHINES[kind]()
    v = binary(1, machine.layers["v"].width)
    mask = torch.tensor([True, False, True, False, True])[: v.shape[1]]
    guide = MeanFieldGuide(machine, 40)
    bounds = torch.stack([MeanFieldGuide(machine, k).bound(v, mask=mask) for k in range(8)])
    assert (bounds.diff(dim=0) > -1e-12).all()
    completed = v.repeat(4, 1)
    completed[:, ~mask] = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * int((~mask).sum()))
    exact = machine.log_marginal({"v": completed}).logsumexp(0).detach()
    assert bounds[-1].item() <= exact.item()
    assert exact - bounds[-1] < 0.5
    filled = guide.fill_in(v, mask)
    assert torch.equal(filled[:, mask], v[:, mask])
    posterior = machine.log_marginal({"v": completed}).softmax(0).detach() @ completed
    assert (filled[0] - posterior).abs().max() < 0.25


def test_labels_are_inferred_or_given() -> None:
    dbm, v = deep(num_labels=3), binary(4, 5)
    y = dbm.layers["y"].encode(torch.tensor([[0], [1], [2], [0]]))
    guide = MeanFieldGuide(dbm, 20)
    assert torch.allclose(guide.means(v)["y"].sum(-1), torch.ones(4))
    given = guide.means({"v": v, "y": y})
    assert torch.equal(given["y"], y)
    assert (guide.bound({"v": v, "y": y}) <= dbm.log_marginal({"v": v, "y": y})).all()
    for argument in (v, {"v": v, "y": y}):
        assert torch.isfinite(torch.tensor(BoltzmannELBO(10, 1).loss(dbm.model, guide, argument)))


def test_without_data_it_bounds_log_z() -> None:
    dbm = deep(scale=0.3)
    bound, exact = MeanFieldGuide(dbm, 50).bound(), dbm.log_partition()
    assert exact - 0.5 < bound.item() <= exact
    loss = pplvi.ELBO(num_particles=2000).loss(dbm.model, MeanFieldGuide(dbm, 50))
    assert -loss == pytest.approx(bound.item(), abs=0.2)


def test_elbo_of_the_sites_is_the_bound() -> None:
    dbm, v = deep(), binary(5, 5)
    guide = MeanFieldGuide(dbm, 20)
    bound = guide.bound(v).sum().item()
    losses = [Trace_ELBO(num_particles=50, vectorize_particles=True).loss(dbm.model, guide, v) for _ in range(10)]
    error = torch.tensor(losses).std().item() / 10**0.5
    assert -sum(losses) / 10 == pytest.approx(bound, abs=4 * error)
    draws = Predictive(dbm.model, guide=guide, num_samples=4000, parallel=True)(v)["h2"]
    p = guide.means(v)["h2"]
    assert ((draws.mean(0) - p).abs() < 4.5 * (p * (1 - p) / 4000).sqrt() + 1e-12).all()


def gradients(machine: BoltzmannMachine, loss: Tensor) -> dict[object, Tensor]:
    parameters = {**machine.edges(), **machine.biases()}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def test_gradient_is_the_exact_one_of_the_bound() -> None:
    """BoltzmannELBO on a 3-layer DBM: d(bound)/d(theta) - d log Z/d(theta), within 4 standard errors."""
    dbm, v = deep(scale=0.6, centered=False), binary(7, 5)
    guide = MeanFieldGuide(dbm, 100)
    means = guide.means(v)
    exact = gradients(dbm, dbm.energy(means).mean() + dbm.log_partition())
    elbo = BoltzmannELBO(num_chains=200, sweeps=5)
    for _ in range(20):
        elbo.differentiable_loss(dbm.model, guide, v)
    sampled = [gradients(dbm, elbo.differentiable_loss(dbm.model, guide, v)) for _ in range(90)]
    for key, expected in exact.items():
        found = torch.stack([sample[key] for sample in sampled])
        batches = found.reshape(30, 3, -1).mean(1)  # consecutive steps of a chain are correlated
        error = batches.std(0) / 30**0.5
        assert ((batches.mean(0) - expected.flatten()).abs() < 4 * error + 1e-9).all(), key


def test_bound_is_stationary_at_the_fixed_point() -> None:
    """The gradient with the means held is that of the converged bound: the means need no gradient."""
    dbm, v = deep(), binary(7, 5)
    guide = MeanFieldGuide(dbm, 400)
    held = gradients(dbm, dbm.energy(guide.means(v)).sum())
    found = guide.posterior(v, 1)
    through = gradients(dbm, (dbm.energy(found.values) - guide.entropy(found)).sum())
    for key in held:
        torch.testing.assert_close(held[key], through[key], rtol=1e-5, atol=1e-7)


def exact_log_likelihood(dbm: BoltzmannMachine, v: Tensor) -> float:
    return (dbm.log_marginal({"v": v}) - dbm.log_partition()).mean().item()


def test_training_from_a_random_start_raises_the_likelihood() -> None:
    dbm = DeepBoltzmannMachine([6, 5, 4])
    v = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]).repeat(10, 1)
    before = exact_log_likelihood(dbm, v)
    svi = SVI(dbm.model, MeanFieldGuide(dbm, 10), SGD({"lr": 0.1}), BoltzmannELBO(num_chains=50, sweeps=3))
    for _ in range(400):
        svi.step(v)
    assert before < -4.0
    assert exact_log_likelihood(dbm, v) > -1.6


class Products(TorchDispatchMode):
    """Count matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
            self.count += min(args[-2].shape) > 1
        return func(*args, **(kwargs or {}))


def test_a_step_has_no_more_products_than_its_sweeps_and_its_gradient() -> None:
    """Guide, chains and energy share their products; both phases of the gradient are one product a weight matrix."""
    dbm, v = DeepBoltzmannMachine([6, 5, 4]), binary(7, 6)
    svi = SVI(dbm.model, MeanFieldGuide(dbm, iterations=10), SGD({"lr": 0.1}), BoltzmannELBO(num_chains=7, sweeps=5))
    svi.step(v)
    with Products() as products:
        svi.step(v)
    assert products.count == 2 + 10 * 2 + 5 * 4 + 2  # first pass, sweeps of mean field, sweeps of chains, gradient


def test_fit_posterior_arviz_and_checkpoints(tmp_path: Path) -> None:
    start, v, path = DeepBoltzmannMachine([6, 5, 4]), binary(20, 6), tmp_path / "dbm.pt"

    def fitted(num_steps: int, **options: object) -> tuple[DeepBoltzmannMachine, pplvi.Fit]:
        dbm = copy.deepcopy(start)
        settings = {"objective": BoltzmannELBO(30, 2), "optim": SGD({"lr": 0.05}), "schedule": None, "seed": 0}
        return dbm, pplvi.fit(
            dbm.model, MeanFieldGuide(dbm, 5), args=(v,), num_steps=num_steps, progress=False, **settings, **options
        )

    _, result = fitted(20, checkpoint=path)
    posterior = result.posterior(50)
    assert posterior.draws.latents["h1"].shape == (50, 20, 5)
    assert result.to_arviz().posterior["h2"].shape[-2:] == (20, 4)
    resumed, _ = fitted(30, resume=path)
    straight, _ = fitted(30)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name  # weights, offsets and chains


def test_guide_is_pickled_with_its_machine() -> None:
    guide = MeanFieldGuide(deep(), 7, tol=1e-3)
    again, v = pickle.loads(pickle.dumps(guide)), binary(3, 5)
    torch.testing.assert_close(again.means(v)["h3"], guide.means(v)["h3"])
    assert (again.iterations, again.tol) == (7, 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": -1}, "iterations=-1: expected a whole number of at least 0"),
        ({"iterations": 2.5}, "iterations=2.5: expected a whole number"),
        ({"damping": 0.5}, "parallel=True"),
        ({"damping": 1.0, "parallel": True}, r"\[0, 1\)"),
        ({"tol": 0.0}, "positive"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeanFieldGuide(deep(), **options)


def test_bad_data_are_refused() -> None:
    guide = MeanFieldGuide(deep())
    with pytest.raises(ValueError, match=r"\(3, 6\).*\(\*batch, 5\)"):
        guide.means(torch.ones(3, 6))
    with pytest.raises(ValueError, match="unknown layer 'x'"):
        guide.means({"x": torch.ones(3, 6)})
    with pytest.raises(ValueError, match="a mask without data"):
        guide.means(mask=torch.ones(5).bool())


@pytest.mark.parametrize("damping", [0.1, 0.9])
def test_damping_is_the_share_of_the_field_before(damping: float) -> None:
    dbm, observed = deep(), {"v": binary(3, 5)}
    start = MeanFieldGuide(dbm, 0).solve(observed)
    once = MeanFieldGuide(dbm, 1, parallel=True).solve(observed, start=start)
    damped = MeanFieldGuide(dbm, 1, parallel=True, damping=damping).solve(observed, start=start)
    for layer, field in damped.fields.items():
        torch.testing.assert_close(field, damping * start.fields[layer] + (1 - damping) * once.fields[layer])
