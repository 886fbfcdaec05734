# %% [markdown]
# # Boltzmann machines
#
# Undirected models of handwritten digits, as Pyro programs: a restricted Boltzmann machine, then a deep one with its
# mean-field guide. Train with `BoltzmannELBO`, look at filters and at what the machines dream, fill in missing pixels,
# and estimate the partition function, without which a likelihood is only known up to a constant. The digits are those
# of scikit-learn: 1,797 images of 8 x 8.
#
# Run this file as it is, or open it as a notebook (the cells are in percent format). Pictures go to `out/`.

# %%
import os
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import SGD
from sklearn.datasets import load_digits

import pplvi
from pplvi import BoltzmannELBO, DeepBoltzmannMachine, MeanFieldGuide, RestrictedBoltzmannMachine
from pplvi.energies import chain_mixing, free_energy_gap, inpaint, nearest_neighbours
from pplvi.energies.evaluation.pictures import plot_filters, plot_images

SMOKE = bool(os.environ.get("PPLVI_SMOKE"))  # the tests run this file with short loops
NUM_STEPS = 30 if SMOKE else 3000
NUM_BETAS = 20 if SMOKE else 2000
OUT = Path("out")
OUT.mkdir(exist_ok=True)
pyro.set_rng_seed(0)

# %% [markdown]
# ## Data
#
# Bernoulli units take zeros and ones; grey levels are refused, with the ways to make them binary. Here each pixel is
# drawn once, in proportion to its grey level.

# %%
images = torch.bernoulli(torch.tensor(load_digits().images / 16.0, dtype=torch.float32)).flatten(1)
train, test = images[:1500], images[1500:]

# %% [markdown]
# ## A restricted Boltzmann machine
#
# `rbm.model` is a Pyro program: a plate of data, a site for each layer, and a factor `exp(-E)`. Its log density is not
# normalised, so that an ordinary ELBO would only push energies down. `BoltzmannELBO` adds what is missing: the gradient
# of log Z, from persistent chains that each step of training moves on. The guide is the exact posterior of the hidden
# layer.

# %%
rbm = RestrictedBoltzmannMachine(64, 32)
svi = SVI(rbm.model, rbm.guide, SGD({"lr": 0.05, "momentum": 0.5}), BoltzmannELBO(num_chains=100, sweeps=1))
for _ in range(NUM_STEPS):
    rows = torch.randint(len(train), (100,))
    svi.step(train[rows])

gap = free_energy_gap(rbm, train, test)
mixing = chain_mixing(rbm, num_chains=10, num_sweeps=20 if SMOKE else 500, seed=0)
print(f"free-energy gap {gap.value:.2f} +- {gap.standard_error:.2f} nats; R-hat of the chains {mixing.r_hat:.2f}")
plot_filters(rbm, num_filters=30).savefig(OUT / "08_filters.png")

# %% [markdown]
# ## log Z, and with it the likelihood
#
# Annealed importance sampling goes from a model of independent pixels to the machine. The estimate comes with an
# interval and an effective sample size, and warns where a few chains dominate. It is too small on average, so that
# likelihoods come out too high. RAISE beside them needs no log Z: it bounds, from below, the likelihood of the annealed
# model, the directed one that the walk samples from, which with few temperatures is not quite the machine.

# %%
estimate = pplvi.annealed_importance_sampling(
    rbm, num_chains=100, num_betas=NUM_BETAS, data=test[:50], num_raise_chains=3, seed=0
)
print(estimate)
(mean, error), (lower, _) = estimate.log_likelihood, estimate.log_likelihood_bound
print(f"test log-likelihood {mean:.2f} +- {error:.2f} nats, of the annealed model at least {lower:.2f}")

# %% [markdown]
# ## A deep Boltzmann machine
#
# Two hidden layers. Their posterior does not factorise; `MeanFieldGuide` finds the best factorised one by sweeps over
# the layers, and `BoltzmannELBO` takes its energy and entropy exactly, without a draw.

# %%
dbm = DeepBoltzmannMachine([64, 32, 32], name="deep")
guide = MeanFieldGuide(dbm, iterations=10)
fit = pplvi.fit(
    dbm.model,
    guide,
    data=[train[rows] for rows in torch.randperm(1500).split(100)],
    objective=BoltzmannELBO(num_chains=100, sweeps=5),
    optim=SGD({"lr": 0.05, "momentum": 0.5}),
    num_steps=NUM_STEPS,
    seed=0,
    progress=False,
)

# %% [markdown]
# ## Dreams, and half an image
#
# Fantasy particles are the ends of Gibbs chains. The nearest training images say whether the machine only copies them.
# Missing pixels are drawn with the others clamped.

# %%
sweeps = 20 if SMOKE else 1000
fantasies = dbm.gibbs(dbm.draw((10,)), sweeps)
pixels = torch.sigmoid(dbm.field("v", fantasies)).detach()
nearest = nearest_neighbours(fantasies["v"], train)
print(f"pixels by which dreams differ from the nearest training image: {nearest.distance.square().mean():.1f}")

upper = torch.arange(64) < 32
halves = inpaint(dbm, test[:10], upper, num_sweeps=sweeps, seed=0)
rows = torch.cat([pixels, train[nearest.indices], test[:10], torch.where(upper, test[:10], 0.5), halves])
labels = ["dreams", "nearest", "data", "upper half", "filled in"]
plot_images(rows, labels=labels).savefig(OUT / "08_digits.png", bbox_inches="tight")

# %% [markdown]
# ## The report of a deep machine
#
# The variational bound of the data needs log Z too.

# %%
deep = pplvi.annealed_importance_sampling(
    dbm, num_chains=100, num_betas=NUM_BETAS, data=test[:50], guide=guide, num_raise_chains=3, seed=0
)
print(deep)
mean, error = deep.log_likelihood
print(f"bound of the test log-likelihood: {mean:.2f} +- {error:.2f} nats")

# %% [markdown]
# The guide is a Pyro guide, and hidden layers are sites: everything else works as for any other model. `Posterior`
# weighs draws of the mean-field guide for each image by the energy; log Z is a constant that it does not know, so that
# its evidence is unnormalised.

# %%
posterior = pplvi.Posterior(dbm.model, guide, (test[:20],), num_draws=50 if SMOKE else 1000, seed=0)
print("median Pareto k-hat of the mean-field posterior:", round(posterior.pareto_k.median().item(), 2))
data = pplvi.to_arviz([posterior])
print(data.posterior["h1"].dims)
