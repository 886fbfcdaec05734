# %% [markdown]
# # The undirected zoo
#
# A restricted Boltzmann machine is one of many. This page goes through its relatives: machines that are given
# something, that convolve, that classify, whose units gate each other, that model the covariance of real data, and
# that run through time. Each is its energy and its conditionals; the loss, the chains, the estimate of log Z and the
# monitors are those of tutorial 8. It follows chapter 20 of Goodfellow, Bengio and Courville's *Deep learning* (2016).
# The digits are those of scikit-learn: 1,797 images of 8 x 8.
#
# Run this file as it is, or open it as a notebook (the cells are in percent format). Pictures go to `out/`.

# %%
import os
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits, load_sample_image

import pplvi
from pplvi.energies import MeanFieldGuide, SpikeSlabUnits, chain_mixing, plot_filters, plot_images

SMOKE = bool(os.environ.get("PPLVI_SMOKE"))  # the tests run this file with short loops
NUM_STEPS = 10 if SMOKE else 2000
NUM_BETAS = 20 if SMOKE else 500
OUT = Path("out")
OUT.mkdir(exist_ok=True)
pyro.set_rng_seed(0)

grey, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
v, y = (grey > 7.5).float(), y.long()
train_v, test_v, train_y, test_y = v[:1400], v[1400:], y[:1400], y[1400:]


def train(program, guide, data, loss, lr=2e-3, size=100):
    """Minibatches of some tensors that belong together; the last loss."""
    pyro.clear_param_store()  # machines have parameters of the same names
    svi, value = SVI(program, guide, pyro.optim.Adam({"lr": lr}), loss), float("nan")
    for _ in range(NUM_STEPS):
        rows = torch.randint(len(data[0]), (size,))
        value = svi.step(*(part[rows] for part in data))
    return value


# %% [markdown]
# ## Given something
#
# The lower half of a digit, given the upper one: `given=32` is the width of what the machine is conditional on. It has
# weights to both layers and no energy of its own. Every datum has its own log Z, so that a chain cannot go on from one
# to another: contrastive divergence starts each at its datum, and annealed importance sampling has chains for each.

# %%
upper, lower = train_v[:, :32], train_v[:, 32:]
crbm = pplvi.RestrictedBoltzmannMachine(32, 40, given=32)
loss = pplvi.BoltzmannELBO(negative="contrastive", sweeps=5)
train(lambda v, x: crbm.model(v, given=x), lambda v, x: crbm.guide(v, given=x), (lower, upper), loss)
test = {"v": test_v[:, 32:], "given": test_v[:, :32]}
print(pplvi.annealed_importance_sampling(crbm, 20, NUM_BETAS, data=test, num_raise_chains=0, seed=0).log_likelihood)

# %%
x = test_v[:10, :32]
drawn = crbm.distribution(given=x, num_sweeps=20 if SMOKE else 500).sample((3,))
rows = torch.cat([test_v[:10], *(torch.cat([x, half], 1) for half in drawn)])
plot_images(rows, labels=["data", "drawn", "drawn", "drawn"]).savefig(OUT / "11_lower_halves.png", bbox_inches="tight")

# %% [markdown]
# ## Filters that are everywhere
#
# A convolutional machine has one set of filters for all places, and of each 2 x 2 block of a map at most one unit is on
# (probabilistic max pooling): `pooled` is what a layer above would see.

# %%
conv = pplvi.ConvolutionalBoltzmannMachine((1, 8, 8), maps=12, filter_size=3, pool=2)
train(conv.model, conv.guide, (train_v,), pplvi.BoltzmannELBO(num_chains=50, sweeps=1))
print("pooled features:", conv.pooled(test_v[:5]).shape)
print(pplvi.annealed_importance_sampling(conv, 50, NUM_BETAS, base_rate=train_v.mean(0), seed=0))
plot_filters(conv, columns=6).savefig(OUT / "11_filters.png")

# %% [markdown]
# ## Labels
#
# With a layer of labels, p(y | v) is exact. Training can maximise it alone, the joint likelihood, or both.

# %%
machine = pplvi.ClassificationBoltzmannMachine(64, 60, num_labels=10)
train(machine.classify, machine.marginal_guide, (train_v, train_y), pplvi.ELBO())
print("discriminative, test error:", (machine.label_logits(test_v).argmax(1) != test_y).float().mean().item())

machine = pplvi.ClassificationBoltzmannMachine(64, 60, num_labels=10)
train(machine.hybrid, machine.marginal_guide, (train_v, train_y), pplvi.BoltzmannELBO(num_chains=50, sweeps=1))
print("hybrid, test error:", (machine.label_logits(test_v).argmax(1) != test_y).float().mean().item())

