"""Restricted Boltzmann machines on images: exact and estimated likelihoods, partition functions, speed.

- ``exact``: 16 hidden units, so that the test log likelihood is exact. Persistent chains on thresholded MNIST (60,000
  images, batch 100, learning rate .01, 50 epochs; published -142.56, -142.09 for flipped data: Melchior, Fischer &
  Wiskott 2016) and, centered with a rate that falls from .05 to zero, on sampled MNIST (50,000 images, 25 epochs).
- ``large``: 500 hidden units, sampled MNIST, likelihood by annealed importance sampling from both sides (published
  -86.90 with persistent chains, -86.34 with CD-25: Salakhutdinov & Murray 2008).
- ``partition``: in how many of 20 seeds the exact log Z of a machine with 20 hidden units lies within three standard
  errors of 100 chains with 10,000 temperatures.
- ``speed``: milliseconds of CPU time of one update of 784-500 with batch 100 beside a bare torch loop, its matrix
  products alone and scikit-learn's ``BernoulliRBM``; chain-temperatures a CPU second of annealed importance sampling.

    python benchmarks/boltzmann.py --data ../shared/data/mnist --only exact --out benchmarks/results/boltzmann.json

Without ``--data`` scikit-learn's digits, 8 x 8, stand in, with the same machines but for their visible units.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pplvi import BoltzmannELBO, CompiledSVI, RestrictedBoltzmannMachine, annealed_importance_sampling

Row = dict[str, Any]


def images(folder: Path | None, name: str, together: bool) -> tuple[Tensor, Tensor]:
    """Training and test images; with ``together`` the validation images are training images too."""
    if folder is None:
        from sklearn.datasets import load_digits

        grey = torch.tensor(load_digits().images / 16.0, dtype=torch.float32).flatten(1)
        generator = torch.Generator().manual_seed(0)
        data = (grey > 0.5).float() if name == "threshold" else torch.bernoulli(grey, generator=generator)
        return data[:1500], data[1500:]
    arrays = np.load(folder / f"mnist_{name}.npz")
    parts = ["train.data", "valid.data"] if together else ["train.data"]
    train = np.concatenate([arrays[part] for part in parts])
    return torch.from_numpy(train).float(), torch.from_numpy(arrays["test.data"]).float()


def batches(data: Tensor, epochs: int, size: int = 100) -> Iterator[tuple[Tensor]]:
    for _ in range(epochs):
        for rows in torch.randperm(len(data)).split(size):
            if len(rows) == size:
                yield (data[rows],)


def train(rbm: Any, data: Tensor, *, epochs: int, lr: float, sweeps: int = 1, falling: bool = False) -> float:
    """CPU seconds of training, traced."""
    total = epochs * (len(data) // 100)
    svi = CompiledSVI(
        rbm.model,
        rbm.guide,
        partial(torch.optim.SGD, lr=lr),
        BoltzmannELBO(100, sweeps=sweeps),
        mode="trace",
        schedule=(lambda t: 1.0 - t / total) if falling else None,
    )
    start = time.process_time()
    svi.epoch(batches(data, epochs))
    return time.process_time() - start


def machine(data: Tensor, num_hidden: int, seed: int, *, centered: bool) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    rbm = RestrictedBoltzmannMachine(data.shape[1], num_hidden, centered=centered)
    mean = data.mean(0).clamp(0.01, 0.99)
    with torch.no_grad():
        rbm.bias("v").copy_(torch.logit(mean))
        rbm.offset("v").copy_(mean)
    return rbm


def exact(options: argparse.Namespace) -> Iterator[Row]:
    settings = [
        ("threshold", False, 1, 0.01, False, 50, -142.56, False),
        ("threshold", False, 1, 0.01, False, 50, -142.09, True),
        ("sampled", True, 1, 0.05, True, 25, -145.2, False),
        ("sampled", True, 5, 0.05, True, 25, -144.3, False),
    ]
    for name, centered, sweeps, lr, falling, epochs, published, flipped in settings:
        data, test = images(options.data, name, together=name == "threshold")
        data, test = (1 - data, 1 - test) if flipped else (data, test)
        found, seconds = [], []
        for seed in range(options.seeds):
            rbm = machine(data, 16, seed, centered=centered or flipped)
            seconds.append(train(rbm, data, epochs=options.epochs or epochs, lr=lr, sweeps=sweeps, falling=falling))
            with torch.no_grad():
                found.append(float((-rbm.free_energy(test)).double().mean() - rbm.log_partition()))
        what = f"{name}{', flipped' if flipped else ''}, {'centered ' if centered or flipped else ''}PCD-{sweeps}"
        yield {
            "table": "exact",
            "what": what,
            "mean": statistics.mean(found),
            "seeds": found,
            "published": published,
            "cpu_seconds": statistics.mean(seconds),
        }


def large(options: argparse.Namespace) -> Iterator[Row]:
    data, test = images(options.data, "sampled", together=False)
    rbm = machine(data, 500, 0, centered=True)
    seconds = train(rbm, data, epochs=options.epochs or 50, lr=0.05, falling=True)
    start = time.process_time()
    samples = rbm.gibbs(rbm.draw((options.chains,)), options.sweeps)["v"]
    found = annealed_importance_sampling(rbm, options.chains, options.betas, samples=samples, seed=0)
    with torch.no_grad():
        free = (-rbm.free_energy(test)).double().mean()
    yield {
        "table": "large",
        "what": "784-500, sampled, centered PCD-1",
        "log_likelihood": float(free) - found.log_z,
        "reverse": float(free) - (found.upper_bound or float("nan")),
        "interval": [float(free) - end for end in reversed(found.interval)],
        "ess": found.ess,
        "published": -86.90,
        "cpu_seconds": seconds,
        "ais_cpu_seconds": time.process_time() - start,
    }


def partition(options: argparse.Namespace) -> Iterator[Row]:
    data, _ = images(options.data, "sampled", together=False)
    rbm = machine(data, options.hidden, 0, centered=True)
    train(rbm, data, epochs=options.epochs or 2, lr=0.01)
    truth = rbm.log_partition().item()
    found = [annealed_importance_sampling(rbm, 100, options.betas, seed=seed) for seed in range(options.repeats)]
    inside = sum(low < truth < high for low, high in (each.interval for each in found))
    yield {
        "table": "partition",
        "what": f"{data.shape[1]}-{options.hidden}, 100 chains, {options.betas} temperatures",
        "inside": inside,
        "of": options.repeats,
        "exact": truth,
        "estimates": [each.log_z for each in found],
    }


def speed(options: argparse.Namespace) -> Iterator[Row]:
    data = torch.bernoulli(torch.full((options.updates * 100, 784), 0.3)).split(100)
    ways = {
        "matrix products": _products(data[0]),
        "bare torch": _bare(data[0]),
        "scikit-learn BernoulliRBM": _sklearn(data[0]),
        "SVI": _svi(),
        "CompiledSVI, trace": _compiled(),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, step in ways.items():  # in turns, so that all see the same machine
            start = time.process_time()
            for batch in data:
                step(batch)
            times[name].append((time.process_time() - start) / len(data) * 1e3)
    for name, found in times.items():
        yield {"table": "speed", "what": f"update of 784-500, batch 100: {name}", "ms": statistics.median(found)}
    rbm = machine(data[0], 500, 0, centered=True)
    for chains in (100, 1000):
        start, betas = time.process_time(), 3000 // chains * 10
        annealed_importance_sampling(rbm, chains, betas, seed=0)
        rate = chains * betas / (time.process_time() - start)
        yield {"table": "speed", "what": f"AIS of 784-500, {chains} chains", "chain_betas_a_second": rate}


def _products(v: Tensor) -> Callable[[Tensor], None]:
    weight = torch.randn(784, 500)

    def step(batch: Tensor) -> None:
        h = batch @ weight
        batch.T @ h
        model = h @ weight.T
        g = model @ weight
        model.T @ g

    return step


def _bare(v: Tensor) -> Callable[[Tensor], None]:
    weight, a, b = 0.01 * torch.randn(784, 500), torch.zeros(784), torch.zeros(500)
    chain = torch.bernoulli(torch.full((100, 784), 0.5))

    def step(batch: Tensor) -> None:
        nonlocal chain
        p = torch.sigmoid(batch @ weight + b)
        h = torch.sigmoid(chain @ weight + b)
        q = torch.sigmoid(h.new_empty(h.shape).uniform_().lt_(h) @ weight.T + a)
        chain = torch.empty_like(q).uniform_().lt_(q)
        h = torch.sigmoid(chain @ weight + b)
        weight.add_(batch.T @ p - chain.T @ h, alpha=1e-4)
        a.add_((batch - chain).sum(0), alpha=1e-4)
        b.add_((p - h).sum(0), alpha=1e-4)

    return step


def _sklearn(v: Tensor) -> Callable[[Tensor], Any]:
    from sklearn.neural_network import BernoulliRBM

    rbm = BernoulliRBM(n_components=500, learning_rate=0.01, batch_size=100, random_state=0)
    rbm.partial_fit(v.numpy())
    return lambda batch: rbm.partial_fit(batch.numpy())


def _svi() -> Callable[[Tensor], Any]:
    pyro.clear_param_store()
    rbm = RestrictedBoltzmannMachine(784, 500, name="svi")
    optim = pyro.optim.SGD({"lr": 0.01})
    return pyro.infer.SVI(rbm.model, rbm.guide, optim, BoltzmannELBO(100, sweeps=1)).step


def _compiled() -> Callable[[Tensor], Any]:
    rbm = RestrictedBoltzmannMachine(784, 500, name="compiled")
    optim = partial(torch.optim.SGD, lr=0.01)
    svi = CompiledSVI(rbm.model, rbm.guide, optim, BoltzmannELBO(100, sweeps=1), mode="trace")
    svi.step(torch.zeros(100, 784))
    return svi.step


TABLES: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "exact": exact,
    "large": large,
    "partition": partition,
    "speed": speed,
}


def shown(row: Row) -> str:
    numbers = {k: v for k, v in row.items() if k not in ("table", "what", "seeds", "estimates")}
    return f"{row['what']:<50} " + ", ".join(
        f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items()
    )


def merged(path: Path, rows: list[Row]) -> list[Row]:
    """The rows of a file, with new ones in the place of old ones of the same name."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {(row["table"], row["what"]) for row in rows}
    return [row for row in old if (row["table"], row["what"]) not in new] + rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of mnist_sampled.npz and mnist_threshold.npz")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--out", type=Path, help="JSON file; rows are merged into it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="in place of each row's own")
    parser.add_argument("--betas", type=int, default=10_000)
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--sweeps", type=int, default=1000, help="sweeps to the samples of the reverse chains")
    parser.add_argument("--hidden", type=int, default=20, help="hidden units of the table partition")
    parser.add_argument("--repeats", type=int, default=20, help="seeds of the table partition")
    parser.add_argument("--updates", type=int, default=20, help="updates of a round of the table speed")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.only:
        for row in TABLES[name](options):
            print(shown(row), flush=True)
            if options.out:
                options.out.write_text(json.dumps({"rows": merged(options.out, [row])}, indent=1) + "\n")


if __name__ == "__main__":
    main()
