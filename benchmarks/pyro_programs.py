"""Small programs of the kinds that Pyro's ``examples/`` has, written anew, for benchmarks/pyro_examples.py.

All data are simulated. Each function makes a model and a guide with fresh parameters, and the arguments of both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.nn.functional import softplus

from benchmarks.pyro_chains import CHAINS, SUMMED, tunes
from pplvi.examples.eight_schools import EFFECTS, STANDARD_ERRORS

Kind = Literal["Trace_ELBO", "TraceEnum_ELBO", "TraceMeanField_ELBO", "TraceGraph_ELBO"]
POSITIVE = dist.constraints.positive


@dataclass(frozen=True)
class Example:
    """Programs with their arguments, and Pyro's loss for them."""

    model: Any
    guide: Any
    args: tuple[Any, ...]
    loss: Kind = "Trace_ELBO"
    nesting: int = 1
    lr: float = 0.02


def normals(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def uniforms(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(8))


def only(model: Any, *starts: str) -> Any:
    """The model with no other sites than those of which the name starts so."""
    return poutine.block(model, expose_fn=lambda site: site["name"].startswith(starts))


def chain(make: Callable[[], Any]) -> Callable[[], Example]:
    def example() -> Example:
        model = make()
        return Example(model, AutoDelta(only(model, "p_")), tunes(), "TraceEnum_ELBO", 2, 0.05)

    return example


# ---------------------------------------------------------------------- animals that are caught again


def marked(survival: Literal["constant", "by time", "random", "by sex", "both"]) -> Callable[[], Example]:
    """Cormack, Jolly & Seber: whether an animal is alive is summed out, and masked before its first capture."""

    def survivals(sex: Tensor, t: int, center: Any, spread: Any) -> Any:
        if survival == "constant":
            return center.sigmoid()
        if survival == "by sex":
            return (center + sex * spread).sigmoid()
        if t == 0:
            return torch.tensor(1.0)
        change = pyro.sample(f"phi_{t}", dist.Normal(0.0, 1.0))
        shift = {"by time": center + change, "random": center + spread.exp() * change, "both": sex * spread + change}
        return shift[survival].sigmoid()

    def model(caught: Tensor, sex: Tensor) -> None:
        center, spread = pyro.sample("phi_center", dist.Normal(0.0, 1.5)), pyro.sample("phi_spread", dist.Normal(0, 1))
        found = pyro.sample("rho", dist.Uniform(0.0, 1.0))
        alive = torch.ones(len(caught))
        seen = torch.zeros(len(caught)).bool()
        animals = pyro.plate("animals", len(caught), dim=-1)
        for t in pyro.markov(range(caught.shape[1])):
            phi = survivals(sex, t, center, spread)
            with animals, poutine.mask(mask=seen):
                first = 1 - seen.float()
                probs = (1 - first) * phi * alive + first
                alive = pyro.sample(f"z_{t}", dist.Bernoulli(probs), infer=SUMMED)
                pyro.sample(f"y_{t}", dist.Bernoulli(found * alive), obs=caught[:, t])
            seen |= caught[:, t].bool()

    def example() -> Example:
        caught, sex = (uniforms(12, 5) < 0.4).float(), (uniforms(12) < 0.5).float()
        return Example(model, AutoDiagonalNormal(only(model, "phi", "rho")), (caught, sex), "TraceEnum_ELBO")

    return example


# ---------------------------------------------------------------------- words and mixtures


def topics() -> Example:
    """Latent Dirichlet allocation: topics of words summed out, topics of documents amortised, minibatches."""
    words, documents, length, count = 8, 10, 6, 3
    text = (uniforms(length, documents) * words).long()
    network = nn.Sequential(nn.Linear(words, 6), nn.Sigmoid(), nn.Linear(6, count), nn.Softmax(dim=-1))

    def model(text: Tensor) -> None:
        with pyro.plate("topics", count):
            weight = pyro.sample("weight", dist.Gamma(1.0 / count, 1.0))
            topic = pyro.sample("topic", dist.Dirichlet(torch.ones(words) / words))
        with pyro.plate("documents", documents) as chosen:
            share = pyro.sample("share", dist.Dirichlet(weight))
            with pyro.plate("words", length):
                of_word = pyro.sample("of_word", dist.Categorical(share), infer=SUMMED)
                pyro.sample("text", dist.Categorical(topic[of_word]), obs=text[:, chosen])

    def guide(text: Tensor) -> None:
        pyro.module("network", network)
        weight = pyro.param("weight_counts", lambda: torch.ones(count), constraint=POSITIVE)
        topic = pyro.param(
            "word_counts", lambda: torch.ones(count, words), constraint=dist.constraints.greater_than(0.5)
        )
        with pyro.plate("topics", count):
            pyro.sample("weight", dist.Gamma(weight, 1.0))
            pyro.sample("topic", dist.Dirichlet(topic))
        with pyro.plate("documents", documents, 5) as chosen:
            seen = text[:, chosen]
            counts = torch.zeros(words, len(chosen)).scatter_add(0, seen, torch.ones(seen.shape))
            pyro.sample("share", dist.Delta(network(counts.T), event_dim=1))

    return Example(model, guide, (text,), "TraceEnum_ELBO", 2)


def two_causes() -> Example:
    """A hidden coin between two observed ones, with conjugate guides of their probabilities."""
    first = (uniforms(30) < 0.7).float()
    last = torch.where(uniforms(2, 30)[1] < 0.8, first, 1 - first)

    @config_enumerate
    def model(first: Tensor, last: Tensor) -> None:
        a = pyro.sample("a", dist.Beta(1.0, 1.0))
        b = pyro.sample("b", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
        c = pyro.sample("c", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
        with pyro.plate("data", len(first)):
            shown = pyro.sample("first", dist.Bernoulli(a), obs=first)
            hidden = pyro.sample("hidden", dist.Bernoulli(Vindex(b)[shown.long()]))
            pyro.sample("last", dist.Bernoulli(Vindex(c)[hidden.long()]), obs=last)

    def guide(first: Tensor, last: Tensor) -> None:
        prior = torch.tensor([[10.0, 1.0], [1.0, 10.0]])
        one = pyro.param("qa", torch.tensor([1.0, 10.0]), constraint=POSITIVE)
        pyro.sample("a", dist.Beta(one[0], one[1]))
        for name in "bc":
            both = pyro.param(f"q{name}", prior, constraint=POSITIVE)
            pyro.sample(name, dist.Beta(both[:, 0], both[:, 1]).to_event(1))

    return Example(model, guide, (first, last), "TraceEnum_ELBO")


def seals() -> Example:
    """Chains in a hierarchy of groups and individuals with discrete random effects, and zero-inflated steps."""
    groups, individuals, times, states, effects = 2, 3, 4, 2, 2
    step = uniforms(individuals, groups, times) * 2
    step[0, 0, 1] = step[2, 1, 3] = 0.0

    @config_enumerate
    def model(step: Tensor) -> None:
        share = pyro.param("share", lambda: torch.rand(effects), constraint=dist.constraints.simplex)
        of_group = pyro.param("of_group", lambda: torch.randn(effects, states**2))
        spread = pyro.param("spread", lambda: torch.rand(groups, effects), constraint=dist.constraints.simplex)
        of_one = pyro.param("of_one", lambda: torch.randn(groups, effects, states**2))
        none = pyro.param("none", lambda: torch.ones(states, 2))
        shape = pyro.param("shape", lambda: torch.ones(states) + torch.rand(states), constraint=POSITIVE)
        with pyro.plate("group", groups, dim=-1):
            logits = Vindex(of_group)[..., pyro.sample("e_group", dist.Categorical(share)), :]
            with pyro.plate("individual", individuals, dim=-2):
                mine = pyro.sample("e_one", dist.Categorical(spread))
                logits = logits + Vindex(of_one)[torch.arange(groups), mine, :]
                table = logits.reshape(*logits.shape[:-1], states, states)
                state = torch.tensor(0)
                for t in pyro.markov(range(times)):
                    state = pyro.sample(f"s_{t}", dist.Categorical(logits=Vindex(table)[..., state, :]))
                    stays = step[..., t] == 0
                    pyro.sample(f"stays_{t}", dist.Categorical(logits=Vindex(none)[..., state, :]), obs=stays.long())
                    moving = dist.Gamma(Vindex(shape)[..., state], 1.0)
                    both = dist.MaskedMixture(stays, moving, dist.Delta(torch.tensor(0.0)))
                    pyro.sample(f"step_{t}", both, obs=step[..., t])

    return Example(model, lambda step: None, (step,), "TraceEnum_ELBO", 2)


# ---------------------------------------------------------------------- networks


class Autoencoder(nn.Module):
    """Pixels and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 8), nn.Softplus(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 12))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), x.new_ones(len(x), 2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def autoencoder() -> Example:
    networks = Autoencoder()
    return Example(networks.model, networks.guide, ((uniforms(8, 12) < 0.4).float(),))


def half_labelled() -> Example:
    """Labels are a latent of the guide that is summed out there; Kingma et al. (2014), M2."""
    label = nn.Sequential(nn.Linear(12, 3), nn.Softmax(dim=-1))
    code, picture = nn.Linear(15, 4), nn.Linear(5, 12)

    def both(*parts: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)

    def model(x: Tensor) -> None:
        pyro.module("picture", picture)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(len(x), 3) / 3))
            pyro.sample("x", dist.Bernoulli(logits=picture(both(z, y))).to_event(1), obs=x)

    @config_enumerate(default="parallel", expand=True)
    def guide(x: Tensor) -> None:
        pyro.module("label", label)
        pyro.module("code", code)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(label(x)))
            loc, scale = code(both(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return Example(model, guide, ((uniforms(8, 12) < 0.4).float(),), "TraceEnum_ELBO")


class DeepMarkov(nn.Module):
    """A nonlinear state space model: a recurrent guide, flows, masks, and a factor on both densities of states."""

    def __init__(self, factor: float, flows: int) -> None:
        super().__init__()
        self.factor = factor
        self.emit = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4))
        self.move = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4))
        self.rnn = nn.RNN(4, 5, nonlinearity="relu", batch_first=True)
        self.combine = nn.Linear(7, 4)
        self.first, self.first_q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        self.flows = nn.ModuleList([affine_autoregressive(2, hidden_dims=[5]) for _ in range(flows)])

    def model(self, x: Tensor, mask: Tensor) -> None:
        pyro.module("markov", self)
        z = self.first.expand(len(x), 2)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                loc, scale = self.move(z).chunk(2, -1)
                with poutine.scale(scale=self.factor):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, softplus(scale)).mask(mask[:, t : t + 1]).to_event(1))
                seen = dist.Bernoulli(logits=self.emit(z)).mask(mask[:, t : t + 1]).to_event(1)
                pyro.sample(f"x_{t}", seen, obs=x[:, t])

    def guide(self, x: Tensor, mask: Tensor) -> None:
        pyro.module("markov", self)
        later = self.rnn(x.flip(1))[0].flip(1)
        z = self.first_q.expand(len(x), 2)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                loc, scale = self.combine(torch.cat([z, later[:, t]], -1)).chunk(2, -1)
                step = dist.Normal(loc, softplus(scale))
                here = mask[:, t : t + 1]
                shown = step.mask(here).to_event(1)
                if len(self.flows):
                    shown = dist.TransformedDistribution(step, list(self.flows)).mask(mask[:, t])
                with poutine.scale(scale=self.factor):
                    z = pyro.sample(f"z_{t}", shown)


def deep_markov(factor: float, flows: int) -> Callable[[], Example]:
    def example() -> Example:
        network = DeepMarkov(factor, flows)
        tune, length = tunes()
        mask = torch.arange(tune.shape[1]) < length.unsqueeze(-1)
        return Example(network.model, network.guide, (tune[..., :4], mask))

    return example


WIDTHS = (2, 3, 9)


def layers_of_gammas() -> tuple[Any, tuple[Tensor, ...]]:
    """A deep exponential family with two hidden layers: sparse gamma codes of counts."""
    x = (uniforms(6, 9) * 6).round()

    def model(x: Tensor) -> None:
        ws = []
        for layer, sizes in enumerate(pairwise(WIDTHS)):
            with pyro.plate(f"entries_{layer}", sizes[0] * sizes[1]):
                w = pyro.sample(f"w_{layer}", dist.Gamma(0.5, 0.3))
            ws.append(w.reshape(sizes) if w.dim() == 1 else w.reshape(-1, *sizes))
        with pyro.plate("data", len(x)):
            top = pyro.sample("z_0", dist.Gamma(0.5, 0.5).expand([WIDTHS[0]]).to_event(1))
            z = pyro.sample("z_1", dist.Gamma(0.5, 0.5 / (top @ ws[0] + 1e-3)).to_event(1))
            pyro.sample("x", dist.Poisson(z @ ws[1] + 1e-3).to_event(1), obs=x)

    return model, (x,)


def gammas() -> Example:
    model, args = layers_of_gammas()

    def guide(x: Tensor) -> None:
        def gamma(name: str, *shape: int) -> Any:
            shape_of = softplus(pyro.param(f"{name}_shape", lambda: 0.5 + 0.1 * torch.randn(shape)))
            mean = softplus(pyro.param(f"{name}_mean", lambda: 0.1 * torch.randn(shape)))
            return dist.Gamma(shape_of, shape_of / mean)

        for layer, sizes in enumerate(pairwise(WIDTHS)):
            with pyro.plate(f"entries_{layer}", sizes[0] * sizes[1]):
                pyro.sample(f"w_{layer}", gamma(f"w_{layer}", sizes[0] * sizes[1]))
        with pyro.plate("data", len(x)):
            for layer, width in enumerate(WIDTHS[:-1]):
                pyro.sample(f"z_{layer}", gamma(f"z_{layer}", len(x), width).to_event(1))

    return Example(model, guide, args, "TraceMeanField_ELBO")


class Grouped(EasyGuide):
    """All weights in one normal, and all codes of a datum in another."""

    def guide(self, x: Tensor) -> None:
        weights, codes = self.group(match="w_"), self.group(match="z_")
        loc = pyro.param("w_loc", lambda: 0.5 + 0.1 * torch.randn(weights.event_shape))
        scale = pyro.param("w_scale", lambda: torch.full(weights.event_shape, 0.3), constraint=POSITIVE)
        weights.sample("ws", dist.Normal(loc, scale).to_event(1))
        with self.plate("data", len(x)):
            shape = (len(x), *codes.event_shape)
            loc = pyro.param("z_loc", lambda: 0.5 + 0.1 * torch.randn(shape))
            scale = pyro.param("z_scale", lambda: torch.full(shape, 0.3), constraint=POSITIVE)
            codes.sample("zs", dist.Normal(loc, scale).to_event(1))


def grouped_gammas() -> Example:
    model, args = layers_of_gammas()
    return Example(model, Grouped(model), args)


def present_or_not() -> Example:
    """Attend, infer, repeat: whether there is one more object decides which densities count; scored with baselines."""
    x = normals(6, 4) + torch.tensor([[2.0, 2.0, 0.0, 0.0]] * 3 + [[2.0, 2.0, 2.0, 2.0]] * 3)
    see, guess = nn.Linear(5, 5), nn.Linear(5, 1)
    draw = nn.Linear(2, 4)

    def model(x: Tensor) -> None:
        pyro.module("draw", draw)
        with pyro.plate("data", len(x)):
            here, picture = torch.ones(len(x), 1), torch.zeros(len(x), 4)
            for t in range(2):
                here = pyro.sample(f"here_{t}", dist.Bernoulli(0.5 * here).to_event(1))
                what = pyro.sample(f"what_{t}", dist.Normal(torch.zeros(len(x), 2), 1.0).mask(here.bool()).to_event(1))
                picture = picture + here * draw(what)
            pyro.sample("x", dist.Normal(picture, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("see", see)
        pyro.module("guess", guess)
        with pyro.plate("data", len(x)):
            here = torch.ones(len(x), 1)
            for t in range(2):
                given = torch.cat([x, here], -1)
                out = see(given)
                baseline = {"baseline_value": guess(given.detach()).squeeze(-1)}
                probs = 0.98 * out[:, :1].sigmoid() * here
                here = pyro.sample(f"here_{t}", dist.Bernoulli(probs).to_event(1), infer={"baseline": baseline})
                code = dist.Normal(out[:, 1:3], out[:, 3:].exp())
                pyro.sample(f"what_{t}", code.mask(here.bool()).to_event(1))

    return Example(model, guide, (x,), "TraceGraph_ELBO", lr=0.01)


# ---------------------------------------------------------------------- regressions


def batting() -> Example:
    """Partially pooled rates of success."""
    at_bats, hits = torch.full((9,), 45.0), (uniforms(9) * 10 + 8).round()

    def model(at_bats: Tensor, hits: Tensor) -> None:
        m = pyro.sample("m", dist.Uniform(0.0, 1.0))
        kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
        with pyro.plate("players", len(hits)):
            p = pyro.sample("p", dist.Beta(m * kappa, (1 - m) * kappa))
            pyro.sample("hits", dist.Binomial(at_bats, probs=p), obs=hits)

    return Example(model, AutoNormal(model), (at_bats, hits))


def schools() -> Example:
    def model(y: Tensor, sigma: Tensor) -> None:
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 10.0)), pyro.sample("tau", dist.HalfCauchy(25.0))
        with pyro.plate("schools", len(y)):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)

    def guide(y: Tensor, sigma: Tensor) -> None:
        loc = pyro.param("loc", lambda: 0.1 * torch.randn(2 + len(y)))
        scale = pyro.param("scale", lambda: 0.1 + 0.1 * torch.rand(2 + len(y)), constraint=POSITIVE)
        pyro.sample("mu", dist.Normal(loc[0], scale[0]))
        pyro.sample("tau", dist.LogNormal(loc[1], scale[1]))
        with pyro.plate("schools", len(y)):
            pyro.sample("effect", dist.Normal(loc[2:], scale[2:]))

    return Example(model, guide, (torch.tensor(EFFECTS), torch.tensor(STANDARD_ERRORS)))


def correlations() -> Example:
    def model(y: Tensor) -> None:
        dim = y.shape[1]
        theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(dim)).to_event(1))
        factor = pyro.sample("factor", dist.LKJCholesky(dim, 1.5))
        scale = torch.mm(torch.diag(theta.sqrt()), factor)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(dim), scale_tril=scale), obs=y)

    return Example(model, AutoMultivariateNormal(model), (normals(20, 3),))


class Slope(PyroModule):
    """A regression whose plate takes its minibatch from outside."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.line = PyroModule[nn.Linear](3, 1)
        self.line.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.line.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))
        self.scale = PyroSample(dist.LogNormal(0.0, 1.0))

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean, scale = self.line(x).squeeze(-1), self.scale
        with pyro.plate("data", self.size, subsample=x):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)


