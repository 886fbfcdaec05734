"""Wake-sleep on a sigmoid belief network: test log-likelihood of four algorithms and more at equal compute.

Two layers of binary causes, 200-200-784 on stochastically binarised MNIST (``--data``), 20-20-64 on scikit-learn's
digits thresholded at half intensity otherwise. The comparison is that of Bornschein & Bengio 2015 (sections 4.1, 4.2:
reweighted wake-sleep against wake-sleep) and Le et al. 2019 (section 4: wake-phi against sleep-phi, the defensive
mixture, and importance-weighted bounds with VIMCO, Mnih & Rezende 2016). Every method gets the same CPU seconds, in
compiled steps (compilation is not counted), the same networks and Adam; only the loss differs:

    WakeSleep      wake-theta with equal weights, sleep-phi, one draw and one dream an image
    RWS            reweighted wake-sleep, wake-phi
    RWS sleep      reweighted wake-theta, sleep-phi (insomnia 0)
    RWS half       both phi updates (insomnia 0.5)
    RWS mixture    wake-phi with a defensive mixture (0.2)
    VIMCO          the importance-weighted bound with leave-one-out baselines

Columns: the importance-weighted bound with 5,000 draws for each test image (``log p``, nats an image) and the ELBO.
The gap between the two is how far the guide is from the posterior; it is shown on test images and on images that the
model dreams at that moment. A sleep phase is trained on dreams, which early in training are unlike any image: the
guide's gap is small on dreams then and large on data, so that the model learns from poor draws. ``--out`` has the whole
learning curve, at 1/64, 1/32, ..., 1 of the budget.

    python -m benchmarks.wake_sleep --seconds 40 --out wake_sleep.json
    python -m benchmarks.wake_sleep --data DIR --seconds 300 --test-images 500 --out wake_sleep_mnist.json
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.optim import Adam
from torch import Tensor, nn

from benchmarks.reporting import Table, command_line, write
from pplvi import CompiledSVI, ImportanceWeightedELBO, ReweightedWakeSleep, WakeSleep
from pplvi.weights import logmeanexp

QUICK = "--methods WakeSleep --mode trace --seconds 0.2 --points 1 --draws 20 --hidden 4 --test-images 10"

K = 10
LOSSES: dict[str, Callable[[], object]] = {
    "WakeSleep": WakeSleep,
    "RWS": lambda: ReweightedWakeSleep(K),
    "RWS sleep": lambda: ReweightedWakeSleep(K, insomnia=0.0),
    "RWS half": lambda: ReweightedWakeSleep(K, insomnia=0.5),
    "RWS mixture": lambda: ReweightedWakeSleep(K, mixture=0.2),
    "VIMCO": lambda: ImportanceWeightedELBO(K, estimator="vimco"),
}


@dataclass(frozen=True)
class Point:
    """A point of a learning curve; nats an image. ``gap``: ``log p`` minus ELBO; on dreams with as many draws."""

    seconds: float
    steps: int
    log_p: float
    elbo: float
    gap: float
    gap_on_dreams: float


@dataclass(frozen=True)
class Row:
    """One method: its learning curve, the last point with many draws."""

    method: str
    ms_a_step: float
    curve: tuple[Point, ...]


class BeliefNet(nn.Module):
    """p(z2) p(z1 | z2) p(x | z1), all Bernoulli."""

    def __init__(self, hidden: int, pixels: int) -> None:
        super().__init__()
        self.top = nn.Parameter(torch.zeros(hidden))
        self.middle, self.bottom = nn.Linear(hidden, hidden), nn.Linear(hidden, pixels)

    def forward(self, x: Tensor) -> None:
        pyro.module("model", self)
        with pyro.plate("images", len(x)):
            z2 = pyro.sample("z2", dist.Bernoulli(logits=self.top).to_event(1))
            z1 = pyro.sample("z1", dist.Bernoulli(logits=self.middle(z2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.bottom(z1)).to_event(1), obs=x)


class Recogniser(nn.Module):
    """q(z1 | x) q(z2 | z1), all Bernoulli."""

    def __init__(self, hidden: int, pixels: int) -> None:
        super().__init__()
        self.bottom, self.top = nn.Linear(pixels, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> None:
        pyro.module("guide", self)
        with pyro.plate("images", len(x)):
            z1 = pyro.sample("z1", dist.Bernoulli(logits=self.bottom(x)).to_event(1))
            pyro.sample("z2", dist.Bernoulli(logits=self.top(z1)).to_event(1))


def images(data: Path | None, num_test: int | None) -> tuple[Tensor, Tensor]:
    """Training and test images with values 0 and 1, one a row."""
    if data is not None:
        found = np.load(data / "mnist_sampled.npz")
        train, test = (torch.from_numpy(found[name]).float() for name in ("train.data", "test.data"))
        return train, test[:num_test]
    from sklearn.datasets import load_digits

    x = (torch.tensor(load_digits().data) >= 8).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[360:]], x[order[:360]][:num_test]


def bounds(model: nn.Module, guide: nn.Module, x: Tensor, draws: int, chunk: int = 50) -> tuple[float, float]:
    """The importance-weighted bound with many draws, and the ELBO, in nats an image."""
    loss = ImportanceWeightedELBO(num_particles=min(chunk, draws))
    with torch.no_grad():
        parts = [next(iter(loss.steps(model, guide, x))).log_weight for _ in range(draws // loss.num_particles)]
    log_weight = torch.cat(parts).double()
    return float(logmeanexp(log_weight).mean()), float(log_weight.mean())


def look(model: nn.Module, guide: nn.Module, test: Tensor, draws: int, seconds: float, steps: int) -> Point:
    """Where training is; on dreams, as many as test images but at most 200."""
    with torch.no_grad():
        dreams = poutine.trace(poutine.uncondition(model)).get_trace(test[:200]).nodes["x"]["value"]
    log_p, elbo = bounds(model, guide, test, draws)
    on_dreams = bounds(model, guide, dreams, draws)
    return Point(seconds, steps, log_p, elbo, log_p - elbo, on_dreams[0] - on_dreams[1])


def measure(method: str, train: Tensor, test: Tensor, options: argparse.Namespace) -> Row:
    """Train with a budget of CPU seconds and evaluate at powers of two of it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(options.seed)
    model, guide = BeliefNet(options.hidden, train.shape[1]), Recogniser(options.hidden, train.shape[1])
    svi = CompiledSVI(model, guide, Adam({"lr": options.lr}), LOSSES[method](), mode=options.mode)
    svi.step(train[: options.batch])  # compiles
    spent, steps, curve = 0.0, 1, []
    for part in range(options.points - 1, -1, -1):
        began = process_time() - spent
        while spent < options.seconds / 2**part:
            for _ in range(10):
                svi.step(train[torch.randint(len(train), (options.batch,))])
            steps, spent = steps + 10, process_time() - began
        draws = options.draws if part == 0 else min(options.draws, 500)
        curve.append(look(model, guide, test, draws, spent, steps))
    return Row(method, 1000 * spent / steps, tuple(curve))


