"""The unconstrained density: as many rows at once as fit, and the same values whatever their number."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pplvi.programs.density import CHUNK, UnconstrainedDensity
from pplvi.programs.work import Work

pytestmark = pytest.mark.usefixtures("float64")
PLACES = torch.linspace(0.0, 1.0, 60, dtype=torch.float64)


def gaussian_process(x, y):
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    covariance = (-0.5 * ((x - x[:, None]) / length).square()).exp() + 0.1 * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)


def regression(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


@pytest.mark.parametrize("way", [None, "loop"])
def test_wide_rows_go_through_in_parts(way):
    """Sixty data have a matrix of 28 kB for a row: the largest tensor of a call stays within 4 MiB."""
    density = UnconstrainedDensity(gaussian_process, (PLACES, PLACES.sin()), vectorize=way)
    rows = torch.linspace(-2.0, 1.0, 300)[:, None]
    with Work() as work:
        value, gradient = density.value_and_gradient(rows)
    assert work.widest <= 4 * 2**20
    assert (density.rows_at_once < 200) == (way is None)
    for k in (0, 151, 299):
        alone, slope = density.value_and_gradient(rows[k : k + 1])
        torch.testing.assert_close((value[k], gradient[k]), (alone[0], slope[0]))


def test_wide_data_are_no_wide_rows():
    """What does not grow with rows is no reason for parts."""
    x = torch.linspace(-1.0, 1.0, 400)
    assert UnconstrainedDensity(regression, (x, x)).rows_at_once == CHUNK


def test_rows_without_a_gradient_go_through_in_larger_parts():
    """Nothing is kept of them, and a call of the program costs as much for few rows as for many."""
    runs = []

    def model():
        runs.append(1)
        return pyro.sample("x", dist.Normal(0.0, 1.0))

    density, rows = UnconstrainedDensity(model), torch.zeros(4 * CHUNK, 1)
    runs.clear()
    density.value_and_gradient(rows)
    assert len(runs) == 4
    with torch.no_grad():
        density(rows)
    assert len(runs) == 5


def test_rows_of_an_enumerated_model_go_through_together():
    """What is summed out has dimensions beside those of the rows: they are run in the fastest way."""

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(loc + z, 1.0), obs=y)

    y, rows = torch.tensor([0.3, -1.2, 0.8]), torch.tensor([[0.0], [1.5], [-2.0]])
    density = UnconstrainedDensity(model, (y,))
    assert density.way.word == "broadcast"
    parts = [math.log(p) + dist.Normal(rows + z, 1.0).log_prob(y) for z, p in ((0, 0.6), (1, 0.4))]
    exact = dist.Normal(0.0, 1.0).log_prob(rows[:, 0]) + torch.logaddexp(*parts).sum(1)
    torch.testing.assert_close(density(rows), exact)


def test_scales_far_from_one_are_the_units_of_a_search():
    """Powers of two, of real numbers as a factor and of positive ones where their logarithms are zero."""

    def model():
        pyro.sample("far", dist.Normal(0.0, 1e5))
        pyro.sample("near", dist.Normal(0.0, 2.0))
        pyro.sample("small", dist.Exponential(1e6))

    density = UnconstrainedDensity(model, in_units=True)
    zero, one = density.units
    torch.testing.assert_close(zero, torch.tensor([0.0, 0.0, -20 * math.log(2.0)]))
    torch.testing.assert_close(one, torch.tensor([2.0**17, 1.0, 1.0]))
    assert density.unpack(torch.ones(1, 3))["far"].item() == 2.0**17
