# %% [markdown]
# # Coordinate ascent and EM
#
# Where the conditional distribution of each block of latents given the rest is of an exponential family, the best mean
# field needs no gradient steps: `q_i ~ exp E[log p]` is a closed form, one block at a time, and the bound never falls
# (Goodfellow et al. 2016, equation 19.56). `AutoConjugate` finds these updates from a program as it is written, and
# refuses by name what has none. Where parameters are estimated instead, it is `ExpectationMaximization`.
#
# Run this file as it is, or open it as a notebook (the cells are in percent format). Pictures go to `out/`.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

import pplvi
from pplvi import AutoConjugate, ExpectationMaximization, RobbinsMonro

SMOKE = bool(os.environ.get("PPLVI_SMOKE"))  # the tests run this file with short loops
N = 90 if SMOKE else 600
NUM_TIMES = 15 if SMOKE else 100
NUM_STEPS = 20 if SMOKE else 150
NUM_DRAWS = 200 if SMOKE else 2000
OUT = Path("out")
OUT.mkdir(exist_ok=True)
torch.set_default_dtype(torch.float64)
pyro.set_rng_seed(0)

# %% [markdown]
# ## A mixture
#
# Three clusters in the plane. The labels `z` are discrete: given the other blocks they have their exact distribution.
# Weights, locations and precisions have closed-form updates each.

