"""Eight schools: a two-level normal model of eight coaching experiments, not centred.

    mu ~ Normal(0, 5),  tau ~ HalfCauchy(5),  z_j ~ Normal(0, 1),  theta_j = mu + tau z_j
    y_j ~ Normal(theta_j, sigma_j)

Data: D. B. Rubin, "Estimation in parallel randomized experiments", Journal of Educational Statistics 6, 1981, as
printed in Gelman et al., "Bayesian Data Analysis", section 5.5: eight pairs of numbers.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pplvi.examples.example import Example

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
STANDARD_ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
SCHOOLS = ("A", "B", "C", "D", "E", "F", "G", "H")


def model(sigma: Tensor, y: Tensor | None = None) -> Tensor:
    """Score gains `y` of shape (8,) with known standard errors `sigma` of shape (8,); returns the gains.

    >>> model(*load().args).shape
    torch.Size([8])
    """
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", sigma.shape[-1]):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def load() -> Example:
    """The eight schools with their data, in the default dtype.

    >>> load().args[1].tolist()
    [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
    """
    return Example(
        "eight_schools", model, (torch.tensor(STANDARD_ERRORS), torch.tensor(EFFECTS)), {"school": list(SCHOOLS)}
    )
