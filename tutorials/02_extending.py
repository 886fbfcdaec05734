# %% [markdown]
# # Extending
#
# Your own guide, your own objective in ten lines, what a `Step` is, and the two KL divergences in pictures.
#
# The one idea: every algorithm here is a sequence of *weighted steps*. A sampler runs the model and the guide and
# yields steps; an objective is a pure function of a step. So a new objective works with every sampler and guide, and a
# new guide with every objective.

# %%
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoContinuous, AutoNormal, init_to_value

import pplvi
from pplvi import ELBO, AutoFlow, ForwardKL, ImportanceWeightedELBO, WeightedELBO
from pplvi.objectives import Objective, Terms
from pplvi.weights import logmeanexp

SMOKE = bool(os.environ.get("PPLVI_SMOKE"))  # the tests run this file with short loops
NUM_STEPS = 40 if SMOKE else 800
OUT = Path("out")
OUT.mkdir(exist_ok=True)
pyro.set_rng_seed(0)

# %% [markdown]
# ## Your own guide
#
# A guide is any Pyro program with the latent sites of the model. The plainest is a function with parameters:


# %%
def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def guide(y):
    loc = pyro.param("guide_loc", y.mean().detach())
    spread = pyro.param("guide_spread", torch.tensor([0.5, 0.5]), constraint=dist.constraints.positive)
    pyro.sample("loc", dist.Normal(loc, spread[0]))
    centre = pyro.param("guide_centre", torch.tensor(0.0))
    pyro.sample("scale", dist.LogNormal(centre, spread[1]))


y = torch.tensor([1.2, 0.4, 2.9, -0.3, 1.6])
options = {"optim": partial(torch.optim.Adam, lr=0.03), "num_steps": NUM_STEPS, "seed": 0, "progress": False}
by_hand = pplvi.fit(model, guide, args=(y,), **options)
by_hand.report()

# %% [markdown]
# The report says that this guide misses the tails, which five observations leave heavy. So the next one has them.
#
# A family of guides for *any* model is a subclass of one of Pyro's `AutoGuide` classes. `AutoContinuous` packs all
# latents into one unconstrained vector, and asks for its distribution only. Here: independent Student-t marginals, with
# learned degrees of freedom. Heavy tails are what importance weights like, so look at k-hat.


# %%
class AutoStudentT(AutoContinuous):
    """Independent Student-t distributions over the unconstrained latents."""

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        self.centre = torch.nn.Parameter(self._init_loc())
        self.log_width = torch.nn.Parameter(torch.full_like(self.centre, -1.0))
        self.log_df = torch.nn.Parameter(torch.full_like(self.centre, 2.0))

    def get_posterior(self, *args, **kwargs):
        return dist.StudentT(2.0 + self.log_df.exp(), self.centre, self.log_width.exp()).to_event(1)


for family in (AutoNormal, AutoStudentT, AutoFlow):
    fit = pplvi.fit(model, family, args=(y,), objective=ELBO(num_particles=8), **options)
    k_hat = float(fit.posterior().pareto_k)
    print(f"{family.__name__:<14} loss {fit.losses[0, -20:].mean():7.3f}   k-hat {k_hat:5.2f}")

# %% [markdown]
# ## What a Step is
#
# A loss can show the steps that it works on. Here there is one: importance sampling from the guide. Its log weights are
# in nats, particles on dimension 0. The latents above are global, so a particle has one weight for all data.

# %%
loss = ImportanceWeightedELBO(num_particles=4)
(step,) = loss.steps(model, guide, y)
print("log target ", step.log_target.shape, "log p(y, z)")
print("log forward", step.log_forward.shape, "log q(z)")
assert torch.allclose(step.log_increment, step.log_target - step.log_forward)
assert not step.log_weight.requires_grad  # the weight itself is always detached

# %% [markdown]
# With a latent for each datum inside the plate, and none outside, weights are per datum: the batch of the step is the
# plate. That is why a hundred data do not make the effective sample size collapse.


# %%
def local_model(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def local_guide(y):
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(0.5 * y, 0.7))


(local_step,) = loss.steps(local_model, local_guide, torch.randn(100))
print("log weights of", tuple(local_step.log_weight.shape), "(particles, data)")

# %% [markdown]
# The bounds are one-liners of a step: the ELBO is the mean of the log weights, the importance-weighted bound the
# logarithm of the mean weight.

