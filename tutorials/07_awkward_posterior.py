# %% [markdown]
# # One awkward posterior, five guides
#
# A small hierarchical model whose posterior is a funnel: where the groups agree, their effects are squeezed together,
# and where they do not, they are free. Five guides meet it, from the cheapest to a flow. The report and a few pictures
# of ArviZ tell them apart, without knowing the answer; NUTS, run at the end, does know it.
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
from pyro.infer.autoguide import AutoNormal

import pplvi
from pplvi import AutoBatchAndMatch, AutoDeterministicNormal, AutoFlow, AutoPathfinder
from pplvi.posterior import plot_against_reference, plot_weights

SMOKE = bool(os.environ.get("PPLVI_SMOKE"))  # the tests run this file with short loops
NUM_STEPS = 40 if SMOKE else 3000
NUM_DRAWS = 40 if SMOKE else 1000
NUM_ITERATIONS = 10 if SMOKE else 200
OUT = Path("out")
OUT.mkdir(exist_ok=True)
torch.set_default_dtype(torch.float64)  # searches end where numbers end: give them some

# %% [markdown]
# ## The model
#
# Eight schools in the *centered* form: the effects `theta` are drawn around `mu` with spread `tau`. With only eight
# noisy observations `tau` may well be near zero, and there the posterior of `theta` becomes narrow: a funnel.

# %%
y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


# %% [markdown]
# ## Five guides
#
# - **mean field**: independent normals, trained by stochastic gradients;
# - **Pathfinder** and **deterministic ADVI** search instead of being trained: no learning rate, nothing to tune;
# - **batch and match** searches too, for the best full-rank Gaussian, and is where the flow starts;
# - a **flow**, by the recipe that the literature has come to.
#
# Each is one argument of the same call.

# %%
fit = partial(pplvi.fit, schools, args=(sigma, y), seed=0, progress=False)
recipe = pplvi.flow_recipe(NUM_STEPS) | ({"init": None} if SMOKE else {})
fits = {
    "mean field": fit(AutoNormal, num_steps=NUM_STEPS),
    "pathfinder": fit(AutoPathfinder),
    "deterministic": fit(partial(AutoDeterministicNormal, init_scale=0.3)),
    "batch and match": fit(partial(AutoBatchAndMatch, num_iterations=NUM_ITERATIONS)),
    "flow": fit(partial(AutoFlow, flow="quadratic", rotate=False), **recipe),
}

# %% [markdown]
# ## What the reports say
#
# The ELBO alone ranks the guides, but does not say whether the best of them is good. Pareto k-hat does: the flow's
# weights have a finite variance or nearly so, those of the Gaussians do not, and the report says what that means and
# what to try next.

# %%
fits["pathfinder"].report()
fits["flow"].report()

# %% [markdown]
# The same as one table. Nobody has the exact answer yet.

# %%
print(pplvi.compare(fits).to_string())

# %% [markdown]
# ## Pictures that tell them apart
#
# The weights first: a guide that fits has equal weights, and a k-hat at the bottom. A Gaussian cannot follow the neck
# of the funnel; where it has too little mass the log weights have a long right tail.

# %%
figure, axes = plt.subplots(len(fits), 2, figsize=(9, 2.4 * len(fits)), squeeze=False)
for row, (name, result) in zip(axes, fits.items(), strict=True):
    plot_weights(result, axes=row)
    row[0].set_title(name)
figure.tight_layout()
figure.savefig(OUT / "awkward_weights.png")

# %% [markdown]
# Then the funnel itself, `tau` against one effect, from each guide's own draws (`draws="guide"`). Only the flow narrows
# where `tau` is small.

# %%
figure, axes = plt.subplots(1, len(fits), figsize=(3 * len(fits), 3), sharex=True, sharey=True)
for ax, (name, result) in zip(axes, fits.items(), strict=True):
    posterior = result.to_arviz(draws="guide").posterior
    ax.plot(posterior["theta"][0, :, 0], posterior["tau"][0], ".", markersize=2, alpha=0.5)
    ax.set(title=name, xlabel="theta[0]", yscale="log", xlim=(-40, 60), ylim=(1e-2, 1e2))
axes[0].set_ylabel("tau")
figure.tight_layout()
figure.savefig(OUT / "awkward_funnels.png")

# %% [markdown]
# And ArviZ's forest plot: intervals of the same quantity side by side, importance-resampled. Guides that k-hat calls
# good agree with each other.

# %%
data = {name: result.to_arviz() for name, result in fits.items()}
if hasattr(az, "plot_ppc_dist"):  # ArviZ 1.x, which takes them by name
    az.plot_forest(data, var_names=["mu", "tau"], combined=True)
else:
    az.plot_forest(list(data.values()), model_names=list(data), var_names=["mu", "tau"], combined=True)
plt.savefig(OUT / "awkward_forest.png")

# %% [markdown]
# ## Against NUTS
#
# The answer, for a model this small. The centered form is awkward for NUTS too, so it gets the non-centered one:
# `pplvi.noncentered` sees which latents depend on others, standardises them, and leaves a deterministic `theta`.

# %%
easier = pplvi.noncentered(schools)
nuts = pplvi.fit(easier, "nuts", args=(sigma, y), num_steps=NUM_DRAWS, seed=0, progress=False)
reference = nuts.to_arviz()
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
plot_against_reference(data["flow"], reference, var_names=["mu", "tau"])
plt.savefig(OUT / "awkward_reference.png")

# %% [markdown]
# ## Let it choose
#
# `"auto"` climbs the same ladder by itself, within a budget of seconds, and says in its report what was tried and why
# it stopped. It also tries the model's non-centered forms. That is the lesson of the awkward posterior: the easier form
# needs only the first rung. `chosen.model` is that form, for a flow, if the report asks for one.

# %%
chosen = pplvi.fit(schools, "auto", budget=0.1 if SMOKE else 60.0, args=(sigma, y), seed=0, progress=False)
chosen.report()
