"""Monitors and pictures of Boltzmann machines."""

from __future__ import annotations

import matplotlib as mpl
import pytest
import torch

from pplvi.energies import (
    DeepBoltzmannMachine,
    RestrictedBoltzmannMachine,
    chain_mixing,
    free_energy_gap,
    inpaint,
    nearest_neighbours,
)
from pplvi.energies.evaluation.pictures import plot_filters, plot_images

mpl.use("Agg")


def test_the_gap_is_a_difference_of_log_likelihoods() -> None:
    torch.manual_seed(0)
    rbm = RestrictedBoltzmannMachine(5, 3, init_scale=1.0)
    first, second = torch.bernoulli(torch.full((9, 5), 0.5)), torch.bernoulli(torch.full((7, 5), 0.5))
    p = rbm.distribution()
    exact = (p.log_prob(first).mean() - p.log_prob(second).mean()).item()
    gap = free_energy_gap(rbm, first, second)
    assert gap.value == pytest.approx(exact, abs=1e-5)
    assert gap.standard_error > 0


def test_chains_that_do_not_mix_are_told_from_chains_that_do() -> None:
    torch.manual_seed(0)
    free = chain_mixing(RestrictedBoltzmannMachine(8, 4, init_scale=0.1), 6, 100, seed=0)
    stuck = RestrictedBoltzmannMachine(8, 4, init_scale=0.0)
    with torch.no_grad():  # two modes, all on and all off, far from each other and of different energy
        stuck.weight("v", "h").fill_(6.0)
        stuck.bias("v").fill_(-12.0)
        stuck.bias("h").fill_(-23.0)
    bound = chain_mixing(stuck, 6, 100, seed=0)
    assert free.r_hat < 1.05
    assert bound.r_hat > 1.5
    assert free.ess > bound.ess
    assert free.changed > 0.4 > bound.changed
    deep = chain_mixing(DeepBoltzmannMachine([6, 4, 3]), 4, 20, seed=0)
    assert deep.free_energy.shape == (4, 20)


def test_missing_units_have_their_conditional_means() -> None:
    torch.manual_seed(1)
    rbm = RestrictedBoltzmannMachine(5, 3, init_scale=1.5)
    v = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0]])
    observed = torch.tensor([True, True, True, False, False])
    filled = inpaint(rbm, v, observed, num_sweeps=400, num_draws=50, seed=0)
    states = rbm.distribution().enumerate_support()
    possible = states[(states[:, :3] == v[0, :3]).all(1)]
    weights = (-rbm.free_energy(possible)).softmax(0)
    exact = (weights.unsqueeze(-1) * possible).sum(0)
    assert torch.equal(filled[0, :3], v[0, :3])
    assert torch.allclose(filled[0, 3:], exact[3:].detach(), atol=0.02)


def test_neighbours() -> None:
    data = torch.eye(4)
    found = nearest_neighbours(data[[2, 0]] * 0.9, data)
    assert found.indices.tolist() == [2, 0]
    assert torch.allclose(found.distance, torch.full((2,), 0.1), atol=1e-6)


def test_pictures() -> None:
    figure = plot_images(torch.rand(7, 6), (2, 3), columns=4, labels=["a", "b"])
    assert len(figure.axes) == 8
    assert sum(axis.has_data() for axis in figure.axes) == 7
    dbm = DeepBoltzmannMachine([9, 4, 3])
    assert len(plot_filters(dbm, num_filters=4, columns=2).axes) == 4


def test_bad_input() -> None:
    rbm = RestrictedBoltzmannMachine(4, 2)
    with pytest.raises(ValueError, match="at least 2 chains"):
        chain_mixing(rbm, num_chains=1)
    with pytest.raises(ValueError, match="the same width"):
        nearest_neighbours(torch.zeros(2, 3), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="expected booleans"):
        inpaint(rbm, torch.zeros(2, 4), torch.ones(4))
    with pytest.raises(ValueError, match="num_sweeps=1"):
        inpaint(rbm, torch.zeros(2, 4), torch.ones(4, dtype=torch.bool), num_sweeps=1)
    with pytest.raises(ValueError, match="expected 2 x 2"):
        plot_images(torch.rand(3, 5))
    with pytest.raises(ValueError, match="one for each of 1 rows"):
        plot_images(torch.rand(3, 4), labels=["a", "b"])
    with pytest.raises(ValueError, match="not connected"):
        plot_filters(DeepBoltzmannMachine([4, 3, 2]), "h2")
