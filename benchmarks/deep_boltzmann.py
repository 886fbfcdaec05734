"""Deep Boltzmann machines: where training starts, what it optimises, centering, recognition networks, labels, speed.

Four tables, on scikit-learn's digits (8x8, thresholded) or on binary MNIST:

- ``training``: a random start, plain and centered, pretraining by layers, and multi-prediction, with the same CPU time;
  test bound and log likelihood (log Z by enumeration where the machine allows it), error of inferred labels,
  and cross-entropy of missing pixels. Compares with what Goodfellow, Bengio & Courville (2016), 20.4, say of them.
- ``hessian``: condition numbers of an enumerable machine, centered or not (Montavon & Mueller 2012).
- ``recognition``: bound and time of a recognition network against mean field to convergence, with one-step and
  ten-step targets (Salakhutdinov & Larochelle 2010).
- ``speed``: milliseconds of an update of 784-500-1000, 10 mean-field and 5 Gibbs sweeps, batch 100, through ``SVI``,
  against bare torch and the matrix products alone.

A machine of full size and classifiers that start from it are in ``deep_boltzmann_large.py``.

    python -m benchmarks.deep_boltzmann --out benchmarks/results/deep_boltzmann.json
    python -m benchmarks.deep_boltzmann --tables training --data ../shared/data/mnist --widths 784 500 500
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import SGD, Adam
from torch import Tensor, nn

from benchmarks.boltzmann_training import Data, load
from benchmarks.reporting import command_line, table_of, write_table
from pplvi import (
    BoltzmannELBO,
    CompiledSVI,
    DeepBoltzmannMachine,
    MeanFieldGuide,
    MultiPrediction,
    RecognitionGuide,
    pretrain,
)
from pplvi.energies import annealed_importance_sampling

QUICK = "--seconds 0.2 --small 64 6 5 --widths 64 10 8 --speed-widths 12 8 6 --repeats 1"

Row = dict[str, Any]
BATCH = 100


def cpu(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def train(svi: SVI, batches: Callable[[Tensor], Any], count: int, seconds: float) -> int:
    """Steps until the CPU time is spent; the number of steps."""
    steps, end = 0, time.process_time() + seconds
    while time.process_time() < end:
        for index in torch.randperm(count).split(BATCH):
            svi.step(batches(index))
            steps += 1
            if time.process_time() >= end:
                break
    return steps


# ---------------------------------------------------------------------- training


def machine(widths: Sequence[int], *, centered: bool, scale: float = 0.01) -> DeepBoltzmannMachine:
    pyro.clear_param_store()
    return DeepBoltzmannMachine(widths, num_labels=10, centered=centered, init_scale=scale)


STARTS = (("random start", "likelihood"), ("pretrained", "likelihood"), ("centered", "likelihood"))


def training(data: Data, widths: Sequence[int], seconds: float, lr: float, seeds: int) -> list[Row]:
    """Each row has the same CPU time, pretraining included; means over seeds, and the range of the bound."""
    rows = []
    for start, objective in (*STARTS, ("centered", "multi-prediction")):
        found = [one_start(data, widths, seconds, lr, start, objective, seed) for seed in range(seeds)]
        means = {key: mean([each[key] for each in found]) for key in found[0]}
        bounds = [each["bound"] for each in found]
        rows.append({"start": start, "objective": objective, **means, "lowest": min(bounds), "highest": max(bounds)})
    return rows


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def one_start(
    data: Data, widths: Sequence[int], seconds: float, lr: float, start: str, objective: str, seed: int
) -> Row:
    """Updates and results of one machine."""
    torch.manual_seed(seed)
    likelihood, before = objective == "likelihood", 0.0
    dbm = machine(widths, centered=start == "centered", scale=0.01 if likelihood else 0.1)
    if start == "pretrained":
        before = cpu(lambda: by_layers(dbm, data.v, seconds / 2, seed))
    if likelihood:
        svi = SVI(dbm.model, MeanFieldGuide(dbm, 10), SGD({"lr": lr}), BoltzmannELBO(BATCH, sweeps=5))
    else:
        svi = SVI(dbm.model, MeanFieldGuide(dbm, 6), Adam({"lr": 0.01}), MultiPrediction())
    return {"steps": train(svi, labelled(dbm, data), len(data.v), seconds - before), **judged(dbm, data)}


def by_layers(dbm: DeepBoltzmannMachine, v: Tensor, seconds: float, seed: int = 0) -> None:
    share = seconds / dbm.depth

    class Clock:
        def __init__(self) -> None:
            self.first = time.process_time()
            self.step = 0

        def __call__(self, run: Any) -> bool:
            if run.step <= self.step:
                self.first = time.process_time()
            self.step = run.step
            return time.process_time() - self.first > share

    pretrain(dbm, v, num_steps=10**6, batch_size=BATCH, seed=seed, callbacks=[Clock()], schedule=None)


def labelled(dbm: DeepBoltzmannMachine, data: Data) -> Callable[[Tensor], dict[str, Tensor]]:
    codes = dbm.layers["y"].encode(data.y.unsqueeze(1))
    return lambda index: {"v": data.v[index], "y": codes[index]}


def judged(dbm: DeepBoltzmannMachine, data: Data) -> Row:
    """Test bound and log likelihood, error of labels, cross-entropy of half of the pixels given the other half.

    Of machines that are too large to enumerate, log Z is an estimate by annealed importance sampling, which makes the
    bound optimistic, and there is no log likelihood.
    """
    guide = MeanFieldGuide(dbm, 50, tol=1e-4)
    error = (guide.means(data.test_v)["y"].argmax(-1) != data.test_y).float().mean().item()
    mask = torch.rand(data.test_v.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    missing = guide.fill_in(data.test_v, mask).clamp(1e-6, 1 - 1e-6)[~mask]
    painted = nn.functional.binary_cross_entropy(missing, data.test_v[~mask]).item()
    some = data.test_v[:100]
    exact = None
    try:
        with torch.no_grad():
            log_z = float(dbm.log_partition())
            exact = torch.cat([dbm.log_marginal({"v": part}) for part in some.split(10)]).double().mean().item() - log_z
    except ValueError:
        log_z = annealed_importance_sampling(dbm, 100, 1000, seed=0).log_z
    bound = guide.bound(some).double().mean().item() - log_z
    return {"label_error": error, "inpainting": painted, "bound": bound, "log_likelihood": exact}


# ---------------------------------------------------------------------- the Hessian


def hessian() -> list[Row]:
    """Condition numbers at a random start and after training 6-4-3, in the plain and centered parameters."""
    rows = []
    for bright in (0.5, 0.85):
        torch.manual_seed(0)
        pyro.clear_param_store()
        v = (torch.rand(200, 1, dtype=torch.float64) < 0.5).double().expand(-1, 6)
        v = torch.where(torch.rand(200, 6) < 0.3, (torch.rand(200, 6) < bright).double(), v)
        if bright > 0.5:
            v = torch.maximum(v, (torch.rand(200, 6) < 0.6).double())
        dbm = DeepBoltzmannMachine([6, 4, 3], init_scale=0.3).double()
        dbm.biases()["v"].data.copy_(torch.logit(v.mean(0)))
        for steps in (0, 300):
            svi = SVI(dbm.model, MeanFieldGuide(dbm, 20), SGD({"lr": 0.1}), BoltzmannELBO(negative="exact"))
            for _ in range(steps):
                svi.step(v)
            plain, centered = (condition(dbm, v, offsets) for offsets in (False, True))
            rows.append({"mean_pixel": v.mean().item(), "steps": steps, "plain": plain, "centered": centered})
    return rows


def condition(dbm: DeepBoltzmannMachine, v: Tensor, centered: bool) -> float:
    """Largest over smallest eigenvalue of the model's Fisher information: the Hessian of log Z in these parameters."""
    codes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 13)
    states = dict(zip(("v", "h1", "h2"), codes.split([6, 4, 3], -1), strict=True))
    with torch.no_grad():
        p = (-dbm.energy(states)).softmax(0)
        means = MeanFieldGuide(dbm, 50).means(v)
    offsets = {n: means[n].mean(0) if centered else torch.zeros(s.shape[1]).double() for n, s in states.items()}
    around = {n: s - offsets[n] for n, s in states.items()}
    pairs = [torch.einsum("si,sj->sij", around[a], around[b]).flatten(1) for a, b in dbm.edges()]
    statistic = torch.cat([*pairs, *around.values()], 1)
    moved = statistic - p @ statistic
    eigenvalues = torch.linalg.eigvalsh(moved.T @ (p.unsqueeze(1) * moved))
    return (eigenvalues[-1] / eigenvalues[0]).item()


