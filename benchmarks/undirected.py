"""Kinds of undirected machines on data: labels, music, images and patches, each in one table.

- ``labels``: classification machines of 784-500-10 units on thresholded MNIST, trained to classify, or with a share of
  the joint likelihood (Larochelle & Bengio 2008: 1.81 and 1.28 per cent test error, of grey images). 50,000 images to
  train on, 10,000 to choose the update by. What is trained to classify sees images of which a fifth of the pixels is
  off, drawn anew in each batch.
- ``music``: JSB chorales, nats a frame by annealed importance sampling, of a machine given four frames and of a
  recurrent one (Boulanger-Lewandowski et al. 2012; Taylor et al. 2007). The pieces are as they are, without
  transposition; the validation pieces choose the update.
- ``images``: a convolutional machine with probabilistic max pooling on sampled MNIST (the binarisation of natural_bm):
  milliseconds an update of 20 images, and its likelihood.
- ``patches``: 8 x 8 patches of scikit-learn's two photographs, whitened: machines of as many hidden units whose
  covariance is Gaussian, of spikes and slabs (from a start that knows how wide pixels are), or gated.

Log-likelihoods are those of annealed importance sampling, which are too high on average; intervals are three standard
errors of log Z beside one of the mean over data.

    python -m benchmarks.undirected --data ../shared/data --tables music --out benchmarks/results/undirected.json

Without ``--data`` digits and made-up sequences stand in. Seconds are CPU seconds, recording and evaluation included.
"""

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from benchmarks.boltzmann_training import load
from benchmarks.reporting import command_line, table_of, write
from pplvi import ELBO, BoltzmannELBO, CompiledSVI
from pplvi.energies import (
    ClassificationBoltzmannMachine,
    ContrastiveDivergence,
    ConvolutionalBoltzmannMachine,
    GaussianUnits,
    MeanCovarianceMachine,
    MeanProductOfStudents,
    PersistentChains,
    RecurrentTemporalMachine,
    RestrictedBoltzmannMachine,
    RNNBoltzmannMachine,
    SpikeSlabUnits,
    annealed_importance_sampling,
    plot_filters,
    plot_images,
)

QUICK = "--share 0.002 --frames 40 --betas 5"
LATTER = 0.5
Row = dict[str, Any]


