"""Mixture VAE: the proportions of a batch of 300 images, by reweighted wake-sleep and by nested inference.

The model of section 4.3 of Zimmermann et al. 2021: lambda ~ Dirichlet, c_n ~ Categorical(lambda), z_n ~ N(mu_c,
1/tau_c), x_n by a decoder. On thresholded digits of scikit-learn, or on stochastically binarised MNIST (``--data``).
Here the components are the ten classes: decoder, mu and tau are fitted first, to labelled images, and then held, so
that lambda is known. What is compared is how well the guides learn, without labels, to infer the lambda of a batch:
an encoder q(z_n | x_n), a classifier q(c_n | z_n), and q(lambda | c) = Dirichlet(a + b counts of c).

    RWS   one weight for a batch: lambda ties its images together (wake-phi, K particles)
    NVI   two levels. Inner: z and c of each image for the target p(x_n | z_n) p(z_n | c_n) / 10, with a weight for each
          image, then resampled image by image. Outer: lambda, with these c, for the target of the model. Each level has
          its own forward KL divergence and no gradient goes from one to the other.

Same networks, Adam and CPU seconds for both. Columns: mean absolute error of the posterior mean of lambda over fresh
test batches whose lambda is drawn from the prior, the effective sample size of K = 100 draws (of RWS's one weight; of
NVI's outer weights and, in the median image, of its inner ones), and the share of images whose most probable class is
right. Lines beside them: the posterior mean of lambda if the labels were seen, which nothing can beat, and the prior's.

    python -m benchmarks.mixture_vae --seconds 60 --out mixture_vae.json
    python -m benchmarks.mixture_vae --data DIR --seconds 120 --out mixture_vae_mnist.json
"""

import argparse
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from time import process_time

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.optim import Adam
from torch import Tensor, nn
from torch.nn.functional import softplus

from benchmarks.reporting import Table, command_line, write
from pplvi import ELBO, CompiledSVI, ForwardKL, ReweightedWakeSleep
from pplvi.losses import Loss
from pplvi.objectives import ForwardKLDivergence, Step
from pplvi.programs import Run, execute
from pplvi.programs.joint import Program
from pplvi.weights import effective_sample_size, expectation, resample

QUICK = "--seconds 0.2 --fit-steps 20 --mode trace --test-batches 1"

CLASSES, BATCH, K = 10, 300, 10


@dataclass(frozen=True)
class Row:
    """One method after some CPU seconds of training."""

    method: str
    seconds: float
    steps: int
    error: float
    ess: float
    ess_of_an_image: float
    accuracy: float


def indicators(c: Tensor) -> Tensor:
    """One of the ten is 1, the class; a last dimension more."""
    return (c.unsqueeze(-1) == torch.arange(CLASSES)).float()


def counts(c: Tensor) -> Tensor:
    """How often each class occurs on the last dimension."""
    return indicators(c).sum(-2)


