"""The unconstrained density: as many rows at once as fit, and the same values whatever their number."""

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
