"""A deep Boltzmann machine of full size without pretraining, and classifiers that start from its weights.

- ``curve``: 784-500-1000 on sampled MNIST from a random start, centered, one Gibbs sweep of persistent chains and two
  mean-field sweeps an update, learning rate falling to zero; the test bound (mean field, log Z by annealed importance
  sampling) of the averaged parameters as training goes on (published: -84.62, pretrained, after hundreds of epochs,
  Salakhutdinov & Hinton 2009).
- ``labels``: test errors after fine-tuning on all, 1,000 and 100 labels, from a machine's weights or a random start
  (published there: 0.95 % with all labels; 6.5 % and 16.2 % with 1,000 and 100, 10.9 % and 23.8 % from a random start).

    python -m benchmarks.deep_boltzmann_large --data ../shared/data/mnist --compile --machine dbm.pt \\
        --epochs 12 --out benchmarks/results/deep_boltzmann_large.json

``curve`` writes the averaged machine to the file ``--machine`` and ``labels`` starts from it, whatever made it; without
one ``labels`` has ``curve`` run first. Without ``--data``: scikit-learn's digits, a 64-100-100 machine.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from benchmarks.boltzmann_training import EVERY, Data, Training, load, started
from benchmarks.reporting import Rows, command_line, write_table
from pplvi import DeepBoltzmannMachine, MeanFieldGuide, annealed_importance_sampling, to_classifier

QUICK = "--tables curve --widths 64 20 15 --updates 20 --points 1 --betas 10 --final-betas 10 --chains 5"

Row = dict[str, Any]

# ---------------------------------------------------------------------- curve


def curve(options: argparse.Namespace) -> Iterator[Row]:
    data = load(options.data, "sampled")
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    dbm = started(DeepBoltzmannMachine(options.widths), data.v)
    training = Training(
        dbm,
        MeanFieldGuide(dbm, options.mean_field),
        data.v,
        options.updates,
        lr=options.lr,
        sweeps=options.gibbs,
        weight_decay=options.weight_decay,
        window=max(2 * EVERY, options.updates // 40),
        mode=options.compile or "trace",
    )
    count = math.ceil(options.updates / options.points)
    for done in range(0, options.updates, count):
        training.run(min(count, options.updates - done))
        last = done + count >= options.updates
        found = bound(training.average, data, options, options.final_betas if last else options.betas, last)
        save(training.average, options)
        yield {"updates": min(done + count, options.updates), "cpu_seconds": training.seconds, **found}


def bound(dbm: Any, data: Data, options: argparse.Namespace, betas: int, complete: bool) -> Row:
    """Mean bounds of test images, and of as many training images, in nats; a thousand of each but at the end."""
    start = time.process_time()
    found = annealed_importance_sampling(dbm, options.chains, betas, seed=0)
    count = len(data.test_v) if complete else 1000
    test, train = (mean_bound(dbm, v[:count]) for v in (data.test_v, data.v))
    return {
        "bound": test - found.log_z,
        "interval": [test - end for end in reversed(found.interval)],
        "training_images": train - found.log_z,
        "images": min(count, len(data.test_v)),
        "ess": found.ess,
        "betas": betas,
        "evaluation_cpu_seconds": time.process_time() - start,
    }


def mean_bound(dbm: Any, v: Tensor) -> float:
    """Mean over images of what the bound is without log Z."""
    guide = MeanFieldGuide(dbm, 50, tol=1e-3)
    return torch.cat([guide.bound(part) for part in v.split(1000)]).double().mean().item()


def save(dbm: Any, options: argparse.Namespace) -> None:
    """Widths, parameters and offsets, without chains."""
    if options.machine is not None:
        kept = {name: value for name, value in dbm.state_dict().items() if not name.startswith("chain_")}
        torch.save({"widths": list(options.widths), "state": kept}, options.machine)


def restored(path: Path) -> DeepBoltzmannMachine:
    pyro.clear_param_store()
    saved = torch.load(path)
    dbm = DeepBoltzmannMachine(saved["widths"])
    dbm.load_state_dict(saved["state"])
    return dbm


# ---------------------------------------------------------------------- labels


def labels(options: argparse.Namespace) -> Iterator[Row]:
    """Mean test errors over subsets of the labels, and their range."""
    data, dbm = load(options.data, options.images), restored(options.machine)
    pyro.set_rng_seed(0)
    random = DeepBoltzmannMachine(options.widths, init_scale=options.init_scale)
    for count in options.labels or [len(data.v), 1000, 100]:
        row: Row = {"labels": count}
        seeds = range(1 if count == len(data.v) else options.subsets)
        for name, start in (("machine", dbm), ("random", random)):
            errors = [tuned(start, data, count, seed, options) for seed in seeds]
            row |= {name: statistics.mean(errors), f"{name}_each": errors}
        yield row


def tuned(start: DeepBoltzmannMachine, data: Data, count: int, seed: int, options: argparse.Namespace) -> float:
    """Test error after fine-tuning on some labels, as many of each class as of the others."""
    torch.manual_seed(seed)
    chosen = balanced(data.y, count)
    classifier = to_classifier(copy.deepcopy(start), 10, iterations=10)
    inputs, target = augmented(classifier, data.v[chosen]), data.y[chosen]
    size = 20 if count <= 2000 else 100
    updates = max(options.epochs * count // size, options.least_updates)
    trained = [p for p in classifier.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=options.tuning_lr, weight_decay=options.tuning_decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=updates)
    for index in shuffled(count, size, updates):
        optimiser.zero_grad()
        nn.functional.cross_entropy(classifier(*(x[index] for x in inputs)), target[index]).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        found = torch.cat([classifier(v).argmax(-1) for v in data.test_v.split(1000)])
    return (found != data.test_y).float().mean().item()


def balanced(y: Tensor, count: int) -> Tensor:
    """Random indices with the same number of each class, as far as there are so many; all of them if asked for all."""
    order = torch.randperm(len(y))
    rank = torch.empty_like(order)
    for label in y.unique():
        mine = order[y[order] == label]
        rank[mine] = torch.arange(len(mine))
    return order[rank[order].argsort(stable=True)][:count]


def augmented(classifier: Any, v: Tensor) -> tuple[Tensor, ...]:
    """Inputs of the classifier, some images at a time."""
    parts = [classifier.augment(part) for part in v.split(1000)]
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def shuffled(count: int, size: int, updates: int) -> Iterator[Tensor]:
    """Batches of indices, epoch after epoch."""
    while updates > 0:
        for index in torch.randperm(count).split(size)[:updates]:
            yield index
            updates -= 1


# ---------------------------------------------------------------------- tables

TABLES: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {"curve": curve, "labels": labels}


def main(argv: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Print the tables row by row, and write them as JSON."""
    options = parsed(argv)
    torch.set_num_threads(1)
    if options.tables == ["labels"] and not options.machine:
        raise SystemExit("labels alone needs a trained machine: --machine FILE, made by --tables curve.")
    beside = options.out or Path("deep_boltzmann_large.json")
    options.machine = options.machine or beside.with_suffix(".pt")
    found: dict[str, list[Row]] = {}
    shown = Rows()
    for name in options.tables:
        found[name] = []
        for row in TABLES[name](options):
            shown.show({"table": name, **row})
            found[name].append(row)
            write_table(options, name, found[name])
    return found


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--data", type=Path, help="folder of mnist_sampled.npz and mnist_threshold.npz")
    parser.add_argument("--machine", type=Path, help="file of the trained machine: written by curve, read by labels")
    parser.add_argument("--widths", type=int, nargs="+", help="784 500 1000; 64 100 100 for digits")
    curve = parser.add_argument_group("curve")
    curve.add_argument("--updates", type=int, default=55_000)
    curve.add_argument("--points", type=int, default=11)
    curve.add_argument("--lr", type=float, default=0.09)
    curve.add_argument("--weight-decay", type=float, default=5e-4)
    curve.add_argument("--gibbs", type=int, default=1)
    curve.add_argument("--mean-field", type=int, default=2, help="sweeps in training")
    curve.add_argument("--compile", action="store_true", help="train through inductor")
    curve.add_argument("--chains", type=int, default=100)
    curve.add_argument("--betas", type=int, default=1000)
    curve.add_argument("--final-betas", type=int, default=20_000)
    labels = parser.add_argument_group("labels")
    labels.add_argument("--images", choices=("sampled", "threshold"), default="threshold")
    labels.add_argument("--labels", type=int, nargs="+", help="numbers of labels: all, 1,000 and 100")
    labels.add_argument("--subsets", type=int, default=3)
    labels.add_argument("--epochs", type=int, default=20)
    labels.add_argument("--least-updates", type=int, default=1000)
    labels.add_argument("--tuning-lr", type=float, default=1e-3, help="of AdamW, falling to zero")
    labels.add_argument("--tuning-decay", type=float, default=0.01)
    labels.add_argument("--init-scale", type=float, default=0.1, help="of the weights of a random start")
    options = parser.parse_args(argv)
    options.widths = options.widths or ([64, 100, 100] if options.data is None else [784, 500, 1000])
    return options


if __name__ == "__main__":
    main()
