"""Grunfeld: a regression of the investment of eleven firms over twenty years, with an intercept for each firm.

    mu ~ Normal(0, 1),  tau ~ HalfNormal(1),  intercept_f ~ Normal(mu, tau),  b_value, b_capital ~ Normal(0, 1)
    sigma ~ HalfNormal(1),  y_tf ~ Normal(intercept_f + b_value value_tf + b_capital capital_tf, sigma)

All three variables are logarithms. Investment is standardised; value and capital are centred within each firm, so that
an intercept is the mean investment of its firm, and scaled to unit variance. The data, in the public domain, are
`grunfeld.csv` beside this file, which states their source and licence.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pplvi.examples.example import Example, read_rows


def model(value: Tensor, capital: Tensor, investment: Tensor | None = None) -> Tensor:
    """Investment of shape (years, firms) given market value and capital of the same shape; returns the investment.

    >>> value, capital, investment = load().args
    >>> model(value, capital).shape == investment.shape
    True
    """
    years, firms = value.shape
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    b_value = pyro.sample("b_value", dist.Normal(0.0, 1.0))
    b_capital = pyro.sample("b_capital", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("firm", firms, dim=-1):
        intercept = pyro.sample("intercept", dist.Normal(mu, tau))
        with pyro.plate("year", years, dim=-2):
            mean = intercept + b_value * value + b_capital * capital
            return pyro.sample("investment", dist.Normal(mean, sigma), obs=investment)


def load() -> Example:
    """The panel of eleven firms in logarithms, centred and scaled, in the default dtype.

    >>> example = load()
    >>> [tuple(arg.shape) for arg in example.args]
    [(20, 11), (20, 11), (20, 11)]
    >>> example.coords["firm"][:2]
    ['General Motors', 'US Steel']
    """
    rows = read_rows("grunfeld.csv")
    firms, years = list(dict.fromkeys(row["firm"] for row in rows)), sorted({int(row["year"]) for row in rows})
    cells = {(int(row["year"]), row["firm"]): row for row in rows}

    def column(name: str) -> Tensor:
        return torch.tensor([[float(cells[year, firm][name]) for firm in firms] for year in years]).log()

    def within(table: Tensor) -> Tensor:
        centred = table - table.mean(0)
        return centred / centred.std()

    investment = column("invest")
    args = within(column("value")), within(column("capital")), (investment - investment.mean()) / investment.std()
    return Example("grunfeld", model, args, {"firm": firms, "year": years})
