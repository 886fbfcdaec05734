"""Kernels of annealed guides at equal gradient evaluations: DAIS, UHA, MCVAE, MCD and CMCD on a funnel and a ring.

The same guide each time, a learned normal base, a learned path and ``--transitions`` transitions, trained end to end by
the evidence bound; every transition evaluates the gradient of its target twice for each draw. After the tables of
Geffner & Domke 2021 (UHA) and Vargas et al. 2024 (CMCD), whose targets and budgets are others: what can be compared is
the order of the rows. Targets of known log Z:

- funnel: ten dimensions (Neal 2003), log Z = 0;
- ring: eight Gaussian modes around the origin (Zimmermann et al. 2021), log Z = log 8.

Columns: the gap log Z - ELBO in nats and the effective sample size of the weights on the extended space, both from
20,000 draws, and the CPU seconds of training. The first row has no transition.

    python -m benchmarks.annealed_kernels --out benchmarks/results/annealed_kernels.json
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import process_time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from benchmarks.annealing_ring import ring
from benchmarks.reporting import Table, command_line, write
from pplvi.compile import CompiledSVI
from pplvi.guides import AnnealedGuide
from pplvi.kernels import ControlledLangevinKernel, LangevinKernel, UncorrectedHamiltonianKernel
from pplvi.losses import ELBO
from pplvi.programs import execute
from pplvi.training import Cosine
from pplvi.weights import effective_sample_size

QUICK = "--targets funnel --kernels DAIS --transitions 2 --particles 4 --draws 500 --seeds 1 --steps 3"


@dataclass(frozen=True)
class Target:
    """A model of known log Z, and where its base starts.

    :ivar step_size: initial step size of Langevin kernels; that of a leapfrog step is ``sqrt(2 step_size)``.
    """

    model: Callable[[], Any]
    size: int
    log_z: float
    scale: float
    step_size: float


def funnel() -> None:
    """Neal's funnel as one site: the logarithm of the variance first."""
    z = pyro.sample("x", dist.Normal(torch.zeros(10), 1.0).to_event(1).mask(False))
    v, x = z[..., :1], z[..., 1:]
    density = dist.Normal(0.0, 3.0).log_prob(v).sum(-1) + dist.Normal(0.0, (v / 2).exp()).log_prob(x).sum(-1)
    pyro.factor("density", density)


TARGETS = {
    "funnel": Target(funnel, 10, 0.0, 1.0, 0.01),
    "ring": Target(ring, 2, math.log(8), 5.0, 0.05),
}


def kernels(target: Target) -> dict[str, Any]:
    """The rows; a leapfrog step of ``h`` moves draws as a Langevin step of ``h^2 / 2`` does."""
    size, leap = target.step_size, math.sqrt(2 * target.step_size)
    return {
        "base": None,
        "MCVAE": LangevinKernel(size),
        "DAIS": UncorrectedHamiltonianKernel(leap),
        "UHA": UncorrectedHamiltonianKernel(leap, keep=0.8),
        "MCD": ControlledLangevinKernel(size, control="reverse"),
        "CMCD": ControlledLangevinKernel(size),
    }


@dataclass(frozen=True)
class Row:
    """One kernel on one target, one seed."""

    target: str
    kernel: str
    seed: int
    gradients: int
    gap: float
    ess: float
    seconds: float


def base_of(target: Target) -> Callable[[], None]:
    """A normal base whose location and scale are learned."""

    def base() -> None:
        loc = pyro.param("base.loc", torch.zeros(target.size))
        scale = pyro.param(
            "base.scale", torch.full((target.size,), target.scale), constraint=constraints.softplus_positive
        )
        pyro.sample("x", dist.Normal(loc, scale).to_event(1))

    return base


def measure(name: str, kernel: str, seed: int, options: argparse.Namespace) -> Row:
    """Train one guide and weigh its draws."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    target = TARGETS[name]
    base, how = base_of(target), kernels(target)[kernel]
    guide: Any = base
    if how is not None:
        guide = AnnealedGuide(target.model, base, options.transitions, how, learn_path=True)
    loss = ELBO(options.particles)
    loss.loss(target.model, guide)
    began = process_time()
    how_fast: dict[str, Any] = {"mode": "trace", "schedule": Cosine(options.steps), "clip": 100.0}
    svi = CompiledSVI(target.model, guide, lambda p: torch.optim.Adam(p, lr=options.rate), loss, **how_fast)
    svi.run(options.steps)
    seconds = process_time() - began
    log_weight = log_weights(target, guide, options.draws)
    gap = target.log_z - float(log_weight.mean())
    ess = float(effective_sample_size(log_weight)) / options.draws
    return Row(name, kernel, seed, 0 if how is None else 2 * options.transitions, gap, ess, seconds)


@torch.no_grad()
def log_weights(target: Target, guide: Any, count: int) -> Tensor:
    """Log weights of draws on the extended space."""
    run = execute(target.model, guide, (), {}, num_particles=count)
    return run.log_target() - run.log_forward()


def table(rows: Sequence[Row]) -> str:
    """Medians over seeds."""
    titles = {"gradients": "d", "gap": "8.3f", "worst": "8.3f", "ESS/N": "6.3f", "seconds": "8.1f"}
    lines = []
    for target, kernel in dict.fromkeys((row.target, row.kernel) for row in rows):
        own = [row for row in rows if (row.target, row.kernel) == (target, kernel)]
        gap, worst = median(row.gap for row in own), max(row.gap for row in own)
        ess, seconds = median(row.ess for row in own), median(row.seconds for row in own)
        lines.append((target, kernel, own[0].gradients, gap, worst, ess, seconds))
    return Table({"target": "<8", "kernel": "<6", **titles}).text(lines)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, print and write."""
    parser = command_line(__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", default=list(kernels(TARGETS["ring"])))
    parser.add_argument("--transitions", type=int, default=8)
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=20_000)
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for target in options.targets:
        for kernel in options.kernels:
            rows += [measure(target, kernel, seed, options) for seed in range(options.seeds)]
            write(options, rows=rows)
    print(table(rows))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
