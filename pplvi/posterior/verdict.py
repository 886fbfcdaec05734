"""One verdict on a posterior, from all that is known of it: its words, its reasons, and what would decide more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from pplvi.kinds.checked import checked
from pplvi.posterior.arviz.versions import predictive_plot
from pplvi.posterior.scouts import Missed
from pplvi.weights.pareto import pareto_k_threshold

Word = Literal["reliable", "usable for means, not for tails", "not reliable"]
RELIABLE: Word = "reliable"
USABLE: Word = "usable for means, not for tails"
UNRELIABLE: Word = "not reliable"
WORDS: tuple[Word, ...] = (RELIABLE, USABLE, UNRELIABLE)

_NEARLY_EQUAL = 0.9  # part of the draws that is effective
_MOST_K, _CERTAIN_K = 0.7, 0.5
_HALF = 0.5  # part of the draws that is effective, from which on a tail is judged by its size
_NOTHING, _TAILS, _MEANS = 0.01, 0.02, 0.1  # parts of the evidence that may lie beyond the draws
_LEAST_ESS, _FEW_ESS = 200.0, 50.0
_RARE, _TAIL = 0.15, 0.1  # part of the draws that is effective; part of the evidence in a tail
_SOME, _MANY = 0.01, 0.1  # parts of the data that are badly approximated
_RHAT, _RHAT_USABLE, _CHAIN_ESS, _CHAIN_FEW = 1.01, 1.05, 400.0, 100.0


@checked
@dataclass(frozen=True)
class Verdict:
    """How far a posterior can be believed.

    :ivar word: ``"reliable"``, ``"usable for means, not for tails"`` or ``"not reliable"``.
    :ivar reasons: what it was decided by, with the numbers; the decisive ones first.
    :ivar next: what to do next, which would decide what is open.

    >>> print(Verdict("reliable", ("k-hat 0.10 +- 0.08 of 4,000 draws",), ()))
    reliable: k-hat 0.10 +- 0.08 of 4,000 draws
    """

    word: Word
    reasons: tuple[str, ...]
    next: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.word}: {'; '.join(self.reasons)}"

    @property
    def rank(self) -> int:
        """0 for reliable, 1 for usable, 2 for not reliable: what posteriors are ordered by."""
        return WORDS.index(self.word)


@dataclass(frozen=True)
class Facts:
    """What a verdict on weighted draws is computed from.

    :ivar num_draws: how many draws k-hat was fitted to.
    :ivar ess: effective draws among them.
    :ivar pareto_k: k-hat.
    :ivar pareto_k_error: its standard error.
    :ivar shortfall: part of the evidence beyond the largest weights, by k-hat and its error.
    :ivar missed: where scouts find more than the guide, the most certain first; empty if none were sent.
    :ivar scouts: how many were sent and what they met, or why none were.
    :ivar converged: whether training had converged; ``None`` if there was none or it cannot be judged.
    :ivar disagreement: how runs of other seeds contradict this one.
    :ivar doubts: what else makes the draws unusable.
    """

    num_draws: int
    ess: float
    pareto_k: float
    pareto_k_error: float
    shortfall: float
    missed: tuple[Missed, ...] = ()
    scouts: str = ""
    converged: bool | None = None
    disagreement: tuple[str, ...] = ()
    doubts: tuple[str, ...] = field(default=())

    @property
    def certain(self) -> tuple[Missed, ...]:
        """What the guide misses for certain."""
        return tuple(each for each in self.missed if each.is_certain)

    @property
    def is_level(self) -> bool:
        """Whether scouts agree and tails are small: k-hat is then that of a few draws that do not matter."""
        agreed = bool(self.missed) and not self.certain
        return agreed and self.efficiency >= _HALF and self.shortfall < _NOTHING

    @property
    def efficiency(self) -> float:
        """Effective part of the draws."""
        return self.ess / self.num_draws


RICHER = "a richer guide: AutoNormal, then AutoMultivariateNormal, then pplvi.AutoFlow"
EASIER = "an easier posterior: reparameterise hierarchies (pplvi.noncentered), scale the predictors"
COVERING = (
    "an objective that covers the tails: pplvi.ImportanceWeightedELBO(num_particles=16), pplvi.RenyiELBO(alpha=0.5)"
)
NUTS = 'a reference run with pplvi.fit(model, "nuts", ...), if the model is small enough'
CHECK = f"posterior predictive checks ({predictive_plot()}): all of the above judges the guide, not the model"
MODES = 'all modes at once: pplvi.fit(model, "auto", ...) starts at what scouts find'
TRAIN = "train on: the training had not converged; more steps (num_steps=) or another learning rate"
MORE = "more draws (num_draws=), which is cheap"
SEEDS = "several restarts (restarts=): none was compared with this one"


def judge(facts: Facts) -> Verdict:
    r"""The verdict on draws with importance weights.

    Reliable are draws whose k-hat is below 0.7 by more than its error, or whose weights are nearly equal (nine tenths
    of the draws effective) up to a k-hat of 0.7, or half of which are effective if one percent of the evidence at most
    lies beyond the largest weight and scouts have found nothing, with less than 2 % of the evidence beyond the largest
    weight, 15 % of the draws and 200 of them effective, no restart and no scout that contradicts them (by 2 % of the
    evidence and four standard errors, or by 5 % and three), from a guide that had converged or has every second draw
    effective. Up to 10 % beyond, 50 effective draws, or nearly equal weights of any k-hat are usable for means.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry 2024, Pareto smoothed importance sampling, JMLR 25(72); Yao,
    Vehtari, Simpson and Gelman 2018, Yes, but did it work? Evaluating variational inference.

    >>> judge(Facts(4000, 3900.0, 0.1, 0.08, 0.001)).word
    'reliable'
    >>> judge(Facts(4000, 3960.0, 0.9, 0.14, 0.01)).word  # nearly equal weights with a few large ones
    'usable for means, not for tails'
    >>> judge(Facts(4000, 3.5, 0.89, 0.14, 0.5)).word
    'not reliable'
    """
    unreliable, limits = tuple(_against(facts)), tuple(_limits(facts))
    word = UNRELIABLE if unreliable else USABLE if limits else RELIABLE
    reasons = (*unreliable, *limits, *_numbers(facts))
    return Verdict(word, reasons, _next(facts, word))


def at_best(facts: Facts) -> Verdict:
    """The verdict if scouts find nothing, which is the best that it can be.

    >>> at_best(Facts(4000, 3800.0, 0.72, 0.13, 0.001)).word, judge(Facts(4000, 3800.0, 0.72, 0.13, 0.001)).word
    ('reliable', 'usable for means, not for tails')
    """
    return judge(replace(facts, missed=(Missed(0.0, 0.0, "everywhere"),)))


def is_settled(facts: Facts) -> bool:
    """Whether more draws will hardly make them reliable: few are effective, or k-hat is too large by twice its error.

    >>> is_settled(Facts(4000, 240.0, 0.52, 0.1, 0.01)), is_settled(Facts(4000, 2000.0, 0.72, 0.1, 0.01))
    (True, False)
    """
    heavy = facts.pareto_k - 2 * facts.pareto_k_error >= _MOST_K
    return facts.efficiency < _RARE or (heavy and facts.efficiency < _HALF)


def _against(facts: Facts) -> Iterator[str]:
    """Why draws are not even usable for means."""
    yield from facts.doubts
    yield from facts.disagreement
    if worst := next((each for each in facts.certain if _is_grave(each)), None):
        yield f"scouts find {worst} that the guide misses"
    if math.isinf(facts.pareto_k):
        yield "the tail of the weights cannot be fitted: fewer than five draws in it, or no draw has any weight"
        return
    if facts.efficiency >= _NEARLY_EQUAL:
        return
    if facts.pareto_k >= 1:
        yield f"k-hat {facts.pareto_k:.2f}: the weights behave as if they had no finite mean"
    elif facts.shortfall > _MEANS:
        yield f"about {_part(facts.shortfall)} of the evidence lies beyond the largest weight, by the tail (k-hat)"
    if facts.ess < _FEW_ESS:
        yield f"{facts.ess:.0f} effective draws"


def _limits(facts: Facts) -> Iterator[str]:
    """Why draws are usable for means only."""
    if math.isinf(facts.pareto_k):
        return
    if facts.certain and not any(map(_is_grave, facts.certain)):
        yield f"scouts find {facts.certain[0]} that the guide misses"
    elif likely := next((each for each in facts.missed if each.is_likely and not each.is_certain), None):
        yield f"scouts find {likely} that the guide may miss"
    if facts.efficiency < _RARE:
        yield f"only {facts.efficiency:.1%} of the draws are effective"
    sure = facts.pareto_k + facts.pareto_k_error
    if facts.is_level:
        pass
    elif facts.pareto_k >= _MOST_K or (sure >= _MOST_K and facts.efficiency < _NEARLY_EQUAL):
        yield f"k-hat may be {_MOST_K} or more, so that the tails of the guide are too light"
    elif facts.pareto_k > pareto_k_threshold(facts.num_draws):
        needed = math.ceil(10 ** (1 / (1 - facts.pareto_k)))
        yield f"averages at k-hat {facts.pareto_k:.2f} need {needed:,} draws or more"
    if facts.shortfall > _TAILS and facts.efficiency < _NEARLY_EQUAL:
        yield f"about {_part(facts.shortfall)} of the evidence may lie beyond the largest weight"
    if _FEW_ESS <= facts.ess < _LEAST_ESS:
        yield f"{facts.ess:.0f} effective draws, too few for tails"
    if facts.converged is False and not (facts.efficiency > 0.5 and facts.pareto_k < _CERTAIN_K):
        yield "the training had not converged"


def _is_grave(lost: Missed) -> bool:
    """Whether means are wrong without it: it is no tail, or a large one."""
    return not lost.tail or lost.share > _TAIL


def _part(share: float) -> str:
    return f"{share:.0%}" if share < 1 else "most"


def _numbers(facts: Facts) -> Iterator[str]:
    if math.isfinite(facts.pareto_k):
        yield f"k-hat {facts.pareto_k:.2f} +- {facts.pareto_k_error:.2f} of {facts.num_draws:,} draws"
    yield f"{facts.ess:.0f} of them effective ({facts.efficiency:.0%})"
    if facts.scouts:
        yield facts.scouts


def _next(facts: Facts, word: Word) -> tuple[str, ...]:
    steps = [TRAIN] if facts.converged is False else []
    if facts.certain:
        steps.append(MODES)
    if word == RELIABLE:
        return (*steps, CHECK)
    if math.isinf(facts.pareto_k):
        return (*steps, MORE, "a guide whose draws lie within the support of the model")
    if word == USABLE:
        return (*steps, MORE, RICHER, CHECK)
    return (*steps, RICHER, EASIER, COVERING, NUTS)


@dataclass(frozen=True)
class DatumFacts:
    """What a verdict on weights of every datum is computed from.

    :ivar size: how many data.
    :ivar bad: indices of those that are badly approximated: k-hat above 0.7 by more than its error, and not nearly
        equal weights.
    :ivar median_k: the median k-hat.
    :ivar converged: as of :class:`Facts`.
    """

    size: int
    bad: tuple[int, ...]
    median_k: float
    converged: bool | None = None


def judge_data(facts: DatumFacts) -> Verdict:
    """The verdict where every datum has weights of its own: how many are badly approximated, and which.

    At most one in a hundred is reliable, at most one in ten usable.

    >>> print(judge_data(DatumFacts(1000, (3, 17), 0.2)))
    reliable: 2 of 1,000 data are badly approximated: 3, 17; median k-hat 0.20
    """
    part = len(facts.bad) / facts.size
    word = RELIABLE if part <= _SOME else USABLE if part <= _MANY else UNRELIABLE
    if facts.converged is False and word == RELIABLE and facts.median_k >= _CERTAIN_K:
        word = USABLE
    which = ", ".join(map(str, facts.bad[:10])) + (", ..." if len(facts.bad) > 10 else "")
    counted = f"{len(facts.bad):,} of {facts.size:,} data are badly approximated" + (f": {which}" if which else "")
    late = ("the training had not converged",) if facts.converged is False else ()
    steps = (TRAIN,) if late else ()
    more = (CHECK,) if word == RELIABLE else (RICHER, COVERING, "semi-amortised guides for the data that are worst")
    return Verdict(word, (counted, f"median k-hat {facts.median_k:.2f}", *late), (*steps, *more))


def judge_chains(
    rhat: float, ess: float, num_chains: int, missed: tuple[Missed, ...] = (), scouts: str = ""
) -> Verdict:
    """The verdict on draws of equal weight in chains, or islands, by their largest R-hat and smallest bulk ESS.

    Chains agree, too, where all of them are in one mode of several: scouts can show that.

    Source: Vehtari, Gelman, Simpson, Carpenter and Buerkner 2021, Rank-normalization, folding, and localization: an
    improved R-hat for assessing convergence of MCMC, Bayesian Analysis 16(2).

    >>> judge_chains(1.002, 900.0, 4).word, judge_chains(1.3, 20.0, 4).word
    ('reliable', 'not reliable')
    """
    if rhat <= _RHAT and ess >= _CHAIN_ESS:
        word = RELIABLE
    else:
        word = USABLE if rhat <= _RHAT_USABLE and ess >= _CHAIN_FEW else UNRELIABLE
    lost = tuple(f"scouts find {each} that no chain has visited enough" for each in missed if each.is_certain)[:1]
    word = UNRELIABLE if lost else word
    chains = f"{num_chains} chains" if num_chains > 1 else "the halves of one chain"
    reasons = (*lost, f"R-hat {rhat:.3f} of {chains}", f"smallest effective sample size {ess:.0f}")
    reasons = (*reasons, scouts) if scouts else reasons
    alone = ("several chains (restarts=4): one cannot show what it misses",) if num_chains == 1 else ()
    more = (CHECK,) if word == RELIABLE else ("more draws (num_steps=) and a longer warm-up (num_warmup=)", EASIER)
    return Verdict(word, reasons, (*alone, *more))


POINT = Verdict(
    UNRELIABLE,
    ("the guide holds latent sites at a point, so it says nothing of their uncertainty and has no evidence or k-hat",),
    ("AutoLaplaceApproximation for a spread around the point", "AutoNormal or pplvi.AutoFlow for a fitted spread"),
)
SUBSAMPLED = Verdict(
    UNRELIABLE,
    (
        "a plate is subsampled: the ELBO is an estimate from one minibatch, and importance weights, which would need "
        "the density of all data, do not exist",
    ),
    ("a posterior on the full data: Posterior(model, guide, full_args)",),
)