class Generator(nn.Module):
    """Components and decoder: p(z | c), p(x | z)."""

    def __init__(self, pixels: int, size: int, hidden: int) -> None:
        super().__init__()
        self.mu, self.log_tau = nn.Parameter(torch.randn(CLASSES, size)), nn.Parameter(torch.zeros(CLASSES, size))
        self.decoder = nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, pixels))
        self.levels = self.inner, self.outer  # a bound method is a new program at every look

    def images(self, c: Tensor, x: Tensor) -> None:
        """Sample z and x of images with these classes, inside their plate."""
        z = pyro.sample("z", dist.Normal(self.mu[c], (-0.5 * self.log_tau[c]).exp()).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def labelled(self, x: Tensor, labels: Tensor) -> None:
        """The model that components and decoder are fitted with."""
        pyro.module("generator", self)
        with pyro.plate("images", len(x)):
            self.images(labels, x)

    def inner(self, x: Tensor) -> None:
        """The inner target, one image at a time: every class as probable as another."""
        with pyro.plate("images", len(x)):
            self.images(pyro.sample("c", dist.Categorical(torch.ones(CLASSES))), x)

    def outer(self, c: Tensor) -> None:
        """The outer target, a batch of classes a row."""
        with pyro.plate("rows", len(c)):
            proportions = pyro.sample("lambda", dist.Dirichlet(torch.ones(CLASSES)))
            pyro.factor("c", (counts(c) * proportions.log()).sum(-1))

    def forward(self, x: Tensor) -> None:
        """The model."""
        proportions = pyro.sample("lambda", dist.Dirichlet(torch.ones(CLASSES)))
        with pyro.plate("images", len(x)):
            self.images(pyro.sample("c", dist.Categorical(proportions)), x)


class Recogniser(nn.Module):
    """Encoder, classifier, and the Dirichlet of the proportions given the classes."""

    def __init__(self, pixels: int, size: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, 2 * size))
        self.classifier = nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))
        self.slopes = nn.Parameter(torch.tensor([0.5, -2.0]))
        self.levels = self.inner, self.outer

    def encoded(self, x: Tensor) -> Tensor:
        """Sample z, inside the images' plate."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        return pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def labelled(self, x: Tensor, labels: Tensor) -> None:
        """The encoder alone."""
        pyro.module("recogniser", self)
        with pyro.plate("images", len(x)):
            self.encoded(x)

    def inner(self, x: Tensor) -> Tensor:
        """Encoder and classifier."""
        pyro.module("recogniser", self)
        with pyro.plate("images", len(x)):
            return pyro.sample("c", dist.Categorical(logits=self.classifier(self.encoded(x))))

    def proportions(self, c: Tensor) -> dist.Dirichlet:
        """q(lambda | c) for classes on the last dimension."""
        offset, slope = softplus(self.slopes)
        return dist.Dirichlet(offset + slope * counts(c))

    def outer(self, c: Tensor) -> None:
        """The proportions of each row of classes."""
        pyro.module("recogniser", self)
        with pyro.plate("rows", len(c)):
            pyro.sample("lambda", self.proportions(c))

    def forward(self, x: Tensor) -> None:
        """The guide of the whole model; there are particles to the left of the images' plate."""
        c = self.inner(x)
        pyro.sample("lambda", self.proportions(c.unsqueeze(-2)))


def inner_run(generator: Generator, recogniser: Recogniser, x: Tensor, count: int) -> tuple[Run, Tensor, Tensor]:
    """Weighted draws of every image, and classes resampled image by image, ``(count, images)``."""
    run = execute(generator.levels[0], recogniser.levels[0], (x,), {}, num_particles=count, detach=True)
    log_weight = (run.log_target() - run.log_forward()).detach()
    return run, log_weight, torch.take_along_dim(run.guide.nodes["c"]["value"], resample(log_weight), 0)


class Nested(Loss):
    """The forward KL divergences of the two levels."""

    outer = ForwardKL(K)

    def differentiable_loss(self, model: Program, guide: Program, *args: Tensor, **kwargs: object) -> Tensor:
        """Their sum, in nats; its value is no bound."""
        run, _, c = inner_run(model, guide, *args, K)
        inner = ForwardKLDivergence()(Step.from_proposal(run.log_target(), run.log_forward())).surrogate.sum()
        return inner + self.outer.differentiable_loss(model.levels[1], guide.levels[1], c) / K


