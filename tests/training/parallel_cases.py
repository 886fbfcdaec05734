"""Fits that any number of ranks has to do alike, each a function of the parallel options to what came out."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pplvi
from pplvi.fitting import Minibatches

ROWS, PARTICLES = 11, 4
_RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, 3, generator=_RANDOM, dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.3
NOISE = torch.randn(PARTICLES, ROWS, generator=_RANDOM, dtype=torch.float64)  # of local latents, the same on any rank
ROW = torch.arange(ROWS)
ALL = (X, Y, ROW)


class Noise(Messenger):
    """Draws of local latents whose noise belongs to the row."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "z" and msg["value"] is None and not msg["done"]:
            noise = NOISE[:, self.rows] if len(msg["fn"].batch_shape) > 1 else NOISE[0, self.rows]
            msg["value"], msg["done"] = msg["fn"].loc + msg["fn"].scale * noise, True


def regression(x, y, rows):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    s = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), s), obs=y)


def factors(x, y, rows):
    slope = pyro.param("slope", torch.tensor(0.3))
    with pyro.plate("data", ROWS, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * z + x[:, 0], 1.0), obs=y)


def amortised(x, y, rows):
    a, b = pyro.param("a", torch.tensor([0.2, -0.1, 0.3])), pyro.param("b", torch.tensor(-0.5))
    with pyro.plate("data", ROWS, subsample_size=len(y)), Noise(rows):
        pyro.sample("z", dist.Normal(x @ a, b.exp()))


def both(x, y, rows):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal((x * w.unsqueeze(-2)).sum(-1), 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def both_guide(x, y, rows):
    loc, scale = pyro.param("loc", torch.zeros(3)), pyro.param("scale", torch.full((3,), -1.0)).exp()
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))
    amortised(x, y, rows)


def fitted(model: Any, guide: Any, parallel: Any, **options: Any) -> dict[str, Any]:
    """What is left of a short fit."""
    options = {"args": ALL, "num_steps": 8, "seed": 0, "progress": False, "dtype": torch.float64, **options}
    fit = pplvi.fit(model, guide, optim=partial(torch.optim.SGD, lr=0.01), parallel=parallel, **options)
    return {**{n: p.numpy() for n, p in fit.runs[0].params.items()}, "losses": fit.losses[0]}


def loader(size: int = 4) -> Iterator[Any]:
    """Shuffled batches, the last of which is shorter."""
    return DataLoader(TensorDataset(*ALL), batch_size=size, shuffle=True)


FULL, ALONE = pplvi.fitting.DataParallel(shard=True), "none"
MODELS = {"global": (regression, AutoMultivariateNormal), "local": (factors, amortised), "both": (both, both_guide)}
OBJECTIVES = {
    "ELBO": pplvi.ELBO(PARTICLES),
    "exact entropy": pplvi.ELBO(PARTICLES, entropy="exact"),
    "analytic KL": pplvi.ELBO(PARTICLES, entropy="kl"),
    "stl": pplvi.ELBO(PARTICLES, estimator="stl"),
    "vimco": pplvi.ImportanceWeightedELBO(PARTICLES, estimator="vimco"),
    "IWAE": pplvi.ImportanceWeightedELBO(PARTICLES),
    "dreg": pplvi.ImportanceWeightedELBO(PARTICLES, estimator="dreg"),
    "Renyi": pplvi.RenyiELBO(0.5, PARTICLES),
    "chi": pplvi.ChiELBO(PARTICLES),
    "thermodynamic": pplvi.ThermodynamicELBO(PARTICLES),
    "RWS": pplvi.ReweightedWakeSleep(PARTICLES),
    "sum": pplvi.ELBO(PARTICLES) + 0.5 * pplvi.ForwardKL(PARTICLES),
}
CASES: dict[str, Callable[[Any], dict[str, Any]]] = {
    f"{latents}, {name}": lambda parallel, pair=pair, objective=objective: fitted(*pair, parallel, objective=objective)
    for latents, pair in MODELS.items()
    for name, objective in OBJECTIVES.items()
    if (latents, name) != ("both", "analytic KL")  # a draw for all particles has none
}