def trained(data: Data, widths: Sequence[int], seconds: float, lr: float) -> DeepBoltzmannMachine:
    """A machine without labels, pretrained by layers for half of the time."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    dbm = DeepBoltzmannMachine(widths)
    before = cpu(lambda: by_layers(dbm, data.v, seconds / 2))
    svi = SVI(dbm.model, MeanFieldGuide(dbm, 10), SGD({"lr": lr}), BoltzmannELBO(BATCH, sweeps=5))
    train(svi, lambda i: data.v[i], len(data.v), seconds - before)
    return dbm


# ---------------------------------------------------------------------- recognition networks


def recognition(data: Data, widths: Sequence[int], seconds: float, lr: float) -> list[Row]:
    """A machine trained for a while, then networks alone; gap (nats) to mean field at convergence, and time ratio."""
    dbm = trained(data, widths, seconds, lr)
    dbm.requires_grad_(False)
    dbm.forget_chains()
    full = MeanFieldGuide(dbm, 200, tol=1e-4)
    best, rows = full.bound(data.test_v).mean(), []
    base = statistics.median(cpu(lambda: full.posterior(data.test_v, tol=1e-4)) for _ in range(9))

    def row(name: str, targets: str, guide: Any) -> Row:
        with torch.no_grad():
            times = [cpu(lambda: guide.posterior(data.test_v)) for _ in range(9)]
        gap = (best - guide.bound(data.test_v).mean()).item()
        return {"posterior": name, "targets": targets, "gap_nats": gap, "time_ratio": statistics.median(times) / base}

    rows.append({"posterior": "mean field to 1e-4", "targets": "", "gap_nats": 0.0, "time_ratio": 1.0})
    for sweeps in (0, 1, 5, 10):
        rows.append(row(f"mean field, {sweeps} sweeps", "", MeanFieldGuide(dbm, sweeps)))
    for targets in (1, 10):
        pyro.clear_param_store()
        guide = RecognitionGuide(dbm, targets)
        svi = SVI(dbm.model, guide, Adam({"lr": 3e-3}), BoltzmannELBO(1, sweeps=1))
        train(svi, lambda i: data.v[i], len(data.v), seconds)
        for sweeps in (0, 1):
            rows.append(row(f"network, {sweeps} sweeps", f"{targets}-step", guide.refined(sweeps)))
    return rows


# ---------------------------------------------------------------------- speed


def speed(widths: Sequence[int], repeats: int) -> list[Row]:
    """CPU milliseconds of one update, medians of alternating runs."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    dbm, v = DeepBoltzmannMachine(widths), (torch.rand(BATCH, widths[0]) < 0.2).float()
    elbo = BoltzmannELBO(BATCH, sweeps=5)
    svi = SVI(dbm.model, MeanFieldGuide(dbm, 10), SGD({"lr": 5e-3}), elbo)
    traced = DeepBoltzmannMachine(widths, name="traced")
    compiled = CompiledSVI(
        traced.model, MeanFieldGuide(traced, 10), lambda p: torch.optim.SGD(p, lr=5e-3), elbo, mode="trace"
    )
    bare, floor = Bare(widths), Products(widths)
    calls = {
        "SVI": lambda: svi.step(v),
        "CompiledSVI, traced": lambda: compiled.step(v),
        "bare torch": lambda: bare.step(v),
        "matrix products": lambda: floor.step(v),
    }
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(1e3 * cpu(call))
    return [{"way": name, "ms": statistics.median(found)} for name, found in times.items()]


