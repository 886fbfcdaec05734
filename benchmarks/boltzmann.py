"""Partition functions of restricted Boltzmann machines: are the intervals right, how fast, and a large machine.

- ``large``: 500 hidden units, sampled MNIST, likelihood by annealed importance sampling from both sides (published
  -86.90 with persistent chains, -86.34 with CD-25: Salakhutdinov & Murray 2008). Training is centered, the learning
  rate falls to zero, and parameters are averaged over the last fortieth of the updates. The samples of the reverse
  chains are the ends of long Gibbs chains, not exact ones, so that theirs is no bound.
- ``partition``: in how many of 20 seeds the exact log Z of a machine with 20 hidden units lies within three standard
  errors of 100 chains with 10,000 temperatures.
- ``speed``: chain-temperatures a CPU second of annealed importance sampling, beside a bare torch loop and the two
  matrix products a temperature that nothing can do without.

    python -m benchmarks.boltzmann --data ../shared/data/mnist --compile --out benchmarks/results/boltzmann.json

Without ``--data`` scikit-learn's digits, 8 x 8, stand in. Machines small enough for exact likelihoods, and the speed of
an update, are in ``restricted_boltzmann.py``, deep machines in ``deep_boltzmann.py``.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from benchmarks.boltzmann_training import EVERY, Training, load, started
from benchmarks.reporting import Rows, command_line, rows_of, write
from pplvi import RestrictedBoltzmannMachine, annealed_importance_sampling

QUICK = "--epochs 1 --betas 20 --chains 10 --sweeps 5 --hidden 4 --repeats 2 --speed-work 500 --rounds 1"

Row = dict[str, Any]


def machine(data: Tensor, num_hidden: int, seed: int) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return started(RestrictedBoltzmannMachine(data.shape[1], num_hidden), data)


def large(options: argparse.Namespace) -> Iterator[Row]:
    images = load(options.data, "sampled")
    data, test = images.v, images.test_v
    rbm = machine(data, 500, 0)
    updates = (options.epochs or 70) * (len(data) // 100)
    training = Training(
        rbm,
        rbm.guide,
        data,
        updates,
        lr=options.lr,
        sweeps=options.gibbs,
        weight_decay=options.weight_decay,
        window=max(2 * EVERY, updates // 40),
        mode=options.compile or "trace",
    )
    training.run(updates)
    setting = f"784-500, PCD-{options.gibbs}, {updates} updates, lr {options.lr}, decay {options.weight_decay}"
    for name, found in (("averaged parameters", training.average), ("last parameters", rbm)):
        row = {"table": "large", "what": f"{setting}, {name}", **likelihood(found, data, test, options)}
        yield {**row, "published": -86.90, "published_cd25": -86.34, "cpu_seconds": training.seconds}


def likelihood(rbm: Any, data: Tensor, test: Tensor, options: argparse.Namespace) -> Row:
    """Mean log-likelihoods in nats; the reverse chains start where those of training are after some more sweeps."""
    start = time.process_time()
    count = min(options.chains, 100)
    samples = rbm.gibbs({n: rbm.get_buffer(f"chain_{n}")[:count] for n in rbm.layers}, options.sweeps)["v"]
    found = annealed_importance_sampling(rbm, options.chains, options.betas, samples=samples, seed=0)
    with torch.no_grad():
        free, train = ((-rbm.free_energy(v)).double().mean().item() for v in (test, data[:10_000]))
    return {
        "log_likelihood": free - found.log_z,
        "reverse": free - (found.upper_bound or float("nan")),
        "interval": [free - end for end in reversed(found.interval)],
        "training_images": train - found.log_z,
        "ess": found.ess,
        "ais_cpu_seconds": time.process_time() - start,
    }


def partition(options: argparse.Namespace) -> Iterator[Row]:
    data = load(options.data, "sampled").v
    rbm = machine(data, options.hidden, 0)
    updates = (options.epochs or 2) * (len(data) // 100)
    Training(rbm, rbm.guide, data, updates, lr=0.01, falling=False).run(updates)
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
    rbm = machine(torch.full((1, 784), 0.3), 500, 0)
    for chains in (100, 1000):
        betas = max(3, options.speed_work // chains)
        ways = {"annealed_importance_sampling": _ours, "bare torch": _bare, "matrix products": _products}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():  # in turns, so that all see the same machine
                start = time.process_time()
                way(rbm, chains, betas)
                rates[name].append(chains * betas / (time.process_time() - start))
        for name, found in rates.items():
            rate = statistics.median(found)
            yield {"table": "speed", "what": f"784-500, {chains} chains: {name}", "chain_betas_a_second": rate}


def _ours(rbm: Any, chains: int, betas: int) -> None:
    annealed_importance_sampling(rbm, chains, betas, seed=0)


def _products(rbm: Any, chains: int, betas: int) -> None:
    weight, v = rbm.weight("v", "h").detach(), torch.rand(chains, 784)
    for _ in range(betas):
        _ = (v @ weight) @ weight.T


def _bare(rbm: Any, chains: int, betas: int) -> Tensor:
    weight, a, b = (x.detach() for x in (rbm.weight("v", "h"), rbm.bias("v"), rbm.bias("h")))
    v, total = torch.rand(chains, 784).lt(0.5).float(), torch.zeros(chains, dtype=torch.float64)
    field, linear = v @ weight + b, v @ a
    softplus, grid = torch.nn.functional.softplus, torch.linspace(0, 1, betas).tolist()
    for before, beta in pairwise(grid):
        total += ((beta - before) * linear + (softplus(beta * field) - softplus(before * field)).sum(-1)).double()
        p = torch.sigmoid(beta * field)
        h = torch.empty_like(p).uniform_().lt_(p)
        p = torch.sigmoid(beta * (h @ weight.T + a))
        v = torch.empty_like(p).uniform_().lt_(p)
        field, linear = v @ weight + b, v @ a
    return total


TABLES: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "large": large,
    "partition": partition,
    "speed": speed,
}


def merged(path: Path, rows: list[Row]) -> list[Row]:
    """The rows of a file, with new ones in the place of old ones of the same name."""
    old = rows_of(path)
    new = {(row["table"], row["what"]) for row in rows}
    return [row for row in old if (row["table"], row["what"]) not in new] + rows


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, help="folder of mnist_sampled.npz")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--epochs", type=int, help="in place of each row's own")
    parser.add_argument("--betas", type=int, default=10_000)
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--sweeps", type=int, default=1000, help="sweeps to the samples of the reverse chains")
    parser.add_argument("--lr", type=float, default=0.1, help="of the table large, falling to zero")
    parser.add_argument("--weight-decay", type=float, default=2e-4, help="of the table large")
    parser.add_argument("--gibbs", type=int, default=1, help="Gibbs sweeps an update, of the table large")
    parser.add_argument("--compile", action="store_true", help="train the table large through inductor")
    parser.add_argument("--hidden", type=int, default=20, help="hidden units of the table partition")
    parser.add_argument("--repeats", type=int, default=20, help="seeds of the table partition")
    parser.add_argument("--speed-work", type=int, default=10_000, help="chain-temperatures of a round of speed")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shown = Rows()
    for name in options.only:
        for row in TABLES[name](options):
            shown.show({key: value for key, value in row.items() if key != "table"})
            if options.out:
                write(options, rows=merged(options.out, [row]))


if __name__ == "__main__":
    main()
