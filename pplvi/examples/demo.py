"""The main job on three real data sets: three guides, three objectives and NUTS as the reference.

``python -m pplvi.examples.demo --out out`` fits the models of :mod:`pplvi.examples`, prints a table, and writes plots
(PNG) and ArviZ data (NetCDF). The runs are independent, so they share the cores as processes of one thread each.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer import NUTS
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pplvi.examples import LOADERS, load
from pplvi.examples.example import Example
from pplvi.fitting import Fit, fit
from pplvi.guides import AutoFlow
from pplvi.losses.elbo import ELBO, ImportanceWeightedELBO, RenyiELBO
from pplvi.posterior.plots import plot_against_reference, plot_objective, plot_weights

REFERENCE = "NUTS"
SHOWN = ("AutoFlow", "ImportanceWeightedELBO")  # the run of which report, plots and data are written
NUM_PARTICLES = 4

# Compiled by Pyro's own tracer, and with a full mass matrix, because the posteriors are correlated.
KERNEL = partial(NUTS, jit_compile=True, ignore_jit_warnings=True, full_mass=True)
GUIDES: dict[str, Callable[..., Any]] = {
    "AutoFlow": partial(AutoFlow, transforms=2, hidden_features=(32, 32)),
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoNormal": AutoNormal,
}
OBJECTIVES: dict[str, Callable[[], Any]] = {
    "ELBO": partial(ELBO, num_particles=NUM_PARTICLES),
    "ImportanceWeightedELBO": partial(ImportanceWeightedELBO, num_particles=NUM_PARTICLES),
    "RenyiELBO": partial(RenyiELBO, alpha=0.5, num_particles=NUM_PARTICLES),
}
HEADER = ("guide", "objective", "ELBO", "k-hat", "ESS", "log evidence", "mean err", "sd err", "seconds")
ROW = "{:<23}{:<23}{:>8}{:>7}{:>6}{:>17}{:>13}{:>13}{:>9}"
LEGEND = (
    "ELBO and log evidence in nats, ESS in draws. Errors of the mean and of the standard deviation: the largest over\n"
    "all latents, in standard deviations under NUTS, of the guide's own draws / after Pareto-smoothed weighting.\n"
    "In the row of NUTS, the smallest bulk ESS and the largest Monte Carlo errors of that run itself."
)
_NO_NUMBERS = ("",) * 4


@dataclass(frozen=True)
class Job:
    """One run, by names: an example with a guide and an objective, or with NUTS and none."""

    example: str
    guide: str
    objective: str
    num_steps: int
    num_draws: int
    out: Path

    @property
    def stem(self) -> str:
        """How the names of this run's files begin."""
        return str(self.out / "-".join(part for part in (self.example, self.guide, self.objective) if part))


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: latent draws, each ``(num_draws, *shape)``, and the cells of its row.

    ``draws`` are the guide's own, ``weighted`` the same resampled by their Pareto-smoothed weights. A run that failed
    has neither, and says why.
    """

    job: Job
    draws: dict[str, Tensor]
    weighted: dict[str, Tensor]
    seconds: float
    quality: tuple[str, ...]
    noise: tuple[float, float] = (0.0, 0.0)
    failure: str = ""


def plan(examples: Sequence[str], num_steps: int, num_draws: int, out: Path) -> list[Job]:
    """All runs, the long ones first so that the cores end together.

    >>> jobs = plan(["eight_schools"], 100, 100, Path("out"))
    >>> len(jobs), jobs[0].guide, jobs[1].stem
    (10, 'NUTS', 'out/eight_schools-AutoFlow-ELBO')
    """
    pairs = [(REFERENCE, ""), *((guide, objective) for guide in GUIDES for objective in OBJECTIVES)]
    return [Job(example, *pair, num_steps, num_draws, out) for pair in pairs for example in examples]


def run(job: Job) -> Outcome:
    """Do one run, in whatever process; its error is its outcome."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        return sample(job) if job.guide == REFERENCE else approximate(job)
    except Exception as error:  # whatever it is, the other runs go on
        return failed(job, f"{type(error).__name__}: {error}", time.perf_counter() - start)


def failed(job: Job, why: str, seconds: float = math.nan) -> Outcome:
    """The outcome of a run that has none."""
    return Outcome(job, {}, {}, seconds, _NO_NUMBERS, failure=" ".join(why.split()))


def sample(job: Job) -> Outcome:
    """Run NUTS, write its ArviZ data, and say how exact a reference it is."""
    import arviz as az

    example = load(job.example)
    result = fit(
        example.model,
        KERNEL,
        num_warmup=job.num_draws // 2,
        args=example.args,
        num_steps=job.num_draws,
        seed=0,
        progress=False,
    )
    data = result.to_arviz(coords=example.coords, dims=example.dims)
    data.to_netcdf(f"{job.stem}.nc")
    draws = result.posterior().draws.latents
    summary = az.summary(data, var_names=list(draws), round_to="none")
    mean, spread = (float((summary[name] / summary["sd"]).max()) for name in ("mcse_mean", "mcse_sd"))
    return Outcome(job, draws, draws, result.seconds, ("", "", f"{summary['ess_bulk'].min():.0f}", ""), (mean, spread))


