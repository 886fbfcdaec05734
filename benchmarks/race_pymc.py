"""The problems of benchmarks/race.py in PyMC, as its users write them, for nutpie.

Variables have the names of the Pyro programs in benchmarks/race_problems.py. Nothing of PyMC is imported before
``programs`` is called.
"""

from collections.abc import Callable
from typing import Any

Program = Callable[..., None]


def programs() -> dict[str, Program]:
    """A program for each problem, by its name; called with the data by name in the context of a ``pymc.Model``."""
    import numpy as np
    import pymc as pm
    import pytensor
    import pytensor.tensor as pt

    ordered = pm.distributions.transforms.ordered

    def schools(y: Any, sigma: Any) -> None:
        mu = pm.Normal("mu", 0.0, 5.0)
        tau = pm.HalfCauchy("tau", 5.0)
        theta = pm.Normal("theta", 0.0, 1.0, shape=len(y))
        pm.Normal("y", mu + tau * theta, sigma, observed=y)

    def schools_centered(y: Any, sigma: Any) -> None:
        mu = pm.Normal("mu", 0.0, 5.0)
        tau = pm.HalfCauchy("tau", 5.0)
        theta = pm.Normal("theta", mu, tau, shape=len(y))
        pm.Normal("y", theta, sigma, observed=y)

    def ionosphere(X: Any, y: Any) -> None:
        w = pm.Normal("w", 0.0, 1.0, shape=X.shape[1])
        pm.Bernoulli("y", logit_p=X @ w, observed=y)

    def mixture(y: Any) -> None:
        mu = pm.Normal("mu", 0.0, 2.0, shape=2, transform=ordered, initval=[-1.0, 1.0])
        sigma = pm.HalfNormal("sigma", 2.0, shape=2)
        theta = pm.Beta("theta", 5.0, 5.0)
        pm.NormalMixture("y", w=pt.stack([theta, 1 - theta]), mu=mu, sigma=sigma, observed=y)

    def hmm(y: Any) -> None:
        rows = [pm.Dirichlet(f"theta{k}", np.ones(2)) for k in (1, 2)]
        transition = pt.log(pt.stack(rows))
        mu = pm.Normal("mu", np.array([3.0, 10.0]), 1.0, transform=ordered, initval=[3.0, 10.0])
        emission = pm.logp(pm.Normal.dist(mu, 1.0), y[:, None])

        def step(seen: Any, alpha: Any, transition: Any) -> Any:
            return pt.logsumexp(alpha[:, None] + transition, axis=0) + seen

        alpha = pytensor.scan(
            step, sequences=emission[1:], outputs_info=emission[0], non_sequences=transition, return_updates=False
        )
        pm.Potential("y", pt.logsumexp(alpha[-1]))

    def kidiq(kid_score: Any, mom_hs: Any, mom_iq: Any) -> None:
        beta = pm.Flat("beta", shape=4)
        sigma = pm.HalfCauchy("sigma", 2.5)
        mean = beta[0] + beta[1] * mom_hs + beta[2] * mom_iq + beta[3] * mom_hs * mom_iq
        pm.Normal("kid_score", mean, sigma, observed=kid_score)

    def diamonds(X: Any, Y: Any) -> None:
        centered = X[:, 1:] - X[:, 1:].mean(0)
        b = pm.Normal("b", 0.0, 1.0, shape=centered.shape[1])
        intercept = pm.StudentT("intercept", nu=3.0, mu=8.0, sigma=10.0)
        sigma = pm.HalfStudentT("sigma", nu=3.0, sigma=10.0)
        pm.Normal("Y", intercept + centered @ b, sigma, observed=Y)

    def radon(g: Any, x: Any, y: Any) -> None:
        mu_a = pm.Normal("mu_a", 0.0, 2.0)
        mu_b = pm.Normal("mu_b", 0.0, 2.0)
        sa, sb, s = (pm.HalfNormal(name, 1.0) for name in ("sa", "sb", "s"))
        a = pm.Normal("a", mu_a, sa, shape=85)
        b = pm.Normal("b", mu_b, sb, shape=85)
        pm.Normal("y", a[g] + b[g] * x, s, observed=y)

    def pois(g: Any, x: Any, y: Any) -> None:
        mu = pm.Normal("mu", 0.0, 2.0)
        s = pm.HalfNormal("s", 1.0)
        b = pm.Normal("b", 0.0, 1.0)
        a = pm.Normal("a", mu, s, shape=100)
        pm.Poisson("y", pt.exp(a[g] + b * x), observed=y)

    def garch(y: Any) -> None:
        mu = pm.Normal("mu", 0.0, 5.0)
        a0 = pm.HalfNormal("a0", 2.0)
        a1 = pm.Uniform("a1", 0.0, 1.0)
        f = pm.Uniform("f", 0.0, 1.0)
        b1 = pm.Deterministic("b1", f * (1 - a1))
        pm.Potential("reference", -pt.log1p(-a1))

        def step(before: Any, variance: Any, mu: Any, a0: Any, a1: Any, b1: Any) -> Any:
            return a0 + a1 * (before - mu) ** 2 + b1 * variance

        first = a0 / (1 - 0.99 * (a1 + b1))
        rest = pytensor.scan(
            step,
            sequences=pt.as_tensor(y[:-1]),
            outputs_info=first,
            non_sequences=[mu, a0, a1, b1],
            return_updates=False,
        )
        pm.Normal("y", mu, pt.sqrt(pt.concatenate([first[None], rest])), observed=y)

    def gp(x: Any, y: Any) -> None:
        ell = pm.LogNormal("ell", 0.0, 1.0)
        amp = pm.LogNormal("amp", 0.0, 1.0)
        noise = pm.LogNormal("noise", -1.0, 1.0)
        cov = amp**2 * pt.exp(-((x[:, None] - x) ** 2) / (2 * ell**2)) + (noise**2 + 1e-6) * np.eye(len(x))
        pm.MvNormal("y", np.zeros(len(x)), cov=cov, observed=y)

    def sv(y: Any) -> None:
        sigma = pm.Exponential("sigma", 10.0)
        nu = pm.Gamma("nu", 2.0, 0.1)
        h0 = pm.Normal("h0", 0.0, 2.0)
        eps = pm.Normal("eps", 0.0, 1.0, shape=len(y))
        h = pm.Deterministic("h", h0 + sigma * pt.cumsum(eps))
        pm.StudentT("y", nu=nu, mu=0.0, sigma=pt.exp(h / 2), observed=y)

    def horseshoe(X: Any, y: Any) -> None:
        tau = pm.HalfCauchy("tau", 1.0)
        s = pm.HalfNormal("s", 2.0)
        lam = pm.HalfCauchy("lam", 1.0, shape=X.shape[1])
        z = pm.Normal("z", 0.0, 1.0, shape=X.shape[1])
        beta = pm.Deterministic("beta", z * lam * tau)
        pm.Normal("y", X @ beta, s, observed=y)

    both = {"hs10": horseshoe, "hs100": horseshoe}
    each = (schools, schools_centered, ionosphere, mixture, hmm, kidiq, diamonds, radon, pois, garch, gp, sv)
    return {**{program.__name__: program for program in each}, **both}
