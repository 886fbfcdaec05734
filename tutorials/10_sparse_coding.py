# %% [markdown]
# # Sparse coding
#
# A datum is the sum of a few atoms of a dictionary. Which atoms, is a latent variable whose posterior has no closed
# form: this page goes through what can be done about that. First the mode, with a certificate of how good it is; then a
# network that says at once what the search finds; then binary codes, where mean field can be compared with the exact
# posterior, and where learning changes what it is an approximation of. It follows chapter 19 of Goodfellow, Bengio and
# Courville's *Deep learning* (2016). The digits are those of scikit-learn: 1,797 images of 8 x 8.
#
# Run this file as it is, or open it as a notebook (the cells are in percent format). Pictures go to `out/`.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from sklearn.datasets import load_digits

import pplvi
from pplvi import LISTA, AutoAmortized, AutoProximal, BinaryMeanField, BinarySparseCoding, SparseCoding

SMOKE = bool(os.environ.get("PPLVI_SMOKE"))  # the tests run this file with short loops
NUM_ATOMS = 20 if SMOKE else 100
NUM_STEPS = 10 if SMOKE else 600
OUT = Path("out")
OUT.mkdir(exist_ok=True)
pyro.set_rng_seed(0)

digits = torch.tensor(load_digits().data / 16.0, dtype=torch.float32)
digits = digits - digits.mean(0)
digits = digits / digits.norm(dim=1, keepdim=True)
train, test = digits[500 : 700 if SMOKE else None], digits[: 40 if SMOKE else 500]

# %% [markdown]
# ## A dictionary
#
# `SparseCoding` is the program: codes with a Laplace prior, observations `v ~ N(W h, noise)`, columns of `W` of length
# one. `learn_dictionary` finds codes by FISTA, and moves the columns one after another, each to its minimum; the
# objective never rises. With `batch_size=` it does so on minibatches.

# %%
coding = SparseCoding.from_data(train, NUM_ATOMS, penalty=0.1)
trace = pplvi.learn_dictionary(coding, train, num_steps=5 if SMOKE else 60)
print(f"mean objective {trace[0]:.4f} after the first codes, {trace[-1]:.4f} at the end")

fig, axes = plt.subplots(4, 10, figsize=(8, 3.4))
for axis, atom in zip(axes.flat, coding.dictionary.detach().T[:40], strict=False):
    axis.imshow(atom.reshape(8, 8).numpy(), cmap="gray")
for axis in axes.flat:
    axis.set_axis_off()
fig.savefig(OUT / "sparse_coding_atoms.png")

# %% [markdown]
# ## The mode, and how far from it we are
#
# `AutoProximal` reads the lasso problem off a program, whatever it looks like: here it is the model's own, below a
# regression. With parameters held fixed there is nothing to train: left free, `fit` would train the dictionary by
# gradient, at the mode of the codes. It needs a Laplace prior and a concave quadratic log density of the rest. The
# duality gap bounds how much the log joint could still rise, without knowing where the maximum is.

# %%
coding.requires_grad_(False)
for method in ("ista", "fista", "coordinate"):
    guide = AutoProximal(coding.model, sites="h", method=method, tol=1e-5)
    codes = guide(test)["h"]
    active = (codes != 0).float().sum(1).mean()
    print(
        f"{method:10s} {guide.iterations:4d} steps, largest gap {guide.gap.max():.1e} nats, {active:.1f} atoms a digit"
    )

fit = pplvi.fit(coding.model, lambda model: AutoProximal(model, "h"), args=(test,), progress=False)
fit.report()

# %% [markdown]
# A point has no entropy: it is no approximation of the posterior, and the report says so. A guide with a density is.
# For one digit, mean field has some evidence, and k-hat says how well it fits.


# %%
def one_digit(v):
    h = pyro.sample("h", dist.Laplace(0.0, 0.1).expand([NUM_ATOMS]).to_event(1))
    pyro.sample("v", dist.Normal(coding.dictionary.detach() @ h, 0.1).to_event(1), obs=v)


normal = pplvi.fit(one_digit, AutoNormal, args=(test[0],), num_steps=5 * NUM_STEPS, seed=0, progress=False)
normal.report()