def jointly(
    generator: Generator, recogniser: Recogniser, x: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Posterior mean of lambda, probability of the classes, and log weights of the batch and of single images."""
    run = execute(generator, recogniser, (x,), {}, num_particles=count)
    log_weight = run.log_target() - run.log_forward()
    mean = expectation(log_weight, run.guide.nodes["lambda"]["value"].reshape(count, CLASSES))
    classes = indicators(run.guide.nodes["c"]["value"])
    return mean, expectation(log_weight, classes), log_weight, log_weight[:, None]


def nested(
    generator: Generator, recogniser: Recogniser, x: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, level by level."""
    _, inner, c = inner_run(generator, recogniser, x, count)
    run = execute(generator.levels[1], recogniser.levels[1], (c,), {})
    log_weight = (run.log_target() - run.log_forward())[0]
    mean = expectation(log_weight, run.guide.nodes["lambda"]["value"])
    return mean, indicators(c).mean(0), log_weight, inner


METHODS = {"RWS": (ReweightedWakeSleep(K), jointly), "NVI": (Nested(num_particles=K), nested)}


def data(path: Path | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images with values 0 and 1, and their labels."""
    if path is not None:
        found = np.load(path / "mnist_sampled.npz")
        parts = [(torch.from_numpy(found[f"{p}.data"]).float(), torch.from_numpy(found[f"{p}.lbl"])) for p in SPLITS]
        return (parts[0][0], parts[0][1].long()), (parts[1][0], parts[1][1].long())
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, labels = (torch.tensor(digits.data) >= 8).float(), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order[600:]], labels[order[600:]]), (x[order[:600]], labels[order[:600]])


SPLITS = ("train", "test")


def batch(images: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and the proportions that they were drawn with."""
    x, labels = images
    proportions = dist.Dirichlet(torch.ones(CLASSES)).sample()
    which = torch.multinomial(proportions[labels] / torch.bincount(labels)[labels], BATCH, replacement=True)
    return x[which], labels[which], proportions


def evaluate(
    method: str, generator: Generator, recogniser: Recogniser, test: Sequence[tuple[Tensor, ...]]
) -> list[float]:
    """Error, ESS, ESS of an image and accuracy, means over test batches."""
    found = []
    for x, labels, proportions in test:
        with torch.no_grad():
            mean, classes, joint, single = METHODS[method][1](generator, recogniser, x, 100)
        ess, of_an_image = effective_sample_size(joint), effective_sample_size(single).median()
        error, accuracy = (mean - proportions).abs().mean(), (classes.argmax(-1) == labels).float().mean()
        found.append(torch.stack([error, ess, of_an_image, accuracy]))
    return torch.stack(found).mean(0).tolist()


def fitted(train: tuple[Tensor, Tensor], options: argparse.Namespace) -> Generator:
    """Components and decoder, from labelled images."""
    pyro.clear_param_store()
    pixels = train[0].shape[1]
    generator = Generator(pixels, options.size, options.hidden)
    recogniser = Recogniser(pixels, options.size, options.hidden)
    svi = CompiledSVI(generator.labelled, recogniser.labelled, Adam({"lr": 3e-3}), ELBO(), mode=options.mode)
    for _ in range(options.fit_steps):
        which = torch.randint(len(train[0]), (BATCH,))
        svi.step(train[0][which], train[1][which])
    return generator.requires_grad_(False)


def measure(
    method: str,
    generator: Generator,
    train: tuple[Tensor, Tensor],
    test: list,
    options: argparse.Namespace,
    shown: Table,
) -> list[Row]:
    """Train the guide and evaluate it at a quarter, a half and the end of the budget."""
    pyro.clear_param_store()
    pyro.set_rng_seed(options.seed)
    recogniser = Recogniser(train[0].shape[1], options.size, options.hidden)
    svi = CompiledSVI(generator, recogniser, Adam({"lr": 3e-3}), METHODS[method][0], mode=options.mode)
    svi.step(batch(train)[0])
    spent, steps, rows = 0.0, 1, []
    for share in (0.25, 0.5, 1.0):
        began = process_time() - spent
        while spent < share * options.seconds:
            svi.step(batch(train)[0])
            steps, spent = steps + 1, process_time() - began
        rows.append(Row(method, spent, steps, *evaluate(method, generator, recogniser, test)))
        shown.show(*astuple(rows[-1]))
    return rows


def table() -> Table:
    """Its titles."""
    titles = {"seconds": "8.0f", "steps": "8d", "error": "8.4f", "ESS": "8.1f", "an image": "8.1f", "accuracy": "8.3f"}
    return Table({"method": "<8", **titles})


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, print and write."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, help="folder with mnist_sampled.npz")
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of training for each method")
    parser.add_argument("--fit-steps", type=int, default=3000, help="steps for components and decoder")
    parser.add_argument("--test-batches", type=int, default=20)
    parser.add_argument("--size", type=int, default=8, help="dimensions of z")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--mode", default="compiled", choices=["compiled", "trace"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.mode = True if options.mode == "compiled" else "trace"
    pyro.set_rng_seed(options.seed)
    train, held = data(options.data)
    test = [batch(held) for _ in range(options.test_batches)]
    shown = table()
    seen = [(1 + torch.bincount(labels, minlength=CLASSES)) / (CLASSES + BATCH) for _, labels, _ in test]
    errors = {"labels": seen, "prior": [torch.full((CLASSES,), 1 / CLASSES)] * len(test)}
    rows = []
    for name, means in errors.items():
        error = torch.stack([(m - b[2]).abs().mean() for m, b in zip(means, test, strict=True)]).mean().item()
        rows.append(Row(name, 0.0, 0, error, float("nan"), float("nan"), float("nan")))
        shown.show(*astuple(rows[-1]))
    generator = fitted(train, options)
    for method in METHODS:
        rows += measure(method, generator, train, test, options, shown)
    write(options, rows=rows)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
