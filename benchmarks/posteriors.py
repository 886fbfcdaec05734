"""The quality of posteriors for the seconds spent: guides on targets with a known log evidence, and on posteriordb.

Judges every guide by log Z - ELBO (nats), ESS/N and k-hat of 20,000 draws, by the largest errors of marginal means
(in sds), sds (ratio - 1) and Wasserstein-1 distances (in sds) against reference draws, raw and importance-resampled, by
gradient evaluations and by CPU seconds of the whole fit (compilation included), one thread. A marginal of a pair of
reference samples differs too: the floors are the same errors between the two halves of the reference.

Compares with the gaps published or measured elsewhere (``BEST``), with the reach that the project set itself, and,
where NumPyro is installed, with NumPyro's guides on the targets that numpyro_guides.py has.

    python -m benchmarks.posteriors --data ../shared/data --seeds 0 1 2 3 4

A second table says which cells got to the reach (posterior_reach.py).

Results are merged into benchmarks/results/posteriors.json, so that parts can be run one after another with --targets,
--guides and --seeds; --report only prints what is there.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pplvi
from benchmarks import numpyro_guides
from benchmarks.posterior_reach import verdicts
from benchmarks.posterior_targets import TARGETS, Target
from benchmarks.posteriordb_models import MODELS, posteriordb
from benchmarks.reporting import command_line, rows_of, table_of, write
from pplvi import (
    ELBO,
    AutoBatchAndMatch,
    AutoDeterministicNormal,
    AutoFlow,
    AutoHierarchical,
    AutoPathfinder,
    Fit,
    RenyiELBO,
)
from pplvi.posterior import WeightedDraws

QUICK = "--targets funnel --guides deterministic --seeds 0 --draws 500"

DRAWS, CHUNK, QUANTILES = 20_000, 2_500, 2_001
SCHOOLS = "eight_schools-eight_schools_noncentered"
RESULTS = Path(__file__).parent / "results" / "posteriors.json"

# target -> (best gap published or measured elsewhere, the reach)
BEST: dict[str, tuple[str, str]] = {
    "eight_schools": (".008", ".005"),
    "eight_schools_centered": ("-", ".03"),
    "funnel": (".014", ".007"),
    "brownian": (".070", ".05"),
    "brownian_increments": (".070", ".03"),
    "seeds": (".012", ".012"),
    "ionosphere": (".034", ".03"),
    "sonar": (".54", ".15"),
    "credit": (".030", "-"),
    "many_well": ("-", "log Z to .1"),
    "cox_process": ("about 21", "10"),
}


@dataclass(frozen=True)
class Row:
    """One fit. Pairs are (raw, importance-resampled); ``None`` where nothing is known of the target."""

    target: str
    guide: str
    seed: int
    gap: float | None
    log_z_error: float | None
    ess: float
    pareto_k: float
    mean_error: tuple[float, float] | None
    sd_error: tuple[float, float] | None
    w1: tuple[float, float] | None
    floor: float | None
    gradients: int
    cpu_seconds: float
    note: str = ""
    mean_floor: float | None = None
    sd_floor: float | None = None


def _trained(kind: Any, steps: int, particles: int, rate: float, **options: Any) -> Callable[[Target, int], Fit]:
    def run(target: Target, seed: int) -> Fit:
        init = {} if target.multimodal else options.get("start", {})
        settings = {k: v for k, v in options.items() if k != "start"} | init
        objective = settings.pop("objective", ELBO(particles))
        optim = partial(torch.optim.Adam, lr=rate)
        return pplvi.fit(
            target.model, kind, objective=objective, optim=optim, num_steps=steps, seed=seed, progress=False, **settings
        )

    return run


def _by_plate(target: Target, seed: int) -> Fit:
    """A flow for each element of a plate, by a bound that covers all modes: its weights are those of the elements."""
    if not target.plate:
        raise ValueError("the target has no plate that holds all of it")
    guide = partial(AutoHierarchical, plates=target.plate, family="flow", init_scale=2.0)
    return _trained(guide, 1000, 64, 1e-2, objective=RenyiELBO(0.5, num_particles=64), compile="trace", stop=None)(
        target, seed
    )


def _easiest(target: Target, seed: int) -> Fit:
    """The form of the model that "auto" takes, and a flow on it, as a user would do it."""
    easier = pplvi.fit(target.model, "auto", seed=seed, progress=False).model
    return _flow(replace(target, model=easier), seed)


def _found(kind: Any, **options: Any) -> Callable[[Target, int], Fit]:
    return lambda target, seed: pplvi.fit(target.model, partial(kind, **options), seed=seed, progress=False)


def _wide(model: Callable[[], None]) -> AutoFlow:
    return AutoFlow(model, "nsf", affine="diagonal", init_scale=1.5)


def _flow(target: Target, seed: int, rotate: bool = True, rate: float = 5e-3) -> Fit:
    if target.multimodal:
        return _trained(_wide, 3000, 64, 2e-3, objective=ELBO(64, estimator="stl"), compile=True, stop=None)(
            target, seed
        )
    kind = partial(AutoFlow, flow="quadratic", rotate=rotate)
    recipe = pplvi.flow_recipe(learning_rate=rate)
    return pplvi.fit(target.model, kind, seed=seed, progress=False, compile="trace", **recipe)


GUIDES: dict[str, Callable[[Target, int], Fit]] = {
    "mean field": _trained(AutoNormal, 4000, 8, 0.02, compile="auto"),
    "full rank": _trained(
        AutoMultivariateNormal, 2000, 16, 0.01, compile="auto", start={"init": "pathfinder"},
        objective=ELBO(16, estimator="stl"),
    ),
    "pathfinder, paper": _found(AutoPathfinder, exact_hessian=False, moment_matching=0),
    "pathfinder": _found(AutoPathfinder),
    "mean field, deterministic": _found(AutoDeterministicNormal, linear_response=False),
    "deterministic": _found(AutoDeterministicNormal),
    "batch and match": _found(AutoBatchAndMatch),
    "flow": _flow,
    "flow, unrotated": partial(_flow, rotate=False, rate=1e-2),
    "hierarchical flow, Renyi": _by_plate,
    "flow, easiest form": _easiest,
    "auto": lambda target, seed: pplvi.fit(target.model, "auto", seed=seed, progress=False),
}  # fmt: skip
ALL = [*GUIDES, *numpyro_guides.GUIDES]


def cpu_seconds() -> float:
    """CPU time of this process and its children (compilers)."""
    return sum(os.times()[:4])


def wasserstein(ours: Tensor, theirs: Tensor) -> Tensor:
    """Marginal 1-Wasserstein distances ``(columns,)`` of two samples, by their quantile functions."""
    probs = torch.linspace(0, 1, QUANTILES, dtype=ours.dtype)[1:-1]
    return (_quantiles(ours, probs) - _quantiles(theirs, probs)).abs().mean(0)


def _quantiles(sample: Tensor, probs: Tensor) -> Tensor:
    place = probs * (len(sample) - 1)
    low, ordered = place.long(), sample.sort(0).values
    part = (place - low).unsqueeze(1)
    return ordered[low] * (1 - part) + ordered[(low + 1).clamp(max=len(sample) - 1)] * part


def marginals(target: Target, draws: Mapping[str, Tensor]) -> tuple[float, float, float]:
    """Largest error of means, of sds and of marginals against the reference draws, in units of their sds."""
    assert target.reference is not None
    return _errors(target.coordinates(draws), target.reference)


def _errors(ours: Tensor, reference: Tensor) -> tuple[float, float, float]:
    sd = reference.std(0)
    mean = (ours.mean(0) - reference.mean(0)).abs() / sd
    found = mean, (ours.std(0) / sd - 1).abs(), wasserstein(ours, reference) / sd
    return tuple(float(part.max()) for part in found)  # type: ignore[return-value]


def floors(target: Target) -> tuple[float | None, float | None, float | None]:
    """The same errors of one half of the reference draws against the other."""
    if target.reference is None:
        return None, None, None
    one, two = target.reference.chunk(2)
    return _errors(one, two)


def gradients(fit: Fit) -> int:
    """How many gradients of the log density a fit took."""
    particles = getattr(fit.objective, "num_particles", 1)
    return sum(getattr(run.guide, "num_gradients", 0) + run.step * particles for run in fit.runs)


def judge(key: str, target: Target, guide: str, seed: int, draws: int = DRAWS, data: Path = Path()) -> Row:
    """Fit one guide and measure it."""
    fit = _fit_numpyro if guide in numpyro_guides.GUIDES else _fit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds, count, note, posterior = fit(key, target, guide, seed, draws, data)
    return _row(key, target, guide, seed, posterior, gradients=count, cpu_seconds=seconds, note=note)


Measured = tuple[float, int, str, WeightedDraws]


def _fit(key: str, target: Target, guide: str, seed: int, draws: int, data: Path) -> Measured:
    pyro.clear_param_store()
    start = cpu_seconds()
    fit = GUIDES[guide](target, seed)
    seconds = cpu_seconds() - start
    posterior = fit.posterior(draws, seed=seed + 1000, chunk_size=min(draws, CHUNK))
    return seconds, gradients(fit), fit.guide_name if guide == "auto" else "", posterior


def _fit_numpyro(key: str, target: Target, guide: str, seed: int, draws: int, data: Path) -> Measured:
    if key not in numpyro_guides.PROGRAMS or not numpyro_guides.is_available():
        raise ValueError("no such program, or NumPyro is not installed")
    start = cpu_seconds()
    trained = numpyro_guides.train(key, guide, data, seed)
    seconds = cpu_seconds() - start
    return seconds, trained.gradients, "", trained.posterior(draws, seed + 1000, min(draws, CHUNK))


def _row(key: str, t: Target, guide: str, seed: int, posterior: WeightedDraws, **rest: Any) -> Row:
    known = t.log_z is not None
    mean_floor, sd_floor, floor = floors(t)
    pairs = None
    if t.reference is not None:
        raw = {**posterior.draws.latents, **posterior.draws.deterministics}
        both = [marginals(t, raw), marginals(t, posterior.resample(seed=seed, deterministics=True))]
        pairs = [(a, b) for a, b in zip(*both, strict=True)]
    return Row(
        target=key,
        guide=guide,
        seed=seed,
        gap=float(t.log_z - posterior.elbo[0]) if known else None,
        log_z_error=float(posterior.total_log_evidence.value - t.log_z) if known else None,
        ess=float(posterior.ess.min()) / posterior.num_draws,  # of the worst element, where a plate has weights each
        pareto_k=float(posterior.pareto_k.max()),
        mean_error=pairs[0] if pairs else None,
        sd_error=pairs[1] if pairs else None,
        w1=pairs[2] if pairs else None,
        floor=floor,
        mean_floor=mean_floor,
        sd_floor=sd_floor,
        **rest,
    )


def load(data: Path, key: str) -> Target:
    """A target by its key: one of TARGETS, or a name of posteriordb."""
    return TARGETS[key](data) if key in TARGETS else posteriordb(data, key)


def merge(options: argparse.Namespace, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Write rows into the file, in the place of older ones of the same target, guide and seed."""
    new = [asdict(row) for row in rows]
    done = {(r["target"], r["guide"], r["seed"]) for r in new}
    kept = [r for r in rows_of(options.out) if (r["target"], r["guide"], r["seed"]) not in done] + new
    kept.sort(key=lambda r: (_order(r["target"]), _place(r["guide"]), r["seed"]))
    write(options, rows=kept)
    return rows_of(options.out)


