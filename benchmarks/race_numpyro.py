"""The problems of benchmarks/race.py in NumPyro, as its users write them: programs of the data's names.

Sites have the names of the Pyro programs in benchmarks/race_problems.py. Nothing of NumPyro is imported before
``programs`` is called.
"""

from collections.abc import Callable
from typing import Any

Program = Callable[..., None]


def programs() -> dict[str, Program]:
    """A program for each problem, by the problem's name; its arguments are the names of the data."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from jax.scipy.special import logsumexp
    from numpyro.distributions import constraints

    def schools(y: Any, sigma: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", len(y)):
            theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)

    def schools_centered(y: Any, sigma: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", len(y)):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    def ionosphere(X: Any, y: Any) -> None:
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([X.shape[1]]).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Bernoulli(logits=X @ w), obs=y)

    def mixture(y: Any) -> None:
        mu = numpyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
        numpyro.factor("means", dist.Normal(0.0, 2.0).log_prob(mu).sum())
        sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
        theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
        weights = dist.Categorical(probs=jnp.stack([theta, 1 - theta]))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)

    def hmm(y: Any) -> None:
        rows = [numpyro.sample(f"theta{k}", dist.Dirichlet(jnp.ones(2))) for k in (1, 2)]
        transition = jnp.log(jnp.stack(rows))
        mu = numpyro.sample("mu", dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,)))
        numpyro.factor("means", dist.Normal(jnp.array([3.0, 10.0]), 1.0).log_prob(mu).sum())
        emission = dist.Normal(mu, 1.0).log_prob(y[:, None])

        def step(alpha: Any, seen: Any) -> Any:
            return logsumexp(alpha[:, None] + transition, axis=0) + seen, None

        numpyro.factor("y", logsumexp(jax.lax.scan(step, emission[0], emission[1:])[0]))

    def kidiq(kid_score: Any, mom_hs: Any, mom_iq: Any) -> None:
        beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (4,)))
        sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
        mean = beta[0] + beta[1] * mom_hs + beta[2] * mom_iq + beta[3] * mom_hs * mom_iq
        with numpyro.plate("data", len(kid_score)):
            numpyro.sample("kid_score", dist.Normal(mean, sigma), obs=kid_score)

    def diamonds(X: Any, Y: Any) -> None:
        centered = X[:, 1:] - X[:, 1:].mean(0)
        b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([centered.shape[1]]).to_event(1))
        intercept = numpyro.sample("intercept", dist.StudentT(3.0, 8.0, 10.0))
        sigma = numpyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
        with numpyro.plate("data", len(Y)):
            numpyro.sample("Y", dist.Normal(intercept + centered @ b, sigma), obs=Y)

    def radon(g: Any, x: Any, y: Any) -> None:
        mu_a = numpyro.sample("mu_a", dist.Normal(0.0, 2.0))
        mu_b = numpyro.sample("mu_b", dist.Normal(0.0, 2.0))
        sa, sb, s = (numpyro.sample(name, dist.HalfNormal(1.0)) for name in ("sa", "sb", "s"))
        with numpyro.plate("groups", 85):
            a = numpyro.sample("a", dist.Normal(mu_a, sa))
            b = numpyro.sample("b", dist.Normal(mu_b, sb))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(a[g] + b[g] * x, s), obs=y)

    def pois(g: Any, x: Any, y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        s = numpyro.sample("s", dist.HalfNormal(1.0))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("groups", 100):
            a = numpyro.sample("a", dist.Normal(mu, s))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Poisson(jnp.exp(a[g] + b * x)), obs=y)

    def garch(y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        a0 = numpyro.sample("a0", dist.HalfNormal(2.0))
        a1 = numpyro.sample("a1", dist.Uniform(0.0, 1.0))
        f = numpyro.sample("f", dist.Uniform(0.0, 1.0))
        b1 = numpyro.deterministic("b1", f * (1 - a1))
        numpyro.factor("reference", -jnp.log1p(-a1))

        def step(variance: Any, before: Any) -> Any:
            after = a0 + a1 * (before - mu) ** 2 + b1 * variance
            return after, after

        first = a0 / (1 - 0.99 * (a1 + b1))
        _, rest = jax.lax.scan(step, first, y[:-1])
        scale = jnp.sqrt(jnp.concatenate([first[None], rest]))
        with numpyro.plate("days", len(y)):
            numpyro.sample("y", dist.Normal(mu, scale), obs=y)

    def gp(x: Any, y: Any) -> None:
        ell = numpyro.sample("ell", dist.LogNormal(0.0, 1.0))
        amp = numpyro.sample("amp", dist.LogNormal(0.0, 1.0))
        noise = numpyro.sample("noise", dist.LogNormal(-1.0, 1.0))
        square = (x[:, None] - x) ** 2
        cov = amp**2 * jnp.exp(-square / (2 * ell**2)) + (noise**2 + 1e-6) * jnp.eye(len(x))
        numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), covariance_matrix=cov), obs=y)

    def sv(y: Any) -> None:
        sigma = numpyro.sample("sigma", dist.Exponential(10.0))
        nu = numpyro.sample("nu", dist.Gamma(2.0, 0.1))
        h0 = numpyro.sample("h0", dist.Normal(0.0, 2.0))
        with numpyro.plate("steps", len(y)):
            eps = numpyro.sample("eps", dist.Normal(0.0, 1.0))
        h = numpyro.deterministic("h", h0 + sigma * jnp.cumsum(eps))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.StudentT(nu, 0.0, jnp.exp(h / 2)), obs=y)

    def horseshoe(X: Any, y: Any) -> None:
        tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
        s = numpyro.sample("s", dist.HalfNormal(2.0))
        with numpyro.plate("predictors", X.shape[1]):
            lam = numpyro.sample("lam", dist.HalfCauchy(1.0))
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        beta = numpyro.deterministic("beta", z * lam * tau)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(X @ beta, s), obs=y)

    both = {"hs10": horseshoe, "hs100": horseshoe}
    each = (schools, schools_centered, ionosphere, mixture, hmm, kidiq, diamonds, radon, pois, garch, gp, sv)
    return {**{program.__name__: program for program in each}, **both}
