"""The programs that benchmarks/speed.py trains: for Pyro and, where it has the parts, for NumPyro."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

from benchmarks.annealing_ring import BUDGET, ring, start
from pplvi.examples.eight_schools import EFFECTS, STANDARD_ERRORS
from pplvi.guides import AnnealedGuide
from pplvi.kernels import ResidualKernel
from pplvi.losses import ELBO, Loss, NestedELBO

TARGETS = 8


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)


SCHOOLS = (torch.tensor(EFFECTS), torch.tensor(STANDARD_ERRORS))


def logistic(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    logits = weights @ x.T if weights.dim() == 1 else (weights @ x.T).squeeze(-2)  # particles have a plate of their own
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def regression_data(path: str | None) -> tuple[Tensor, Tensor]:
    """The columns of a file with ``X`` and ``y``, standardised, and a constant; or 350 simulated rows of 35."""
    if path is None:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(350, 35, generator=g)
        return x, torch.bernoulli((x @ torch.randn(35, generator=g)).sigmoid(), generator=g)
    import numpy as np

    with np.load(path) as file:
        x, y = (torch.as_tensor(file[name], dtype=torch.float32) for name in _names(file))
    x = x[:, x.std(0) > 0]
    return torch.cat([(x - x.mean(0)) / x.std(0), torch.ones(len(x), 1)], 1), (y > y.min()).float()


def _names(file: Any) -> tuple[str, str]:
    return next(k for k in file if file[k].ndim == 2), next(k for k in file if file[k].ndim == 1)


def hierarchical(x: Tensor, group: Tensor, y: Tensor) -> None:
    """2,000 rows in 20 groups, 100 of them at every step."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    spread, noise = pyro.sample("spread", dist.HalfNormal(1.0)), pyro.sample("noise", dist.HalfNormal(1.0))
    level = pyro.sample("level", dist.Normal(torch.zeros(20), 1.0).to_event(1))
    with pyro.plate("data", len(y), subsample_size=100) as index:
        mean = x[index] @ slope + spread * level[group[index]]
        pyro.sample("y", dist.Normal(mean, noise), obs=y[index])


def hierarchical_data() -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    x, group = torch.randn(2000, 5, generator=g), torch.randint(20, (2000,), generator=g)
    mean = x.sum(1) / 2 + torch.randn(20, generator=g)[group]
    return x, group, mean + 0.5 * torch.randn(2000, generator=g)


def coefficients(x: Tensor, y: Tensor) -> None:
    """A regression whose coefficients have a name each."""
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    mean: Any = 0.0
    for i in range(x.shape[1]):
        mean = mean + pyro.sample(f"w_{i}", dist.Normal(0.0, 1.0)) * x[:, i]
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, noise), obs=y)