def minibatches() -> Example:
    x = normals(10, 3)
    model = Slope(50)
    return Example(model, AutoNormal(model), (x, x.sum(-1) + 0.1 * uniforms(10)))


def few_inputs() -> Example:
    """Sparse regression with pairs of inputs, summed out by a Gaussian process (Agrawal et al. 2019)."""
    x = normals(15, 4)

    def kernel(x: Tensor, z: Tensor, single: Tensor, pairs: Tensor, base: float) -> Tensor:
        dot, squares = x @ z.T, (x**2) @ (z**2).T
        return 0.5 * pairs**2 * ((1 + dot) ** 2 - squares - 1) + (single**2 - pairs**2) * dot + base

    def model(x: Tensor, y: Tensor) -> None:
        shrink = pyro.sample("shrink", dist.HalfCauchy(torch.ones(x.shape[1])).to_event(1))
        noise = pyro.sample("noise", dist.InverseGamma(3.0, 1.0))
        single = pyro.sample("single", dist.HalfCauchy(1.0))
        pairs = pyro.sample("pairs", dist.InverseGamma(3.0, 0.5)) * single**2
        chosen = shrink * x
        covariance = kernel(chosen, chosen, single, pairs, 0.1) + (noise + 1e-3) * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)

    return Example(model, AutoNormal(model, init_scale=0.05), (x, x[:, 0] - x[:, 1] * x[:, 0]), lr=0.005)


