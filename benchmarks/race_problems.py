"""The fourteen problems of benchmarks/race.py, written as a user would write them, and what their posteriors are.

Each has data as arrays, a model that takes them as arguments, and the mean and sd of every scalar that is judged, from
long reference runs. ``scalars`` maps posterior draws by name, latent and deterministic, to the reference's columns.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.posterior_targets import columns, eight_schools, ionosphere
from benchmarks.posteriordb_models import posteriordb

Draws = Mapping[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """One problem of the race.

    :ivar args: what the model is called with.
    :ivar scalars: draws ``{site: (S, ...)}`` to ``(S, columns)``.
    :ivar mean: of the columns, by the reference.
    :ivar sd: of the columns, by the reference.
    :ivar data: all arrays by name, for programs in other languages.
    :ivar dtype: that the problem needs.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    scalars: Callable[[Draws], Tensor]
    mean: np.ndarray
    sd: np.ndarray
    data: Mapping[str, np.ndarray]
    dtype: torch.dtype = torch.float32


def horseshoe(X: Tensor, y: Tensor) -> None:
    """A linear regression with a horseshoe prior."""
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    s = pyro.sample("s", dist.HalfNormal(2.0))
    with pyro.plate("predictors", X.shape[1]):
        lam = pyro.sample("lam", dist.HalfCauchy(1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    beta = pyro.deterministic("beta", z * lam * tau)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(X @ beta, s), obs=y)


def gaussian_process(x: Tensor, y: Tensor) -> None:
    """A Gaussian process with a squared exponential kernel and noise."""
    ell = pyro.sample("ell", dist.LogNormal(0.0, 1.0))
    amp = pyro.sample("amp", dist.LogNormal(0.0, 1.0))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
    square = (x[:, None] - x) ** 2
    cov = amp**2 * torch.exp(-square / (2 * ell**2)) + (noise**2 + 1e-6) * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), cov), obs=y)


def stochastic_volatility(y: Tensor) -> None:
    """A random walk of the log variance, seen through Student's t."""
    sigma = pyro.sample("sigma", dist.Exponential(10.0))
    nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
    h0 = pyro.sample("h0", dist.Normal(0.0, 2.0))
    with pyro.plate("steps", len(y)):
        eps = pyro.sample("eps", dist.Normal(0.0, 1.0))
    h = pyro.deterministic("h", h0 + sigma * eps.cumsum(-1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(nu, 0.0, (h / 2).exp()), obs=y)


def garch(y: Tensor) -> None:
    """GARCH(1, 1), started at its stationary variance.

    The factor is the reference's, whose draws have a density of ``1 / (1 - a1)`` beside that of the priors: the mean of
    the gradient of the log density over them, which is zero for draws of a density, is 6.9 standard errors from zero in
    ``a1`` without it and .8 with it, the other coordinates within one.
    """
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    a0 = pyro.sample("a0", dist.HalfNormal(2.0))
    a1 = pyro.sample("a1", dist.Uniform(0.0, 1.0))
    f = pyro.sample("f", dist.Uniform(0.0, 1.0))
    b1 = pyro.deterministic("b1", f * (1 - a1))
    pyro.factor("reference", -torch.log1p(-a1))
    variance = a0 / (1 - 0.99 * (a1 + b1))
    variances = []
    for t in range(len(y)):
        if t > 0:
            variance = a0 + a1 * (y[t - 1] - mu) ** 2 + b1 * variance
        variances.append(variance)
    with pyro.plate("days", len(y)):
        pyro.sample("y", dist.Normal(mu, torch.stack(variances, -1).sqrt()), obs=y)


def counts(g: Tensor, x: Tensor, y: Tensor) -> None:
    """Poisson regression with an intercept for each of 100 groups."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 100):
        a = pyro.sample("a", dist.Normal(mu, s))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson((a[g] + b * x).exp()), obs=y)


def slopes(g: Tensor, x: Tensor, y: Tensor) -> None:
    """Varying intercepts and slopes in 85 groups."""
    mu_a = pyro.sample("mu_a", dist.Normal(0.0, 2.0))
    mu_b = pyro.sample("mu_b", dist.Normal(0.0, 2.0))
    sa = pyro.sample("sa", dist.HalfNormal(1.0))
    sb = pyro.sample("sb", dist.HalfNormal(1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("groups", 85):
        a = pyro.sample("a", dist.Normal(mu_a, sa))
        b = pyro.sample("b", dist.Normal(mu_b, sb))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[g] + b[g] * x, s), obs=y)


# name -> model, arguments, columns; "log" says which of them are judged by their logarithm
_RACE: dict[str, tuple[Callable[..., None], tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "hs10": (horseshoe, ("X", "y"), ("tau", "lam", "s", "beta"), ("tau", "lam", "s")),
    "hs100": (horseshoe, ("X", "y"), ("tau", "lam", "s", "beta"), ("tau", "lam", "s")),
    "gp": (gaussian_process, ("x", "y"), ("ell", "amp", "noise"), ("ell", "amp", "noise")),
    "sv": (stochastic_volatility, ("y",), ("sigma", "nu", "h"), ("sigma", "nu")),
    "garch": (garch, ("y",), ("mu", "a0", "a1", "b1"), ("a0",)),
    "pois": (counts, ("g", "x", "y"), ("mu", "s", "b", "a"), ("s",)),
    "radon": (slopes, ("g", "x", "y"), ("mu_a", "mu_b", "sa", "sb", "s", "a", "b"), ("sa", "sb", "s")),
}
_STAN = {
    "mixture": "low_dim_gauss_mix-low_dim_gauss_mix",
    "hmm": "hmm_example-hmm_example",
    "kidiq": "kidiq-kidscore_interaction",
    "diamonds": "diamonds-diamonds",
}
NAMES = ("schools", "schools_centered", "ionosphere", *_STAN, "radon", "pois", "garch", "gp", "sv", "hs10", "hs100")


def _of_race(folder: Path, name: str) -> Problem:
    model, arguments, sites, logs = _RACE[name]
    with np.load(folder / f"{name}.npz") as file:
        data = {argument: file[f"data_{argument}"] for argument in arguments}
        mean, sd = file["reference_mean"], file["reference_sd"]
    dtype = torch.float64 if name == "gp" else torch.float32  # a jitter of 1e-6 is below what single precision sees
    return Problem(name, model, tuple(data.values()), columns(*sites, log=logs), mean, sd, data, dtype)


def _arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The data of a problem whose program is a closure over them."""
    if name in _STAN:
        content = json.loads((folder / "posteriordb" / f"{_STAN[name]}.data.json").read_text())
        return {key: np.asarray(value, float) for key, value in content.items()}
    with np.load(folder / "targets" / f"{'ionosphere' if name == 'ionosphere' else 'eight_schools'}.npz") as file:
        return {key: file[key] for key in file if key != "reference_draws"}


def load(folder: Path, name: str) -> Problem:
    """A problem by its name.

    :param folder: of the files of the race; what other benchmarks read lies beside it.
    """
    if name in _RACE:
        return _of_race(folder, name)
    if name in _STAN:
        target = posteriordb(folder.parent, _STAN[name])
    elif name == "ionosphere":
        target = ionosphere(folder.parent)
    else:
        target = eight_schools(folder.parent, centered=name == "schools_centered")
    assert target.reference is not None
    reference = target.reference.double().numpy()
    mean, sd = reference.mean(0), reference.std(0)
    data = _arrays(folder.parent, name)
    return Problem(name, target.model, (), target.coordinates, mean, sd, data, torch.float64)
