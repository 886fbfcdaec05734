"""What scouts are made of: mixtures of Student distributions that are pushed and fitted, and rows that climb."""

import math

import torch

from pplvi.posterior.ascent import ascend
from pplvi.posterior.students import Students

TRIL = torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=torch.float64)


def normal(loc: list[float]) -> Students:
    return Students(torch.zeros(1), torch.tensor([loc]).double(), TRIL[None], torch.tensor([math.inf]))


def test_noise_is_pushed_along_the_scale():
    noise = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    pushed = normal([3.0, -1.0]).push(noise, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(pushed, torch.tensor([3.0, -1.0]) + noise @ TRIL.T)


def test_one_normal_is_fitted_by_moments_drawn_towards_the_present_covariance():
    torch.manual_seed(0)
    draws, weight = torch.randn(50, 2, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    weight = weight / weight.sum()
    found, effective = normal([0.5, 0.5]).fitted(draws, weight, steps=1), 1 / weight.square().sum()
    loc = weight @ draws
    scatter = (weight[:, None] * (draws - loc)).T @ (draws - loc)
    covariance = (effective * scatter + 4 * TRIL @ TRIL.T) / (effective + 4)
    torch.testing.assert_close(found.loc[0], loc)
    torch.testing.assert_close(found.tril[0] @ found.tril[0].T, covariance)


def test_rows_climb_a_narrow_ridge_in_a_few_steps():
    scale = torch.logspace(0, 3, 6, dtype=torch.float64)

    def ridge(x):
        return -0.5 * (scale * (x - 1).square()).sum(1), -scale * (x - 1)

    starts = torch.stack([torch.zeros(6), torch.linspace(-2, 3, 6)]).double()
    assert bool((ascend(ridge, starts, 40).value > -0.002).all())
