"""Goodfellow, Bengio & Courville (2016), Deep learning, sections 19.4.2 and 19.4.4: what can be known exactly."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pplvi.guides.search.deterministic import _Objective
from pplvi.programs.density import UnconstrainedDensity

pytestmark = pytest.mark.usefixtures("float64")
GRID = torch.linspace(-8.0, 8.0, 161, dtype=torch.float64)
STARTS = {
    "uniform": torch.zeros_like(GRID),
    "two humps": -((GRID.abs() - 4.0) ** 2),
    "to one side": -0.5 * (GRID - 5.0).abs(),
}


FEATURES = torch.stack([GRID, (GRID - 0.5) ** 2])
MOMENTS = torch.tensor([0.5, 2.0], dtype=torch.float64)


def ascend(log_p: Tensor, steps: int = 3000) -> Tensor:
    """Ascent of the Lagrangian of 19.50 in the density, along its functional derivative, and descent in multipliers.

    The derivative of the entropy in ``p(x)`` is ``-log p(x) - 1``, that of a moment what it is the mean of; steps are
    taken in ``log p``, where they are those of mirror ascent, and the total is kept at one.
    """
    multipliers = torch.zeros(2, dtype=torch.float64)
    for _ in range(steps):
        violation = FEATURES @ log_p.softmax(-1) - MOMENTS
        multipliers = multipliers + 0.02 * violation
        slope = -log_p - (multipliers + 0.1 * violation) @ FEATURES
        log_p = (log_p + 0.1 * slope).log_softmax(-1)
    return log_p.softmax(-1)


@pytest.mark.parametrize("name", STARTS)
def test_the_density_of_most_entropy_is_the_gaussian(name: str) -> None:
    """Given mean and variance, from any start; on the grid within 1e-4 of total variation."""
    found = ascend(STARTS[name])
    gaussian = dist.Normal(0.5, 2.0**0.5).log_prob(GRID).softmax(-1)
    assert 0.5 * (found - gaussian).abs().sum() < 1e-4


def two_latents(v: Tensor, w: Tensor) -> None:
    """19.57: two independent standard normals that explain one number together."""
    h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("v", dist.Normal((w * h).sum(-1), 1.0), obs=v)


def test_the_mean_field_of_two_latents_has_exact_means_and_less_variance() -> None:
    """19.67: variances ``1 / (1 + w_i^2)``, where the posterior's are larger, as the two trade off."""
    v, w = torch.tensor(1.7), torch.tensor([1.5, -0.8])
    precision = torch.eye(2) + torch.outer(w, w)
    covariance = torch.linalg.inv(precision)
    points = 2.0**0.5 * torch.cat([torch.eye(2), -torch.eye(2)])  # with the moments of a standard normal
    objective = _Objective(UnconstrainedDensity(two_latents, (v, w)), points)
    mean, log_scale = (found := objective.minimise(torch.zeros(4))).chunk(2)
    torch.testing.assert_close(mean, covariance @ (w * v), rtol=1e-4, atol=0)
    torch.testing.assert_close((2 * log_scale).exp(), 1 / (1 + w**2), rtol=1e-4, atol=0)
    assert ((2 * log_scale).exp() < covariance.diagonal()).all()
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))  # KL(q || p)
    evidence = dist.Normal(0.0, (1 + w @ w).sqrt()).log_prob(v)
    assert -objective.value_and_gradient(found)[0] == pytest.approx(float(evidence - gap), abs=1e-8)