def groups(x: list[Tensor], y: list[Tensor]) -> None:
    """Groups in a loop, each with its own level, slope and data."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(2.0))
    for i, (x_i, y_i) in enumerate(zip(x, y, strict=True)):
        level = pyro.sample(f"level_{i}", dist.Normal(mu, tau))
        slope = pyro.sample(f"slope_{i}", dist.Normal(0.0, 1.0))
        with pyro.plate(f"data_{i}", len(y_i)):
            pyro.sample(f"y_{i}", dist.Normal(level + slope * x_i, 0.5), obs=y_i)


class Autoencoder(nn.Module):
    """784-400-20 and back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.Softplus(), nn.Linear(400, 40))
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.Softplus(), nn.Linear(400, 784))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(20), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def bare_loss(self, x: Tensor) -> Tensor:
        """The same step without a program: what a hand-written training loop minimises."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        noise = torch.randn_like(loc)
        z = loc + log_scale.exp() * noise
        fit = nn.functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return fit + (z**2 / 2 - noise**2 / 2 - log_scale).sum()


def hidden_markov(y: Tensor) -> None:
    """Three hidden states, summed out over 20 times."""
    move = pyro.sample("move", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 1.0).to_event(1))
    k: Any = 0
    for t in pyro.markov(range(len(y))):
        probs = move[..., k, :] if t == 0 else pyro.ops.indexing.Vindex(move)[..., k, :]
        k = pyro.sample(f"k{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
        pyro.sample(f"y{t}", dist.Normal(pyro.ops.indexing.Vindex(loc)[..., k], 0.5), obs=y[t])


@dataclass(frozen=True)
class Problem:
    """Programs, what they are called with, and the loss that this package trains them by."""

    title: str
    model: Any
    guide: Any
    args: tuple[Any, ...] = ()
    loss: Loss = field(default_factory=ELBO)
    particles: int = 1
    lr: float = 0.02


def _words(guide: Any, particles: int) -> str:
    return f"{guide.__name__}, {particles} particle{'s' if particles > 1 else ''}"


def _schools(guide: Any, particles: int) -> Callable[[str | None], Problem]:
    title = f"eight schools, {_words(guide, particles)}"
    return lambda _: Problem(title, eight_schools, guide(eight_schools), SCHOOLS, ELBO(particles), particles)


def _logistic(guide: Any, particles: int) -> Callable[[str | None], Problem]:
    def make(path: str | None) -> Problem:
        x, y = regression_data(path)
        title = f"logistic regression {len(x)} x {x.shape[1]}, {_words(guide, particles)}"
        return Problem(title, logistic, guide(logistic), (x, y), ELBO(particles), particles)

    return make


def _hierarchical(_: str | None) -> Problem:
    title = "hierarchical regression, minibatches of 100 of 2,000"
    return Problem(title, hierarchical, AutoNormal(hierarchical), hierarchical_data())


def _coefficients(_: str | None) -> Problem:
    g = torch.Generator().manual_seed(4)
    x = torch.randn(500, 200, generator=g)
    y = x[:, ::5].sum(1) + 0.5 * torch.randn(500, generator=g)
    return Problem("200 sites in a loop, regression", coefficients, AutoNormal(coefficients), (x, y))


def _groups(_: str | None) -> Problem:
    g = torch.Generator().manual_seed(5)
    x = [torch.randn(20 + i % 5, generator=g) for i in range(100)]
    y = [torch.randn((), generator=g) + x_i + 0.5 * torch.randn(len(x_i), generator=g) for x_i in x]
    return Problem("100 groups in a loop, 202 sites, five sizes of data", groups, AutoNormal(groups), (x, y))


def _vae(_: str | None) -> Problem:
    networks = Autoencoder()
    x = torch.bernoulli(torch.full((128, 784), 0.2), generator=torch.Generator().manual_seed(2))
    return Problem("VAE 784-400-20, batch of 128", networks.model, networks.guide, (x,), lr=1e-3)


def _hmm(_: str | None) -> Problem:
    y = torch.randn(20, generator=torch.Generator().manual_seed(3)) * 0.5 + 2 * (torch.arange(20) % 3 - 1)
    guide = AutoNormal(pyro.poutine.block(hidden_markov, expose=["move", "loc"]))
    return Problem("hidden Markov model, 3 states, 20 times, enumerated", hidden_markov, guide, (y,))


def _ring(_: str | None) -> Problem:
    particles = BUDGET // TARGETS
    guide = AnnealedGuide(ring, start, TARGETS - 1, ResidualKernel(hidden=50))
    loss = NestedELBO("reverse_kl", particles, resample=True)
    return Problem(f"annealing ring, {TARGETS} targets, NVIR", ring, guide, (), loss, particles, 1e-3)


PROBLEMS: dict[str, Callable[[str | None], Problem]] = {
    "schools": _schools(AutoNormal, 1),
    "schools-100": _schools(AutoNormal, 100),
    "schools-full": _schools(AutoMultivariateNormal, 1),
    "logistic-100": _logistic(AutoNormal, 100),
    "logistic-full": _logistic(AutoMultivariateNormal, 1),
    "hierarchical": _hierarchical,
    "vae": _vae,
    "hmm": _hmm,
    "ring": _ring,
    "coefficients": _coefficients,
    "groups": _groups,
}
NUMPYRO = ("schools", "logistic", "hierarchical", "vae")


def numpyro_programs(name: str) -> tuple[Any, Any]:
    """The same model and guide for NumPyro; enumeration needs a further package, and the ring another program."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as ndist
    from jax.example_libraries import stax
    from numpyro.infer import autoguide

    def schools(y: Any, sigma: Any) -> None:
        mu = numpyro.sample("mu", ndist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", ndist.HalfCauchy(5.0))
        with numpyro.plate("schools", 8):
            effect = numpyro.sample("effect", ndist.Normal(0.0, 1.0))
            numpyro.sample("y", ndist.Normal(mu + tau * effect, sigma), obs=y)

    def regression(x: Any, y: Any) -> None:
        weights = numpyro.sample("weights", ndist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", ndist.Bernoulli(logits=x @ weights), obs=y)

    def levels(x: Any, group: Any, y: Any) -> None:
        slope = numpyro.sample("slope", ndist.Normal(jnp.zeros(5), 1.0).to_event(1))
        spread, noise = (numpyro.sample(n, ndist.HalfNormal(1.0)) for n in ("spread", "noise"))
        level = numpyro.sample("level", ndist.Normal(jnp.zeros(20), 1.0).to_event(1))
        with numpyro.plate("data", len(y), subsample_size=100) as index:
            mean = x[index] @ slope + spread * level[group[index]]
            numpyro.sample("y", ndist.Normal(mean, noise), obs=y[index])

    def network(name: str, size_in: int, size_out: int) -> Any:
        layers = stax.serial(stax.Dense(400), stax.Softplus, stax.Dense(size_out))
        return numpyro.module(name, layers, (128, size_in))

    def images(x: Any) -> None:
        decode = network("decoder", 20, 784)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", ndist.Normal(jnp.zeros(20), 1.0).to_event(1))
            numpyro.sample("x", ndist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def encoder(x: Any) -> None:
        loc, log_scale = jnp.split(network("encoder", 784, 40)(x), 2, -1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", ndist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    if name == "vae":
        return images, encoder
    kind = autoguide.AutoMultivariateNormal if name.endswith("full") else autoguide.AutoNormal
    model = {"schools": schools, "logistic": regression, "hierarchical": levels}[name.split("-")[0]]
    return model, kind(model)
