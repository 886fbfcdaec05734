"""A family that ``fit(model, "auto")`` has tried, and how it is judged beside others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from pplvi.fitting.result import Fit
from pplvi.posterior.posterior import Posterior
from pplvi.posterior.verdict import RELIABLE, WORDS, Verdict, at_best
from pplvi.posterior.weighted import Estimate

WRITTEN = "as written"
GOOD_ENOUGH = 0.7  # k-hat
MOST_EFFECTIVE = 0.5  # part of the draws that is effective: what lighter tails would have less of
_MISSED, _TWENTYFOLD = 0.2, 3.0  # nats of evidence


@dataclass(frozen=True)
class Attempt:
    """One family that was tried.

    :ivar name: of the family.
    :ivar form: of the model: ``"as written"``, or how much of it is centered.
    :ivar fit: its fit, ``None`` if there is none.
    :ivar pareto_k: the largest k-hat of 4,000 draws of its best restart; infinite without a fit.
    :ivar elbo: of these draws, in nats; minus infinite without a fit.
    :ivar log_evidence: by their importance weights, in nats.
    :ivar seconds: CPU seconds that it took.
    :ivar state: what the model's parameters are worth after it.
    :ivar failure: why there is no fit, or empty.
    :ivar verdict: on these draws; ``None`` without a fit.
    :ivar efficiency: effective part of the draws.
    :ivar unheard: the draws, if the verdict is without scouts, which could only find against them.
    """

    name: str
    form: str
    fit: Fit | None
    pareto_k: float
    elbo: float
    log_evidence: Estimate
    seconds: float
    state: list[torch.Tensor]
    failure: str = ""
    verdict: Verdict | None = None
    efficiency: float = 0.0
    unheard: Posterior | None = None

    def __str__(self) -> str:
        word = [] if self.verdict is None else [self.verdict.word]
        sampled = self.fit is not None and self.fit.islands is not None
        outcome = self.failure or ", ".join(word if sampled else [*word, f"k-hat {self.pareto_k:.2f}"])
        return f"{self.title}: {outcome} ({self.seconds:.1f} s)"

    @property
    def title(self) -> str:
        """The family and, if it is not as written, the form of the model."""
        return self.name if self.form == WRITTEN else f"{self.name}, {self.form}"

    @property
    def is_reliable(self) -> bool:
        """Whether its verdict is the best one, by all that is asked of draws."""
        return self.verdict is not None and self.verdict.word == RELIABLE and self.unheard is None

    @property
    def is_easy(self) -> bool:
        """Whether no other form of the model is needed: most draws are effective, with light tails."""
        return self.pareto_k < GOOD_ENOUGH and self.efficiency >= MOST_EFFECTIVE

    @property
    def is_interrupted(self) -> bool:
        """Whether the user has interrupted it."""
        return self.fit is not None and self.fit.runs[self.fit.best].reason == "interrupted"

    @property
    def rank(self) -> int:
        """That of the verdict; behind all others without a fit."""
        return len(WORDS) if self.verdict is None else self.verdict.rank

    @property
    def quality(self) -> str:
        """What forms of the model are compared by."""
        return f"{self.form} has k-hat {self.pareto_k:.2f} and a log evidence of {self.log_evidence} nats"

    @property
    def evidence_at_least(self) -> float:
        """Log evidence less two standard errors, in nats: what is found by draws that do not miss much."""
        return self.log_evidence.value - 2 * self.log_evidence.error

    def refutes(self, other: Attempt) -> bool:
        """Whether the evidence found here is so much larger that the other guide has to miss part of the posterior.

        Whatever k-hat is, by Markov's inequality the evidence is estimated 3 nats too high once in twenty times.
        """
        ours, theirs = self.log_evidence, other.log_evidence
        margin = _MISSED if self.pareto_k < GOOD_ENOUGH else _TWENTYFOLD
        return ours.value - theirs.value > margin + 4 * math.hypot(ours.error, theirs.error)


def judged(posterior: Posterior) -> dict[str, Any]:
    """The verdict of an attempt and what goes with it. Scouts, who are dear, are asked where they may decide."""
    facts = posterior.facts_without_scouts
    if facts is None:
        return {"verdict": posterior.verdict}
    if (verdict := at_best(facts)).word != RELIABLE:
        return {"verdict": verdict, "efficiency": facts.efficiency, "unheard": posterior}
    return {"verdict": posterior.verdict, "efficiency": facts.efficiency}
