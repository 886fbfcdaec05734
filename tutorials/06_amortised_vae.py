# %% [markdown]
# # Minibatches, an amortised guide and a variational autoencoder
#
# With latents for every datum, a guide with parameters for every datum grows with the data. An amortised guide does
# not: one network reads a datum and gives the posterior of its latents. Data then come in minibatches of any size and
# order, and new data need no training. Here: a variational autoencoder of handwritten digits (1,797 images of 8 x 8,
# with scikit-learn): train, generate, reconstruct, fill in missing pixels, and see what amortisation costs.
#
# Run this file as it is, or open it as a notebook (the cells are in percent format). Pictures go to `out/`.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from sklearn.datasets import load_digits
from torch import nn

import pplvi
from pplvi import ELBO, AutoAmortized

SMOKE = bool(os.environ.get("PPLVI_SMOKE"))  # the tests run this file with short loops
NUM_STEPS = 40 if SMOKE else 4000
NUM_DRAWS = 30 if SMOKE else 1000
OUT = Path("out")
OUT.mkdir(exist_ok=True)
pyro.set_rng_seed(0)

# %% [markdown]
# ## The model
#
# Pixels are binarised at random, in proportion to their grey level. Each image has eight latents; a network maps them
# to the probabilities of its pixels. The plate knows the size of the whole data set, so that a minibatch counts for all
# of it. `mask` says which pixels were seen: the others are left out of the likelihood.

# %%
digits = torch.tensor(load_digits().images / 16.0, dtype=torch.float32).flatten(1)
images = torch.bernoulli(digits)
train, test = images[:1500], images[1500:]


class Decoder(PyroModule):
    def __init__(self, latent=8, hidden=128, pixels=64):
        super().__init__()
        self.latent = latent
        self.net = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, pixels))
        to_pyro_module_(self.net)

    def forward(self, x, mask, size=None):
        with pyro.plate("image", size or len(mask), subsample_size=len(mask), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.latent]).to_event(1))
            pixels = dist.Bernoulli(logits=self.net(z)).mask(mask).to_event(1)
            return pyro.sample("x", pixels, obs=x)


# %% [markdown]
# ## An amortised guide
#
# The encoder sees the pixels, zero where they are missing, and the mask. `AutoAmortized` puts a linear head on it that
# gives the parameters of each image's posterior, here independent normals. `family="multivariate_normal"` or `"flow"`
# are richer.


# %%
def encoder(hidden=128, pixels=64):
    return nn.Sequential(nn.Linear(2 * pixels, hidden), nn.Tanh())


def seen(x, mask, size=None):
    return torch.cat([torch.where(mask, x, 0.0), mask.to(x.dtype)], -1)


def guide_of(model):
    return AutoAmortized(model, encoder(), plates="image", inputs=seen)


# %% [markdown]
# ## Train on minibatches
#
# `data` is anything that yields the model's arguments. Some pixels are hidden at random in training, so that the
# encoder learns what to make of missing ones.


# %%
def batches(size=100):
    generator = torch.Generator().manual_seed(0)
    while True:
        rows = torch.randperm(len(train), generator=generator)[:size]
        mask = torch.rand(size, 64, generator=generator) > 0.2 * torch.rand(size, 1, generator=generator)
        yield train[rows], mask, len(train)


fit = pplvi.fit(
    Decoder(), guide_of, data=batches(), objective=ELBO(), num_steps=NUM_STEPS, seed=0, progress=False, compile="trace"
)
model, guide = fit.model, fit.guide
plt.figure(figsize=(6, 3))
plt.plot(fit.losses[0] / len(train))
plt.xlabel("step")
plt.ylabel("-ELBO, nats per image")
plt.savefig(OUT / "06_training.png")

# %% [markdown]
# ## New images
#
# The test images were never seen; their posteriors cost one pass through the network. Weights are per image, so that
# each has a k-hat of its own. The report says that the guide does not grow with the data, and what one network for all
# images costs: the ELBO that each image would gain if its posterior's parameters were its own.

# %%
new = test[:50]
everything = torch.ones_like(new, dtype=torch.bool)
fit.report(args=(new, everything))
gap = pplvi.amortization_gap(guide, (new, everything), num_steps=20 if SMOKE else 300, seed=0)
print(f"amortisation costs {gap.value:.2f} +- {gap.standard_error:.2f} nats an image")

# %% [markdown]
# ## Reconstruct, generate, fill in
#
# Reconstructions come from the posterior, new digits from the prior, and missing pixels from the posterior given the
# ones that were seen.


# %%
def probabilities(x, mask):
    z = guide.quantiles([0.5], x, mask)["z"][0]
    return torch.sigmoid(model.net(z)).detach()


upper = everything.clone()
upper[:, 32:] = False  # the lower half is missing
filled = torch.where(upper, new, probabilities(new, upper))
fantasies = torch.sigmoid(model.net(torch.randn(50, model.latent))).detach()
rows = {"data": new, "reconstructed": probabilities(new, everything), "lower half filled in": filled, "new": fantasies}

figure, axes = plt.subplots(len(rows), 10, figsize=(10, 1.2 * len(rows)))
for line, (name, pictures) in zip(axes, rows.items(), strict=True):
    for axis, picture in zip(line, pictures, strict=False):
        axis.imshow(picture.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([])
    line[0].set_ylabel(name, rotation=0, ha="right", fontsize=8)
figure.savefig(OUT / "06_digits.png", bbox_inches="tight")

wrong = ((filled > 0.5) != (new > 0.5))[:, 32:].float().mean()
mean_image = train.mean(0).expand_as(new)
baseline = ((mean_image > 0.5) != (new > 0.5))[:, 32:].float().mean()
print(f"missing pixels wrong: {wrong:.1%}; with the mean image {baseline:.1%}")

# %% [markdown]
# ## On to ArviZ
#
# The plate is a named dimension; resampling by weights is done image by image.

# %%
posterior = fit.posterior(NUM_DRAWS, args=(new, everything))
data = pplvi.to_arviz([posterior])
print(data.posterior["z"].dims, dict(data.posterior.sizes))
print("median k-hat over images:", np.round(posterior.pareto_k.median().item(), 2))