# %% [markdown]
# ## A network that guesses the codes
#
# LISTA is a network with the shape of ISTA's iterations, which it starts as. As the encoder of an amortised guide with
# `family="delta"` its output is the code itself, and the ELBO, but for a constant, minus the objective of the codes.
# Mixtures of two digits keep it from learning the few digits by heart.


# %%
class Mixtures:
    def __iter__(self):
        while True:
            first, second = (train[torch.randint(len(train), (128,))] for _ in range(2))
            share = 0.3 * torch.rand(128, 1)
            mixed = (1 - share) * first + share * second
            yield mixed / mixed.norm(dim=1, keepdim=True)


network = LISTA(coding.dictionary, num_layers=7, penalty=0.1)
least = coding.objective(test, coding.codes(test))


def excess(codes):
    return (coding.objective(test, codes) - least).mean().item()


before = excess(network(test).detach())
pplvi.fit(
    coding.model,
    lambda model: AutoAmortized(model, network, plates="data", family="delta"),
    data=Mixtures(),
    num_steps=NUM_STEPS,
    learning_rate=3e-3,
    stop=None,
    seed=0,
    progress=False,
)
print(
    f"mean objective above the least: ISTA, 8 steps {before:.4f}; LISTA, 7 layers {excess(network(test).detach()):.4f}"
)

# %% [markdown]
# ## Binary codes and their mean field
#
# With binary codes the posterior can be written down for a dozen of them. Mean field updates one code after another,
# each at its best given the others: the bound never falls. All at once, it may fall, and may never settle.

# %%
torch.manual_seed(0)
truth = BinarySparseCoding(8, 12, weight=torch.randn(8, 12) / 2**0.5)
data = truth.model(size=100).detach()
log_p, _ = truth.exact(data)

fig, axis = plt.subplots(figsize=(7, 3))
for label, options in {
    "in turn": {},
    "at once": {"update": "at once"},
    "at once, half kept": {"update": "at once", "damping": 0.5},
}.items():
    bound = BinaryMeanField(truth, 30, **options).trace(data)
    falls = (bound.diff(dim=0) < -1e-5).any(0).sum()
    print(f"{label:18s} log p - bound {(log_p - bound[-1]).mean():.3f} nats a datum, {falls} of 100 bounds ever fell")
    axis.plot((log_p - bound).mean(1), label=label)
best = BinaryMeanField(truth, restarts=20).bound(data)
print(f"the best of 21 starts: {(log_p - best).mean():.3f}")
axis.set(xlabel="sweep", ylabel="KL to the posterior, nats a datum")
axis.legend()
fig.savefig(OUT / "sparse_coding_mean_field.png")

# %% [markdown]
# ## Learning changes what inference can reach
#
# EM with the exact posterior raises log p, whether the posterior factorises or not. EM with mean field raises
# the bound, log p minus the divergence of the two: it moves to models whose posteriors factorise. From one start, the
# gap widens in the one and narrows in the other; what that costs is a difference of two exact log p.

# %%
torch.manual_seed(5)
source = BinarySparseCoding(12, 8, weight=1.5 * torch.randn(12, 8) / 12**0.5)
data = source.model(size=500).detach()
start = source.weight.detach() + 0.3 * torch.randn(12, 8)
models = {name: BinarySparseCoding(12, 8, weight=start) for name in ("exact EM", "mean-field EM")}
gaps = {name: [] for name in models}
for _ in range(2 if SMOKE else 8):
    for name, model in models.items():
        gaps[name].append((model.exact(data)[0] - BinaryMeanField(model, restarts=5).bound(data)).mean().item())
        posterior = "exact" if name == "exact EM" else BinaryMeanField(model)
        pplvi.learn_binary_coding(model, data, posterior, num_steps=5)
cost = (models["exact EM"].exact(data)[0] - models["mean-field EM"].exact(data)[0]).mean()
print({name: [round(gap, 3) for gap in found] for name, found in gaps.items()})
print(f"log p at the end: the model of mean-field EM has {cost:.3f} nats a datum less")

fig, axis = plt.subplots(figsize=(6, 3))
for name, found in gaps.items():
    axis.plot(5 * torch.arange(len(found)), found, label=name)
axis.set(xlabel="EM steps", ylabel="log p - bound, nats a datum", ylim=(0, None))
axis.legend()
fig.savefig(OUT / "sparse_coding_learning.png")
