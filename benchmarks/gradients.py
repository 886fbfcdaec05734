"""Signal-to-noise ratio of the guide's gradient against the number of particles.

Reproduces, on their Gaussian model, what Rainforth et al. 2018 ("Tighter variational bounds are not necessarily
better", section 4) found of the importance-weighted bound: the reparameterised gradient of the inference network loses
its signal as K^(-1/2); and what Tucker et al. 2019 ("Doubly reparameterized gradient estimators", section 6) put in its
place: with the doubly reparameterised estimator the ratio grows as K^(1/2). Sticking the landing (Roeder et al. 2017;
biased for K > 1) and VIMCO (Mnih & Rezende 2016) stand beside them.

Model: z ~ N(mu, I), x | z ~ N(z, I) in 20 dimensions; guide q(z | x) = N(A x + b, 2/3 I) with A = I/2 and b = mu/2 plus
a perturbation. The gradient is that in b at one datum. Independent replicas of the datum are one plate, so that a
single call of the loss gives as many independent gradients.

    python -m benchmarks.gradients --out gradients.json
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.reporting import Table, command_line, write
from pplvi.losses import ImportanceWeightedELBO

QUICK = "--particles 2 4 --replicas 20"

DIMENSIONS = 20
ESTIMATORS = ("reparam", "stl", "dreg", "vimco")
REPLICAS_AT_ONCE = 2**22  # numbers in a tensor


@dataclass(frozen=True)
class Row:
    """One estimator at one number of particles; norms are over the coordinates of b."""

    estimator: str
    num_particles: int
    signal: float
    sd: float
    snr: float
    seconds: float


def programs(x: Tensor, mu: Tensor, offset: Tensor) -> tuple:
    """The Gaussian model and guide on replicas of one datum; ``b`` has a row for every replica."""

    def model() -> None:
        with pyro.plate("replicas", len(offset)):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide() -> None:
        b = pyro.param("b", offset)
        with pyro.plate("replicas", len(offset)):
            pyro.sample("z", dist.Normal(x / 2 + b, (2 / 3) ** 0.5).to_event(1))

    return model, guide


def gradients(estimator: str, num_particles: int, replicas: int, problem: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Independent gradients in ``b``, ``(replicas, dimensions)``."""
    x, mu, offset = problem
    loss = ImportanceWeightedELBO(num_particles, estimator=estimator)
    width = num_particles**2 if estimator == "vimco" else num_particles * DIMENSIONS
    chunk, found = max(1, REPLICAS_AT_ONCE // width), []
    for start in range(0, replicas, chunk):
        pyro.clear_param_store()
        count = min(chunk, replicas - start)
        loss.loss_and_grads(*programs(x, mu, offset.expand(count, -1).clone()))
        found.append(pyro.param("b").grad)
    return torch.cat(found)


def measure(num_particles: int, replicas: int, problem: tuple[Tensor, Tensor, Tensor]) -> list[Row]:
    """A row for each estimator: norm of the expected gradient over the norm of one gradient's standard deviation.

    All but ``"stl"`` have the same expectation: the mean of the least noisy, DReG, stands for it, and what its own
    noise adds to the norm is taken off. (The mean of the others is mostly noise at many particles.)
    """
    rows, signals = [], {}
    for estimator in sorted(ESTIMATORS, key=lambda e: e != "dreg"):
        started = perf_counter()
        draws = gradients(estimator, num_particles, replicas, problem)
        seconds, variance = perf_counter() - started, draws.var(0).sum()
        own = (draws.mean(0).square().sum() - variance / replicas).clamp(min=0).sqrt()
        signal = signals.setdefault("stl" if estimator == "stl" else "dreg", own)
        rows.append(
            Row(
                estimator,
                num_particles,
                float(signal),
                float(variance.sqrt()),
                float(signal / variance.sqrt()),
                seconds,
            )
        )
    return rows


def slope(rows: Sequence[Row]) -> float:
    """Power of K with which the signal-to-noise ratio goes, by least squares over the larger half of the table."""
    upper = rows[-max(2, len(rows) // 2) :]
    log_k = torch.tensor([row.num_particles for row in upper], dtype=torch.float64).log()
    log_snr = torch.tensor([row.snr for row in upper], dtype=torch.float64).log()
    centred = log_k - log_k.mean()
    return float((centred * log_snr).sum() / centred.square().sum())


def run(particles: Sequence[int], replicas: int, seed: int, perturbation: float) -> list[Row]:
    """All rows of the table."""
    pyro.set_rng_seed(seed)
    mu = torch.randn(DIMENSIONS)
    x = mu + torch.randn(DIMENSIONS) * 2**0.5
    problem = x, mu, mu / 2 + perturbation * torch.randn(DIMENSIONS)
    return [row for k in particles for row in measure(k, replicas, problem)]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, and the fitted power of K."""
    titles = {"K": "6d", "signal": "10.5f", "sd": "10.5f", "SNR": "8.3f", "seconds": "8.2f"}
    own = {e: [row for row in rows if row.estimator == e] for e in ESTIMATORS}
    cells = [(e, r.num_particles, r.signal, r.sd, r.snr, r.seconds) for e in ESTIMATORS for r in own[e]]
    slopes = [f"{e}: SNR goes as K^{slope(own[e]):.2f}" for e in ESTIMATORS]
    return "\n".join([Table({"estimator": "<9", **titles}).text(cells), *slopes])


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = command_line(__doc__)
    parser.add_argument("--particles", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--replicas", type=int, default=2000, help="independent gradients of each kind")
    parser.add_argument("--perturbation", type=float, default=0.1, help="standard deviation of b around its optimum")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        rows = run(options.particles, options.replicas, options.seed, options.perturbation)
    finally:
        torch.set_default_dtype(default)
    print(table(rows))
    slopes = {e: slope([row for row in rows if row.estimator == e]) for e in ESTIMATORS}
    write(options, rows=rows, slopes=slopes)
    return rows


if __name__ == "__main__":
    main()