# %% [markdown]
# ## Gates
#
# In a gated machine a hidden unit stands for a transformation: it switches on weights between what is given and what is
# seen. Here rows of dots that moved by one place, to the left or to the right; the hidden units say which.

# %%
before = (torch.rand(2000, 12) < 0.3).float()
way = torch.arange(2000) % 2
after = torch.where(way.unsqueeze(1) == 0, before.roll(-1, 1), before.roll(1, 1))
gated = pplvi.GatedBoltzmannMachine(12, 8, given=12, num_factors=30)
loss = pplvi.BoltzmannELBO(negative="contrastive", sweeps=1)
train(lambda v, x: gated.marginal(v, given=x), gated.marginal_guide, (after, before), loss, lr=5e-3)
means = gated.guide.factorised(after, given=before).means["h"]
gap = (means[way == 0].mean(0) - means[way == 1].mean(0)).abs().max()
print(f"the unit that tells the ways apart best: means differ by {gap.item():.2f}")

# %% [markdown]
# ## Real data: covariance
#
# Gaussian visible units with binary hidden ones mix Gaussians of one covariance. Spike-and-slab units, which are off or
# a real number, and mean-and-covariance machines, whose chains are moved by Hamiltonian Monte Carlo on the free energy,
# change the covariance from datum to datum. Patches of a photograph, whitened; log-likelihoods of held-out patches.
# `marginal` is the program with hidden layers summed out; nothing is left for a guide to do.

# %%
photo = torch.log1p(torch.tensor(load_sample_image("china.jpg").mean(-1), dtype=torch.float32) + torch.rand(427, 640))
patches = photo.unfold(0, 4, 4).unfold(1, 4, 4).reshape(-1, 16)[torch.randperm(106 * 160)]
values, vectors = torch.linalg.eigh(torch.cov(patches.T))
patches = (patches - patches.mean(0)) @ (vectors * (values + 1e-3 * values.mean()).rsqrt()) @ vectors.T
slabs = SpikeSlabUnits(16, precision=4.0)
kinds = {
    "Gaussian": pplvi.RestrictedBoltzmannMachine(16, 16, visible="gaussian", centered=False),
    "spike and slab": pplvi.RestrictedBoltzmannMachine(16, 16, visible="gaussian", hidden=slabs, centered=False),
    "mean and covariance": pplvi.MeanCovarianceMachine(16, num_covariance=12, num_mean=4, num_leapfrog=5),
}
for name, kind in kinds.items():
    train(kind.marginal, kind.marginal_guide, (patches[:12000],), pplvi.BoltzmannELBO(num_chains=100, sweeps=1))
    found = pplvi.annealed_importance_sampling(
        kind, 50, NUM_BETAS, data=patches[12000:14000], num_raise_chains=0, seed=0
    )
    print(f"{name}: {found.log_likelihood[0]:.2f} +- {found.log_likelihood[1]:.2f} nats; {found}")
mixing = chain_mixing(kinds["mean and covariance"], 4, 20 if SMOKE else 500, seed=0)
print(f"R-hat of its chains {mixing.r_hat:.2f}")

# %% [markdown]
# ## Time
#
# In an RNN-RBM a recurrent network turns what was seen into the biases of a conditional machine; all times are trained
# together. A dot that walks round a ring:

# %%
start, length = torch.randint(10, (200, 1)), 4 if SMOKE else 12
rings = torch.nn.functional.one_hot((start + torch.arange(length)) % 10, 10).float()
walk = pplvi.RNNBoltzmannMachine(10, 12, num_state=16)
train(walk.model, walk.guide, (rings,), pplvi.BoltzmannELBO(negative="contrastive", sweeps=2), lr=1e-2, size=20)
frames = walk.frames(rings[:20])
found = pplvi.annealed_importance_sampling(walk.machine, 10, NUM_BETAS, data=frames, num_raise_chains=0, seed=0)
print(f"{found.log_likelihood[0]:.2f} nats a frame")
print(walk.generate(1, length, num_sweeps=20 if SMOKE else 200)[0].int())

# %% [markdown]
# ## What is missing
#
# Masks, mean field and `Posterior` are as for other machines; log Z is a constant that the posterior does not know.

# %%
pyro.clear_param_store()
halves = {"v": test_v[:20, 32:], "given": test_v[:20, :32]}
seen = torch.arange(32) < 16
filled = MeanFieldGuide(crbm).fill_in(halves["v"], seen, halves["given"])
print("filled in:", filled.shape)
posterior = pplvi.Posterior(crbm.model, crbm.guide, (halves,), num_draws=20 if SMOKE else 1000, seed=0)
print("median Pareto k-hat of the exact posterior:", posterior.pareto_k.median().item())
