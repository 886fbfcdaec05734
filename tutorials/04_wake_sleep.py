# %% [markdown]
# # Wake-sleep with an encoder
#
# A model of images with binary causes, and a guide that reads the causes off an image. Binary draws have no gradient
# path, so the usual ELBO needs score functions; wake-sleep needs no gradient through a draw at all. Awake, the model
# learns from what the guide sees in the data; asleep, the guide learns from what the model dreams.
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
from pyro.infer import SVI
from torch.nn.functional import softplus

import pplvi
from pplvi import ImportanceWeightedELBO, ReweightedWakeSleep, WakeSleep
from pplvi.weights import effective_sample_size

SMOKE = bool(os.environ.get("PPLVI_SMOKE"))  # the tests run this file with short loops
NUM_STEPS = 40 if SMOKE else 1000
NUM_IMAGES = 100 if SMOKE else 400
OUT = Path("out")
OUT.mkdir(exist_ok=True)
pyro.set_rng_seed(0)

# %% [markdown]
# ## Bars
#
# Every image is five by five pixels. Each of the ten rows and columns is lit with probability 0.2 (Hinton, Dayan, Frey
# and Neal 1995 used such bars), and 2 % of the pixels are flipped. Nobody tells the model that there are bars.

# %%
SIDE, CAUSES = 5, 10
lit = torch.rand(NUM_IMAGES, CAUSES) < 0.2
rows, columns = lit[:, :SIDE, None], lit[:, None, SIDE:]
clean = (rows | columns).reshape(NUM_IMAGES, SIDE**2)
images = (clean ^ (torch.rand(clean.shape) < 0.02)).float()


def show(pictures, path, titles=()):
    figure, axes = plt.subplots(1, len(pictures), figsize=(len(pictures), 1.4), layout="constrained")
    for axis, picture, title in zip(axes, pictures, [*titles, *[""] * len(pictures)], strict=False):
        axis.imshow(picture.reshape(SIDE, SIDE).detach(), cmap="gray")
        axis.set(xticks=[], yticks=[], title=title)
    figure.savefig(path)


show(images[:10], OUT / "wake_sleep_images.png")

# %% [markdown]
# ## Model and guide
#
# Two Pyro programs. The model, or decoder: binary causes `z` with learned odds, rare at first, and pixels that any
# cause can switch on, a noisy or: `p(off) = exp(-(leak + sum of the weights of the causes that are on))`. The guide, or
# encoder: the odds of each cause given the image. Both draw inside a plate of images, so that every image has weights
# of its own. The image is an argument and the observed value at once: that is how dreams will find their way from the
# model into the guide.


# %%
def parameter(name, *shape, start=0.0, scale=0.0):
    return pyro.param(name, lambda: start + scale * torch.randn(shape))


def decoder(x):
    odds = parameter("decoder.odds", CAUSES, start=-1.0)
    weight = softplus(parameter("decoder.weight", CAUSES, SIDE**2, start=-1.0, scale=0.5))
    leak = softplus(parameter("decoder.leak", SIDE**2, start=-3.0))
    with pyro.plate("image", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=odds).to_event(1))
        logits = (z @ weight + leak).expm1().log()
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def encoder(x):
    weight, bias = parameter("encoder.weight", SIDE**2, CAUSES, scale=0.1), parameter("encoder.bias", CAUSES)
    with pyro.plate("image", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=x @ weight + bias).to_event(1))


# %% [markdown]
# ## Training, with two optimisers
#
# Only the loss differs between the algorithms. Model and guide may have optimisers of their own: the model moves in
# smaller steps, so that the guide can follow it. Neither loss is a bound of the evidence, hence a bound to watch is
# named: `monitor`. Compiled steps are several times faster; `"trace"` needs no compiler.

# %%
options = {
    "args": (images,),
    "optim": {"model": partial(torch.optim.Adam, lr=0.01), "guide": partial(torch.optim.Adam, lr=0.03)},
    "num_steps": NUM_STEPS,
    "monitor": ImportanceWeightedELBO(num_particles=20),
    "stop": None,
    "compile": "trace",
    "seed": 1,
    "progress": False,
}
losses = {
    "wake-sleep": WakeSleep(num_particles=1, num_sleep_particles=1),
    "reweighted": ReweightedWakeSleep(num_particles=10),
    "with sleep": ReweightedWakeSleep(num_particles=10, insomnia=0.5, num_sleep_particles=1),
    "with a mixture": ReweightedWakeSleep(num_particles=10, mixture=0.2),
}
fits = {name: pplvi.fit(decoder, encoder, objective=loss, **options) for name, loss in losses.items()}

