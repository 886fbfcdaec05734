"""The annealing ring: nested variational inference on an unnormalised mixture of eight Gaussians.

Reproduces table 1 of Zimmermann et al. 2021 (section 4.1): gamma_K(x) = sum over m = 1..8 of
N(x; 10 (sin, cos)(2 pi m/8), 0.5 I), so that log Z = log 8 = 2.0794; gamma_1 = N(0, 25 I); a geometric path of K
targets; 288 / K particles; residual Gaussian kernels with 50 hidden units; Adam with rate 1e-3. Rows: AVO, NVI, NVIR,
NVI*, NVIR* (R: resampling at every level in training, *: learned betas). The paper trains for 20,000 steps.

Evaluation: batches of 1,000 draws, without resampling (the honest, cumulative effective sample size) and with it,
where the effective sample size is that of the last level alone; the published table gives the latter for the R rows.
Published for K = 8 (ESS of 1,000; log Z): AVO 295, 2.06; NVI 319, 2.07; NVIR 961, 2.08; NVI* 481, 2.08; NVIR* 965,
2.08.

    python benchmarks/annealing_ring.py --steps 20000 --batches 100 --out ring.json
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from time import process_time

import pyro
import pyro.distributions as dist
import torch
from pyro.optim import Adam
from torch import Tensor

from pplvi.annealing import Annealed, Resampling
from pplvi.compile import CompiledSVI, Mode
from pplvi.guides.annealed import AnnealedGuide
from pplvi.kernels import ResidualKernel
from pplvi.nested_elbo import NestedELBO
from pplvi.objectives import Routing
from pplvi.samplers import Request
from pplvi.weights import effective_sample_size, logmeanexp

BUDGET = 288
HOW: dict[str, Mode] = {"compiled": True, "trace": "trace", "eager": False}
METHODS = {
    "AVO": ("avo", False, False),
    "NVI": ("reverse_kl", False, False),
    "NVIR": ("reverse_kl", True, False),
    "NVI*": ("reverse_kl", False, True),
    "NVIR*": ("reverse_kl", True, True),
}


@dataclass(frozen=True)
class Row:
    """One method at one number of targets; ESS of 1,000 draws, log Z and its standard deviation over batches."""

    method: str
    num_targets: int
    seed: int
    steps: int
    ess: float
    log_z: float
    log_z_sd: float
    ess_resampled: float
    log_z_resampled: float
    ms_a_step: float
    betas: tuple[float, ...]


ANGLE = 2 * math.pi * torch.arange(1, 9) / 8
MODES = dist.Normal(10 * torch.stack([ANGLE.sin(), ANGLE.cos()], -1), 0.5**0.5).to_event(1)
ANYWHERE = dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False)
START = dist.Normal(torch.zeros(2), 5.0).to_event(1)


def ring() -> None:
    """Eight modes on a circle of radius 10, with a total mass of 8."""
    x = pyro.sample("x", ANYWHERE)
    pyro.factor("density", torch.logsumexp(MODES.log_prob(x.unsqueeze(-2)), -1))


def start() -> None:
    """The first target."""
    pyro.sample("x", START)


def evaluate(guide: AnnealedGuide, resample: bool, batches: int) -> tuple[float, float, float]:
    """Mean ESS of 1,000 draws, mean of log Z and its standard deviation over batches."""
    sampler, request = Annealed(Resampling(resample)), Request(1000, routing=Routing(detach=True, local=True))
    with torch.no_grad():
        last = [list(sampler(ring, guide, (), {}, request))[-1].log_weight for _ in range(batches)]
    log_weight: Tensor = torch.stack(last, 1)
    log_z = logmeanexp(log_weight)
    return float(effective_sample_size(log_weight).mean()), float(log_z.mean()), float(log_z.std())


def measure(method: str, num_targets: int, steps: int, batches: int, seed: int, mode: Mode) -> Row:
    """Train one row of the table and evaluate it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    divergence, resample, learn_path = METHODS[method]
    guide = AnnealedGuide(ring, start, num_targets - 1, ResidualKernel(hidden=50), learn_path=learn_path)
    loss = NestedELBO(divergence, BUDGET // num_targets, resample=resample)
    svi = CompiledSVI(ring, guide, Adam({"lr": 1e-3}), loss, mode=mode)
    svi.step()
    began = process_time()
    svi.run(steps - 1)
    each = 1000 * (process_time() - began) / max(1, steps - 1)
    ess, log_z, sd = evaluate(guide, False, batches)
    ess_resampled, log_z_resampled, _ = evaluate(guide, True, batches)
    betas = tuple(round(beta, 4) for beta in guide.betas.tolist())
    return Row(method, num_targets, seed, steps, ess, log_z, sd, ess_resampled, log_z_resampled, each, betas)


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = f"{'method':8}{'K':>3}{'ESS':>8}{'log Z':>9}{'sd':>8}{'ESS (R)':>9}{'log Z (R)':>11}{'ms/step':>9}"
    lines = [
        f"{r.method:8}{r.num_targets:3}{r.ess:8.0f}{r.log_z:9.3f}{r.log_z_sd:8.3f}{r.ess_resampled:9.0f}"
        f"{r.log_z_resampled:11.3f}{r.ms_a_step:9.1f}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", type=int, nargs="+", default=[8])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--mode", choices=list(HOW), default="compiled", help="how CompiledSVI runs a step")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for num_targets, method, seed in product(options.targets, options.methods, options.seeds):
        rows.append(measure(method, num_targets, options.steps, options.batches, seed, HOW[options.mode]))
        print(table(rows[-1:]).splitlines()[-1] if len(rows) > 1 else table(rows), flush=True)
        if options.out:
            options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