# %%
CENTERS = torch.tensor([[-3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])
x = CENTERS[torch.randint(3, (N,))] + torch.randn(N, 2)


def mixture(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        tau = pyro.sample("tau", dist.Gamma(torch.full((2,), 2.0), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(mu[z], tau[z].rsqrt()).to_event(1), obs=x)


fit = pplvi.fit(mixture, AutoConjugate, args=(x,), restarts=3, seed=0, progress=False)
print(f"{len(fit.guide.bounds) - 1} sweeps:", fit.guide.summary())
for term, nats in fit.guide.terms(x).items():
    print(f"  {term:18s} {nats:10.3f}")

plt.figure(figsize=(5, 3))
for run in fit.runs:
    plt.plot(-torch.tensor(run.losses), label=f"restart {run.index}")
plt.xlabel("sweep")
plt.ylabel("bound (nats)")
plt.legend()
plt.tight_layout()
plt.savefig(OUT / "coordinate_ascent.png")

# %% [markdown]
# It is a Pyro guide: it draws `mu`, `tau`, `weights` and `z`, and all that follows from draws is there. A site that
# asks for it (`infer={"enumerate": "parallel"}`, or `config_enumerate`) is left to the model to be summed out, which
# makes weights less noisy.

# %%
summed = pplvi.fit(pyro.infer.config_enumerate(mixture), AutoConjugate, args=(x,), restarts=3, seed=0, progress=False)
posterior = summed.posterior(NUM_DRAWS)
print(f"Pareto k-hat {float(posterior.pareto_k):.2f}")
print("log evidence", posterior.total_log_evidence, "above the bound", summed.guide.bounds[-1])

# %% [markdown]
# ## EM: parameters instead of latents
#
# With `pyro.param` in the place of priors there is nothing to be Bayesian about but `z`: the E-step is exact, the
# M-step too, and `losses` is `-log p(x)`, which never rises.


# %%
def by_parameters(x):
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    mu = pyro.param("mu", torch.zeros(3, 2))
    sd = pyro.param("sd", torch.ones(3, 2), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(mu[z], sd[z]).to_event(1), obs=x)


em = pplvi.fit(by_parameters, ExpectationMaximization(), args=(x,), seed=0, progress=False)
print(f"log p(x) {-em.losses[0, 0]:.2f} at the start, {-em.losses[0, -1]:.2f} after {em.losses.shape[1]} iterations")
print("means by EM       ", em.params[em.best]["mu"].sort(0).values[:, 0])
print("medians by sweeps ", fit.guide.median(x)["mu"].sort(0).values[:, 0])

# %% [markdown]
# ## Blocks
#
# A mean field takes blocks as independent. The coefficients of a regression interact: they share a joint normal, found
# from the program. Different sites are apart unless they are named together; the difference of the bounds is the price
# of independence, in nats.

# %%
GROUP = torch.arange(60) % 6
y = torch.randn(6)[GROUP] + 2.0 + 0.5 * torch.randn(60)


def hierarchy(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("groups", 6):
        a = pyro.sample("a", dist.Normal(mean, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[GROUP], 0.5), obs=y)


apart = AutoConjugate(hierarchy).run(y)
joint = AutoConjugate(hierarchy, blocks=[("mean", "a")]).run(y)
covariance = 25.0 + (GROUP[:, None] == GROUP) + 0.25 * torch.eye(60)
exact = dist.MultivariateNormal(torch.zeros(60), covariance).log_prob(y).item()
print(f"apart {apart.bounds[-1]:.4f}, one block {joint.bounds[-1]:.4f}, log p(y) {exact:.4f}")

# %% [markdown]
# ## Time
#
# A loop over time is merged: one factor for all steps. A random walk of normal sites is one block, so that its update
# is a smoother, and a chain of discrete sites has its exact posterior.

# %%
level = torch.randn(NUM_TIMES).cumsum(0) * 0.3 + torch.randn(NUM_TIMES)


def walk(y):
    q = pyro.sample("q", dist.Gamma(2.0, 0.2))
    r = pyro.sample("r", dist.Gamma(2.0, 2.0))
    state = pyro.sample("x_0", dist.Normal(0.0, 1.0))
    for t in range(len(y)):
        if t > 0:
            state = pyro.sample(f"x_{t}", dist.Normal(state, q.rsqrt()))
        pyro.sample(f"y_{t}", dist.Normal(state, r.rsqrt()), obs=y[t])


smoother = AutoConjugate(walk, seed=0).run(level)
low, high = (
    torch.stack([v[0] for n, v in smoother.quantiles([p], level).items() if n[0] == "x"]) for p in (0.05, 0.95)
)
plt.figure(figsize=(6, 3))
plt.plot(level, ".", color="gray")
plt.fill_between(range(NUM_TIMES), low, high, alpha=0.4)
plt.tight_layout()
plt.savefig(OUT / "local_level.png")
print("walk:", smoother.summary())

# %% [markdown]
# ## What has no closed form
#
# is refused with the site, the operation and what to do. With `fallback=` the site is updated by natural gradients, and
# everything else stays closed-form.

# %%
features = torch.randn(60, 2)
labels = (features @ torch.tensor([2.0, -1.0]) + torch.randn(60) > 0).double()


def logistic(features, labels):
    alpha = pyro.sample("alpha", dist.Gamma(1.0, 1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), alpha.rsqrt()).to_event(1))
    with pyro.plate("data", len(features)):
        pyro.sample("label", dist.Bernoulli(logits=features @ w), obs=labels)


try:
    AutoConjugate(logistic).run(features, labels)
except ValueError as error:
    print(error)
mixed = AutoConjugate(logistic, fallback={"w": "cvi"}, seed=0).run(features, labels)
print("logistic:", mixed.summary(), mixed.median(features, labels)["w"])

# %% [markdown]
# ## Minibatches
#
# Stochastic variational inference (Hoffman et al. 2013) steps along natural gradients of minibatches, at falling rates.


# %%
def in_part(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        mu = pyro.sample("mu", dist.Normal(CENTERS / 3, 5.0).to_event(1))
    with pyro.plate("data", N, subsample_size=len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(mu[z], 1.0).to_event(1), obs=x)


start = pyro.infer.autoguide.init_to_value(values={"mu": CENTERS / 3})
batches = list(x[torch.randperm(N)].split(30))
stochastic = pplvi.fit(
    in_part,
    lambda model: AutoConjugate(model, rate=RobbinsMonro(10, 0.8), init_loc_fn=start),
    data=[(batch,) for batch in batches],
    num_steps=NUM_STEPS,
    seed=0,
    progress=False,
)
full = AutoConjugate(in_part, init_loc_fn=start).run(x)
print(f"full fit {full.bounds[-1]:.2f}, minibatches {sum(stochastic.guide.terms(x).values()):.2f} nats")
torch.set_default_dtype(torch.float32)