plt.figure(figsize=(7, 3.5))
for name, fit in fits.items():
    watched = -torch.tensor(fit.runs[0].monitored) / NUM_IMAGES
    plt.plot(10 * torch.arange(1, len(watched) + 1), watched, label=name)
    print(f"{name:<15} {losses[name]}: bound {watched[-20:].mean():.2f} nats an image")
plt.xlabel("step")
plt.ylabel("importance-weighted bound, nats an image")
plt.legend()
plt.savefig(OUT / "wake_sleep_curves.png")

# %% [markdown]
# Plain wake-sleep stays behind (about -13.6 nats an image against -8.4 after 1,000 steps): its guide learns from dreams
# alone, and the first dreams are nothing like bars. Any share of wake-phi mends that.
#
# ## What was learned
#
# The picture of a cause shows which pixels it switches on, its title how often it is on: nearly all are a row or a
# column, which nobody named. The second picture shows what the model dreams.

# %%
fit = fits["reweighted"]
found = fit.params[0]
show(
    1 - (-softplus(found["decoder.weight"])).exp(),
    OUT / "wake_sleep_causes.png",
    [f"{p:.2f}" for p in found["decoder.odds"].sigmoid()],
)
dreams = pyro.poutine.trace(pyro.poutine.uncondition(fit.model)).get_trace(images[:10]).nodes["x"]["value"]
show(dreams, OUT / "wake_sleep_dreams.png")

# %% [markdown]
# ## Weights per image
#
# The step that the loss sees has one weight for each draw and image, `(particles, images)`. Were all images one draw,
# as in Pyro's own `ReweightedWakeSleep`, a single particle would carry all the weight.

# %%
(step,) = ImportanceWeightedELBO(num_particles=100).steps(fit.model, fit.guide, images)
per_image, joint = effective_sample_size(step.log_weight), effective_sample_size(step.log_weight.sum(1))
print(f"effective draws of 100: {per_image.median():.0f} in the median image, {joint:.1f} of all images as one")

# %% [markdown]
# ## Report and ArviZ
#
# The posterior of the causes is in ArviZ's schema like any other, resampled by its weights image by image. Here the
# probability of each cause for three images, and what the report thinks of the guide.

# %%
fit.report(args=(images[:20],))
data = fit.to_arviz(args=(images[:3],))
table = az.summary(data, var_names=["z"], kind="stats", round_to=2)["mean"].to_numpy().reshape(3, CAUSES)
print("probability of each cause, one image a row\n", table)

# %% [markdown]
# ## The same under Pyro's `SVI`
#
# Two learning rates are Pyro's own `Adam` with a function of the parameter's name. `fit` takes that too.

# %%
pyro.clear_param_store()
optim = pyro.optim.Adam(lambda name: {"lr": 0.01 if name.startswith("decoder") else 0.03})
svi = SVI(decoder, encoder, optim, loss=WakeSleep())
for _ in range(NUM_STEPS // 10):
    loss = svi.step(images)
print(f"wake-sleep under SVI: {loss / NUM_IMAGES:.2f} nats an image, awake and asleep together")

# %% [markdown]
# ## When dreams have no way
#
# A sleep phase puts dreams in the place of the data. It can do so where an argument *is* what a site observes, or where
# the data come in a keyword `observations`, a dict from site name to value. Everything else is refused:


# %%
def sliced(x, observations=None):
    with pyro.plate("image", len(x), subsample_size=10) as index:
        z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(CAUSES)).to_event(1))
        logits = z @ parameter("decoder.weight", CAUSES, SIDE**2)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=(observations or {"x": x})["x"][index])


def sliced_encoder(x, observations=None):
    with pyro.plate("image", len(x), subsample_size=10) as index:
        odds = (observations or {"x": x})["x"][index] @ parameter("encoder.weight", SIDE**2, CAUSES)
        pyro.sample("z", dist.Bernoulli(logits=odds).to_event(1))


try:
    WakeSleep().loss(sliced, sliced_encoder, images)
except ValueError as error:
    print(error)
print("with the keyword:", round(WakeSleep().loss(sliced, sliced_encoder, images, observations={"x": images})))
