# %% [markdown]
# # Autoregressive, latent and implicit models
#
# Three ways to say what images are like. One pixel after another: the density is exact, draws take a pass for each
# pixel. Latent causes: the density is bounded, draws take one pass. A network of noise: draws and nothing else. Each is
# an ordinary Pyro program with `model`, `guide` and, where there is one, `distribution()`; `pplvi.fit` trains all of
# them. It follows sections 20.10 of Goodfellow, Bengio and Courville's *Deep learning* (2016). The digits are those of
# scikit-learn, 8 x 8, thresholded at half intensity; `13_honest_evaluation.py` compares such models.
#
# Run this file as it is, or open it as a notebook (the cells are in percent format). Pictures go to `out/`.

# %%
import math
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pplvi
from pplvi import MADE, NADE, Adversarial, DeepLatentGaussian, Generator, MomentMatching, OrderlessNADE
from pplvi.energies.evaluation.pictures import plot_images
from pplvi.evaluation import mode_coverage

SMOKE = bool(os.environ.get("PPLVI_SMOKE"))  # the tests run this file with short loops
NUM_STEPS = 20 if SMOKE else 3000
NUM_DRAWS = 30 if SMOKE else 1000
OUT = Path("out")
OUT.mkdir(exist_ok=True)
pyro.set_rng_seed(0)

digits = torch.tensor(load_digits().data > 7.5, dtype=torch.float32)[torch.randperm(1797)]
train, test = digits[:1500], digits[1500:]
batches = list(train.split(100))
how = {"data": batches, "num_steps": NUM_STEPS, "seed": 0, "progress": False, "learning_rate": 0.005}

# %% [markdown]
# ## One pixel after another
#
# NADE shares one hidden layer among all conditionals, and takes all of them in one pass; MADE is a masked autoencoder.
# The guide is empty: there are no latents, and the ELBO is the log-likelihood.

# %%
nade, made = NADE(64, 50), MADE(64, [80])
for model in (nade, made):
    model.start_at(train)
    pplvi.fit(model.model, model.guide, **how)
    log_p = model.distribution().log_prob(test)
    print(f"{type(model).__name__}: {log_p.mean():.2f} nats of a test image, exactly")

# %% [markdown]
# ## Half an image
#
# With `mask=` the missing pixels are a latent site: the guide draws each in its turn, given those before it. Weights
# put right what later pixels say of earlier ones, and k-hat says whether they can. The lower half given the upper one
# is exact, since it comes last. The other way round, proposals do not look ahead: that is what weights are for.
#
# `OrderlessNADE` is one network for every order: what was seen comes first, always.

# %%
upper = torch.arange(64) < 32
for name, mask in (("upper", upper), ("lower", ~upper)):
    posterior = pplvi.Posterior(nade.model, nade.guide, (test[:20],), {"mask": mask}, num_draws=NUM_DRAWS, seed=0)
    print(f"the {name} half seen: median Pareto k-hat {posterior.pareto_k.median().item():.2f}")

orderless = OrderlessNADE(64, [100])
orderless.start_at(train)
pplvi.fit(orderless.model, orderless.guide, **how)
for count in (1, 8):
    log_p = orderless.distribution(num_orders=count).log_prob(test)
    print(f"an ensemble of {count} orders: {log_p.mean():.2f} nats")
halves = orderless.distribution().complete(test[:10], ~upper)
rows = torch.cat([nade.sample(10), test[:10], torch.where(upper, 0.5, test[:10]), halves])
plot_images(rows, labels=["NADE draws", "data", "lower half", "filled in"]).savefig(OUT / "12_halves.png")

# %% [markdown]
# ## Latent causes
#
# `DeepLatentGaussian` has layers of latents and a ladder for a guide. `given=` makes it conditional, here on the
# digit's class. `BetaELBO` weighs the divergence from the prior: no bound, and it says so (`monitor is None`).

# %%
classes = torch.nn.functional.one_hot(torch.tensor(load_digits().target), 10).float()
pyro.set_rng_seed(0)
classes = classes[torch.randperm(1797)]
vae = DeepLatentGaussian(64, [4], hidden=60, given=10)
pairs = [(x, c) for x, c in zip(batches, classes[:1500].split(100), strict=True)]
pplvi.fit(vae.model, vae.guide, **{**how, "data": pairs}, objective=pplvi.BetaELBO(2.0))
bound = -pplvi.ImportanceWeightedELBO(100).loss(vae.model, vae.guide, test, classes[1500:]) / len(test)
print(f"conditional on the class: at least {bound:.2f} nats")

values = torch.linspace(-2.5, 2.5, 10)
paths = torch.cat([vae.traverse(torch.zeros(4), i, values, classes[0]) for i in range(4)])
plot_images(paths, labels=[f"latent {i}" for i in range(4)]).savefig(OUT / "12_traversals.png")

# %% [markdown]
# ## Draws and nothing else
#
# A `Generator` is trained by comparing its draws with data: by the moments of a kernel, or by a second network that
# tells them apart. The discriminator is the guide; each program has an optimiser of its own. On 25 modes of a grid one
# can count what is left out. Where draws are as the data, no discriminator has a loss below log 4: a loss near it says
# that this one sees no difference, not that there is none.

# %%
axis = torch.arange(-2.0, 3.0)
centres = torch.cartesian_prod(axis, axis)


def plane(count: int) -> Tensor:
    """Draws of 25 modes."""
    return centres[torch.randint(25, (count,))] + 0.1 * torch.randn(count, 2)


def network() -> nn.Module:
    """From noise to the plane."""
    return nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))


layers = [nn.Linear(2, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)]
judge = nn.Sequential(*layers)


def discriminator(x: Tensor) -> Tensor:
    """Log odds of being data."""
    return pyro.module("judge", judge)(x).squeeze(-1)


matching, adversarial = Generator(network(), 2, name="matching"), Generator(network(), 2, name="adversarial")
adam = {"lr": 0.001, "betas": (0.5, 0.999)}
two = {"model": pyro.optim.Adam(adam), "guide": pyro.optim.Adam(adam)}
points = [plane(200) for _ in range(100)]
shared = {"data": points, "num_steps": NUM_STEPS, "seed": 0, "progress": False}
by_moments = pplvi.fit(matching.model, matching.guide, objective=MomentMatching([0.2, 0.5, 1.0]), **shared)
by_judge = pplvi.fit(adversarial.model, discriminator, objective=Adversarial(), optim=two, **shared)
print(f"discriminator's loss {by_judge.losses[0, -50:].mean():.2f}, log 4 = {math.log(4):.2f}")

fig, axes = plt.subplots(1, 3, figsize=(9, 3), sharex=True, sharey=True)
draws = {"data": plane(1000), "moments": matching.sample(1000), "adversarial": adversarial.sample(1000)}
for axis_of, (name, x) in zip(axes, draws.items(), strict=True):
    found = mode_coverage(x, centres, radius=0.4)
    print(f"{name}: {found.covered} of 25 modes, {found.share:.0%} of the draws near one")
    axis_of.scatter(*x.T.numpy(), s=1)
    axis_of.set_title(name)
fig.savefig(OUT / "12_modes.png")