def _order(key: str) -> int:
    return [*TARGETS, SCHOOLS, *MODELS].index(key)


def _place(guide: str) -> int:
    return ALL.index(guide) if guide in ALL else len(ALL)  # rows of a guide that another version of this file knows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The median over seeds and, in brackets, the worst; errors raw / importance-resampled."""
    titles = ["target", "guide", "seeds", "log Z - ELBO", "log Z err", "ESS/N", "k-hat", "mean err", "sd err", "W1"]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["guide"]), []).append(row)
    lines, last = [], ""
    for (target, guide), group in groups.items():
        best = f" (best {BEST[target][0]}, reach {BEST[target][1]})" if target in BEST and target != last else ""
        lines.append(_line(target + best if target != last else "", guide, group))
        last = target
    names = [*titles, "floors", "grads", "CPU s"]
    return table_of([dict(zip(names, line, strict=True)) for line in lines])


def _line(target: str, guide: str, group: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = sorted({r["note"] for r in group} - {""})
    cells = [target, guide + (f" ({', '.join(notes)})" if notes else ""), str(len(group))]
    cells += [_cell([r["gap"] for r in group], 3), _cell([_size(r["log_z_error"]) for r in group], 3)]
    cells += [_cell([r["ess"] for r in group], 2, worst=min), _cell([r["pareto_k"] for r in group], 2)]
    for name in ("mean_error", "sd_error", "w1"):
        pairs = [r[name] or (None, None) for r in group]
        cells.append(" / ".join(_cell([pair[i] for pair in pairs], 3) for i in (0, 1)))
    floor = [group[-1].get(name) for name in ("mean_floor", "sd_floor", "floor")]
    cells += [" / ".join("-" if value is None else f"{value:.3f}" for value in floor)]
    cells += [f"{statistics.median(r['gradients'] for r in group):,.0f}", _cell([r["cpu_seconds"] for r in group], 1)]
    return cells


def _size(value: float | None) -> float | None:
    return None if value is None else abs(value)


def _cell(values: Sequence[float | None], digits: int, worst: Callable[[list[float]], float] = max) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.{digits}f} ({worst(known):.{digits}f})" if known else "-"


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run parts of the table, merge them into the file, print it."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--targets", nargs="+", default=[*TARGETS, SCHOOLS, *MODELS])
    parser.add_argument("--guides", nargs="+", default=ALL, choices=ALL)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.set_defaults(out=RESULTS)
    parser.add_argument("--report", action="store_true", help="only print what is in the file")
    options = parser.parse_args(arguments)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = rows_of(options.out)
    try:
        for key in [] if options.report else options.targets:
            target = load(options.data, key)
            for guide in options.guides:
                for seed in options.seeds:
                    rows = _run_one(key, target, guide, seed, options, rows)
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
    text = table(rows) + "\n\nThe reach, and the guide that comes nearest to it:\n\n" + verdicts(rows)
    options.out.with_suffix(".md").write_text(text + "\n")
    print(text)
    return rows


def _run_one(key: str, target: Target, guide: str, seed: int, options: Any, rows: list[dict[str, Any]]) -> Any:
    start = time.perf_counter()
    try:
        row = judge(key, target, guide, seed, options.draws, options.data)
    except ValueError as error:
        print(f"{key}, {guide}, seed {seed}: {error}", flush=True)
        return rows
    print(f"{key}, {guide}, seed {seed}: {time.perf_counter() - start:.1f} s, {row}", flush=True)
    return merge(options, [row])


if __name__ == "__main__":
    main()
