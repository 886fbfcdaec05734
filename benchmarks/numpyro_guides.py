"""NumPyro's guides on the targets of benchmarks/posteriors.py: programs, training, and draws with importance weights.

For comparison only, and only where NumPyro is installed (pip install -c constraints.txt -e '.[bench]'): nothing of it
is imported before a function is called. 64 draws a step and 10,000 steps of Adam, as the published gaps that the table
compares with; float32, which is NumPyro's default; guides with their default settings.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pplvi.posterior import Draws, WeightedDraws

STEPS, PARTICLES = 10_000, 64

# guide -> its class in numpyro.infer.autoguide, and Adam's learning rate
GUIDES: dict[str, tuple[str, float]] = {
    "numpyro AutoNormal": ("AutoNormal", 0.01),
    "numpyro AutoMultivariateNormal": ("AutoMultivariateNormal", 0.002),
    "numpyro AutoIAFNormal": ("AutoIAFNormal", 0.001),
    "numpyro AutoDAIS": ("AutoDAIS", 0.005),
}

Program = Callable[[], None]


def is_available() -> bool:
    """Whether NumPyro is installed."""
    return importlib.util.find_spec("numpyro") is not None


def _read(folder: Path, name: str) -> dict[str, Any]:
    import jax.numpy as jnp

    with np.load(folder / "targets" / f"{name}.npz") as file:
        return {key: jnp.asarray(file[key]) for key in file if key != "reference_draws"}


def eight_schools(folder: Path) -> Program:
    """Effects standardised."""
    import numpyro
    import numpyro.distributions as dist

    data = _read(folder, "eight_schools")

    def model() -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", 8):
            theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(mu + tau * theta, data["sigma"]), obs=data["y"])

    return model


def funnel(folder: Path) -> Program:
    """Neal's, in ten dimensions."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model() -> None:
        v = numpyro.sample("v", dist.Normal(0.0, 3.0))
        with numpyro.plate("nine", 9):
            numpyro.sample("x", dist.Normal(0.0, jnp.exp(0.5 * v)))

    return model


def seeds(folder: Path) -> Program:
    """A random effect for each of 21 plates."""
    import numpyro
    import numpyro.distributions as dist

    d = _read(folder, "seeds")

    def model() -> None:
        tau = numpyro.sample("tau", dist.Gamma(0.01, 0.01))
        a = numpyro.sample("a", dist.Normal(0.0, 10.0).expand([4]).to_event(1))
        fixed = a[0] + a[1] * d["x1"] + a[2] * d["x2"] + a[3] * d["x1"] * d["x2"]
        with numpyro.plate("plates", 21):
            b = numpyro.sample("b", dist.Normal(0.0, tau**-0.5))
            numpyro.sample("r", dist.Binomial(d["n"], logits=fixed + b), obs=d["r"])

    return model


def brownian(folder: Path) -> Program:
    """Brownian motion with unknown innovation and observation noise."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    observed = _read(folder, "brownian")["observed"]
    seen = np.flatnonzero(~np.isnan(np.asarray(observed)))
    steps = jnp.tril(jnp.ones((30, 30)))

    def model() -> None:
        noise = numpyro.sample("q", dist.LogNormal(0.0, 2.0))
        scale = numpyro.sample("s", dist.LogNormal(0.0, 2.0))
        x = numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(30), scale_tril=scale * steps))
        numpyro.sample("y", dist.Normal(x[seen], noise).to_event(1), obs=observed[seen])

    return model


def logistic(folder: Path, name: str, prior_sd: float) -> Program:
    """Logistic regression."""
    import jax
    import numpyro
    import numpyro.distributions as dist

    d = _read(folder, name)
    signed = (2 * d["y"] - 1)[:, None] * d["X"]

    def model() -> None:
        w = numpyro.sample("w", dist.Normal(0.0, prior_sd).expand([signed.shape[1]]).to_event(1))
        numpyro.factor("y", jax.nn.log_sigmoid(signed @ w).sum())

    return model


PROGRAMS: dict[str, Callable[[Path], Program]] = {
    "eight_schools": eight_schools,
    "funnel": funnel,
    "brownian": brownian,
    "seeds": seeds,
    "ionosphere": partial(logistic, name="ionosphere", prior_sd=1.0),
    "sonar": partial(logistic, name="sonar", prior_sd=1.0),
    "credit": partial(logistic, name="credit", prior_sd=10.0),
}


@dataclass(frozen=True)
class Trained:
    """A program, its guide, and the guide's parameters.

    :ivar gradients: how many gradients of the log density training took.
    """

    model: Program
    guide: Any
    params: Any
    gradients: int

    def posterior(self, num_draws: int, seed: int, chunk: int) -> WeightedDraws:
        """Draws of the guide, weighted; auxiliary variables of a guide count among what it draws."""
        import jax

        run = jax.jit(jax.vmap(self._weighted_draw))
        keys = jax.random.split(jax.random.PRNGKey(seed), num_draws)
        parts = [run(keys[i : i + chunk]) for i in range(0, num_draws, chunk)]
        log_p, log_q = (torch.cat([_tensor(part[i]) for part in parts]) for i in (0, 1))
        latents = {name: torch.cat([_tensor(part[2][name]) for part in parts]) for name in parts[0][2]}
        return WeightedDraws(Draws(latents, {}, {}, {}, log_p, log_q, (), dict.fromkeys(latents, ()), frozenset()))

    def _weighted_draw(self, key: Any) -> Any:
        from numpyro import handlers
        from numpyro.infer.util import log_density

        log_q, drawn = log_density(handlers.seed(self.guide, key), (), {}, self.params)
        log_p, trace = log_density(handlers.replay(handlers.seed(self.model, key), drawn), (), {}, {})
        sites = {n: s for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
        return log_p, log_q, {name: site["value"] for name, site in sites.items()}


def _tensor(value: Any) -> torch.Tensor:
    return torch.as_tensor(np.array(value), dtype=torch.float64)


def train(key: str, guide: str, folder: Path, seed: int, steps: int = STEPS) -> Trained:
    """Train one of NumPyro's guides."""
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO, autoguide

    kind, rate = GUIDES[guide]
    model = PROGRAMS[key](folder)
    made = getattr(autoguide, kind)(model)
    svi = SVI(model, made, numpyro.optim.Adam(rate), Trace_ELBO(num_particles=PARTICLES))
    result = svi.run(jax.random.PRNGKey(seed), steps, progress_bar=False)
    leapfrogs = getattr(made, "K", 1)
    return Trained(model, made, result.params, steps * PARTICLES * leapfrogs)