class Bare:
    """The same update, plain gradients, written out for two hidden layers."""

    def __init__(self, widths: Sequence[int]) -> None:
        d, n, m = widths
        self.w, self.u = 0.01 * torch.randn(d, n), 0.01 * torch.randn(n, m)
        self.a, self.b, self.c = torch.zeros(d), torch.zeros(n), torch.zeros(m)
        self.v, self.h, self.k = (torch.rand(BATCH, x).round() for x in widths)

    def step(self, v: Tensor) -> None:
        up = v @ self.w + self.b
        h = torch.sigmoid(2 * up)
        k = torch.sigmoid(h @ self.u + self.c)
        for _ in range(10):
            h = torch.sigmoid(up + k @ self.u.T)
            k = torch.sigmoid(h @ self.u + self.c)
        for _ in range(5):
            p = torch.sigmoid(self.v @ self.w + self.k @ self.u.T + self.b)
            self.h = torch.lt(torch.rand_like(p), p).float()
            p = torch.sigmoid(self.h @ self.w.T + self.a)
            self.v = torch.lt(torch.rand_like(p), p).float()
            p = torch.sigmoid(self.h @ self.u + self.c)
            self.k = torch.lt(torch.rand_like(p), p).float()
        rate = 5e-3 / BATCH
        self.w += rate * (v.T @ h - self.v.T @ self.h)
        self.u += rate * (h.T @ k - self.h.T @ self.k)
        self.a += rate * (v - self.v).sum(0)
        self.b += rate * (h - self.h).sum(0)
        self.c += rate * (k - self.k).sum(0)


