"""Diabetes: a robust linear regression whose Student-t errors have an unknown number of degrees of freedom.

    intercept ~ Normal(0, 1),  rotated_k ~ Normal(0, 1),  scale ~ HalfNormal(1),  df ~ Gamma(2, 0.1)
    x = Q R,  coef = R^-1 rotated,  y_i ~ StudentT(df, intercept + x_i . coef, scale)

Some of the measurements are nearly collinear; their rotation by the QR decomposition, with Q of unit variance, takes
the correlation out of the posterior, as the Stan user's guide recommends for regressions.
The prior of df is the one of M. A. Juarez and M. F. J. Steel, "Model-based clustering of non-Gaussian panel data
based on skew-t distributions", Journal of Business & Economic Statistics 28, 2010. Data: 442 patients, ten measurements
and the progression of the disease a year later, of B. Efron et al., "Least angle regression", Annals of Statistics 32,
2004, in `diabetes.csv` beside this file.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pplvi.examples.example import Example, read_rows, standardize


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Standardised progression `y` of shape (n,) given measurements `x` of shape (n, k); returns the progression.

    >>> x, y = load().args
    >>> model(x).shape == y.shape
    True
    """
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    q, r = torch.linalg.qr(x)
    unit = (len(x) - 1) ** 0.5
    with pyro.plate("direction", x.shape[-1], dim=-1):
        rotated = pyro.sample("rotated", dist.Normal(0.0, 1.0))
    coef = torch.linalg.solve_triangular(r / unit, rotated.unsqueeze(-1), upper=True).squeeze(-1)
    pyro.deterministic("coef", coef, event_dim=1)
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    df = pyro.sample("df", dist.Gamma(2.0, 0.1))
    mean = intercept + rotated @ q.T * unit
    with pyro.plate("patient", x.shape[-2], dim=-1):
        return pyro.sample("y", dist.StudentT(df, mean, scale), obs=y)


def load() -> Example:
    """The diabetes regression with standardised columns, in the default dtype.

    >>> x, y = load().args
    >>> tuple(x.shape), tuple(y.shape)
    ((442, 10), (442,))
    """
    rows = read_rows("diabetes.csv")
    *features, progression = rows[0]
    values = torch.tensor([[float(row[name]) for name in (*features, progression)] for row in rows])
    x, y = standardize(values[:, :-1]), standardize(values[:, -1])
    return Example("diabetes", model, (x, y), {"feature": features}, {"coef": ["feature"]})
