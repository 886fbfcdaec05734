"""Speed-up of data-parallel steps: one, two, ... ranks of one machine on the same rows, eager and recorded.

Every rank is a process with one thread; ``gloo`` carries what they exchange. Each way trains a logistic regression with
an importance-weighted bound (joint weights, two exchanges a step) and a variational autoencoder (weights per datum, one
exchange). Seconds are wall seconds of a step, after some that are not counted: they say what ranks gain only on a
machine that has a core for each and nothing else to do. CPU milliseconds are those of all ranks together.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
import torch.multiprocessing
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pplvi
from benchmarks.reporting import Table, command_line, write
from pplvi.fitting import DataParallel

QUICK = "--rows 200 --steps 6 --warm 2 --problems regression --ways eager"

COLUMNS, PIXELS, HIDDEN, LATENT = 20, 100, 128, 10
Problem = tuple[Callable[..., Any], Any, tuple[Tensor, ...], Any]


def regression(rows: int) -> Problem:
    """Logistic regression with 20 coefficients, 8 joint weights."""
    X = torch.randn(rows, COLUMNS)
    y = torch.bernoulli(torch.sigmoid(X @ torch.linspace(-1.0, 1.0, COLUMNS)))

    def model(X: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(COLUMNS), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=(X @ b.unsqueeze(-1)).squeeze(-1)), obs=y)

    return model, AutoNormal, (X, y), pplvi.ImportanceWeightedELBO(8)


def autoencoder(rows: int) -> Problem:
    """A variational autoencoder of binary pixels."""
    x = torch.bernoulli(torch.full((rows, PIXELS), 0.3))
    encoder = torch.nn.Sequential(torch.nn.Linear(PIXELS, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 2 * LATENT))
    decoder = torch.nn.Sequential(torch.nn.Linear(LATENT, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, PIXELS))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return model, guide, (x,), pplvi.ELBO()


PROBLEMS = {"regression": regression, "autoencoder": autoencoder}
WAYS: dict[str, Any] = {"eager": False, "recorded": "trace", "compiled": True}


def steps(problem: str, rows: int, way: str, count: int, warm: int) -> tuple[float, float]:
    """Wall and CPU seconds of a step on this rank."""
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args, objective = PROBLEMS[problem](rows)
    began: list[tuple[float, float]] = []

    def look(run: Any) -> None:
        if run.step in (warm, count):
            began.append((perf_counter(), process_time()))

    options: dict[str, Any] = {"objective": objective, "compile": WAYS[way], "callbacks": [look], "stop": None}
    pplvi.fit(model, guide, args=args, num_steps=count, seed=0, progress=False, parallel=DataParallel(True), **options)
    (wall, cpu), (last_wall, last_cpu) = began
    return (last_wall - wall) / (count - warm), (last_cpu - cpu) / (count - warm)


def _rank(rank: int, ranks: int, folder: str, task: tuple[Any, ...]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    torch.save(steps(*task), f"{folder}/{rank}.pt")
    if ranks > 1:
        torch.distributed.destroy_process_group()


def measured(ranks: int, *task: Any) -> tuple[float, float]:
    """Wall seconds of a step, and CPU seconds of all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (ranks, folder, task), nprocs=ranks)
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
    return max(wall for wall, _ in found), sum(cpu for _, cpu in found)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and write."""
    parser = command_line(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm", type=int, default=10, help="first steps that are not counted")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options: argparse.Namespace = parser.parse_args(arguments)
    table = Table({"problem": "<12", "way": "<9", "ranks": "5d", "ms": "8.2f", "CPU ms": "8.2f", "speed-up": "8.2f"})
    rows = []
    for problem in options.problems:
        for way in options.ways:
            alone = None
            for ranks in options.ranks:
                wall, cpu = measured(ranks, problem, options.rows, way, options.steps, options.warm)
                alone = alone or wall
                rows.append({"problem": problem, "way": way, "ranks": ranks, "ms": 1e3 * wall, "cpu_ms": 1e3 * cpu})
                table.show(problem, way, ranks, 1e3 * wall, 1e3 * cpu, alone / wall)
    write(options, steps=rows)
    return rows


if __name__ == "__main__":
    main()