class Products:
    """The matrix products of an update alone."""

    def __init__(self, widths: Sequence[int]) -> None:
        d, n, m = widths
        self.w, self.u, self.h, self.k = torch.rand(d, n), torch.rand(n, m), torch.rand(BATCH, n), torch.rand(BATCH, m)

    def step(self, v: Tensor) -> None:
        v @ self.w, self.h @ self.u
        for _ in range(10):
            self.k @ self.u.T, self.h @ self.u
        for _ in range(5):
            v @ self.w, self.k @ self.u.T, self.h @ self.w.T, self.h @ self.u
        for _ in range(2):
            v.T @ self.h, self.h.T @ self.k


# ---------------------------------------------------------------------- tables


def main(argv: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Print the tables, and write them as JSON."""
    parser = command_line(__doc__)
    names = ["training", "hessian", "recognition", "speed"]
    parser.add_argument("--tables", nargs="+", default=names, choices=names)
    parser.add_argument("--data", help="folder with mnist_threshold.npz; digits unless given")
    parser.add_argument("--widths", type=int, nargs="+", help="of recognition: 64 100 100 for digits")
    parser.add_argument("--small", type=int, nargs="+", help="of training: 64 16 40, whose log Z is exact")
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds of training a machine")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=1, help="of training")
    parser.add_argument("--speed-widths", type=int, nargs=3, default=[784, 500, 1000])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = load(options.data, "threshold")
    size = data.v.shape[1]
    widths, small = options.widths or [size, 100, 100], options.small or options.widths or [size, 16, 40]
    makers: dict[str, Callable[[], list[Row]]] = {
        "training": lambda: training(data, small, options.seconds, options.lr, options.seeds),
        "hessian": hessian,
        "recognition": lambda: recognition(data, widths, options.seconds, options.lr),
        "speed": lambda: speed(options.speed_widths, options.repeats),
    }
    found: dict[str, list[Row]] = {}
    for name in options.tables:
        found[name] = makers[name]()
        print(f"\n{name} ({data.name})\n\n{table_of(found[name])}")
        write_table(options, name, found[name])
    return found


if __name__ == "__main__":
    main()