# %%
log_weight = step.log_increment.detach()
elbo = log_weight.mean(0)
importance_weighted = logmeanexp(log_weight)
print(f"ELBO {elbo:.3f} <= importance weighted {importance_weighted:.3f}")

# %% [markdown]
# ## Your own objective in ten lines
#
# An objective says what it makes of a step: a value to report and a surrogate to differentiate, one number for each
# element of the batch. What draws it needs (detached ones, frozen densities) it declares in `routing`, and what bound
# it reports in `monitor`; the defaults are reparameterised draws and no bound.
#
# VR-max (Li & Turner 2016) only looks at the best particle of each datum. It is no bound, so nothing will stop early by
# it, unless another loss is named with `fit(..., monitor=ELBO())`.


# %%
@dataclass(frozen=True)
class BestParticle(Objective):
    """VR-max: minus the largest log weight."""

    def __call__(self, step):
        loss = -step.log_increment.max(0).values
        return Terms(value=loss.detach(), surrogate=loss)


own = WeightedELBO(BestParticle(), num_particles=8)
print(own, "monitor:", own.monitor)
fit = pplvi.fit(model, AutoNormal, args=(y,), objective=own, **options)
print(f"k-hat {float(fit.posterior().pareto_k):.2f}")

# %% [markdown]
# `WeightedELBO` is one of Pyro's losses, so it goes into `SVI` as well. And losses add and scale:

# %%
pyro.clear_param_store()
mixed = 0.5 * ELBO(num_particles=8) + 0.5 * ForwardKL(num_particles=8)
svi = SVI(model, AutoFlow(model, "nice"), pyro.optim.Adam({"lr": 0.01}), loss=mixed)
print(mixed, "first loss:", round(svi.step(y), 2))

# %% [markdown]
# ## The two KL divergences in pictures
#
# The ELBO minimises KL(q || p): wherever the guide is, the posterior must be. It picks one of two modes. The forward
# KL, KL(p || q), turns that round: wherever the posterior is, the guide must be. It covers both, and a normal guide
# ends at the mean and the standard deviation of the posterior.


# %%
def squared():
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(z**2, 2.0), obs=torch.tensor(9.0))


def normal():
    loc = pyro.param("loc", torch.tensor(1.0))
    scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


z = torch.linspace(-6, 6, 1201)
joint = (dist.Normal(0.0, 3.0).log_prob(z) + dist.Normal(z**2, 2.0).log_prob(torch.tensor(9.0))).exp()
exact = joint / torch.trapezoid(joint, z)  # the posterior, two modes near -3 and 3
exact_sd = torch.trapezoid(exact * z**2, z).sqrt()

plt.figure(figsize=(7, 3.5))
plt.fill_between(z, exact, color="0.85", label="posterior")
for name, objective in {"reverse KL (ELBO)": ELBO(32), "forward KL": ForwardKL(64)}.items():
    fit = pplvi.fit(squared, normal, objective=objective, **options)
    loc, scale = (fit.params[0][key] for key in ("loc", "scale"))
    plt.plot(z, dist.Normal(loc, scale).log_prob(z).exp(), label=name)
    print(f"{name:<18} mean {loc:6.2f}   sd {scale:5.2f}")
print(f"{'posterior':<18} mean {0.0:6.2f}   sd {exact_sd:5.2f}")
plt.legend()
plt.savefig(OUT / "extending_two_kls.png")

# %% [markdown]
# Neither is wrong: the guide has one mode and the posterior two. A guide that can have two needs no choice. Here a
# flow, trained on the forward KL, with its transforms in the order that makes scoring given draws the fast direction.

# %%
two_peaks = pplvi.fit(
    squared,
    lambda model: AutoFlow(
        model,
        "nsf",
        inverse=False,
        transforms=2,
        init_loc_fn=init_to_value(values={"z": torch.tensor(0.0)}),
        init_scale=2.0,
    ),
    objective=ForwardKL(num_particles=64),
    **options,
)
posterior = two_peaks.posterior()
draws = posterior.draws.latents["z"]
print(f"draws below 0: {(draws < 0).float().mean():.2f}, sd {draws.std():.2f}, k-hat {float(posterior.pareto_k):.2f}")

plt.figure(figsize=(7, 3.5))
plt.fill_between(z, exact, color="0.85", label="posterior")
plt.hist(draws.tolist(), bins=60, range=(-6, 6), density=True, histtype="step", label="draws of the flow")
plt.legend()
plt.savefig(OUT / "extending_flow.png")
