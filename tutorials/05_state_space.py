# %% [markdown]
# # State-space models
#
# A particle filter moves weighted draws through time. pplvi trains its proposals with Pyro's `SVI`: the filter is the
# sampler, and the bound or divergence is an argument. This page goes from a model with two methods to learned
# proposals, a learned look-ahead factor, and a posterior over whole sequences in ArviZ.
#
# Run this file as it is, or open it as a notebook (the cells are in percent format). Pictures go to `out/`.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam

import pplvi
from pplvi import FilteredGuide, FilteringELBO, Posterior, StateSpace
from pplvi.objectives import NestedForwardKL
from pplvi.weights import effective_sample_size

SMOKE = bool(os.environ.get("PPLVI_SMOKE"))  # the tests run this file with short loops
NUM_TIMES = 12 if SMOKE else 60
NUM_STEPS = 15 if SMOKE else 400
NUM_DRAWS = 40 if SMOKE else 1000
OUT = Path("out")
OUT.mkdir(exist_ok=True)
pyro.set_rng_seed(0)

# %% [markdown]
# ## The model
#
# Stochastic volatility: the log variance `z` of a return wanders and comes back, `z[t] ~ N(0.95 z[t-1], 0.4)`, and the
# return is `y[t] ~ N(0, exp(z[t] / 2))`. It is an object with two methods, as for Pyro's `SMCFilter`: `init` draws the
# first state, `step` the next one and its datum, and `state` carries whatever later steps need.


# %%
class Volatility:
    def init(self, state):
        state["z"] = pyro.sample("z", dist.Normal(0.0, 1.2))

    def step(self, state, y=None):
        state["z"] = pyro.sample("z", dist.Normal(0.95 * state["z"], 0.4))
        pyro.sample("y", dist.Normal(0.0, (state["z"] / 2).exp()), obs=y)


truth = [torch.randn(()) * 1.2]
for _ in range(NUM_TIMES):
    truth.append(0.95 * truth[-1] + 0.4 * torch.randn(()))
truth = torch.stack(truth)
ys = (truth[1:] / 2).exp() * torch.randn(NUM_TIMES)

# %% [markdown]
# ## A filter with the model's own dynamics, and one that learns
#
# The proposal is written in the same way, and only reads the state. The bootstrap filter proposes from the dynamics and
# does not look at the datum. A network can: it shifts the proposal by what `log y^2` says about the log variance.
#
# `svi.step(ys)` runs `init(state)` and then `step(state, y)` for each `y` in `ys`. `FilteringELBO` is the filtering
# bound (FIVO, VSMC), `-log Z` as the filter estimates it, resampled where the effective sample size falls below a half.


# %%
class Bootstrap:
    def init(self, state):
        pyro.sample("z", dist.Normal(0.0, 1.2))

    def step(self, state, y):
        pyro.sample("z", dist.Normal(0.95 * state["z"], 0.4))


class Learned(PyroModule):
    def __init__(self, name="learned"):
        super().__init__(name)
        self.net = PyroModule[torch.nn.Sequential](
            PyroModule[torch.nn.Linear](2, 16), torch.nn.Tanh(), PyroModule[torch.nn.Linear](16, 1)
        )
        torch.nn.init.zeros_(self.net[-1].weight)
        self.scale = PyroParam(torch.tensor(0.4), dist.constraints.positive)

    def init(self, state):
        pyro.sample("z", dist.Normal(0.0, 1.2))

    def step(self, state, y):
        log_square = (y**2 + 1e-3).log().expand_as(state["z"])
        shift = self.net(torch.stack([state["z"], log_square], -1)).squeeze(-1)
        pyro.sample("z", dist.Normal(0.95 * state["z"] + 0.4 * shift, self.scale))


def train(proposal, loss):
    svi = SVI(Volatility(), proposal, Adam({"lr": 0.01}), loss)
    return [svi.step(ys) for _ in range(NUM_STEPS)]


learned = Learned()
losses = train(learned, FilteringELBO(num_particles=16, resample=0.5))

# %% [markdown]
# The same proposal by other objectives: `"forward_kl"` is NASMC, reweighted wake-sleep over time. It needs no
# reparameterised draws, so discrete states are as good as continuous ones.

# %%
nasmc = Learned("nasmc")
train(nasmc, FilteringELBO(num_particles=16, objective="forward_kl", resample=0.5))

