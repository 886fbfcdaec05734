"""Rejection control: weights are proper, by a sum over every outcome."""

from itertools import product

import pytest
import torch
from torch import Tensor

from pplvi.weights.rejection import Rejection, rejection_control

pytestmark = pytest.mark.usefixtures("float64")

PROPOSAL = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
WEIGHT = torch.tensor([0.25, 3.0, 0.5], dtype=torch.float64)  # of the three values, quarters of any threshold below
QUARTERS = (0.125, 0.375, 0.625, 0.875)  # acceptance probabilities are quarters, so these four numbers are all there is


@pytest.fixture
def uniforms(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the next call draws in place of uniform numbers."""
    given: list[Tensor] = []
    monkeypatch.setattr(torch, "rand_like", lambda like: given.pop().expand_as(like))
    return given


@pytest.mark.parametrize("threshold", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("tries", [2, 3, 4])
def test_weights_are_proper_by_a_sum_over_all_outcomes(tries: int, threshold: float, uniforms: list[Tensor]) -> None:
    """E[w' h(x)] = E_q[w h(x)] for the indicator of each value, and so for every h; their sum is Z."""
    weight = torch.tensor([0.75, 3.0, 1.5]) if threshold == 3.0 else WEIGHT
    values = torch.tensor(list(product(range(3), repeat=tries))).T  # (tries, outcomes)
    noise = torch.tensor(list(product(QUARTERS, repeat=tries - 1))).T
    noise = torch.cat([noise, torch.full_like(noise[:1], 0.5)])  # the last draw needs none
    values, noise = values.repeat_interleave(noise.shape[1], 1), noise.repeat(1, values.shape[1])
    mass = PROPOSAL[values].prod(0) / 4 ** (tries - 1)
    assert float(mass.sum()) == pytest.approx(1.0)
    uniforms.append(noise)
    log_weight = weight[values].log()
    chosen, log_factor = rejection_control(log_weight, torch.tensor(threshold).log())
    kept = values.gather(0, chosen[None])[0]
    found = mass * (log_weight.gather(0, chosen[None])[0] + log_factor).exp()
    expected = PROPOSAL * weight
    torch.testing.assert_close(torch.stack([found[kept == v].sum() for v in range(3)]), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.sum(), expected.sum(), rtol=1e-12, atol=0)
    assert set(chosen.tolist()) == set(range(tries))
    early = chosen < tries - 1
    assert (found[early] / mass[early] <= torch.maximum(weight[kept], torch.tensor(threshold))[early] + 1e-12).all()


def test_a_low_threshold_is_plain_importance_sampling_and_a_high_one_rejection_sampling() -> None:
    torch.manual_seed(0)
    log_weight = torch.randn(400, 200)
    chosen, log_factor = rejection_control(log_weight, -50.0)
    assert chosen.abs().sum() == 0 == log_factor.abs().sum()
    bound = log_weight.max()
    chosen, log_factor = rejection_control(log_weight, bound)
    new = log_weight.gather(0, chosen[None])[0] + log_factor
    usual = chosen < 200
    assert usual.float().mean() > 0.95
    assert new[usual].std() < 0.15 < log_weight.std()  # weights are one constant, but for the estimate of Z


def test_draws_without_weight_are_not_accepted_and_nothing_is_nan() -> None:
    nothing = torch.full((3, 2), -torch.inf)
    nothing[1, 0] = 0.0
    for threshold in (0.0, torch.tensor([0.0, -3.0])):
        chosen, log_factor = rejection_control(nothing, threshold)
        assert chosen.tolist() == [1, 2]
        assert log_factor.tolist() == [-torch.inf, 0.0]  # the estimate is 0: so it is at times, to be right on average
    chosen, log_factor = Rejection(2).choose(torch.full((3, 4), -torch.inf))
    assert chosen.tolist() == [2] * 4
    assert log_factor.tolist() == [0.0] * 4


def test_hostile_arguments_are_refused() -> None:
    for bad in (torch.zeros(1, 3), torch.zeros(()), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="at least two draws"):
            rejection_control(bad, 0.0)
    for shape in ((2,), (1, 3), (0,)):
        with pytest.raises(ValueError, match="one that broadcasts"):
            rejection_control(torch.zeros(4, 3), torch.zeros(shape))
    for threshold in (float("nan"), float("inf"), "high"):
        with pytest.raises(ValueError, match="log_threshold"):
            rejection_control(torch.zeros(3), threshold)
        with pytest.raises(ValueError, match="log_threshold"):
            Rejection(3, threshold)
    with pytest.raises(ValueError, match="num_tries=1"):
        Rejection(1)
