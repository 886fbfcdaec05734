"""Minibatches of large plates: every choice is as likely, in every order, and no permutation of the plate is made."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pplvi
from pplvi.programs.minibatches import FewIndices, some_of


@pytest.mark.parametrize(("size", "number"), [(5, 1), (5, 2), (4, 3), (4, 4)])
def test_every_choice_in_every_order_is_as_likely(size, number):
    torch.manual_seed(0)
    draws = torch.stack([some_of(size, number) for _ in range(2_000)])
    assert ((draws >= 0) & (draws < size)).all()
    counts = (draws * size ** torch.arange(number)).sum(1).unique(return_counts=True)[1].double()
    cells = math.perm(size, number)
    assert len(counts) == cells
    expected = len(draws) / cells
    chi_square = ((counts - expected).square() / expected).sum()
    assert abs(chi_square - (cells - 1)) < 4 * math.sqrt(2 * (cells - 1))


def test_pairs_of_a_large_plate_are_as_likely_as_each_other():
    torch.manual_seed(1)
    draws = torch.stack([some_of(10**9, 64) for _ in range(400)]).double() / 10**9
    assert all(len(row.unique()) == 64 for row in draws)
    error = 1 / math.sqrt(12 * draws.numel())
    assert abs(draws.mean() - 0.5) < 4 * error
    together = draws.T.corrcoef()  # of places in the minibatch
    assert together.triu(1).abs().max() < 5 / math.sqrt(len(draws))


@pytest.mark.parametrize("compile", [False, "trace"])
def test_a_step_makes_no_permutation_of_a_large_plate(compile, monkeypatch):
    made, permutation = [], torch.randperm

    def counted(size, **kwargs):
        made.append(size)
        return permutation(size, **kwargs)

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y), subsample_size=50) as i:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[i])

    monkeypatch.setattr(torch, "randperm", counted)
    y = 3.0 + torch.linspace(-1.0, 1.0, 20_000)
    fit = pplvi.fit(
        model, AutoNormal, args=(y,), num_steps=60, learning_rate=0.2, compile=compile, seed=0, progress=False
    )
    assert made.count(len(y)) < 10  # by Pyro, when it sets up the guide
    assert abs(fit.guide.median(y)["loc"] - 3.0) < 0.3


def test_small_plates_are_drawn_as_pyro_draws_them():
    torch.manual_seed(0)
    with FewIndices(), pyro.plate("data", 20, subsample_size=5) as drawn:
        pass
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.randperm(20)[:5])
