"""What there is to know of draws, gathered for the verdict: weights with more draws behind them, scouts, chains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pplvi.posterior.convergence import rhat_and_ess
from pplvi.posterior.draws import Draws
from pplvi.posterior.islands import evidence_of_islands
from pplvi.posterior.looking import work_of_draw, work_of_row
from pplvi.posterior.scouts import (
    MOST_DIMENSIONS,
    Missed,
    Regions,
    Weighed,
    adapted,
    around,
    climbed,
    climbed_once,
    missed,
    mixed,
    prior_starts,
    screened,
    spread_starts,
    weighed,
    wide,
)
from pplvi.posterior.stacking import stack
from pplvi.posterior.students import Students, joined
from pplvi.posterior.verdict import (
    POINT,
    SUBSAMPLED,
    DatumFacts,
    Facts,
    Verdict,
    judge,
    judge_chains,
    judge_data,
)
from pplvi.posterior.weighted import WeightedDraws
from pplvi.programs.deadline import is_time_over
from pplvi.programs.density import UnconstrainedDensity
from pplvi.programs.state import random_state
from pplvi.programs.ways import Vectorize
from pplvi.types import Program
from pplvi.weights.algebra import logmeanexp, normalize
from pplvi.weights.pareto import pareto_k_error, tail_shortfall

_DEAR_WORK, _DEAR_LOOK = 3e4, 800.0  # elements; those of a point that is only looked at, to find narrow modes


class ModelCall(NamedTuple):
    """A model, its call, the way of running it, and what a draw takes: bytes, and elements computed."""

    model: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    vectorize: Vectorize
    bytes_of_draw: int = 1
    work_of_draw: float = 1.0

    def affordable(self, number: int, least: int, dear: float = _DEAR_WORK) -> int:
        """So many rows, or fewer where they are dear or run one after another, but not too few.

        :param dear: the elements computed for a row from which on fewer are sent.
        """
        one_by_one = _LOOPED if self.vectorize in (False, "loop") else 1
        part = min(1.0, _DEAR / (self.bytes_of_draw * one_by_one), dear / self.work_of_draw)
        return max(least, int(number * part))


_PRIOR_SCOUTS, _FAR_SCOUTS, _SCREENED = 64, 16, 20_000
_SCOUT_DRAWS, _MORE_DRAWS, _CHECKED = 2_000, 10_000, 10_000  # of the last, those of the guide, to compare with
_FEW, _FEW_DRAWS = 8, 500
_DEAR = 2**15  # bytes of a draw from which on fewer are sent
_LOOPED = 2**20  # times dearer is a draw of a program that is run for each draw
_MOST_DRAWS, _MOST_BYTES, _MOST_WORK = 100_000, 2**28, 5e8
_K_ERROR = 0.1
_SURE, _LIKELY, _SMALL = 4.0, 2.0, 0.02
_MORE, _APART = 0.2, 0.1  # nats of evidence; standard deviations of a mean
_BAD_K, _NEARLY_EQUAL = 0.7, 0.9


def facts_with_scouts(own: WeightedDraws, converged: bool | None, programs: ModelCall) -> Facts:
    """What the pool behind some draws says, and what scouts say of it.

    :param own: the draws that are handed over.
    :param converged: whether the training of their guide had converged.
    :param programs: the model and its call.
    """
    facts = facts_of(own.pool, converged)
    lost, scouts = scouted(programs, own.pool)
    ours, whole = own.total_log_evidence, own.pool.total_log_evidence
    told = f"{own.num_draws:,} draws find a log evidence of {ours}, all {own.pool.num_draws:,} {whole}"
    far = abs(ours.value - whole.value) > max(_SURE * math.hypot(ours.error, whole.error), _SMALL)
    return replace(facts, missed=lost, scouts=scouts, doubts=(told,) if far else ())


def verdict_of(draws: WeightedDraws, converged: bool | None = None) -> Verdict:
    """The verdict on draws by themselves, without scouts: see :func:`pplvi.posterior.verdict.judge`."""
    if draws.is_mcmc:
        return verdict_on_chains(draws, None)
    if draws.is_dirac:
        return POINT
    if not draws.has_weights:
        return SUBSAMPLED
    if draws.draws.batch:
        return judge_data(_facts_of_data(draws, converged))
    return judge(facts_of(draws, converged))


def facts_of(draws: WeightedDraws, converged: bool | None = None) -> Facts:
    """What weights say, for one problem without a batch."""
    pareto_k = draws.pareto_k.double()
    error = pareto_k_error(pareto_k, draws.num_draws)
    pessimist = (pareto_k + error).clamp(max=0.95) if float(pareto_k) < 1 else pareto_k
    shortfall = float(tail_shortfall(draws.log_weight.double(), pessimist))
    return Facts(draws.num_draws, float(draws.ess), float(pareto_k), float(error), shortfall, converged=converged)


def _facts_of_data(draws: WeightedDraws, converged: bool | None) -> DatumFacts:
    pareto_k = draws.pareto_k.double().flatten()
    bad = pareto_k - pareto_k_error(pareto_k, draws.num_draws).nan_to_num() > _BAD_K
    bad &= draws.ess.flatten() < _NEARLY_EQUAL * draws.num_draws
    worst = torch.where(bad)[0].tolist()
    return DatumFacts(len(pareto_k), tuple(worst), float(pareto_k.median()), converged)


def verdict_on_chains(draws: WeightedDraws, programs: ModelCall | None) -> Verdict:
    """The verdict on chains, or islands: by R-hat and ESS, and by modes that scouts meet and no chain has visited.

    :param programs: the model and its call; without it no scouts are sent.
    """
    rhat, ess = _rhat_and_ess(draws)
    if programs is None or ess < 1:
        return judge_chains(rhat, ess, draws.num_chains)
    lost, text = scouted(programs, draws, thin=math.ceil(draws.num_draws / ess))
    return judge_chains(rhat, ess, draws.num_chains, lost, text)


def _rhat_and_ess(draws: WeightedDraws) -> tuple[float, float]:
    """The largest R-hat and the smallest bulk ESS of all scalars."""
    found = [
        rhat_and_ess(value.reshape(draws.num_chains, draws.num_draws // draws.num_chains, -1))
        for value in draws.draws.latents.values()
        if value.is_floating_point()
    ]
    rhats, sizes = ([x for each in found for x in each[i].tolist() if math.isfinite(x)] for i in (0, 1))
    return max(rhats, default=math.inf), min(sizes, default=0.0)


def disagreements(best: WeightedDraws, others: Sequence[WeightedDraws]) -> tuple[str, ...]:
    """How guides of other seeds contradict the best one: more evidence, or as much of it and other means."""
    found = []
    for number, other in enumerate(others, 1):
        ours, theirs = best.pool.total_log_evidence, other.pool.total_log_evidence
        error = math.hypot(ours.error, theirs.error)
        if theirs.value - ours.value > max(_SURE * error, _MORE):
            found.append(f"restart {number} of the others finds a log evidence of {theirs}, this one {ours}")
        elif abs(theirs.value - ours.value) < max(_SURE * error, _MORE) and (gap := _furthest(best, other)) > _APART:
            found.append(f"restart {number} of the others has as much evidence and a mean {gap:.1f} sd away")
    return tuple(found)


def _furthest(one: WeightedDraws, other: WeightedDraws) -> float:
    """The largest difference of weighted means, in standard deviations, less three Monte Carlo errors."""
    gaps = [0.0]
    for name, value in one.pool.draws.latents.items():
        if value.is_floating_point():
            (a, sd, error), (b, _, also) = (_mean(each.pool, name) for each in (one, other))
            gaps.append(float(((a - b).abs() / sd - 3 * math.hypot(error, also)).nan_to_num(0.0).max()))
    return max(gaps)


def _mean(pool: WeightedDraws, name: str) -> tuple[Tensor, Tensor, float]:
    weight = normalize(pool.psis_log_weight.double())
    value = pool.draws.latents[name].reshape(pool.num_draws, -1).double()
    mean = weight @ value
    return mean, (weight @ (value - mean).square()).sqrt(), 1 / math.sqrt(float(pool.ess))


# --- more draws -----------------------------------------------------------------------------------------------------


def grown(posterior: WeightedDraws, more: Callable[[int, int], Draws], bytes_of_draw: int) -> WeightedDraws:
    """A pool of draws of the same guide with as many effective ones as are handed over, and a k-hat of error 0.1.

    It ends at 100,000 draws, 256 MiB, or 500 million elements computed: all are counted, so that a seed has one pool.

    :param posterior: the draws that are handed over; the pool begins with them.
    :param more: a number of draws and a seed to draws.
    :param bytes_of_draw: what one takes.
    """
    pool: WeightedDraws = posterior
    most, number = min(_MOST_DRAWS, _MOST_BYTES // max(1, bytes_of_draw)), 0
    while wanted := _wanted(pool, posterior.num_draws, most):
        number += 1
        try:
            if number == 1:
                most = min(most, int(_MOST_WORK / work_of_draw(more)))
                wanted = min(wanted, most - pool.num_draws)
            if wanted < 1 or is_time_over():
                break
            draws = stack([pool.draws, more(wanted, number)], pool.num_draws + wanted)
            new = WeightedDraws(draws, posterior.point_sites)
            new.log_weight  # noqa: B018
        except ValueError:  # far out, where values leave the range of a distribution or densities overflow
            break
        pool = new
    return pool


def _wanted(pool: WeightedDraws, target: int, most: int) -> int:
    """How many draws the pool still needs: none where averages would not settle with any number."""
    size, ess, pareto_k = pool.num_draws, float(pool.ess), pool.pareto_k.double()
    if float(pareto_k) - _SURE * float(pareto_k_error(pareto_k, size)) > 1:
        return 0
    enough = math.ceil(size * (target / max(ess, 1.0) - 1))
    if math.isfinite(float(pareto_k)) and float(pareto_k_error(pareto_k, size)) > _K_ERROR:
        tail = ((1 + float(pareto_k)) / _K_ERROR) ** 2
        enough = max(enough, math.ceil((tail / 3) ** 2) - size)
    enough = min(enough, 3 * size, most - size)  # by and by: the estimates get better
    return enough if enough > 0.01 * size else 0


# --- scouts ---------------------------------------------------------------------------------------------------------


def scouted(programs: ModelCall, pool: WeightedDraws, thin: int = 1) -> tuple[tuple[Missed, ...], str]:
    """Where scouts find more than a guide, and in words how many were sent or why none were.

    :param programs: the model and its call.
    :param pool: the guide's draws, or those of chains.
    :param thin: take every so many of them, as chains are correlated.
    """
    try:
        with random_state(0):
            return _scouted(programs, pool, thin)
    except Exception as error:  # far from the data a program may fail in its own ways
        return (), f"scouts could not climb, {type(error).__name__}: {str(error).split(':')[0]}"


def _scouted(programs: ModelCall, pool: WeightedDraws, thin: int) -> tuple[tuple[Missed, ...], str]:
    call = programs.model, programs.args, programs.kwargs
    density = UnconstrainedDensity(*call, vectorize=programs.vectorize)
    if density.dim > MOST_DIMENSIONS:
        return (), f"no scouts were sent, in {density.dim:,} dimensions"
    if missing := {block.name for block in density.blocks} ^ set(pool.draws.latents):
        return (), f"no scouts were sent: the guide draws {sorted(missing)}, which has no density to climb"
    programs = programs._replace(work_of_draw=work_of_row(density))
    own = _own(density, pool, thin, programs.affordable(_CHECKED, _FEW_DRAWS))
    few, screening = programs.affordable(_FAR_SCOUTS, _FEW), programs.affordable(_SCREENED, _FEW_DRAWS // 5, _DEAR_LOOK)
    first = programs.affordable(_PRIOR_SCOUTS, _FEW)
    prior, others = prior_starts(density, *call, first + screening).tensor_split([first])
    modes, whole = climbed_once(density, prior), around(own)
    beside = torch.cat([spread_starts(own, few), _tails(own, few)])
    number_of_starts, seen = len(prior) + len(beside), _joined(mixed(modes), whole)
    if seen is not None:
        candidates = torch.cat([others, wide(seen, screening)])
        beside = torch.cat([beside, screened(density, seen, candidates, few)])
    modes = climbed(density, beside, modes)
    divided = mixed(modes)
    if (seen := _joined(divided, whole) or seen) is None:
        return (), f"{number_of_starts} scouts met no mode"
    text = f"{number_of_starts} scouts met {len(modes)} mode{'s' * (len(modes) != 1)}"
    number = programs.affordable(_SCOUT_DRAWS, _FEW_DRAWS), programs.affordable(_MORE_DRAWS, 2 * _FEW_DRAWS)
    compare = partial(_missed_by_chains, chains=pool) if pool.is_mcmc else missed
    return _compared(density, (divided, seen), own, number, compare), text


def _joined(*parts: Students | None) -> Students | None:
    kept = [part for part in parts if part is not None]
    return joined(kept) if kept else None


def _compared(
    density: UnconstrainedDensity,
    mixtures: tuple[Students | None, Students],
    own: Weighed,
    number: tuple[int, int],
    compare: Callable[[Weighed, Weighed, Regions], list[Missed]],
) -> tuple[Missed, ...]:
    """What is missed in each region; what seems to be is looked at again with other and more draws.

    :param mixtures: the modes, and the proposal of the scouts.
    """
    proposal, scouts = adapted(density, mixtures[1], number[0])
    regions = Regions.between(mixtures[0], scouts)
    found = compare(scouts, own, regions)
    if any(each.is_certain or each.is_open for each in found):
        found = compare(weighed(density, proposal, number[1]), own, regions)
    return tuple(found)


def _missed_by_chains(scouts: Weighed, own: Weighed, regions: Regions, chains: WeightedDraws) -> list[Missed]:
    """Chains know no evidence: their parts of the whole are compared, in the basins of the modes. Islands know it up to
    an error, which is allowed for, so that tails can be compared too."""
    if chains.evidence is None:
        whole = float(logmeanexp(scouts.log_weight))
    else:
        value, error = evidence_of_islands(chains.evidence.double())
        whole = float(value + _LIKELY * error)
    found = missed(scouts, own._replace(log_weight=torch.full_like(own.log_weight, whole)), regions)
    return [each for each in found if chains.evidence is not None or not each.tail]


def _own(density: UnconstrainedDensity, pool: WeightedDraws, thin: int, number: int) -> Weighed:
    """Draws in unconstrained space, with their density there."""
    first = slice(0, number * thin, thin)
    values = {name: value[first] for name, value in pool.draws.latents.items()}
    with torch.no_grad():
        position = density.pack_rows(values)
        known = pool.draws.log_p
        log_p = density(position) if known is None else known[first] + density.log_jacobian(position)
        log_p = log_p.double().nan_to_num(-math.inf, -math.inf, -math.inf)
    good = position.isfinite().all(1)
    log_weight = torch.zeros_like(log_p) if pool.is_mcmc else pool.log_weight[first].double()
    return Weighed(position.double().nan_to_num(0.0, 0.0, 0.0), log_p, log_weight.masked_fill(~good, -math.inf))


def _tails(own: Weighed, number: int) -> Tensor:
    """Where the weights are largest."""
    return own.position[own.log_weight.topk(min(number, len(own.log_weight))).indices]
