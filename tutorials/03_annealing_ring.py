# %% [markdown]
# # Annealing the ring
#
# Sampling from a density that is known only up to its mass, and has eight far-away modes. A path of targets leads
# there, and each step of it is learned on its own (nested variational inference, Zimmermann et al. 2021).

# %%
import math
import os
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pplvi
from pplvi import AnnealedGuide, NestedELBO
from pplvi.kernels import ResidualKernel
from pplvi.objectives import Routing
from pplvi.samplers import Annealed, Request
from pplvi.samplers.annealed import Resampling
from pplvi.weights import effective_sample_size, logmeanexp

SMOKE = bool(os.environ.get("PPLVI_SMOKE"))  # the tests run this file with short loops
NUM_STEPS = 40 if SMOKE else 4000
NUM_DRAWS = 200 if SMOKE else 2000
LEVELS = 4 if SMOKE else 8
OUT = Path("out")
OUT.mkdir(exist_ok=True)
pyro.set_rng_seed(0)

# %% [markdown]
# ## The target
#
# A model need not be normalised: `pyro.factor` adds any log density. The latent itself gets a distribution that says
# where it lives, with `mask(False)` so that it counts for nothing. The mass of the ring is 8: one for each mode.

# %%
ANGLE = 2 * math.pi * torch.arange(1, 9) / 8
CENTRES = 10 * torch.stack([ANGLE.sin(), ANGLE.cos()], -1)


def ring():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
    modes = dist.Normal(CENTRES, 0.5**0.5).to_event(1)
    pyro.factor("density", torch.logsumexp(modes.log_prob(x.unsqueeze(-2)), -1))


def start():
    pyro.sample("x", dist.Normal(torch.zeros(2), 5.0).to_event(1))


# %% [markdown]
# ## Guide and objective
#
# Between `start` and `ring` lie targets `start^(1 - beta) * ring^beta`. A forward kernel moves draws from one to the
# next, a reverse kernel says how to come back, and the difference of the log densities goes into the weights, so that
# these are right however bad the kernels are. `learn_path=True` also learns the betas.
#
# The same guide trains under `Trace_ELBO` or any objective here as ordinary variational inference on all levels
# together. `NestedELBO` trains each level on its own divergence, from weighted draws of the level before.

# %%
fit = pplvi.fit(
    ring,
    lambda model: AnnealedGuide(model, start, LEVELS - 1, ResidualKernel(hidden=50), learn_path=True),
    objective=NestedELBO("reverse_kl", num_particles=288 // LEVELS, resample=True),
    learning_rate=3e-3,
    num_steps=NUM_STEPS,
    compile=False if SMOKE else "auto",
    seed=0,
    progress=False,
)
fit.report()
guide = fit.guide
print("betas", [round(beta, 3) for beta in guide.betas.tolist()])

# %% [markdown]
# ## Every level in pictures
#
# On the extended space the draws of the levels before the last are auxiliary sites of the guide. Grey levels are the
# target of each level, dots the draws that the kernels made for it, sized by their weights.

# %%
with pyro.plate("draws", NUM_DRAWS), torch.no_grad():
    trace = pyro.poutine.trace(guide).get_trace()
draws = [trace.nodes[f"_x_{level}"]["value"] for level in range(LEVELS - 1)] + [trace.nodes["x"]["value"]]

axis = torch.linspace(-15.0, 15.0, 120)
grid = torch.cartesian_prod(axis, axis)
modes = dist.Normal(CENTRES, 0.5**0.5).to_event(1)
log_ring = torch.logsumexp(modes.log_prob(grid.unsqueeze(-2)), -1)
log_start = dist.Normal(torch.zeros(2), 5.0).to_event(1).log_prob(grid)

figure, axes = plt.subplots(2, LEVELS // 2, figsize=(3 * LEVELS // 2, 6), layout="constrained", squeeze=False)
for level, (ax, beta) in enumerate(zip(axes.flat, guide.betas.tolist(), strict=True)):
    density = ((1 - beta) * log_start + beta * log_ring).softmax(0).reshape(120, 120)
    ax.imshow(density.T, origin="lower", extent=(-15, 15, -15, 15), cmap="Greys")
    ax.scatter(*draws[level][:500].T, s=3, color="tab:red", alpha=0.5)
    ax.set(title=f"beta = {beta:.3f}", xticks=[], yticks=[])
figure.savefig(OUT / "annealing_ring_levels.png")

# %% [markdown]
# ## What each level costs
#
# A walk yields one weighted step a level. The mean weight estimates the mass of each target, without bias; the
# effective sample size says how many of the draws are left. Without resampling it falls from level to level; with it,
# it is that of the last level alone. Both are worth looking at, and only the first says how good the kernels are.

# %%
request = Request(NUM_DRAWS, routing=Routing(detach=True, local=True))
for resample in (False, True):
    with torch.no_grad():
        steps = list(Annealed(Resampling(resample))(ring, guide, (), {}, request))
    ess = [float(effective_sample_size(step.log_weight)) / NUM_DRAWS for step in steps]
    mass = [float(logmeanexp(step.log_weight)) for step in steps]
    print("with resampling" if resample else "without resampling")
    print("  effective sample size, % ", [round(100 * e) for e in ess])
    print("  log mass of each target  ", [round(m, 2) for m in mass], f"(the last one is {math.log(8):.3f})")

# %% [markdown]
# ## The posterior, and ArviZ
#
# An annealed guide is a guide like any other: draws are weighted, the weights smoothed, and k-hat and log Z come with
# them. Each of the eight modes should hold one draw in eight.

# %%
posterior = fit.posterior(num_draws=NUM_DRAWS)
log_z, error = posterior.log_evidence
print(f"log Z {float(log_z):.3f} +- {float(error):.3f}, exact {math.log(8):.3f}; k-hat {float(posterior.pareto_k):.2f}")

data = fit.to_arviz()
print(az.summary(data, round_to=2).to_string())
points = torch.as_tensor(data.posterior["x"].values).reshape(-1, 2)
nearest = torch.cdist(points.float(), CENTRES).argmin(-1)
print("draws in each mode", torch.bincount(nearest, minlength=8).tolist())

figure, ax = plt.subplots(figsize=(5, 5), layout="constrained")
ax.scatter(*points.T, s=3, alpha=0.4)
ax.set(title="the ring, draws resampled by weight", aspect="equal")
figure.savefig(OUT / "annealing_ring_posterior.png")
