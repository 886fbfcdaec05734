"""NUTS of other packages in benchmarks/race.py, where they are installed: the same models in NumPyro."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.race_problems import Draws, Problem


def _models() -> dict[str, Callable[..., Any]]:
    """The problems as NumPyro programs, by the name of their Pyro program."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def horseshoe(X: Any, y: Any) -> None:
        tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
        s = numpyro.sample("s", dist.HalfNormal(2.0))
        with numpyro.plate("predictors", X.shape[1]):
            lam = numpyro.sample("lam", dist.HalfCauchy(1.0))
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        beta = numpyro.deterministic("beta", z * lam * tau)
        numpyro.sample("y", dist.Normal(X @ beta, s), obs=y)

    def stochastic_volatility(y: Any) -> None:
        sigma = numpyro.sample("sigma", dist.Exponential(10.0))
        nu = numpyro.sample("nu", dist.Gamma(2.0, 0.1))
        h0 = numpyro.sample("h0", dist.Normal(0.0, 2.0))
        with numpyro.plate("steps", len(y)):
            eps = numpyro.sample("eps", dist.Normal(0.0, 1.0))
        h = numpyro.deterministic("h", h0 + sigma * jnp.cumsum(eps))
        numpyro.sample("y", dist.StudentT(nu, 0.0, jnp.exp(h / 2)), obs=y)

    def counts(g: Any, x: Any, y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        s = numpyro.sample("s", dist.HalfNormal(1.0))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("groups", 100):
            a = numpyro.sample("a", dist.Normal(mu, s))
        numpyro.sample("y", dist.Poisson(jnp.exp(a[g] + b * x)), obs=y)

    def slopes(g: Any, x: Any, y: Any) -> None:
        mu_a = numpyro.sample("mu_a", dist.Normal(0.0, 2.0))
        mu_b = numpyro.sample("mu_b", dist.Normal(0.0, 2.0))
        sa, sb, s = (numpyro.sample(name, dist.HalfNormal(1.0)) for name in ("sa", "sb", "s"))
        with numpyro.plate("groups", 85):
            a = numpyro.sample("a", dist.Normal(mu_a, sa))
            b = numpyro.sample("b", dist.Normal(mu_b, sb))
        numpyro.sample("y", dist.Normal(a[g] + b[g] * x, s), obs=y)

    return {each.__name__: each for each in (horseshoe, stochastic_volatility, counts, slopes)}


def numpyro_nuts(problem: Problem, method: str, seed: int, budget: float | None) -> tuple[Draws, str]:
    """NumPyro's NUTS: 4 chains, 500 draws each after as many steps.

    :raises ValueError: for a problem without a NumPyro program.
    """
    import jax
    from numpyro.infer import MCMC, NUTS

    name = problem.model.__name__
    models = _models()
    if name not in models:
        raise ValueError(f"{name} has no program for {method}: expected one of {sorted(models)}.")
    jax.config.update("jax_enable_x64", problem.dtype == torch.float64)
    kernel = NUTS(models[name])
    mcmc = MCMC(kernel, num_warmup=500, num_samples=500, num_chains=4, chain_method="sequential", progress_bar=False)
    mcmc.run(jax.random.PRNGKey(seed), *(np.asarray(arg) for arg in problem.args))
    divergences = int(mcmc.get_extra_fields()["diverging"].sum())
    draws = {key: torch.as_tensor(np.asarray(value)) for key, value in mcmc.get_samples().items()}
    return draws, f"{divergences} divergences"


PEERS: dict[str, Callable[[Problem, str, int, float | None], tuple[Draws, str]]] = {"numpyro": numpyro_nuts}
