"""What the project set out to reach in the table of benchmarks/posteriors.py, and which cells got there.

A claim names columns and their numbers. Errors against reference draws pass at their number or at 1.2 times the floor,
that is the same error of one half of the reference draws against the other, whichever is larger. The worst seed counts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.reporting import table_of

SLACK = 1.2
FLOORS = {"mean": "mean_floor", "sd": "sd_floor", "w1": "floor"}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """Largest values that a target's columns should have (ESS/N: smallest).

    :ivar guide: of this guide's rows only; of the best guide's unless given.
    :ivar raw: errors of the guide's own draws, instead of importance-resampled ones.
    """

    target: str
    limits: Mapping[str, float]
    guide: str | None = None
    raw: bool = False


LINEAR = (
    "arK-arK",
    "arma-arma11",
    "sblrc-blr",
    "kidiq-kidscore_interaction",
    "earnings-logearn_interaction",
    "nes2000-nes",
    "diamonds-diamonds",
    "mesquite-logmesquite_logvas",
    "kilpisjarvi_mod-kilpisjarvi",
)
OTHERS = (
    "low_dim_gauss_mix-low_dim_gauss_mix",
    "hmm_example-hmm_example",
    "bball_drive_event_0-hmm_drive_0",
    "hudson_lynx_hare-lotka_volterra",
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs",
)
CLAIMS = (
    Claim("eight_schools", {"gap": 0.005, "ess": 0.98, "seconds": 5}),
    Claim("eight_schools_centered", {"gap": 0.03}),
    Claim("funnel", {"gap": 0.007, "ess": 0.98}),
    Claim("brownian", {"gap": 0.05}),
    Claim("brownian_increments", {"gap": 0.03}),
    Claim("seeds", {"gap": 0.012, "k-hat": 0.5}),
    Claim("ionosphere", {"gap": 0.03, "seconds": 30}),
    Claim("sonar", {"gap": 0.15}),
    Claim("many_well", {"log Z": 0.1}),
    Claim("cox_process", {"gap": 10, "seconds": 120}),
    *(Claim(name, {"mean": 0.03, "sd": 0.03, "seconds": 2}) for name in LINEAR),
    *(Claim(name, {"sd": 0.05}, guide="deterministic", raw=True) for name in LINEAR),
    *(Claim(name, {"w1": 0.06, "k-hat": 0.7}) for name in OTHERS),
)


def _error(name: str) -> Callable[[Row, bool], float]:
    return lambda row, raw: float(row[name][0 if raw else 1])


COLUMNS: dict[str, Callable[[Row, bool], float]] = {
    "gap": lambda row, raw: float(row["gap"]),
    "log Z": lambda row, raw: abs(float(row["log_z_error"])),
    "ess": lambda row, raw: -float(row["ess"]),  # the only column where more is better
    "k-hat": lambda row, raw: float(row["pareto_k"]),
    "mean": _error("mean_error"),
    "sd": _error("sd_error"),
    "w1": _error("w1"),
    "seconds": lambda row, raw: float(row["cpu_seconds"]),
}


def worst(claim: Claim, rows: Sequence[Row]) -> dict[str, tuple[float, float, bool]]:
    """For each column of a claim: the worst seed's value, the limit, and whether it passes."""
    found = {}
    for name, number in claim.limits.items():
        value = max(COLUMNS[name](row, claim.raw) for row in rows)
        if name == "ess":
            found[name] = -value, number, -value >= number
            continue
        floor = max((row.get(FLOORS[name]) or 0.0 for row in rows), default=0.0) if name in FLOORS else 0.0
        limit = max(number, SLACK * floor)
        found[name] = value, limit, value <= limit
    return found


def best(claim: Claim, rows: Sequence[Row]) -> tuple[str, Sequence[Row]] | None:
    """The guide that has the first column, with the fewest misses, or else comes nearest to it; and its rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["target"] == claim.target and claim.guide in (None, row["guide"]):
            groups.setdefault(row["guide"], []).append(row)
    if not groups:
        return None

    def rank(guide: str) -> tuple[float, ...]:
        cells = list(worst(claim, groups[guide]).values())
        value, _, passes = cells[0]
        return 0.0 if passes else value, sum(not passes for _, _, passes in cells), -len(groups[guide]), value

    chosen = min(groups, key=rank)
    return chosen, groups[chosen]


def verdicts(rows: Sequence[Row]) -> str:
    """Markdown: every claim, the guide that comes nearest to it, its worst seed, and what it misses."""
    lines = []
    for claim in CLAIMS:
        found = best(claim, rows)
        if found is None:
            lines.append((claim.target, "-", 0, "not run", "-"))
            continue
        guide, group = found
        cells = worst(claim, group)
        shown = ", ".join(f"{name} {value:.3g} ({limit:.3g})" for name, (value, limit, _) in cells.items())
        missed = [name for name, (_, _, passes) in cells.items() if not passes]
        reached = f"no: {', '.join(missed)}" if missed else "yes"
        raw = ", raw" if claim.raw else ""
        lines.append((claim.target, guide + raw, len(group), shown, reached))
    names = ("target", "guide", "seeds", "worst seed (limit)", "reached")
    return table_of([dict(zip(names, line, strict=True)) for line in lines])