def deep_kernel() -> Example:
    """A sparse Gaussian process on features of a network, three classes."""
    x = normals(12, 4)
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    kernel = gp.kernels.Warping(gp.kernels.RBF(2, lengthscale=torch.ones(2)), iwarping_fn=network)
    machine = gp.models.VariationalSparseGP(
        x,
        x.argmax(-1) % 3,
        kernel,
        Xu=x[:5].clone(),
        likelihood=gp.likelihoods.MultiClass(3),
        latent_shape=torch.Size([3]),
        num_data=60,
        whiten=True,
        jitter=1e-4,
    )
    return Example(machine.model, machine.guide, (), "TraceMeanField_ELBO")


EXAMPLES: dict[str, Callable[[], Example]] = {
    **{name: chain(make) for name, make in CHAINS.items()},
    "cjs-1-constant": marked("constant"),
    "cjs-2-by-time": marked("by time"),
    "cjs-3-random": marked("random"),
    "cjs-4-by-sex": marked("by sex"),
    "cjs-5-both": marked("both"),
    "lda": topics,
    "toy-mixture": two_causes,
    "mixed-hmm": seals,
    "vae": autoencoder,
    "ss-vae-m2": half_labelled,
    "dmm": deep_markov(1.0, 0),
    "dmm-annealed-flow": deep_markov(0.5, 1),
    "sparse-gamma": gammas,
    "sparse-gamma-easy": grouped_gammas,
    "air": present_or_not,
    "baseball": batting,
    "eight-schools": schools,
    "lkj": correlations,
    "svi-torch": minibatches,
    "sparse-regression": few_inputs,
    "sv-dkl": deep_kernel,
}