class Run:
    """Updates of a program with a falling learning rate, an average of the parameters, and the best of both so far."""

    def __init__(
        self, program: tuple[Any, Any], machine: Any, loss: Any, batch: Callable[[], tuple[Any, ...]], **options: Any
    ) -> None:
        self.machine, self.batch, self.updates = machine, batch, options["updates"]
        decay = options.get("weight_decay", 0.0)
        adam = partial(torch.optim.Adam, lr=options["lr"], weight_decay=decay)
        falls = lambda t: max(1.0 - max(t / self.updates - LATTER, 0.0) / (1 - LATTER), 0.01)  # noqa: E731
        mode = options.get("mode", "trace")
        self.svi = CompiledSVI(*program, adam, loss, mode=mode, schedule=falls, clip=options.get("clip"))
        self.average, self.rate = copy.deepcopy(machine), options.get("rate", 0.01)
        self.best: tuple[float, int, Any] = (-math.inf, 0, machine)
        self.started = time.process_time()

    def go(self, value: Callable[[Any], float], points: int = 10) -> Any:
        """All updates; the machine, or average, that validation data like best."""
        every = max(self.updates // points, 1)
        for count in range(1, self.updates + 1):
            self.svi.step(*self.batch())
            if count % 10 == 0:
                with torch.no_grad():
                    for mine, theirs in zip(self.average.parameters(), self.machine.parameters(), strict=True):
                        mine.lerp_(theirs, self.rate)
            if count % every == 0 or count == self.updates:
                self._keep(value, count)
        return self.best[2]

    def _keep(self, value: Callable[[Any], float], count: int) -> None:
        for machine in (self.machine, self.average):
            found = value(machine)
            if found > self.best[0]:
                self.best = found, count, copy.deepcopy(machine)
        print(f"  {count} updates, {self.seconds:.0f} s, validation {found:.4f}, best {self.best[0]:.4f}", flush=True)

    @property
    def seconds(self) -> float:
        """CPU seconds since the start."""
        return time.process_time() - self.started


def annealed(machine: Any, chains: int, betas: int, **options: Any) -> Any:
    """An estimate, whose effective sample size is in the table: no warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return annealed_importance_sampling(machine, chains, betas, num_raise_chains=0, seed=0, **options)


def at_the_mean(machine: Any, v: Tensor) -> Any:
    """The machine with visible biases that give the data's mean."""
    mean = v.reshape(-1, v.shape[-1]).mean(0).clamp(1e-3, 1 - 1e-3)
    with torch.no_grad():
        machine.biases()["v"].copy_(mean.logit())
    return machine


def asked(settings: argparse.Namespace, name: str) -> bool:
    """Whether a machine is among those that are run."""
    return settings.machines is None or any(name.startswith(word) for word in settings.machines)


def rows_of(data: Tensor, size: int) -> Iterator[Tensor]:
    """Indices of batches, epoch after epoch."""
    size = min(size, len(data))
    while True:
        for rows in torch.randperm(len(data)).split(size):
            if len(rows) == size:
                yield rows


# ---------------------------------------------------------------------- labels


def thinned(v: Tensor, dropped: float) -> Tensor:
    """Images of which a share of the pixels is off, drawn anew in each batch."""
    return v * (torch.rand_like(v) >= dropped) if dropped else v


def labels(settings: argparse.Namespace) -> Iterator[Row]:
    """Test errors of classifiers."""
    data = load(None if settings.data is None else settings.data / "mnist", "threshold")
    held = len(data.v) // 6
    v, y, few = data.v[:-held], data.y[:-held], settings.frames
    valid_v, valid_y = data.v[-held:][:few], data.y[-held:][:few]

    def error(machine: Any, v: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            found = torch.cat([machine.label_logits(part).argmax(-1) for part in v.split(1000)])
        return (found != y).double().mean().item()

    kinds = (("discriminative", None, 0.2, 0.0181), ("hybrid", 0.01, 0.0, 0.0128))
    for name, generative, dropped, published in (kind for kind in kinds if asked(settings, kind[0])):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        machine = ClassificationBoltzmannMachine(v.shape[1], 500, num_labels=10)
        index = rows_of(v, 100)
        program = machine.classify if generative is None else partial(machine.hybrid, generative=generative)
        loss = ELBO() if generative is None else BoltzmannELBO(negative=PersistentChains(100, 1))
        updates = max(2, round(settings.share * (30_000 if generative is None else 40_000)))
        run = Run(
            (program, machine.marginal_guide),
            machine,
            loss,
            lambda index=index, dropped=dropped: (thinned(v[rows := next(index)], dropped), y[rows]),
            updates=updates,
            lr=4e-3,
        )
        best = run.go(lambda m: -error(m, valid_v, valid_y), points=8)
        yield {
            "model": f"{name}, {v.shape[1]}-500-10",
            "dropped pixels": dropped,
            "updates": run.best[1],
            "validation error": -run.best[0],
            "test error": error(best, data.test_v[:few], data.test_y[:few]),
            "published": published,
            "cpu_seconds": run.seconds,
        }


# ---------------------------------------------------------------------- music


def pieces(folder: Path | None, part: str) -> list[Tensor]:
    """Piano rolls, ``(frames, 88)`` each."""
    if folder is None:
        generator = torch.Generator().manual_seed(len(part))
        return [(torch.rand(12, 88, generator=generator) < 0.1).float() for _ in range(8)]
    from scipy.io import loadmat

    found = loadmat(folder / "music" / "JSB_Chorales.mat")[f"{part}data"][0]
    return [torch.from_numpy(np.asarray(piece, dtype="f4")) for piece in found]


def framed(folder: Path | None, part: str, past: int = 4) -> dict[str, Tensor]:
    """Frames, and the ones before them side by side, the last one first."""
    v, given = [], []
    for piece in pieces(folder, part):
        before = torch.cat([torch.zeros(past, piece.shape[1]), piece])
        v.append(piece)
        given.append(torch.cat([before[past - 1 - k : len(before) - 1 - k] for k in range(past)], 1))
    return {"v": torch.cat(v), "given": torch.cat(given)}


def padded(folder: Path | None, part: str) -> tuple[Tensor, Tensor]:
    """Pieces of one length, and which frames they have."""
    found = pieces(folder, part)
    mask = torch.arange(max(map(len, found))) < torch.tensor([[len(piece)] for piece in found])
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True), mask


def windows(v: Tensor, mask: Tensor, size: int = 8, length: int = 60) -> tuple[Tensor, Tensor]:
    """Parts of some pieces, each from any frame on, and which frames they have."""
    rows, length = torch.randint(len(v), (size,)), min(length, v.shape[1])
    count = mask[rows].sum(1)
    first = (torch.rand(size) * (count - length + 1).clamp(min=1)).long()
    at = first.unsqueeze(1) + torch.arange(length)
    return v[rows.unsqueeze(1), at.clamp(max=v.shape[1] - 1)], at < count.unsqueeze(1)


def nats(
    machine: Any, data: dict[str, Tensor], settings: argparse.Namespace, chains: int = 10, betas: int = 100
) -> Any:
    """The estimate of the likelihood of frames."""
    return annealed(machine, chains, settings.betas or betas, data=data)


def music(settings: argparse.Namespace) -> Iterator[Row]:
    """Nats a frame of chorales."""
    few = settings.frames or 1000
    frames = {part: framed(settings.data, part) for part in ("train", "valid", "test")}

    def valid(machine: Any) -> float:
        chosen = {n: x[:: max(1, len(x) // few)] for n, x in frames["valid"].items()}
        return float(nats(machine, chosen, settings, betas=60).log_likelihood[0])

    def row(name: str, run: Run, machine: Any, train: Any, test: Any, published: float | None) -> Row:
        found = nats(machine, {n: x[: settings.frames] for n, x in test.items()}, settings, betas=300)
        some = {n: x[:few] for n, x in train.items()}
        low, high = (found.log_likelihood[0] + found.log_z - z for z in reversed(found.interval))
        return {
            "model": name,
            "updates": run.best[1],
            "test nats": found.log_likelihood[0],
            "low": low - found.log_likelihood[1],
            "high": high + found.log_likelihood[1],
            "ESS of 10": found.ess,
            "train nats": nats(machine, some, settings).log_likelihood[0],
            "published": published,
            "cpu_seconds": run.seconds,
        }

    if asked(settings, "conditional"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        machine = RestrictedBoltzmannMachine(88, 150, given=352, centered=False)
        at_the_mean(machine, frames["train"]["v"])
        index = rows_of(frames["train"]["v"], 100)
        batch = lambda: ({n: x[rows] for rows in [next(index)] for n, x in frames["train"].items()},)  # noqa: E731
        run = Run(
            (machine.model, machine.guide),
            machine,
            BoltzmannELBO(negative=ContrastiveDivergence(sweeps=10)),
            batch,
            updates=max(2, round(settings.share * 12_000)),
            lr=1e-3,
            weight_decay=3e-4,
        )
        best = run.go(valid)
        yield row("conditional RBM, 4 frames, 150 hidden", run, best, frames["train"], frames["test"], None)
    v, mask = padded(settings.data, "train")
    others = {part: padded(settings.data, part) for part in ("valid", "test")}
    kinds: dict[str, Callable[[], Any]] = {
        "RNN-RBM": partial(RNNBoltzmannMachine, 88, 150, num_state=100),
        "RTRBM": partial(RecurrentTemporalMachine, 88, 100),
    }
    for name in (name for name in kinds if asked(settings, name)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = kinds[name]()
        at_the_mean(model.machine, v[mask])

        def likelihood(model: Any) -> float:
            data = {n: x[:: max(1, len(x) // few)] for n, x in model.frames(*others["valid"]).items()}
            return float(nats(model.machine, data, settings, betas=60).log_likelihood[0])

        run = Run(
            (model.model, model.guide),
            model,
            BoltzmannELBO(negative=ContrastiveDivergence(sweeps=10)),
            partial(windows, v, mask),
            updates=max(2, round(settings.share * 6_000)),
            lr=5e-3,
            clip=settings.clip,
        )
        best = run.go(likelihood)
        published = 6.27 if name == "RNN-RBM" else None
        yield row(name, run, best.machine, best.frames(v, mask), best.frames(*others["test"]), published)


# ---------------------------------------------------------------------- images


def images(settings: argparse.Namespace) -> Iterator[Row]:
    """A convolutional machine."""
    data = load(None if settings.data is None else settings.data / "mnist", "sampled")
    side = math.isqrt(data.v.shape[1])
    v = data.v[:50_000] if settings.data else data.v
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    filter_size = 9 if side == 28 else 3
    machine = ConvolutionalBoltzmannMachine((1, side, side), maps=24, filter_size=filter_size, pool=2)
    index, updates = rows_of(v, 20), max(2, round(settings.share * 6_000))
    loss = BoltzmannELBO(negative=PersistentChains(20, 1))
    run = Run(
        (machine.model, machine.guide), machine, loss, lambda: (v[next(index)],), updates=updates, lr=2e-3, rate=0.02
    )
    run.svi.step(*run.batch())
    start = time.process_time()
    count = min(100, updates)
    for _ in range(count):
        run.svi.step(*run.batch())
    each = (time.process_time() - start) / count
    best = run.go(lambda m: -float(m.free_energy(v[:200]).detach().mean()) if m is machine else -math.inf, points=4)
    found = annealed(best, 20, settings.betas or 500, data=data.test_v[:500], base_rate=v.mean(0))
    if settings.pictures is not None:
        settings.pictures.mkdir(parents=True, exist_ok=True)
        plot_filters(best, num_filters=24, columns=8).savefig(settings.pictures / "filters.png")
        start_at = {**best.draw((20,)), "v": v[:20]}
        plot_images(best.gibbs(start_at, 500)["v"]).savefig(settings.pictures / "samples.png")
    yield {
        "model": f"{side} x {side}, 24 maps {filter_size} x {filter_size}, pool 2",
        "updates": updates,
        "ms an update": 1e3 * each,
        "test nats": found.log_likelihood[0],
        "log Z low": found.interval[0],
        "log Z high": found.interval[1],
        "ESS of 20": found.ess,
        "cpu_seconds": run.seconds,
    }


# ---------------------------------------------------------------------- patches


def whitened(count: int = 60_000, side: int = 8) -> tuple[Tensor, Tensor]:
    """Grey patches with noise of one grey level, centered and whitened: training and test ones, from left and right."""
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(0)
    found: dict[bool, list[Tensor]] = {False: [], True: []}
    for image in load_sample_images().images:
        grey = torch.tensor(image, dtype=torch.float64).mean(-1)
        grey = torch.log1p(grey + torch.rand(grey.shape, generator=generator, dtype=torch.float64))
        cut = 3 * grey.shape[1] // 4
        for test, part in ((False, grey[:, :cut]), (True, grey[:, cut:])):
            patches = part.unfold(0, side, 1).unfold(1, side, 1).reshape(-1, side * side)
            found[test].append(patches[torch.randperm(len(patches), generator=generator)[: count // 2]])
    train, test = torch.cat(found[False]), torch.cat(found[True])[::10]
    mean, (values, vectors) = train.mean(0), torch.linalg.eigh(torch.cov(train.T))
    white = vectors @ torch.diag((values + 1e-3 * values.mean()).rsqrt()) @ vectors.T
    return ((train - mean) @ white).float(), ((test - mean) @ white).float()


def spikes_and_slabs(width: int, narrow: float = 0.3, wide: float = 5.0, share: float = 0.2) -> Any:
    """A machine that starts as independent pixels, each normal and wide in a share of patches, narrow in the others.

    At small weights the gradient of what slabs know of the covariance is of second order, and training stays there.
    """
    odds = math.log(share / (1 - share)) + math.log(narrow / wide) / 2
    units = GaussianUnits(width, variance=narrow), SpikeSlabUnits(width, precision=4.0, log_odds=odds)
    machine = RestrictedBoltzmannMachine(width, width, visible=units[0], hidden=units[1], centered=False)
    with torch.no_grad():
        machine.weight("v", "h").copy_(2 * narrow * math.sqrt(1 / narrow - 1 / wide) * torch.eye(width))
    return machine


def patches(settings: argparse.Namespace) -> Iterator[Row]:
    """Machines of real units."""
    train, test = whitened(2000 if settings.share < 0.1 else 60_000)
    test = test[: settings.frames or 3000]
    hidden = 64
    kinds: dict[str, tuple[Callable[[], Any], float, int]] = {
        "Gaussian RBM": (partial(RestrictedBoltzmannMachine, 64, hidden, visible="gaussian", centered=False), 1e-3, 1),
        "spike and slab": (partial(spikes_and_slabs, 64), 2e-4, 10),
        "mean and covariance": (partial(MeanCovarianceMachine, 64, num_covariance=48, num_mean=16), 1e-3, 1),
        "mean product of Students": (partial(MeanProductOfStudents, 64, num_covariance=48, num_mean=16), 1e-3, 1),
    }
    for name, (make, lr, sweeps) in ((name, kind) for name, kind in kinds.items() if asked(settings, name)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        machine, index = make(), rows_of(train, 100)
        loss = BoltzmannELBO(negative=PersistentChains(100, sweeps))
        program = (machine.marginal, machine.marginal_guide)
        updates = max(2, round(settings.share * 10_000))
        run = Run(program, machine, loss, lambda index=index: (train[next(index)],), updates=updates, lr=lr, rate=0.02)
        run.go(
            lambda m, machine=machine: (
                -float(m.free_energy(train[:500]).detach().mean()) if m is machine else -math.inf
            ),
            4,
        )
        chosen = run.average
        if hasattr(machine, "step_size"):
            chosen.step_size.copy_(machine.step_size)
        found = annealed(chosen, 100, settings.betas or 2000, data=test)
        mean, error = found.log_likelihood
        yield {
            "model": f"{name}, {hidden} hidden",
            "updates": updates,
            "test nats": mean,
            "low": mean - error + found.log_z - found.interval[1],
            "high": mean + error + found.log_z - found.interval[0],
            "ESS of 100": found.ess,
            "a Gaussian": _gaussian(train, test),
            "cpu_seconds": run.seconds,
        }


def _gaussian(train: Tensor, test: Tensor) -> float:
    normal = torch.distributions.MultivariateNormal(train.mean(0), torch.cov(train.T))
    return float(normal.log_prob(test).double().mean())


TABLES = {"labels": labels, "music": music, "images": images, "patches": patches}


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Run some of the tables."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, help="a folder with mnist/ and music/")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--machines", nargs="+", help="some of a table, by the beginnings of their names; else all")
    parser.add_argument("--share", type=float, default=1.0, help="share of the updates")
    parser.add_argument("--frames", type=int, help="at most as many data to judge by")
    parser.add_argument("--betas", type=int, help="inverse temperatures of annealed importance sampling")
    parser.add_argument("--clip", type=float, default=1.0, help="norm of the gradient of recurrent machines")
    parser.add_argument("--pictures", type=Path, help="where to draw filters and samples of the convolutional machine")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    before = json.loads(settings.out.read_text())["tables"] if settings.out and settings.out.exists() else {}
    found: dict[str, list[Row]] = {}
    for name in settings.tables:
        found[name] = []
        for row in TABLES[name](settings):
            found[name].append(row)
            print(table_of([row]), flush=True)
            kept = [old for old in before.get(name, []) if old["model"] not in {new["model"] for new in found[name]}]
            write(settings, tables={**before, **found, name: kept + found[name]})
    return found


if __name__ == "__main__":
    main()