def approximate(job: Job) -> Outcome:
    """Train a guide and weigh its draws; for the run that is shown, write report, plots and data too."""
    example = load(job.example)
    result = fit(
        example.model,
        GUIDES[job.guide],
        args=example.args,
        objective=OBJECTIVES[job.objective](),
        learning_rate=0.03,
        num_steps=job.num_steps,
        seed=0,
        progress=False,
    )
    posterior = result.posterior(job.num_draws)
    if (job.guide, job.objective) == SHOWN:
        show(job, example, result)
    evidence = posterior.total_log_evidence
    cells = (posterior.elbo.value, posterior.pareto_k.item(), posterior.ess.item(), evidence.value, evidence.error)
    quality = "{:.2f}|{:.2f}|{:.0f}|{:.2f} +- {:.2f}".format(*cells)
    weighted = posterior.resample(seed=0)
    return Outcome(job, posterior.draws.latents, weighted, result.seconds, tuple(quality.split("|")))


def show(job: Job, example: Example, result: Fit) -> None:
    """Write what a fit has to say: its report, its ArviZ data and its plots."""
    Path(f"{job.stem}.txt").write_text(result.summary() + "\n", encoding="utf-8")
    result.to_arviz(coords=example.coords, dims=example.dims).to_netcdf(f"{job.stem}.nc")
    save_figure(plot_objective(result), f"{job.stem}-objective.png")
    save_figure(plot_weights(result), f"{job.stem}-weights.png")


def save_figure(axes: Any, path: str) -> None:
    """Write the figure that some axes are in, and close it."""
    from matplotlib import pyplot

    figure = np.ravel(axes)[0].figure
    figure.savefig(path, dpi=80, bbox_inches="tight")
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
    _import_arviz_once()
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


def _import_arviz_once() -> None:
    """Let this process write ArviZ's stamp of the day: workers importing it for the first time at once race."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module("arviz")


def table(outcomes: Iterable[Outcome]) -> str:
    """A block of rows for each example, in the order of the plan."""
    rows = {(outcome.job.example, outcome.job.guide, outcome.job.objective): outcome for outcome in outcomes}
    lines: list[str] = []
    for example in dict.fromkeys(key[0] for key in rows):
        reference = rows[example, REFERENCE, ""]
        lines += ["", example, ROW.format(*HEADER)]
        lines += [row(outcome, reference) for key, outcome in rows.items() if key[0] == example]
    return "\n".join([*lines, "", LEGEND])


def plot_all(outcomes: Iterable[Outcome]) -> None:
    """The weighted draws of every run that is shown, on top of those of NUTS."""
    rows = {(outcome.job.example, outcome.job.guide, outcome.job.objective): outcome for outcome in outcomes}
    for (example, *names), outcome in rows.items():
        if tuple(names) == SHOWN:
            reference = rows[example, REFERENCE, ""].draws
            if not (outcome.draws and reference):
                continue
            axes = plot_against_reference(outcome.weighted, reference, labels=[SHOWN[0], REFERENCE])
            save_figure(axes, f"{outcome.job.stem}-against-{REFERENCE}.png")


def row(outcome: Outcome, reference: Outcome) -> str:
    """One line of the table."""
    if outcome.failure:
        return f"{outcome.job.guide:<23}{outcome.job.objective:<23}failed: {outcome.failure}"
    if not reference.draws:
        return ROW.format(outcome.job.guide, outcome.job.objective, *outcome.quality, "", "", f"{outcome.seconds:.1f}")
    raw, weighted = (errors(draws, reference.draws) for draws in (outcome.draws, outcome.weighted))
    pairs = [f"({noise:.2f})" for noise in outcome.noise]
    if outcome is not reference:
        pairs = [f"{before:.2f} / {after:.2f}" for before, after in zip(raw, weighted, strict=True)]
    names = outcome.job.guide, outcome.job.objective
    return ROW.format(*names, *outcome.quality, *pairs, f"{outcome.seconds:.1f}")


def demo(examples: Sequence[str], num_steps: int, num_draws: int, processes: int, out: Path) -> str:
    """Do all runs behind a progress bar, and return the table."""
    from tqdm.auto import tqdm

    out.mkdir(parents=True, exist_ok=True)
    jobs = plan(examples, num_steps, num_draws, out)
    with tqdm(total=len(jobs), desc="runs", unit="run") as bar:
        outcomes: dict[Job, Outcome] = {}
        for outcome in run_all(jobs, processes):
            outcomes[outcome.job] = outcome
            bar.set_postfix_str(" ".join((outcome.job.example, outcome.job.guide, outcome.job.objective)))
            bar.update()
    plot_all(outcomes.values())
    return table(outcomes[job] for job in jobs)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: ``python -m pplvi.examples.demo --help``."""
    parser = argparse.ArgumentParser(
        prog="python -m pplvi.examples.demo", description="Three guides, three objectives, NUTS."
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for table, plots and data")
    parser.add_argument("--examples", nargs="+", default=list(LOADERS), choices=list(LOADERS))
    parser.add_argument("--steps", type=int, default=800, help="most training steps of a guide")
    parser.add_argument("--draws", type=int, default=1000, help="draws of a posterior, and of NUTS after warm-up")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)
    start = time.perf_counter()
    text = demo(options.examples, options.steps, options.draws, options.processes, options.out)
    (options.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    seconds = f"{time.perf_counter() - start:.0f} s"
    print(f"{text}\n\n{seconds}; the table, plots (PNG), reports and ArviZ data (NetCDF) are in {options.out}")


if __name__ == "__main__":
    main()
