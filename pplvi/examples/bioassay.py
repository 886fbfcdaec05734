"""Bioassay: a logistic regression of deaths on the dose, with four groups of five animals.

    a ~ Normal(0, 2),  b ~ Normal(10, 10),  deaths_i ~ Binomial(5, logit = a + b dose_i)

The posterior is bent, and far from normal with so few data. Data: A. Racine, A. P. Grieve, H. Fluhler and A. F. M.
Smith, "Bayesian methods in practice: experiences in the pharmaceutical industry", Applied Statistics 35, 1986, as
printed in Gelman et al., "Bayesian Data Analysis", section 3.7: four pairs of numbers.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pplvi.examples.example import Example

LOG_DOSES = (-0.86, -0.30, -0.05, 0.73)
DEATHS = (0.0, 1.0, 3.0, 5.0)
ANIMALS = 5


def model(dose: Tensor, deaths: Tensor | None = None) -> Tensor:
    """Deaths of shape (4,) at doses of shape (4,), in log g/ml; returns the deaths.

    >>> model(*load().args).tolist()
    [0.0, 1.0, 3.0, 5.0]
    """
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(10.0, 10.0))
    with pyro.plate("group", dose.shape[-1]):
        return pyro.sample("deaths", dist.Binomial(ANIMALS, logits=a + b * dose), obs=deaths)


def load() -> Example:
    """The four groups with their data, in the default dtype.

    >>> load().args[0].shape
    torch.Size([4])
    """
    return Example("bioassay", model, (torch.tensor(LOG_DOSES), torch.tensor(DEATHS)))
