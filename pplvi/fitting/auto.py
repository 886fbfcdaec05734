"""``fit(model, "auto")``: from the cheapest family of guides to richer ones, until the draws are reliable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from pyro.infer.autoguide import init_to_value

from pplvi.fitting.attempt import MOST_EFFECTIVE, WRITTEN, Attempt, judged
from pplvi.fitting.clock import Clock, Timing, cpu_seconds
from pplvi.fitting.garbage import old_objects_aside
from pplvi.fitting.result import Fit
from pplvi.fitting.rungs import FLOWS, FOUND, TRAINED, FitArguments, Rung
from pplvi.fitting.smc import is_gaussian
from pplvi.guides.search.batch_and_match import AutoBatchAndMatch
from pplvi.posterior.posterior import Posterior
from pplvi.posterior.weighted import Estimate
from pplvi.programs.deadline import ending
from pplvi.programs.reparam import Reparametrized, forms_of
from pplvi.training.replicas import Originals
from pplvi.training.restart import Restart, publish
from pplvi.types import Program

_NEARBY = 1.0  # k-hat; averages do not settle beyond it
_DRAWS, _JUDGED = 4000, 1000  # the latter where an attempt was cut
_SAME = 0.02  # nats of evidence
_SHORT = 5  # iterations of a path that begins where it would lead to
_LEAST_STEPS, _TIMED_STEPS, _TIMED_PART = 200, 12, 0.1

_INTERRUPTED = "it was interrupted, and it has the best verdict so far"

FitFunction = Callable[..., Fit]


def select(fit: FitFunction, model: Program, originals: Originals, budget: float | Timing) -> Fit:
    """The first family whose draws are reliable, or the best by its verdict within the budget.

    A verdict (:attr:`pplvi.Posterior.verdict`) hears scouts too, and it is not believed where a guide before found more
    evidence. The first family is tried on every form of the model (:func:`pplvi.noncentered`); the others on the form
    where it finds the most evidence, less two standard errors: the evidence is the same in all forms, and what its
    draws miss or seldom meet is missing in the one or large in the other.
    A model with parameters of its own is trained anew with each family, from where it was before, and is left with the
    parameters of the family that is taken.

    :param fit: :func:`pplvi.fit` with everything given but model, guide and how to train it.
    :param model: a Pyro program.
    :param originals: the model's parameters.
    :param budget: CPU seconds of this process and its children, or those of a run that is to be repeated.
    :raises ValueError: the first error if every family fails.
    """
    start = time.perf_counter()
    ladder = _Ladder(fit, originals, Clock.of(budget))
    forms = originals.look(forms_of, model)
    with old_objects_aside():
        reason = ladder.climb({WRITTEN: model, **forms}, (*(TRAINED if originals.trainable else FOUND), *FLOWS))
    best = ladder.best
    if best.fit is None:
        raise ladder.errors[0]
    originals.restore(best.state)
    publish(best.fit.runs[best.fit.best])
    best.fit.total_seconds, best.fit.timing = time.perf_counter() - start, ladder.clock.timing
    best.fit.reformed = best.form != WRITTEN
    best.fit.notes = {"tried": "; ".join(map(str, ladder.attempts)), "taken": f"{best.title}, as {reason}"}
    if forms:
        best.fit.notes["parametrisation"] = ladder.comparison
    if doubt := ladder.doubt:
        best.fit.notes["doubt"] = doubt
    return best.fit


class _Ladder:
    """What was tried so far, and how long there is left.

    :ivar form: of the model, ``None`` until the first family was tried on all of them.
    :ivar judging: seconds that drawing and judging take where an attempt was cut, by those of earlier ones.
    """

    def __init__(self, fit: FitFunction, originals: Originals, clock: Clock) -> None:
        self.fit, self.originals, self.clock = fit, originals, clock
        self.attempts: list[Attempt] = []
        self.errors: list[ValueError] = []
        self.form: str | None = None
        self.posteriors: dict[str, Posterior] = {}
        self.judging = 0.0

    @property
    def done(self) -> list[Attempt]:
        return [attempt for attempt in self.attempts if attempt.fit is not None]

    @property
    def best(self) -> Attempt:
        """The attempt that has a fit, in the form that was chosen, with the best verdict and the least k-hat; of
        equal verdicts one that no other refutes, such as SMC that was cut beside a Gaussian that is far away."""

        def rank(a: Attempt) -> tuple[bool, bool, int, bool, float]:
            refuted = any(other.refutes(a) for other in self.done)
            return a.fit is None, a.form != self.form, a.rank, refuted, a.pareto_k

        return min(self.attempts, key=rank)

    @property
    def comparison(self) -> str:
        first = [attempt for attempt in self.attempts if attempt.name == self.attempts[0].name]
        (chosen,) = (attempt for attempt in first if attempt.form == self.form)
        others = [attempt.quality for attempt in first if attempt.form != self.form]
        return "; ".join([f"{chosen.quality} in {chosen.name}", *others])

    @property
    def doubt(self) -> str:
        """What k-hat cannot see: that another guide finds evidence where the best one never goes."""
        refuting = [attempt for attempt in self.done if attempt.refutes(self.best)]
        if not refuting:
            return ""
        most = max(refuting, key=lambda attempt: attempt.log_evidence.value)
        return (
            f"{most.title} finds a log evidence of {most.log_evidence} nats, this guide {self.best.log_evidence}: it "
            "misses part of the posterior, whatever its k-hat"
        )

    def climb(self, forms: Mapping[str, Program], rungs: tuple[Rung, ...]) -> str:
        """Try one family after another; why it ended. ``Ctrl-C`` leaves the best so far."""
        try:
            reason = self._climb(forms, rungs)
            self.form = self.form or self._easiest().form
            self._hear()
        except KeyboardInterrupt:
            if not self.done:
                raise
            self.form, reason = self.form or self._easiest().form, _INTERRUPTED
        return reason

    def _climb(self, forms: Mapping[str, Program], rungs: tuple[Rung, ...]) -> str:
        for rung in rungs:
            chosen = forms if self.form is None else {self.form: forms[self.form]}
            for number, (form, model) in enumerate(chosen.items()):
                if self.attempts and (self.clock.over() or (self.form is None and self._need_no_other_form())):
                    break
                if not self._try(rung, form, model, share=1 / (len(chosen) - number)):
                    return f"the time left was too short for {rung.name}, and it has the best verdict"
                if self.attempts[-1].is_interrupted:
                    return _INTERRUPTED
            if self.form is None:
                self._choose(self._easiest())
            if self.done and self.best.is_reliable and not self.doubt:
                return "its draws are reliable"
            if self.clock.over():
                return "the time was over, and it has the best verdict"
        return "every family was tried, and it has the best verdict"

    def _need_no_other_form(self) -> bool:
        """Whether the last form is easy, or the time left is less than it took: its draws are not cut by the clock."""
        last = self.attempts[-1]
        return last.is_easy or (bool(self.done) and self.clock.left() < self.clock.measured(last.seconds))

    def _choose(self, easiest: Attempt) -> None:
        """Go on with this form of the model, and judge what was found on it, which costs more than comparing forms."""
        self.form, start = easiest.form, cpu_seconds()
        if (posterior := self.posteriors.get(easiest.form)) is not None:
            with ending(self.clock.over):
                found = judged(posterior)
            self._replace(easiest, **found, seconds=easiest.seconds + cpu_seconds() - start)
        self.posteriors.clear()

    def _hear(self) -> None:
        """Ask scouts of what would be taken, until it is an attempt that they were asked of."""
        while (best := self.best).unheard is not None and not self.clock.over():
            with ending(self.clock.over):
                self._replace(best, verdict=best.unheard.verdict, unheard=None)

    def _replace(self, attempt: Attempt, **changes: Any) -> None:
        self.attempts[self.attempts.index(attempt)] = replace(attempt, **changes)

    def _easiest(self) -> Attempt:
        """The form of the model in which the most evidence was found, less its error: that of draws which are near.
        Of those that have as much, as far as a verdict asks, the one with the most effective draws."""
        most = max(attempt.evidence_at_least for attempt in self.attempts) - _SAME
        near = [attempt for attempt in self.attempts if attempt.evidence_at_least >= most]
        return max(near, key=lambda attempt: (attempt.efficiency, attempt.evidence_at_least, -attempt.pareto_k))

    def _try(self, rung: Rung, form: str, model: Program, share: float) -> bool:
        """Fit a family, trained for as many steps as its share of the time allows; false if that is too few."""
        make = partial(self.fit, model, rung.guide)
        if self.dim > rung.most:
            self._pass_over(rung.name, form, f"not tried in {self.dim:,} dimensions, of at most {rung.most}")
            return True
        most = max((attempt.efficiency for attempt in self.done), default=0.0)
        if rung.gaussian and most >= MOST_EFFECTIVE:
            self._pass_over(rung.name, form, f"not tried, as {most:.0%} of the draws are effective already")
            return True
        if self.form is None and isinstance(model, Reparametrized):
            make = partial(self.fit, model, partial(rung.guide, **self._carried(model)))
        if rung.nearby:
            if (start := self._near()) is None:
                return True
            make = partial(self.fit, model, partial(rung.guide, start=start))
        if rung.guide == "smc":
            make = partial(make, init=self._start(), budget=self.clock)
        if rung.guide is AutoBatchAndMatch:
            make = partial(self.fit, model, partial(rung.guide, start=self._start()))
        if rung.recipe is None:
            self._note(rung, form, make)
            return True
        compile, seconds, failure = self._timed(make, rung.recipe)
        if failure is not None:
            self._note(rung, form, failure)
            return True
        steps = min(rung.steps, int(0.8 * share * self.clock.left() / max(seconds, 1e-6)))
        if steps < _LEAST_STEPS and self.attempts:
            return False
        recipe = rung.recipe(max(steps, _LEAST_STEPS))
        self._note(rung, form, partial(make, **recipe, compile=compile, callbacks=[self._is_over]))
        return True

    def _carried(self, model: Reparametrized) -> dict[str, Any]:
        """Where a search on another form of the model begins: where a Gaussian was matched on the first, if one was,
        from which it needs no long way."""
        guide: Any = _guide_of(next(iter(self.done), None))
        if not getattr(guide, "is_matched", False) or len(guide.gaussians.loc) > 1:
            return {}
        try:
            values = self.originals.look(lambda _, *call: model.values_at(guide.best_values(), *call), model)
        except ValueError:  # such as a scale that is rounded to zero
            return {}
        if not all(bool(value.isfinite().all()) for value in values.values()):
            return {}
        return {"num_paths": 1, "lbfgs": {"max_iterations": _SHORT}, "init_loc_fn": init_to_value(values=values)}

    @property
    def dim(self) -> int:
        """Unconstrained dimensions of the model, where a guide has seen them; 0 before."""
        found = (getattr(attempt.fit.guide, "latent_dim", 0) for attempt in self.done if attempt.fit is not None)
        return max(found, default=0)

    def _pass_over(self, name: str, form: str, failure: str) -> None:
        state = self.originals.state()
        self.attempts.append(
            Attempt(name, form, None, math.inf, -math.inf, Estimate(-math.inf, 0.0), 0.0, state, failure)
        )

    @property
    def _gaussians(self) -> list[Attempt]:
        """The attempts of this form whose guides are Gaussians that a search has found."""
        return [attempt for attempt in self.done if attempt.form == self.form and is_gaussian(attempt.fit)]

    def _start(self) -> Any:
        """The guide with the largest bound of those that are Gaussian: where particles start."""
        return _guide_of(max(self._gaussians, key=lambda attempt: attempt.elbo, default=None))

    def _near(self) -> Any:
        """The guide of Gaussians that heavier tails may be all that is missing of."""
        near = [attempt for attempt in self._gaussians if attempt.pareto_k < _NEARBY]
        return _guide_of(min(near, key=lambda attempt: attempt.rank, default=None))

    def _is_over(self, run: Restart) -> bool:
        return bool(self.clock.over())

    def _note(self, rung: Rung, form: str, make: Callable[[], Fit]) -> None:
        start = cpu_seconds()
        self.originals.restore()
        found, pareto_k, failure = None, math.inf, ""
        elbo, log_evidence = -math.inf, Estimate(-math.inf, 0.0)
        judgement: dict[str, Any] = {}
        try:
            with ending(self.clock.over):
                with self.clock.keeping(self.judging):
                    found = make()
                found.origin = rung.guide  # where it began is no option of the guide, and a file need not hold it
                made = cpu_seconds()
                posterior = found.posterior(_DRAWS)
                if found.islands is None:
                    pareto_k, elbo = float(posterior.pareto_k.max()), posterior.elbo.value
                    judgement["efficiency"] = float(posterior.ess.min()) / posterior.num_draws
                log_evidence = posterior.total_log_evidence
                if self.form is None:
                    self.posteriors[form] = posterior
                else:
                    judgement |= judged(posterior)
                judging = self.clock.measured(cpu_seconds() - made) * min(1.0, _JUDGED / posterior.num_draws)
                self.judging = max(self.judging, judging)
        except ValueError as error:
            found, failure = None, str(error).split(":")[0].split(";")[0] or type(error).__name__
            pareto_k, elbo, log_evidence, judgement = math.inf, -math.inf, Estimate(-math.inf, 0.0), {}
            self.posteriors.pop(form, None)
            self.errors.append(error)
        numbers = (pareto_k, elbo, log_evidence, cpu_seconds() - start)
        self.attempts.append(Attempt(rung.name, form, found, *numbers, self.originals.state(), failure, **judgement))

    def _timed(self, train: FitFunction, recipe: FitArguments) -> tuple[Any, float, Callable[[], Fit] | None]:
        """How to run the steps, the CPU seconds that one of them takes, and, if they fail, what raises why."""
        failing: Callable[[], Fit] | None = None
        for compile in ("trace", False):
            stamps: list[float] = []
            most = cpu_seconds() + _TIMED_PART * self.clock.left()

            def stamp(run: Restart, stamps: list[float] = stamps, most: float = most) -> bool:
                stamps.append(cpu_seconds())
                return len(stamps) > 1 and stamps[-1] > most

            failing = partial(train, **{**recipe(_TIMED_STEPS), "init": None}, compile=compile, callbacks=[stamp])
            try:
                failing()
            except ValueError:
                continue
            return compile, self.clock.measured((stamps[-1] - stamps[0]) / max(len(stamps) - 1, 1)), None
        return False, math.inf, failing


def _guide_of(attempt: Attempt | None) -> Any:
    return None if attempt is None or attempt.fit is None else attempt.fit.guide
