# %% [markdown]
# # A first fit
#
# From a Pyro program to a diagnosed posterior in ArviZ: write a model, fit it, read the report, go on in ArviZ, and
# then change the guide, the objective, or the whole algorithm, one argument at a time.
#
# Run this file as it is, or open it as a notebook (the cells are in percent format). Pictures go to `out/`.

# %%
import os
from functools import partial
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal

import pplvi
from pplvi import ELBO, AutoFlow, ImportanceWeightedELBO
from pplvi.posterior import plot_against_reference, plot_objective, plot_weights

SMOKE = bool(os.environ.get("PPLVI_SMOKE"))  # the tests run this file with short loops
NUM_STEPS = 60 if SMOKE else 1500
NUM_DRAWS = 60 if SMOKE else 1000  # ArviZ 1.x takes leave-one-out of 25 draws and more
OUT = Path("out")
OUT.mkdir(exist_ok=True)

# %% [markdown]
# ## The model
#
# Eight schools (Rubin 1981): each school `j` reports an effect `y[j]` of coaching with a known standard error. It is an
# ordinary Pyro program; pplvi asks nothing else of it. The observed argument may be `None`, so that the model can also
# predict.

# %%
SCHOOLS = list("ABCDEFGH")
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def model(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)


# %% [markdown]
# ## Fit
#
# A guide, an objective, a seed. `AutoFlow` is a normalising flow over all latents; it starts as the mean-field normal
# and bends from there. The importance-weighted bound with eight particles is tighter than the ELBO. Two restarts train
# from two seeds and are kept as two chains.

# %%
small_flow = partial(AutoFlow, transforms=4)
flow = pplvi.fit(
    model,
    small_flow,
    args=(sigma, y),
    objective=ImportanceWeightedELBO(num_particles=8),
    num_steps=NUM_STEPS,
    restarts=2,
    seed=0,
    progress=False,
)

# %% [markdown]
# ## Report
#
# What was fitted, how good it is, what that means, and what to try next. The number to look at first is Pareto k-hat:
# it says whether the draws of the guide, reweighted, can stand for the posterior.

# %%
flow.report()

# %%
figure, axes = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
plot_objective(flow, ax=axes[0])
plot_weights(flow, axes=axes[1:])
figure.savefig(OUT / "first_fit_objective_and_weights.png")

# %% [markdown]
# ## ArviZ
#
# Every group of ArviZ's schema, with plates as named dimensions and restarts as chains. The draws are resampled by
# their smoothed weights, so that everything in ArviZ that knows no weights is right too. `r_hat` compares the restarts.

# %%
data = flow.to_arviz(coords={"school": SCHOOLS})
print(list(data))
print(az.summary(data, var_names=["mu", "tau", "theta"], round_to=2).to_string())

# %%
if hasattr(az, "plot_ppc_dist"):  # ArviZ 1.x
    az.plot_ppc_dist(data, num_samples=20)
else:
    az.plot_ppc(data, num_pp_samples=20, random_seed=0)
plt.gcf().savefig(OUT / "first_fit_predictions.png")

# %% [markdown]
# Leave-one-out cross-validation needs one more correction when the draws come from a guide. `fit.loo()` makes it and
# returns ArviZ's own `ELPDData`.

# %%
print(flow.loo())

# %% [markdown]
# ## Another guide, another objective
#
# One argument each. Any guide of Pyro goes here, and any loss: those of pplvi, and Pyro's own.

# %%
mean_field = pplvi.fit(
    model, AutoNormal, args=(sigma, y), objective=ELBO(num_particles=8), num_steps=NUM_STEPS, seed=0, progress=False
)
mean_field.report()

# %% [markdown]
# ## NUTS beside it
#
# `"nuts"` as the guide runs Pyro's NUTS into the same kind of result, so that what an approximation costs can be seen.

# %%
nuts = pplvi.fit(model, "nuts", args=(sigma, y), num_steps=NUM_DRAWS // 2, seed=0, progress=False)
table = pplvi.compare({"flow": flow, "mean field": mean_field, "nuts": nuts})
print(table[["elpd_loo", "se", "pareto_k", "elbo", "log_evidence", "seconds"]].round(2).to_string())

# %%
plot_against_reference(flow.to_arviz(draws="guide"), nuts, var_names=["mu", "tau"], labels=("flow", "NUTS"))
plt.gcf().savefig(OUT / "first_fit_against_nuts.png")

# %% [markdown]
# ## New data
#
# Predictions for a new experiment at the same eight schools with half the standard error.

# %%
predicted = flow.predict(0.5 * sigma)
print({name: tuple(value.shape) for name, value in predicted.observed.items()})

# %% [markdown]
# ## Pyro's own loop
#
# Nothing above is needed to use the parts. Guides and objectives are Pyro's kind of guides and losses, so they go into
# `SVI` too, and a `Posterior` can be made of any trained guide.

# %%
pyro.clear_param_store()
pyro.set_rng_seed(0)
guide = small_flow(model)
svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=ImportanceWeightedELBO(num_particles=8))
for _ in range(NUM_STEPS // 3):
    svi.step(sigma, y)

posterior = pplvi.Posterior(model, guide, (sigma, y), num_draws=NUM_DRAWS, seed=0)
print(f"k-hat {float(posterior.pareto_k):.2f}, ESS {float(posterior.ess):.0f} of {NUM_DRAWS}")
print({name: value.shape for name, value in guide.median(sigma, y).items()})
