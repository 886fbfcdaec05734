"""The main job on four real data sets: ``fit(model, "auto")``, with NUTS as the reference.

``python -m pplvi.demo --out out`` fits the models of :mod:`pplvi.examples`, prints a table, and writes a page with
pictures (HTML, PNG), reports and ArviZ data (NetCDF). The runs are independent, so they share the cores as processes of
one thread each.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from html import escape
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer import NUTS
from torch import Tensor

from pplvi.examples import LOADERS, load
from pplvi.examples.example import Example
from pplvi.fitting import Fit, fit
from pplvi.posterior.arviz.quiet import arviz_itself
from pplvi.posterior.plots import plot_against_reference, plot_weights

# Compiled by Pyro's own tracer, and with a full mass matrix, because the posteriors are correlated.
KERNEL = partial(NUTS, jit_compile=True, ignore_jit_warnings=True, full_mass=True)
CHAINS = 2
ALGORITHMS = ("NUTS", "auto")
REFERENCE, SHOWN = ALGORITHMS
HEADER = ("fit", "guide", "k-hat", "ESS", "log evidence", "mean err", "sd err", "seconds", "verdict")
ROW = "{:<6}{:<24}{:>6}{:>7}{:>17}{:>10}{:>8}{:>9}  {}"
LEGEND = (
    "Seconds of a processor, up to the verdict. Log evidence in nats, ESS in draws. Errors of the mean and of the\n"
    "standard deviation: the largest over all latents, in standard deviations under NUTS; in the row of NUTS the\n"
    "Monte Carlo error of that run itself."
)
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;text-align:right}td:first-child,th:first-child{text-align:left}"
    "tr{border-bottom:1px solid #ddd}"
    "img{max-width:100%}pre{overflow-x:auto;background:#f6f6f6;padding:1em}"
)


@dataclass(frozen=True)
class Job:
    """One run, by names: an example with an algorithm."""

    example: str
    algorithm: str
    num_draws: int
    out: Path

    @property
    def stem(self) -> str:
        """How the names of this run's files begin."""
        return str(self.out / f"{self.example}-{self.algorithm}")


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: latent draws that all count alike, each ``(num_draws, *shape)``, and the cells of its row.

    A run that failed has none, and says why.
    """

    job: Job
    draws: dict[str, Tensor]
    seconds: float
    cells: tuple[str, ...] = ("",) * 4
    noise: tuple[float, float] = (0.0, 0.0)
    verdict: str = ""
    failure: str = ""


def plan(examples: Sequence[str], num_draws: int, out: Path) -> list[Job]:
    """All runs, the long ones first so that the cores end together.

    >>> [job.stem for job in plan(["eight_schools"], 100, Path("out"))]
    ['out/eight_schools-NUTS', 'out/eight_schools-auto']
    """
    return [Job(example, algorithm, num_draws, out) for algorithm in ALGORITHMS for example in examples]


def run(job: Job) -> Outcome:
    """Do one run, in whatever process; its error is its outcome."""
    torch.set_num_threads(1)
    start = time.process_time()
    try:
        return sample(job) if job.algorithm == REFERENCE else approximate(job)
    except Exception as error:  # whatever it is, the other runs go on
        return failed(job, f"{type(error).__name__}: {error}", time.process_time() - start)


def failed(job: Job, why: str, seconds: float = math.nan) -> Outcome:
    """The outcome of a run that has none."""
    return Outcome(job, {}, seconds, failure=" ".join(why.split()))


def sample(job: Job) -> Outcome:
    """Run NUTS, and say how exact a reference it is."""
    example, start = load(job.example), time.process_time()
    result = fit(
        example.model,
        KERNEL,
        args=example.args,
        num_warmup=job.num_draws // 3,
        num_steps=job.num_draws // CHAINS,
        restarts=CHAINS,
        seed=0,
        progress=False,
    )
    verdict, seconds = result.verdict.word, time.process_time() - start
    data = show(job, example, result)
    draws = result.posterior().draws.latents
    summary = arviz_itself().summary(data, var_names=list(draws), round_to="none")
    mean, spread = (float((summary[name] / summary["sd"]).max()) for name in ("mcse_mean", "mcse_sd"))
    return Outcome(job, draws, seconds, ("NUTS", "", f"{summary['ess_bulk'].min():.0f}", ""), (mean, spread), verdict)


def approximate(job: Job) -> Outcome:
    """Let ``"auto"`` find a guide; its draws are resampled by their weights."""
    example, start = load(job.example), time.process_time()
    result = fit(example.model, "auto", args=example.args, seed=0, progress=False)
    posterior, verdict = result.posteriors[result.best], result.verdict.word
    seconds, evidence = time.process_time() - start, posterior.total_log_evidence
    numbers = (posterior.pareto_k.max().item(), posterior.ess.min().item(), evidence.value, evidence.error)
    cells = "{:.2f}|{:.0f}|{:.2f} +- {:.2f}".format(*numbers).split("|")
    show(job, example, result)
    save_figure(plot_weights(result), f"{job.stem}-weights.png")
    draws = posterior.resample(job.num_draws, seed=0)
    return Outcome(job, draws, seconds, (result.guide_name, *cells), verdict=verdict)


def show(job: Job, example: Example, result: Fit) -> Any:
    """Write what a fit has to say, its report and its ArviZ data, and return the latter."""
    Path(f"{job.stem}.txt").write_text(result.summary() + "\n", encoding="utf-8")
    data = result.to_arviz(coords=example.coords, dims=example.dims, num_prior=100)
    data.to_netcdf(f"{job.stem}.nc")
    return data


def save_figure(axes: Any, path: str) -> None:
    """Write the figure that some axes are in, and close it."""
    from matplotlib import pyplot

    figure = np.ravel(axes)[0].figure
    figure.savefig(path, dpi=60, bbox_inches="tight")
    pyplot.close(figure)


def errors(draws: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, float]:
    r"""Largest error of a mean and of a standard deviation over all latents, in standard deviations of the reference.

    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> errors({"x": 2 * x}, {"x": x})
    (1.0, 1.0)
    """
    pairs = [(_columns(draws[name]), _columns(reference[name])) for name in reference]
    mean = max(((a.mean(0) - b.mean(0)).abs() / b.std(0)).max().item() for a, b in pairs)
    spread = max((a.std(0) / b.std(0) - 1).abs().max().item() for a, b in pairs)
    return mean, spread


def _columns(draws: Tensor) -> Tensor:
    return draws.double().reshape(len(draws), -1)


def run_all(jobs: Sequence[Job], processes: int) -> Iterator[Outcome]:
    """The outcomes as they come; with one process, in this one."""
    if processes == 1:
        yield from map(run, jobs)
        return
    arviz_itself()  # this process writes ArviZ's stamp of the day: workers would race for it
    left = dict.fromkeys(jobs)
    with suppress(BrokenProcessPool):
        for outcome in _in_processes(jobs, processes):
            del left[outcome.job]
            yield outcome
    for job in left:  # a worker died and took the others with it: each by itself
        try:
            yield from _in_processes([job], 1)
        except BrokenProcessPool:
            yield failed(job, "its process died, for lack of memory perhaps")


def _in_processes(jobs: Sequence[Job], processes: int) -> Iterator[Outcome]:
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from (future.result() for future in as_completed([pool.submit(run, job) for job in jobs]))


def rows_of(outcomes: Iterable[Outcome]) -> dict[str, list[tuple[str, ...]]]:
    """The cells of the table, a list of rows for each example, in the order of the plan."""
    found = {(outcome.job.example, outcome.job.algorithm): outcome for outcome in outcomes}
    rows: dict[str, list[tuple[str, ...]]] = {}
    for (example, _), outcome in found.items():
        rows.setdefault(example, []).append(row(outcome, found[example, REFERENCE]))
    return rows


def row(outcome: Outcome, reference: Outcome) -> tuple[str, ...]:
    """The cells of one run."""
    if outcome.failure:
        return (outcome.job.algorithm, *("",) * 7, f"failed: {outcome.failure}")
    pair: tuple[str, ...] = ("", "")
    if outcome is reference:
        pair = tuple(f"({noise:.2f})" for noise in outcome.noise)
    elif reference.draws:
        pair = tuple(f"{error:.2f}" for error in errors(outcome.draws, reference.draws))
    return (outcome.job.algorithm, *outcome.cells, *pair, f"{outcome.seconds:.1f}", outcome.verdict)


def table(rows: dict[str, list[tuple[str, ...]]]) -> str:
    """A block of lines for each example."""
    lines: list[str] = []
    for example, cells in rows.items():
        lines += ["", example, *(ROW.format(*each).rstrip() for each in (HEADER, *cells))]
    return "\n".join([*lines, "", LEGEND])


def page(outcomes: Sequence[Outcome]) -> str:
    """The same as HTML, with the pictures and the words of every fit."""
    body = ["<h1>pplvi</h1>", f"<p>{escape(LEGEND)}</p>"]
    for example, cells in rows_of(outcomes).items():
        body.append(
            f"<h2>{escape(example)}</h2><table>{_line('th', HEADER)}{''.join(_line('td', c) for c in cells)}</table>"
        )
        for outcome in (each for each in outcomes if each.job.example == example):
            stem = Path(outcome.job.stem)
            body += [
                f'<p><img src="{picture.name}" alt="{escape(picture.stem)}"></p>'
                for picture in sorted(stem.parent.glob(f"{stem.name}-*.png"))
            ]
            if (words := stem.with_name(f"{stem.name}.txt")).exists():
                body.append(f"<h3>{escape(stem.name)}</h3><pre>{escape(words.read_text(encoding='utf-8'))}</pre>")
    head = f'<meta charset="utf-8"><title>pplvi</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _line(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def plot_all(outcomes: Iterable[Outcome]) -> None:
    """The draws of ``"auto"`` on top of those of NUTS."""
    found = {(outcome.job.example, outcome.job.algorithm): outcome for outcome in outcomes}
    for (example, algorithm), outcome in found.items():
        reference = found[example, REFERENCE].draws
        if algorithm == SHOWN and outcome.draws and reference:
            axes = plot_against_reference(outcome.draws, reference, labels=ALGORITHMS[::-1])
            save_figure(axes, f"{outcome.job.stem}-against-{REFERENCE}.png")


def demo(examples: Sequence[str], num_draws: int, processes: int, out: Path) -> str:
    """Do all runs behind a progress bar, write the page, and return the table."""
    from tqdm.auto import tqdm

    out.mkdir(parents=True, exist_ok=True)
    jobs = plan(examples, num_draws, out)
    with tqdm(total=len(jobs), desc="runs", unit="run") as bar:
        outcomes: dict[Job, Outcome] = {}
        for outcome in run_all(jobs, processes):
            outcomes[outcome.job] = outcome
            bar.set_postfix_str(f"{outcome.job.example} {outcome.job.algorithm}")
            bar.update()
    done = [outcomes[job] for job in jobs]
    plot_all(done)
    text = table(rows_of(done))
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    (out / "index.html").write_text(page(done), encoding="utf-8")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: ``python -m pplvi.demo --help``."""
    parser = argparse.ArgumentParser(prog="python -m pplvi.demo", description='"auto" and NUTS on four models.')
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the page, pictures and data")
    parser.add_argument("--examples", nargs="+", default=list(LOADERS), choices=list(LOADERS))
    parser.add_argument("--draws", type=int, default=1000, help="draws that are compared, and of NUTS after warm-up")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)
    start = time.perf_counter()
    text = demo(options.examples, options.draws, options.processes, options.out)
    seconds = f"{time.perf_counter() - start:.0f} s"
    print(f"{text}\n\n{seconds}; the same with pictures: {options.out / 'index.html'}, beside reports and ArviZ data")


if __name__ == "__main__":
    main()
