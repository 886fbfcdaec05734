"""Restricted Boltzmann machines on binary images: exact test log-likelihoods, and milliseconds an update.

With 16 hidden units log Z is exact, so that nothing here is estimated. The set-ups follow the literature on centering
(Melchior, Fischer & Wiskott, JMLR 2016, "How to center deep Boltzmann machines"), where the published numbers come
from; they were not checked against the paper's tables again. On thresholded MNIST: 60,000 images, persistent
contrastive divergence, batches of 100, learning rate 0.01, 50 epochs, -142.56 nats, and -142.09 with the data flipped,
which a centered machine does not notice. On sampled MNIST the learning rate falls from 0.05 to zero in 25 epochs.

The second table times an update of a 784-500 machine (PCD-1, batch 100, float32, CPU seconds, in turns): through
``SVI``, compiled, scikit-learn's ``BernoulliRBM``, a loop in bare torch, and the five matrix products that no
implementation can do without.

    python -m benchmarks.restricted_boltzmann --data ../shared/data/mnist --out restricted_boltzmann.json

Without ``--data`` it runs on scikit-learn's 8x8 digits, thresholded.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import pyro
import torch
from torch import Tensor

from benchmarks.boltzmann_training import Kind, batches, load
from benchmarks.reporting import Table, command_line, write
from pplvi import BoltzmannELBO, CompiledSVI, RestrictedBoltzmannMachine

QUICK = "--no-compile --seeds 1 --share 0.02 --turns 1 --rows 0"


@dataclass(frozen=True)
class Setup:
    """One row of the first table."""

    name: str
    images: Kind
    sweeps: int = 1
    epochs: int = 50
    lr: float = 0.01
    falls: bool = False
    flipped: bool = False
    seeds: int = 1
    published: float | None = None
    reach: float | None = None


SETUPS = [
    Setup("PCD-1", "threshold", seeds=10, published=-142.56, reach=-142.6),
    Setup("PCD-1, flipped", "threshold", flipped=True, seeds=3, published=-142.09, reach=-142.6),
    Setup("PCD-1, lr to 0", "sampled", epochs=25, lr=0.05, falls=True, seeds=3, reach=-145.2),
    Setup("PCD-5, lr to 0", "sampled", sweeps=5, epochs=25, lr=0.05, falls=True, seeds=3, reach=-144.3),
]


@dataclass
class Row:
    name: str
    images: str
    seeds: list[float]
    train: list[float]
    published: float | None
    reach: float | None
    cpu_seconds: float


def images(folder: Path | None, kind: Kind) -> tuple[Tensor, Tensor]:
    """Training and test images, ``(num_images, num_pixels)``; 60,000 thresholded ones to train on, 50,000 sampled."""
    data = load(folder, kind)
    return data.v if kind == "threshold" else data.v[:50_000], data.test_v


def mean_log_prob(rbm: RestrictedBoltzmannMachine, data: Tensor) -> float:
    with torch.no_grad():
        p = rbm.distribution()
        return float(torch.cat([p.log_prob(part) for part in data.split(1000)]).double().mean())


def train(setup: Setup, seed: int, settings: argparse.Namespace) -> tuple[float, float]:
    """Exact test and training log-likelihood in nats."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    data, test = images(settings.data, setup.images)
    if setup.flipped:
        data, test = 1 - data, 1 - test
    rbm = RestrictedBoltzmannMachine(data.shape[1], 16)
    mean = (data.mean(0) * len(data) + 1) / (len(data) + 2)
    rbm.biases()["v"].data.copy_(mean.logit())
    epochs = max(1, round(setup.epochs * settings.share))
    steps = epochs * (len(data) // 100)
    svi = CompiledSVI(
        rbm.model,
        rbm.guide,
        partial(torch.optim.SGD, lr=setup.lr),
        BoltzmannELBO(100, setup.sweeps),
        mode=settings.compile or "trace",
        schedule=(lambda t: 1.0 - t / steps) if setup.falls else None,
    )
    for _ in range(epochs):
        svi.epoch(islice(batches(data), len(data) // 100))
    return mean_log_prob(rbm, test), mean_log_prob(rbm, data[:10_000])


def likelihood(setup: Setup, settings: argparse.Namespace, table: Table) -> Row:
    start = time.process_time()
    seeds = setup.seeds if settings.seeds is None else settings.seeds
    found = [train(setup, seed, settings) for seed in range(seeds)]
    tests, trains = ([float(x) for x in part] for part in zip(*found, strict=True))
    spent = (time.process_time() - start) / seeds
    row = Row(setup.name, setup.images, tests, trains, setup.published, setup.reach, spent)
    numbers = statistics.fmean(tests), min(tests), statistics.fmean(trains)
    table.show(row.name, row.images, *numbers, row.published, row.reach, spent)
    return row


# ---------------------------------------------------------------------- speed


def contenders(v: Tensor, hidden: int, compiled: bool) -> dict[str, Callable[[], object]]:
    """One update of each implementation on the same batch."""
    from sklearn.neural_network import BernoulliRBM

    pyro.clear_param_store()
    plain = RestrictedBoltzmannMachine(v.shape[1], hidden, centered=False, name="plain")
    loss, sgd = BoltzmannELBO(len(v), sweeps=1), partial(torch.optim.SGD, lr=0.01)
    svi = pyro.infer.SVI(plain.model, plain.guide, pyro.optim.SGD({"lr": 0.01}), loss)
    center = RestrictedBoltzmannMachine(v.shape[1], hidden, name="centered")
    centered = pyro.infer.SVI(center.model, center.guide, pyro.optim.SGD({"lr": 0.01}), loss)
    found: dict[str, Callable[[], object]] = {"SVI": lambda: svi.step(v), "SVI, centered": lambda: centered.step(v)}
    if compiled:
        other = RestrictedBoltzmannMachine(v.shape[1], hidden, centered=False, name="compiled")
        program = CompiledSVI(other.model, other.guide, sgd, loss)
        found["CompiledSVI"] = lambda: program.step(v)
    peer = BernoulliRBM(hidden, learning_rate=0.01, batch_size=len(v), random_state=0)
    array = v.numpy()
    return {
        **found,
        "scikit-learn": lambda: peer.partial_fit(array),
        "bare torch": bare_torch(v, hidden),
        "matrix products": products(v, hidden),
    }


def bare_torch(v: Tensor, hidden: int, lr: float = 0.01) -> Callable[[], object]:
    weight, a, b = 0.01 * torch.randn(v.shape[1], hidden), torch.zeros(v.shape[1]), torch.zeros(hidden)
    chain = torch.zeros(len(v), hidden)

    def update() -> None:
        nonlocal chain
        p = torch.sigmoid(torch.addmm(b, v, weight))
        q = torch.sigmoid(torch.addmm(a, chain, weight.T))
        w = torch.lt(torch.empty_like(q).uniform_(), q).float()
        r = torch.sigmoid(torch.addmm(b, w, weight))
        chain = torch.lt(torch.empty_like(r).uniform_(), r).float()
        weight.addmm_(v.T, p, alpha=lr / len(v)).addmm_(w.T, r, alpha=-lr / len(v))
        a.add_(v.mean(0) - w.mean(0), alpha=lr)
        b.add_(p.mean(0) - r.mean(0), alpha=lr)

    return update


def products(v: Tensor, hidden: int) -> Callable[[], object]:
    weight, h = torch.randn(v.shape[1], hidden), torch.rand(len(v), hidden)
    return lambda: (v @ weight, h @ weight.T, v @ weight, v.T @ h, v.T @ h)


def speed(settings: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of CPU an update: medians of turns that every contender takes after the others."""
    pixels, hidden = (784, 500) if settings.data is not None else (64, 32)
    v = torch.bernoulli(torch.rand(100, pixels))
    table = contenders(v, hidden, settings.compile)
    times: dict[str, list[float]] = {name: [] for name in table}
    for turn in range(settings.turns + 1):
        for name, update in table.items():
            start = time.process_time()
            for _ in range(20):
                update()
            if turn:
                times[name].append((time.process_time() - start) / 20 * 1e3)
    found = {name: statistics.median(values) for name, values in times.items()}
    print(f"\nCPU ms an update, {pixels}-{hidden}, PCD-1, batch 100, float32")
    shown = Table({"update": "<16", "ms": "7.2f", "times bare torch": "7.2f"})
    for name, value in found.items():
        shown.show(name, value, value / found["bare torch"])
    return found


def main(arguments: Sequence[str] | None = None) -> tuple[list[Row], dict[str, float]]:
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, help="folder of mnist_threshold.npz and mnist_sampled.npz")
    parser.add_argument("--share", type=float, default=1.0, help="share of the epochs to train for")
    parser.add_argument("--turns", type=int, default=9, help="turns of the timed updates; 0 for none")
    parser.add_argument("--rows", type=int, nargs="*", help="which set-ups to run, from 0; all by default")
    parser.add_argument("--seeds", type=int, help="how many of them, in place of each row's own number")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    settings = parser.parse_args(arguments)
    titles = {**dict.fromkeys(["test", "lowest", "train", "published", "reach"], "8.2f"), "CPU s": "6.0f"}
    table = Table({"16 hidden units": "<16", "images": "<10", **titles})
    chosen = SETUPS if settings.rows is None else [SETUPS[i] for i in settings.rows]
    rows = [likelihood(setup, settings, table) for setup in chosen]
    times = speed(settings) if settings.turns else {}
    write(settings, log_likelihood=rows, ms=times)
    return rows, times


if __name__ == "__main__":
    main()