def table() -> Table:
    """Its titles: the end of training, and the gaps early in it."""
    titles = {"ms/step": "7.2f", "steps": "7d", **dict.fromkeys(["log p", "ELBO", "gap", "dreams"], "8.2f")}
    return Table({"method": "<12", **titles, "early data (dreams)": "<"})


def cells(row: Row) -> tuple[Any, ...]:
    last = row.curve[-1]
    early = "  ".join(f"{p.gap:.1f} ({p.gap_on_dreams:.1f})" for p in row.curve[:3])
    return row.method, row.ms_a_step, last.steps, last.log_p, last.elbo, last.gap, last.gap_on_dreams, early


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, print and write."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, help="folder with mnist_sampled.npz")
    parser.add_argument("--methods", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--seconds", type=float, default=40.0, help="CPU seconds of training for each method")
    parser.add_argument("--points", type=int, default=7, help="points of the learning curve")
    parser.add_argument("--draws", type=int, default=5000, help="draws of the last evaluation; 500 before")
    parser.add_argument("--hidden", type=int, help="causes in each layer; 200 for MNIST, 20 otherwise")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, help="1e-3 for MNIST, 3e-3 otherwise")
    parser.add_argument("--test-images", type=int)
    parser.add_argument("--mode", default="compiled", choices=["compiled", "trace"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.hidden = options.hidden or (20 if options.data is None else 200)
    options.lr = options.lr or (3e-3 if options.data is None else 1e-3)
    options.mode = True if options.mode == "compiled" else "trace"
    train, test = images(options.data, options.test_images)
    rows: list[Row] = []
    shown = table()
    for method in options.methods:
        rows.append(measure(method, train, test, options))
        shown.show(*cells(rows[-1]))
        write(options, rows=rows)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