# %% [markdown]
# A factor that looks ahead: `look_ahead(state, rest)` is the logarithm of a guess of how likely the data still to come
# are. It changes which particles survive, never what is estimated. Here it is a learned function of the state and the
# next datum, and is trained together with the proposal by the nested forward KL divergence of each step.


# %%
class Prophet(Learned):
    def __init__(self):
        super().__init__("prophet")
        self.strength = PyroParam(torch.tensor(0.1), dist.constraints.positive)

    def look_ahead(self, state, rest):
        variance = (0.95 * state["z"]).exp()
        return self.strength * dist.Normal(0.0, variance.sqrt()).log_prob(rest[0])


prophet = Prophet()
train(prophet, FilteringELBO(num_particles=16, objective=NestedForwardKL(), resample=0.5))

# %% [markdown]
# ## Which filter is better?
#
# The estimate of log Z is lower on average the worse the proposal; the effective sample size says where in time.

# %%
evaluation = FilteringELBO(num_particles=200, resample=True)
fig, axis = plt.subplots(figsize=(8, 3))
for label, proposal in (("bootstrap", Bootstrap()), ("FIVO", learned), ("NASMC", nasmc), ("look-ahead", prophet)):
    with torch.no_grad():
        values = torch.tensor([-evaluation.loss(Volatility(), proposal, ys) for _ in range(5 if SMOKE else 20)])
        steps = list(evaluation.steps(Volatility(), proposal, ys))
    print(f"{label:10s} log Z {values.mean():8.2f}, sd between runs {values.std():.2f}")
    axis.plot([float(effective_sample_size(step.log_weight)) for step in steps], label=label)
axis.set(xlabel="time", ylabel="effective sample size of 200")
axis.legend()
fig.savefig(OUT / "state_space_filters.png")

# %% [markdown]
# ## The posterior over sequences
#
# `FilteredGuide` makes a guide of a filter: each draw is a run of the filter of its own, one particle of which is
# traced back to the start, with the filter's estimate of the evidence as its weight. `StateSpace` makes an ordinary
# program of the model, whose sites are numbered by their time. From there on everything is as for any other model:
# k-hat, evidence, prediction, ArviZ.

# %%
guide = FilteredGuide(Volatility(), learned, num_particles=50)
posterior = Posterior(StateSpace(Volatility()), guide, (ys,), num_draws=NUM_DRAWS, seed=0)
log_z, error = posterior.log_evidence
print(f"log Z {log_z:.2f} +- {error:.2f}, Pareto k-hat {posterior.pareto_k:.2f}, {posterior.ess:.0f} effective draws")
data = pplvi.to_arviz(posterior)
print(list(data))

paths = posterior.resample()
z = torch.stack([paths[name] for name in ["z", *(f"z_{t}" for t in range(1, NUM_TIMES + 1))]], -1)
low, middle, high = z.quantile(torch.tensor([0.05, 0.5, 0.95]), 0)
fig, axis = plt.subplots(figsize=(8, 3))
axis.fill_between(range(NUM_TIMES + 1), low, high, alpha=0.3, label="90 % interval")
axis.plot(middle, label="median")
axis.plot(truth, "k--", label="truth")
axis.set(xlabel="time", ylabel="log variance")
axis.legend()
fig.savefig(OUT / "state_space_posterior.png")

# %% [markdown]
# ## The same with a loop
#
# A program with a `pyro.markov` loop works too; its iterations are the steps, and the proposal is a program with a loop
# of the same length. As a program cannot be resumed in its middle, it is run again from the start at every step: fine
# for short series, while `init` and `step` take time in proportion to the length.


# %%
def model(ys):
    z = pyro.sample("z_0", dist.Normal(0.0, 1.2))
    for t in pyro.markov(range(len(ys))):
        z = pyro.sample(f"z_{t + 1}", dist.Normal(0.95 * z, 0.4))
        pyro.sample(f"y_{t + 1}", dist.Normal(0.0, (z / 2).exp()), obs=ys[t])


def proposal(ys):
    z = pyro.sample("z_0", dist.Normal(0.0, 1.2))
    for t in pyro.markov(range(len(ys))):
        z = pyro.sample(f"z_{t + 1}", dist.Normal(0.95 * z, 0.4))


print(f"bootstrap filter of the loop: log Z {-FilteringELBO(200).loss(model, proposal, ys[:10]):.2f}")
