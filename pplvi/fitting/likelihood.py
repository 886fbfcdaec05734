"""``fit`` without a posterior to approximate: expectation maximisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from pplvi.fitting.options import Checkpoint
from pplvi.fitting.result import Fit
from pplvi.losses.elbo import ELBO
from pplvi.programs.state import Environment, fingerprint
from pplvi.programs.summing import drawing, summing
from pplvi.training.batches import FullData
from pplvi.training.checkpoint import PathLike
from pplvi.training.em.algorithm import EMSteps, ExpectationMaximization, SummedLatents
from pplvi.training.em.conjugate import ConjugateLatents, kinds_of_latents
from pplvi.training.em.mixed import MixedLatents
from pplvi.training.plan import TrainingPlan
from pplvi.training.replicas import Recipe
from pplvi.training.restart import Restart, publish, scratch
from pplvi.training.restarts import best_of, train_restarts
from pplvi.training.watch import Watch
from pplvi.types import Call, Program

ITERATIONS = 1000


def maximise_likelihood(
    model: Program,
    algorithm: ExpectationMaximization,
    call: Call,
    environment: Environment,
    *,
    num_steps: int | None,
    restarts: int,
    seed: int | None,
    callbacks: Sequence[Callable[[Restart], Any]],
    progress: bool,
    checkpoint: PathLike | Checkpoint | None,
    resume: PathLike | None,
) -> Fit:
    """Run EM from one or several starts, as :func:`pplvi.fit` trains guides."""
    file, steps = Checkpoint.of(checkpoint), num_steps or ITERATIONS
    settings: Mapping[str, Any] = {"guide": repr(algorithm), "seed": str(seed), "data": fingerprint(call)}
    recipe = recipe_of_likelihood(model, call, restarts, environment)
    plan = TrainingPlan(
        recipe,
        ELBO(),
        steps=EMSteps(algorithm, restarts > 1),
        batches=FullData(*call),
        watch=Watch(steps, callbacks=tuple(callbacks), save_every=Checkpoint.every if file is None else file.every),
        restarts=restarts,
        seed=seed,
        progress=progress,
        checkpoint=None if file is None else file.path,
        resume=resume,
        settings=settings,
    )
    runs = train_restarts(plan)
    best = best_of(_with_a_maximum(runs), True)
    recipe.adopt(runs[best])
    publish(runs[best])
    found = Fit(
        runs, best, guide_name="ExpectationMaximization", args=call[0], kwargs=call[1], seed=seed, is_bound=True
    )
    found.objective = algorithm
    found.notes = _notes(runs, best)
    return found


def recipe_of_likelihood(model: Program, call: Call, restarts: int, environment: Environment) -> Recipe:
    """How the programs of the restarts are made: discrete latents of the model are summed over."""
    guide: Any = ConjugateLatents
    with scratch(), environment.active():
        discrete, continuous = kinds_of_latents(model, environment.move(call))
        if not continuous:
            model, guide = summing(model, *environment.move(call)), SummedLatents
        elif discrete:
            model, guide = drawing(model, discrete), MixedLatents
    return Recipe(model, guide, True, restarts > 1, environment)


def _with_a_maximum(runs: Sequence[Restart]) -> list[Restart]:
    found = [run for run in runs if not _collapsed(run)]
    if not found:
        raise ValueError(f"every restart: {_collapsed(runs[0])}")
    return found


def _collapsed(run: Restart) -> str:
    why: str = cast(Any, run.guide).collapsed
    return why


def _notes(runs: Sequence[Restart], best: int) -> dict[str, str]:
    guide = cast(Any, runs[best].guide)
    parts = {"closed form": guide.closed, "L-BFGS": guide.searched}
    notes = {"M-step": "; ".join(f"{how} for {', '.join(names)}" for how, names in parts.items() if names)}
    if lost := [str(run.index) for run in runs if _collapsed(run)]:
        notes["collapsed"] = f"restarts {', '.join(lost)}, where a component closed in on a datum: not counted"
    return notes
