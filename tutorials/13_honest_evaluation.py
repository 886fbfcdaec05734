# %% [markdown]
# # Honest evaluation of densities
#
# Models of one data set come with different numbers: exact log-likelihoods, lower bounds, estimates that are too high
# on average, or none. This page puts them in one table that says which is which, and shows two numbers that mislead:
# windows around draws, and annealing in too few steps. The digits are those of scikit-learn, thresholded at half
# intensity.
#
# Run this file as it is, or open it as a notebook (the cells are in percent format). Pictures go to `out/`.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.optim import SGD
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pplvi
from pplvi import NADE, BoltzmannELBO, DeepLatentGaussian, Generator, MomentMatching, RestrictedBoltzmannMachine
from pplvi.evaluation import data_hash, log_density

SMOKE = bool(os.environ.get("PPLVI_SMOKE"))  # the tests run this file with short loops
NUM_STEPS = 20 if SMOKE else 3000
NUM_DRAWS = 20 if SMOKE else 1000
OUT = Path("out")
OUT.mkdir(exist_ok=True)
pyro.set_rng_seed(0)

grey = torch.tensor(load_digits().data / 16.0, dtype=torch.float32)[torch.randperm(1797)]
digits = (grey > 0.5).float()
train, test = digits[:1500], digits[1500 : 1550 if SMOKE else None]
how = {"data": list(train.split(100)), "num_steps": NUM_STEPS, "seed": 0, "progress": False}

# %% [markdown]
# ## Four families

# %%
nade = NADE(64, 50)
nade.start_at(train)
pplvi.fit(nade.model, nade.guide, learning_rate=0.005, **how)

rbm = RestrictedBoltzmannMachine(64, 12)
pplvi.fit(rbm.model, rbm.guide, objective=BoltzmannELBO(num_chains=100, sweeps=5), optim=SGD({"lr": 0.05}), **how)

vae = DeepLatentGaussian(64, [10], hidden=60)
pplvi.fit(vae.model, vae.guide, learning_rate=0.003, **how)

layers = nn.Sequential(nn.Linear(10, 60), nn.ReLU(), nn.Linear(60, 64), nn.Sigmoid())
gmmn = Generator(layers, 10, noise="uniform")
pplvi.fit(gmmn.model, gmmn.guide, objective=MomentMatching([1.0, 2.0, 4.0]), learning_rate=0.003, **how)

# %% [markdown]
# ## One table
#
# Twelve hidden units are few enough to sum over, so the machine's value is exact; a larger one has an estimate by
# annealed importance sampling, with an interval, and no rank if a few chains carry it. The autoencoder has a lower
# bound. The network of noise has no density: its draws can still be looked at. `diff` is of the same images, one by
# one: its error is well below that of either mean. `copies` is the share of draws that are as near to a training image
# as only 5 % of the test images are.

# %%
models = {"NADE": nade, "RBM": rbm, "VAE": (vae, vae.guide), "GMMN": gmmn}
table = pplvi.compare_densities(models, test, train=train, num_draws=NUM_DRAWS, num_samples=200, seed=0)
print(table.drop(columns=["low", "high", "ess", "precision", "coverage"]).round(3).to_string())

posterior = pplvi.Posterior(vae.model, vae.guide, (test,), num_draws=NUM_DRAWS, seed=0)
print(f"median Pareto k-hat of the autoencoder's guide: {posterior.pareto_k.median().item():.2f}")

# %% [markdown]
# A row that took long is kept by `log_density`, and stands for its model later. It remembers what data it is of: the
# same digits binarised by coin tosses are other data, and refused. Log-likelihoods on two binarisations differ by many
# nats and say nothing of the models.

# %%
kept = log_density(nade, test)
sampled = torch.bernoulli(grey[1500 : 1500 + len(test)])
print(f"thresholded: {data_hash(test)}, sampled: {data_hash(sampled)}")
try:
    pplvi.compare_densities({"NADE": kept, "RBM": rbm}, sampled)
except ValueError as refusal:
    print("refused:", refusal)

# %% [markdown]
# ## What windows around draws say
#
# A Parzen window puts a Gaussian on every draw and calls the mixture the model's density. Centroids of the training
# images are no draws of anything, blurred as they are; they win against true images. What is measured is how well a few
# points cover space, not how likely the data are under the model. That is why the table has no such column.


# %%
def parzen(draws: Tensor, x: Tensor, width: float) -> float:
    """Mean log density of x under windows around draws."""
    parts = torch.distributions.Independent(torch.distributions.Normal(draws, width), 1)
    count = torch.distributions.Categorical(logits=torch.zeros(len(draws)))
    return torch.distributions.MixtureSameFamily(count, parts).log_prob(x).mean().item()


COUNT = 50 if SMOKE else 200
means = KMeans(COUNT, n_init=1, max_iter=10, random_state=0).fit(train.numpy()).cluster_centers_
draws = {
    "training images": train[:COUNT],
    "centroids": torch.tensor(means, dtype=torch.float32),
    "NADE": nade.sample(COUNT),
    "GMMN": gmmn.sample(COUNT),
}
widths = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
scores = {name: max(parzen(x, test, width) for width in widths) for name, x in draws.items()}
for name, score in sorted(scores.items(), key=lambda pair: -pair[1]):
    print(f"windows around {COUNT} {name}: {score:.1f}")

fig, axis = plt.subplots(figsize=(6, 3))
axis.barh(list(scores), list(scores.values()))
axis.set_xlabel("Parzen windows, nats (a warning, not a score)")
fig.savefig(OUT / "13_parzen.png", bbox_inches="tight")

# %% [markdown]
# ## Annealing in too few steps
#
# A machine with many hidden units has no exact normaliser. In few steps a few chains carry the estimate: log Z comes
# out too small, and likelihoods too high. The effective sample size tells, and such a row has no rank.

# %%
exact = rbm.log_partition().item()
for betas in (3, 10, 20 if SMOKE else 1000):
    estimate = pplvi.annealed_importance_sampling(rbm, num_chains=100, num_betas=betas, seed=0)
    print(f"{betas} steps: log Z {estimate.log_z:.2f} (exact {exact:.2f}), {estimate.ess:.0f} effective chains of 100")
