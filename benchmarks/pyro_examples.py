"""Programs of the kinds of Pyro's examples, trained by Pyro's SVI and by this package, with Pyro's loss of both.

Each program is trained from the same seed by the same optimiser for the same number of steps: by Pyro's ``SVI`` with
the loss that Pyro's example takes, by the same ``SVI`` with this package's loss (eager), and with the step recorded
(``"trace"``) or compiled. Then Pyro's loss judges what each has learned: its mean over ``--judge`` evaluations, in
nats. "first" is the largest difference, over the first steps, of a step's eager loss from Pyro's, relative: rounding,
as both draw the same numbers (not in "air", where Pyro learns a baseline and this package takes four particles). The
programs are in pyro_programs.py and pyro_chains.py.

    python -m benchmarks.pyro_examples --only 'hmm*' lda --out benchmarks/results/pyro_examples.json
"""

import argparse
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from statistics import mean, stdev
from time import process_time
from typing import Any

import pyro
import pyro.infer
import torch
from pyro.infer import SVI

from benchmarks.pyro_programs import EXAMPLES, Example
from benchmarks.reporting import Table, command_line, write
from pplvi.compile import CompiledSVI
from pplvi.losses import ELBO

QUICK = "--steps 3 --judge 3 --only hmm-0* vae --ways eager trace"

WAYS = ("eager", "trace", "compiled")
FIRST = 5  # steps whose losses are compared one by one

Row = dict[str, Any]


def pyros_loss(example: Example) -> Any:
    """The loss of Pyro that trains and judges a program."""
    options: dict[str, Any] = {"max_plate_nesting": example.nesting}
    if example.loss == "TraceEnum_ELBO":
        options |= {"strict_enumeration_warning": False}
    return getattr(pyro.infer, example.loss)(**options)


def own_loss(example: Example) -> ELBO:
    """This package's loss of the same value; draws without a path have each other for a baseline, not a network."""
    if example.loss == "TraceMeanField_ELBO":
        return ELBO(entropy="kl")
    return ELBO(4) if example.loss == "TraceGraph_ELBO" else ELBO()


def stepper(way: str, example: Example) -> Callable[[], float]:
    """One training step, which returns its loss."""
    optim = pyro.optim.Adam({"lr": example.lr})
    if way in ("pyro", "eager"):
        loss = pyros_loss(example) if way == "pyro" else own_loss(example)
        slow = SVI(example.model, example.guide, optim, loss)
        return lambda: float(slow.step(*example.args))
    mode: Any = True if way == "compiled" else way
    svi = CompiledSVI(example.model, example.guide, optim, own_loss(example), mode=mode)
    return lambda: svi.step(*example.args)


def trained(way: str, name: str, options: argparse.Namespace) -> Row:
    """Train in one way, and let Pyro's loss judge."""
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(options.seed)
        example = EXAMPLES[name]()
        example.guide(*example.args)  # all ways start from the same parameters
        step = stepper(way, example)
        losses = [step()]
        began = process_time()
        losses += [step() for _ in range(options.steps - 1)]
        spent = process_time() - began
        pyro.set_rng_seed(options.seed + 1)
        judge = pyros_loss(example)
        found = [float(judge.loss(example.model, example.guide, *example.args)) for _ in range(options.judge)]
    error = stdev(found) / len(found) ** 0.5
    return {"losses": losses, "loss": mean(found), "error": error, "ms": 1e3 * spent / max(1, options.steps - 1)}


def compared(name: str, options: argparse.Namespace) -> Row:
    """One row: every way, and what went wrong where a way cannot train the program."""
    row: Row = {"example": name}
    failures = []
    losses: dict[str, list[float]] = {}
    for way in ("pyro", *options.ways):
        try:
            found = trained(way, name, options)
        except Exception as error:  # a program that cannot be trained is part of the table
            failures.append(f"{way}: {type(error).__name__}: {error}".splitlines()[0][:160])
            continue
        losses[way] = found["losses"][:FIRST]
        row |= {way: found["loss"], f"{way} ms": found["ms"]}
        if way == "pyro":
            row["error"] = found["error"]
    if {"pyro", "eager"} <= losses.keys():
        pairs = zip(losses["eager"], losses["pyro"], strict=True)
        row["first"] = max(abs(ours - pyros) / (1 + abs(pyros)) for ours, pyros in pairs)
    return row | {"failed": "; ".join(failures)}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Train, print and write."""
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--judge", type=int, default=50, help="evaluations of Pyro's loss after training")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["eager", "trace"])
    parser.add_argument("--only", nargs="+", default=["*"], help="examples, with wildcards")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    losses = dict.fromkeys(("pyro", *options.ways), "10.3f")
    times = {f"{way} ms": "9.2f" for way in losses}
    table = Table({"example": "<20", **losses, "error": "8.3f", "first": "8.1e", **times, "failed": "<"})
    rows = []
    for name in EXAMPLES:
        if any(fnmatch(name, pattern) for pattern in options.only):
            rows.append(compared(name, options))
            table.show(*(rows[-1].get(column) for column in table.columns))
            write(options, rows=rows)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
