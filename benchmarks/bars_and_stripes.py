"""Bars and stripes, 3x3: what the gradient of a restricted Boltzmann machine's likelihood is estimated with.

The data are the 16 patterns of 3x3 pixels that are bars or stripes (all black and all white are both), so that no model
has a mean log likelihood above -2.5993 nats. A machine with 9 hidden units is trained on random batches with a learning
rate that falls to zero in a line, by plain stochastic gradient descent, and evaluated exactly by enumeration.

Reproduces the finding of Melchior, Fischer & Wiskott (JMLR 2016), "How to center deep Boltzmann machines",
on such data: centered gradients reach higher likelihoods than plain ones, persistent chains higher ones than chains
that start at the data, and the exact gradient the highest.

    python -m benchmarks.bars_and_stripes --out benchmarks/results/bars_and_stripes.json
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pyro
import torch
from torch import Tensor

from benchmarks.reporting import Table, command_line, write
from pplvi import BoltzmannELBO, CompiledSVI
from pplvi.energies import RestrictedBoltzmannMachine

QUICK = "--steps 20 --seeds 1 --no-compile"

OPTIMUM = -(0.25 * math.log(8.0) + 0.75 * math.log(16.0))
REACH = {
    ("exact", True, 0.9): -2.605,
    ("persistent", True, 0.0): -2.70,
    ("persistent", False, 0.0): -2.76,
    ("contrastive", True, 0.0): -2.80,
    ("contrastive", False, 0.0): -3.11,
}
ROWS = [("exact", True, 0.9), ("exact", True, 0.0), ("exact", False, 0.0), *list(REACH)[1:]]


@dataclass
class Row:
    negative: str
    centered: bool
    momentum: float
    mean: float
    seeds: list[float]
    published: float | None
    cpu_seconds: float


def patterns() -> Tensor:
    """The 16 bars and stripes, ``(16, 9)``: each column or each row of one colour."""
    codes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    rows, columns = codes.unsqueeze(1).expand(8, 3, 3), codes.unsqueeze(2).expand(8, 3, 3)
    return torch.cat([rows, columns]).reshape(16, 9)


def batches(data: Tensor, num_steps: int, size: int) -> Iterator[tuple[Tensor]]:
    for _ in range(num_steps):
        yield (data[torch.randint(len(data), (size,))],)


def train(negative: str, centered: bool, momentum: float, seed: int, settings: argparse.Namespace) -> float:
    """Exact mean log likelihood after training, in nats."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    data, num_steps, batch = patterns(), settings.steps, settings.batch
    rbm = RestrictedBoltzmannMachine(9, 9, centered=centered, init_scale=0.1)
    svi = CompiledSVI(
        rbm.model,
        rbm.guide,
        partial(torch.optim.SGD, lr=settings.lr, momentum=momentum),
        BoltzmannELBO(batch, sweeps=1, negative=negative),
        mode=settings.compile or "trace",
        schedule=lambda t: 1.0 - t / num_steps,
    )
    svi.epoch(batches(data, num_steps, batch))
    return float(rbm.distribution().log_prob(data).mean().detach())


def row(negative: str, centered: bool, momentum: float, settings: argparse.Namespace) -> Row:
    start = time.process_time()
    found = [train(negative, centered, momentum, seed, settings) for seed in range(settings.seeds)]
    spent = (time.process_time() - start) / settings.seeds
    mean, published = statistics.fmean(found), REACH.get((negative, centered, momentum))
    return Row(negative, centered, momentum, mean, found, published, spent)


def show(rows: Sequence[Row]) -> None:
    print(f"mean log likelihood in nats; no model is above {OPTIMUM:.4f}")
    titles = {"mean": "8.4f", "lowest": "8.4f", "highest": "8.4f", "reach": "7.3f", "CPU s": "5.1f"}
    table = Table({"negative phase": "<14", "centered": "<8", "momentum": "8.1f", **titles})
    for r in rows:
        numbers = r.mean, min(r.seeds), max(r.seeds), r.published, r.cpu_seconds
        table.show(r.negative, str(r.centered), r.momentum, *numbers)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=100, help="data, and chains, in a step")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of the first step")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    settings = parser.parse_args(arguments)
    rows = [row(*kind, settings) for kind in ROWS]
    show(rows)
    write(settings, optimum=OPTIMUM, rows=rows)
    return rows


if __name__ == "__main__":
    main()
