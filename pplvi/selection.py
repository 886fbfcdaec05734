"""``fit(model, "auto")``: from the cheapest family of guides to richer ones, until the weights can be trusted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pplvi.elbo import ELBO
from pplvi.guides.deterministic import AutoDeterministicNormal
from pplvi.guides.flow import AutoFlow
from pplvi.guides.pathfinder import AutoPathfinder
from pplvi.guides.score_matching import AutoBatchAndMatch
from pplvi.restarts import publish
from pplvi.result import Fit

GOOD_ENOUGH = 0.7
BUDGET = 60.0  # seconds
_DRAWS = 4000
_LEAST_STEPS, _TIMED_STEPS = 200, 10

FitFunction = Callable[..., Fit]


@dataclass(frozen=True)
class Attempt:
    """One family that was tried.

    :ivar name: of the family.
    :ivar fit: its fit, ``None`` if there is none.
    :ivar pareto_k: the largest k-hat of 4,000 draws of its best restart; infinite without a fit.
    :ivar seconds: that it took.
    :ivar failure: why there is no fit, or empty.
    """

    name: str
    fit: Fit | None
    pareto_k: float
    seconds: float
    failure: str = ""

    def __str__(self) -> str:
        outcome = self.failure or f"k-hat {self.pareto_k:.2f}"
        return f"{self.name}: {outcome} ({self.seconds:.1f} s)"


def flow_recipe(num_steps: int = 2000, learning_rate: float = 2e-3, num_particles: int = 64) -> dict[str, Any]:
    """Arguments of :func:`pplvi.fit` that train a flow as the literature has come to do it.

    Sticking the landing, many draws in one call, a full-rank start at the Gaussian of batch and match, a small learning
    rate that falls to zero along a cosine, clipped gradients: ``fit(model, AutoFlow, args=..., **flow_recipe())``.

    :param num_steps: how many steps.
    :param learning_rate: of Adam, at the start.
    :param num_particles: draws in each step.

    Source: Agrawal, Sheldon & Domke (2020), "Advances in black-box VI: normalizing flows, importance weighting, and
    optimization"; Roeder, Wu & Duvenaud (2017).

    Example:
        >>> sorted(flow_recipe())
        ['init', 'num_steps', 'objective', 'optim', 'stop']
    """
    return {
        "objective": ELBO(num_particles, estimator="stl"),
        "optim": partial(torch.optim.Adam, lr=learning_rate),
        "init": "match",
        "num_steps": num_steps,
        "stop": None,
    }


def select(fit: FitFunction, budget: float | None) -> Fit:
    """The cheapest family whose k-hat is below 0.7, or that with the least k-hat within the budget.

    :param fit: :func:`pplvi.fit` with everything given but the guide and how to train it.
    :param budget: seconds, 60 unless given.
    :raises ValueError: for a budget that is no positive number, and the first error if every family fails.
    """
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0):
        raise ValueError(f"budget={budget!r}: expected a positive number of seconds.")
    ladder = _Ladder(fit, time.perf_counter() + (BUDGET if budget is None else budget))
    reason = ladder.climb()
    done = [attempt for attempt in ladder.attempts if attempt.fit is not None]
    if not done:
        raise ladder.errors[0]
    best = min(done, key=lambda attempt: attempt.pareto_k)
    assert best.fit is not None
    publish(best.fit.runs[best.fit.best])
    best.fit.notes = {"tried": "; ".join(map(str, ladder.attempts)), "taken": f"{best.name}, as {reason}"}
    return best.fit


class _Ladder:
    """What was tried so far, and how long there is left."""

    def __init__(self, fit: FitFunction, deadline: float) -> None:
        self.fit, self.deadline = fit, deadline
        self.attempts: list[Attempt] = []
        self.errors: list[ValueError] = []

    @property
    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def climb(self) -> str:
        """Try one family after another; why it ended."""
        for kind in (AutoPathfinder, AutoBatchAndMatch, AutoDeterministicNormal):
            if self._is_good(kind.__name__, partial(self.fit, kind)):
                return f"its k-hat is below {GOOD_ENOUGH}"
            if self.left <= 0:
                return "the time was over, and it has the least k-hat"
        for flow in ("quadratic", "nsf"):
            if not self._try_flow(flow):
                return f"the time left was too short for AutoFlow({flow!r}), and it has the least k-hat"
            if self.attempts[-1].pareto_k < GOOD_ENOUGH:
                return f"its k-hat is below {GOOD_ENOUGH}"
        return "every family was tried, and it has the least k-hat"

    def _is_good(self, name: str, make: Callable[[], Fit]) -> bool:
        start = time.perf_counter()
        try:
            found: Fit | None = make()
            assert found is not None
            pareto_k, failure = float(found.posterior(_DRAWS).pareto_k.max()), ""
        except ValueError as error:
            found, pareto_k, failure = None, float("inf"), str(error).split(":")[0].split(";")[0]
            self.errors.append(error)
        self.attempts.append(Attempt(name, found, pareto_k, time.perf_counter() - start, failure))
        return pareto_k < GOOD_ENOUGH

    def _try_flow(self, flow: str) -> bool:
        """Train a flow for as many steps as the time allows; false if that is too few."""
        options: dict[str, Any] = {"passes": 2} if flow == "nsf" else {}
        train = partial(self.fit, partial(AutoFlow, flow=flow, **options))
        compile, seconds = self._timed(train)
        steps = min(2000, int(0.8 * self.left / seconds))
        if steps < _LEAST_STEPS:
            return False
        self._is_good(f"AutoFlow({flow!r})", partial(train, **flow_recipe(steps), compile=compile))
        return True

    def _timed(self, train: FitFunction) -> tuple[Any, float]:
        """How to run the steps, and the seconds that one of them takes."""
        recipe = {**flow_recipe(_TIMED_STEPS), "init": None}
        for compile in ("trace", False):
            try:
                train(**{**recipe, "num_steps": 1}, compile=compile)
                start = time.perf_counter()
                train(**recipe, compile=compile)
            except ValueError:
                continue
            return compile, (time.perf_counter() - start) / _TIMED_STEPS
        return False, float("inf")
