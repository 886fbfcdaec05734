"""Partition functions: against enumeration, from both sides, for every kind of unit and depth; likelihoods of data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pplvi.energies import (
    BernoulliUnits,
    BoltzmannMachine,
    DeepBoltzmannMachine,
    DenseCoupling,
    MeanFieldGuide,
    RestrictedBoltzmannMachine,
    annealed_importance_sampling,
    raise_bound,
)
from pplvi.energies.evaluation import partition
from pplvi.energies.evaluation.ais_path import Between
from pplvi.energies.evaluation.moment_paths import averaged_machines, base_fields
from pplvi.samplers.annealed import Annealed


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def machines() -> dict[str, BoltzmannMachine]:
    torch.manual_seed(1)
    return {
        "rbm": RestrictedBoltzmannMachine(8, 5, init_scale=0.7),
        "gaussian": RestrictedBoltzmannMachine(4, 5, visible="gaussian", init_scale=0.4),
        "categorical": RestrictedBoltzmannMachine(3, 4, visible="categorical", num_categories=3, init_scale=0.7),
        "dbm": DeepBoltzmannMachine([6, 5, 4], init_scale=0.6),
        "deeper": DeepBoltzmannMachine([5, 4, 3, 3], init_scale=0.6),
    }


def with_biases(machine: BoltzmannMachine) -> BoltzmannMachine:
    with torch.no_grad():
        for name, parameter in machine.named_parameters():
            if name.startswith("bias"):
                parameter.normal_(0.0, 0.5)
    return machine


@pytest.mark.parametrize("kind", ["rbm", "gaussian", "categorical", "dbm", "deeper"])
@pytest.mark.parametrize("betas", [None, "adaptive"])
@pytest.mark.table(2)
def test_log_z_is_inside_three_standard_errors_of_the_exact_one(kind: str, betas: Any) -> None:
    machine = with_biases(machines()[kind])
    exact = machine.log_partition().item()
    found = annealed_importance_sampling(machine, num_chains=400, num_betas=60, betas=betas, seed=0)
    low, high = found.interval
    assert low < exact < high
    assert high - low < 0.3
    assert found.ess > 200
    assert found.log_weights.dtype == torch.float64


def test_intervals_cover_in_nineteen_of_twenty_seeds() -> None:
    machine = with_biases(machines()["rbm"])
    exact = machine.log_partition().item()
    found = [annealed_importance_sampling(machine, num_chains=100, num_betas=30, seed=seed) for seed in range(20)]
    assert sum(low < exact < high for low, high in (each.interval for each in found)) >= 19


def exact_samples(machine: BoltzmannMachine, count: int) -> Tensor:
    states = machine.distribution().enumerate_support()
    weights = (-machine.free_energy(states)).softmax(0)
    return states[torch.multinomial(weights, count, replacement=True)].detach()


def test_reverse_chains_from_exact_samples_bound_from_above() -> None:
    machine = with_biases(machines()["rbm"])
    exact = machine.log_partition().item()
    below, above = [], []
    for seed in range(10):
        torch.manual_seed(seed)
        samples = exact_samples(machine, 20)
        found = annealed_importance_sampling(machine, num_chains=20, num_betas=4, samples=samples, seed=seed)
        below.append(found.log_z)
        assert found.upper_bound is not None
        above.append(found.upper_bound)
    assert sum(below) / 10 < exact < sum(above) / 10
    good = annealed_importance_sampling(machine, 200, 200, samples=exact_samples(machine, 200), seed=0)
    assert good.upper_bound == pytest.approx(exact, abs=0.1)


def test_likelihood_of_data_and_its_bound() -> None:
    machine = with_biases(machines()["rbm"])
    data = exact_samples(machine, 6)
    exact = (-machine.free_energy(data) - machine.log_partition()).detach()
    found = annealed_importance_sampling(machine, 400, 100, data=data, num_raise_chains=100, seed=0)
    assert found.log_likelihood is not None
    assert found.log_likelihood_bound is not None
    assert found.log_likelihood[0] == pytest.approx(float(exact.mean()), abs=0.1)
    assert found.log_likelihood_bound[0] == pytest.approx(float(exact.mean()), abs=0.2)
    few = torch.stack([raise_bound(machine, data, num_chains=1, num_betas=3, seed=seed) for seed in range(40)])
    error = few.std(0) / 40**0.5
    assert bool((few.mean(0) < exact + 4 * error).all())
    assert float(few.mean()) < float(exact.mean()) - 0.05


def test_raise_is_unbiased_for_the_annealed_model() -> None:
    """The estimated model is normalised: its likelihoods add up to one over all data."""
    machine = with_biases(RestrictedBoltzmannMachine(4, 3, init_scale=1.0))
    states = machine.distribution().enumerate_support()
    total = raise_bound(machine, states, num_chains=2000, num_betas=3, seed=0).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=0.05)


def test_a_deep_machine_s_bound_lies_below_its_likelihood() -> None:
    machine = with_biases(machines()["dbm"])
    guide = MeanFieldGuide(machine)
    data = torch.bernoulli(torch.full((5, 6), 0.5))
    exact = (machine.log_marginal({"v": data}) - machine.log_partition()).detach()
    found = annealed_importance_sampling(machine, 400, 100, data=data, guide=guide, num_raise_chains=200, seed=0)
    assert found.log_likelihood is not None
    assert found.log_likelihood_bound is not None
    assert found.log_likelihood[0] < float(exact.mean()) + 0.02
    assert found.log_likelihood_bound[0] == pytest.approx(float(exact.mean()), abs=0.2)


def test_a_large_deep_machine_gets_its_bound_without_more_ado() -> None:
    """Mean field is the guide where none is given: for the bound of the likelihood and for RAISE."""
    machine = with_biases(DeepBoltzmannMachine([25, 22, 21], init_scale=0.1))
    data = torch.bernoulli(torch.full((5, 25), 0.5))
    assert not machine.sums_out(machine.hidden)
    found = annealed_importance_sampling(machine, 50, 50, base_rate=None, data=data, seed=0)
    bound = MeanFieldGuide(machine, 100).bound(data, log_z=found.log_z).mean().item()
    assert found.log_likelihood is not None
    assert found.log_likelihood[0] == pytest.approx(bound, abs=1e-3)
    assert found.log_likelihood_bound is not None
    assert found.log_likelihood_bound[0] == pytest.approx(bound, abs=1.0)


def test_it_is_a_walk_of_the_annealed_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = Annealed.__call__

    def counted(self: Any, *args: Any) -> Any:
        seen.append(args[1].num_steps)
        return plain(self, *args)

    monkeypatch.setattr(Annealed, "__call__", counted)
    annealed_importance_sampling(machines()["rbm"], 10, 7, seed=0)
    assert seen == [6]


def test_two_products_with_the_weights_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machines()["rbm"]
    count = 0
    plain = DenseCoupling.field

    def counted(self: Any, *args: Any) -> Tensor:
        nonlocal count
        count += 1
        return plain(self, *args)

    monkeypatch.setattr(DenseCoupling, "field", counted)
    calls = []
    for num_betas in (11, 21):
        count = 0
        annealed_importance_sampling(machine, 5, num_betas, seed=0)
        calls.append(count)
    assert calls[1] - calls[0] == 2 * 10


def test_it_warns_of_chains_that_dominate() -> None:
    machine = RestrictedBoltzmannMachine(16, 16, init_scale=6.0)
    with pytest.warns(UserWarning, match="dominate the estimate"):
        annealed_importance_sampling(machine, num_chains=200, num_betas=2, seed=0)


def test_the_base_rate_comes_from_the_offsets_or_is_given() -> None:
    machine = with_biases(machines()["rbm"])
    with torch.no_grad():
        machine.bias("v").fill_(3.0)
    plain = annealed_importance_sampling(machine, 100, 5, seed=0)
    rates = torch.sigmoid(machine.bias("v")).detach()
    better = annealed_importance_sampling(machine, 100, 5, base_rate=rates, seed=0)
    machine.offset("v").copy_(rates)
    default = annealed_importance_sampling(machine, 100, 5, seed=0)
    assert default.log_z == better.log_z
    assert better.ess > plain.ess


def test_bad_input() -> None:
    machine = machines()["rbm"]
    lateral = BoltzmannMachine({"v": BernoulliUnits(3), "h": BernoulliUnits(2)}, [("v", "h"), ("v", "v")])
    with pytest.raises(ValueError, match="num_chains=0"):
        annealed_importance_sampling(machine, num_chains=0)
    with pytest.raises(ValueError, match="num_betas=1"):
        annealed_importance_sampling(machine, num_betas=1)
    with pytest.raises(ValueError, match="lateral"):
        annealed_importance_sampling(lateral)
    with pytest.raises(ValueError, match="increasing numbers"):
        annealed_importance_sampling(machine, betas=torch.tensor([0.0, 0.5, 0.4, 1.0]))
    with pytest.raises(ValueError, match="betas='cosine'"):
        annealed_importance_sampling(machine, betas="cosine")
    with pytest.raises(ValueError, match="base_rate has shape"):
        annealed_importance_sampling(machine, base_rate=torch.zeros(3))
    with pytest.raises(ValueError, match="only 0 and 1"):
        raise_bound(machine, torch.full((2, 8), 0.5))


@pytest.mark.parametrize("kind", ["rbm", "dbm"])
def test_the_moment_averaged_path_reaches_the_same_log_z(kind: str) -> None:
    machine = with_biases(machines()[kind])
    exact = machine.log_partition().item()
    found = annealed_importance_sampling(
        machine, 300, 100, path="moment_averaged", knots=(3, 150), samples=None, seed=0
    )
    low, high = found.interval
    assert low < exact < high
    assert found.ess > 150


def test_knots_have_averaged_moments() -> None:
    machine = with_biases(machines()["rbm"])
    base = Between(machine, base_fields(machine, None, {}))
    with torch.no_grad():
        (knot,) = averaged_machines(base, 1, 1500)
        mean = {}
        for name, each in {"knot": knot, "machine": machine}.items():
            states = each.distribution().enumerate_support()
            weights = (-each.free_energy(states)).softmax(0)
            mean[name] = weights @ states
    assert torch.allclose(mean["knot"], (0.5 + mean["machine"]) / 2, atol=0.03)


def test_paths_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="path='arithmetic'"):
        annealed_importance_sampling(machines()["rbm"], path="arithmetic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not all binary"):
        annealed_importance_sampling(machines()["gaussian"], path="moment_averaged")
    with pytest.raises(ValueError, match=r"knots=\(0, 1000\)"):
        annealed_importance_sampling(machines()["rbm"], path="moment_averaged", knots=(0, 1000))


def test_adapted_betas_are_at_equal_distances() -> None:
    """In the standard deviation of the log weight's derivative, here over all states at each inverse temperature."""
    machine = with_biases(RestrictedBoltzmannMachine(4, 3, init_scale=3.0))
    between = Between(machine, base_fields(machine, None, {}))
    grid = torch.linspace(0, 1, 201)
    with torch.no_grad():
        betas = np.array(partition._adapted(between, 41))
        states = {"v": torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)}
        log_p = torch.stack([between.log_density(states, beta) for beta in grid.tolist()])
    (slope,) = torch.gradient(log_p, spacing=(grid,), dim=0)
    p = log_p.softmax(1)
    deviation = ((p * slope**2).sum(1) - (p * slope).sum(1) ** 2).clamp(min=0) ** 0.5
    assert deviation.max() > 2 * deviation.min()  # equal distances are not equal steps
    length = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(deviation, grid)])
    places = np.interp(betas, grid.numpy(), (length / length[-1]).numpy())
    assert np.abs(places - np.linspace(0, 1, 41)).max() < 0.02
