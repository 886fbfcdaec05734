"""Restarts, each in a parameter scope of its own, and the checkpoint that holds them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import takewhile
from os import fspath
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pplvi.programs.errors import warn
from pplvi.programs.ranks import RanksLeftError
from pplvi.programs.running import plain_run
from pplvi.programs.state import clone, preserved_rng, reseed, rng_state, set_rng_state
from pplvi.training import checkpoint, shards
from pplvi.training.batches import FullData, OneShot
from pplvi.training.checkpoint import PathLike, UnwrittenError
from pplvi.training.lockstep import Lockstep, Member
from pplvi.training.loop import Trainer
from pplvi.training.plan import TrainingPlan
from pplvi.training.progress import Progress
from pplvi.training.restart import Ended, Restart, TrainingError, evaluate, scratch
from pplvi.training.resume import check_equal, check_paths, constants, put_back, run_state, shapes, signature
from pplvi.training.watch import Training, Watch
from pplvi.types import Call


def train_restarts(plan: TrainingPlan) -> list[Restart]:
    """Train ``plan.restarts`` runs; restart ``r`` has the seed ``plan.seed + r``.

    One after another, or, with compiled steps on the full data, side by side (:mod:`pplvi.training.lockstep`). With a
    seed, the global random state is left as it was.

    :returns: the runs, fewer than asked for if the user interrupted them.
    :raises ValueError: if restarts would share parameters, for a checkpoint that does not fit, or if a loss stays
        non-finite.
    """
    plan = replace(plan, checkpoint=_absolute(plan.checkpoint), resume=_absolute(plan.resume))
    with ExitStack() as held:

        def claim() -> None:
            if plan.checkpoint is not None:
                held.enter_context(checkpoint.claimed(Path(plan.checkpoint)))
                shards.sweep(plan.checkpoint)
            check_paths(plan)

        plan.ranks.first(claim)
        _check_data(plan)
        plan.batches.environment = plan.recipe.environment
        content = shards.filled(plan.resume or "", plan.ranks.first(lambda: _read(plan)), plan.ranks, plan.mesh)
        session = _Session(plan, content)
        with preserved_rng(active=plan.seed is not None or session.side_by_side), plan.ranks.listening():
            try:
                session.go()
            finally:
                plan.batches.finish()
            for run in session.runs:
                plan.ended(run)
    if session.unwritten is not None:
        session.unwritten.runs = session.runs
        raise session.unwritten
    return session.runs


def restored(plan: TrainingPlan, states: Mapping[int, Mapping[str, Any]]) -> list[Restart]:
    """Restarts that other processes have trained by the same plan, from what they kept of them (:class:`Ended`)."""
    session = _Session(plan, {"runs": list(states.values()), "settings": dict(plan.settings or {})})
    with preserved_rng():
        return [session.restored(index, state) for index, state in states.items()]


def _read(plan: TrainingPlan) -> dict[str, Any]:
    return checkpoint.read_content(plan.resume) if plan.resume is not None else {"runs": []}


def _absolute(path: PathLike | None) -> PathLike | None:
    """Where a path leads from here, whatever the folder is later."""
    return None if path is None else Path(path).resolve()


def _check_data(plan: TrainingPlan) -> None:
    if isinstance(plan.batches, OneShot) and plan.restarts > 1:
        raise ValueError(
            f"restarts={plan.restarts} need data that can be gone through again, got a one-shot iterator: expected a "
            "DataLoader or another re-iterable. Pass a list of its items, or use restarts=1."
        )


class _Session:
    """The restarts so far, and what of them is in the file."""

    def __init__(self, plan: TrainingPlan, content: Mapping[str, Any]) -> None:
        self.plan, self.content = plan, content
        self.runs: list[Restart] = []
        self.states: dict[int, dict[str, Any]] = {}
        self.starts: dict[int, dict[str, Any]] = {}
        self.description: dict[str, Any] = {}
        self.unwritten: UnwrittenError | None = None
        self.base = int(torch.randint(2**31, ())) if plan.seed is None and self.side_by_side else 0
        self.signature: dict[str, str] | None = None
        self.priors: dict[str, str] = {}
        self.initial: dict[str, Tensor] = content.get("initial", clone(plan.recipe.tensors()))
        if "fit" in content and not content["runs"]:
            raise ValueError(
                f"{fspath(plan.resume or '')!r} holds MCMC draws, which no training can go on from: expected a "
                "fit with a guide, or a checkpoint."
            )
        if len(content["runs"]) > plan.restarts:
            raise ValueError(
                f"the checkpoint {fspath(plan.resume or '')!r} holds {len(content['runs'])} restarts, got "
                f"restarts={plan.restarts}: expected at least as many."
            )
        if 0 < len(content["runs"]) < plan.restarts:  # the others start where the first did
            sizes = [
                {name: str(tuple(t.shape)) for name, t in x.items()} for x in (self.initial, plan.recipe.tensors())
            ]
            check_equal(fspath(plan.resume or ""), "modules", *sizes)  # whose dtype a run in place may have changed

    def go(self) -> None:
        if self.plan.recipe.apart and not self.content["runs"]:
            check_apart(self.plan)
        if self.side_by_side:
            self._go_side_by_side()
        else:
            self._go_one_by_one()

    @property
    def side_by_side(self) -> bool:
        """Whether restarts are trained together: compiled steps on the same data, no loop inside the program."""
        alone = len(self.plan.indices) == 1 or self.plan.ranks.size > 1
        return self.plan.steps.side_by_side and not alone and isinstance(self.plan.batches, FullData)

    def _go_side_by_side(self) -> None:
        progress = Progress(self.plan.watch.num_steps, 1, self.plan.progress)
        members: list[Member] = []
        trainers: list[Trainer] = []

        def report(run: Restart) -> None:
            if run is next((m.trainer.run for m in members if not m.trainer.run.reason), run):
                progress(run)

        try:
            for index in self.plan.indices:
                trainer, found = self._started(index, report)
                self.runs.append(trainer.run)
                trainers.append(trainer)
                if not found:
                    members.append(Member(len(members), trainer))
            Lockstep(members, self._write).train()
            for trainer in trainers:
                self._keep(trainer)
        except TrainingError as error:
            error.runs = [run for run in self.runs if run.reason]
            raise
        finally:
            progress.close()
        if all(run.reason == "interrupted" and not run.losses for run in self.runs):
            raise KeyboardInterrupt
        self.runs = [run for run in self.runs if run.losses or run.reason == "found"]

    def _go_one_by_one(self) -> None:
        for index in self.plan.indices:
            progress = Progress(
                self.plan.watch.num_steps, self.plan.restarts, self.plan.progress and self.plan.ranks.rank == 0
            )
            try:
                run = self._train(index, progress)
            except KeyboardInterrupt as error:  # before the first step of this restart
                if not self.runs or isinstance(error, RanksLeftError):
                    raise
                return
            except TrainingError as error:
                error.runs = list(self.runs)
                raise
            finally:
                progress.close()
            if run.reason == "interrupted":
                return

    def restored(self, index: int, saved: Mapping[str, Any]) -> Restart:
        """A restart that was trained elsewhere."""
        run, objective, _ = self._begin(index, saved)
        with run.scope():
            self.plan.start.take_back(run, saved)
            evaluate(objective, run.model, run.guide, self.plan.batches.peek())
            trainer = Trainer(run, objective, self.plan.steps, self.plan.batches, self.plan.watch)
            self._keep(self._put_back(trainer, saved))
        run.reason = saved["reason"] or "interrupted"
        return run

    def _started(self, index: int, report: Callable[[Restart], None]) -> tuple[Trainer, bool]:
        """A restart before its next step, and whether nothing is left to train."""
        saved = self.content["runs"][index] if index < len(self.content["runs"]) else None
        run, objective, start = self._begin(index, saved)
        watch = replace(self.plan.watch, report=report, save=self._saver(index, start))
        with run.scope():
            trainer = self._trainer(run, objective, watch, saved)
            return trainer, self.plan.start.begin(trainer)

    def _train(self, index: int, progress: Progress) -> Restart:
        trainer, found = self._started(index, progress)
        run = trainer.run
        with run.scope():
            if not found:
                trainer.train()
            if run.reason == "interrupted" and not run.losses:
                raise KeyboardInterrupt
            if not run.losses and not found:
                raise ValueError("data= yielded no batch: expected at least one.")
            self._keep(trainer)
        self.runs.append(run)
        return run

    def _keep(self, trainer: Trainer) -> None:
        """Keep what the continuation of a restart that has ended needs."""
        batches, run = self.plan.batches, trainer.run
        state = {**run_state(trainer), "start": self.starts[run.index]}
        call = batches.call if isinstance(batches, FullData) else trainer.call
        run.ended = Ended(state, call, dict(self.plan.settings or {}), self.initial)

    def _begin(self, index: int, saved: Mapping[str, Any] | None) -> tuple[Restart, Any, dict[str, Any]]:
        seed = None if self.plan.seed is None else self.plan.seed + index
        if saved is not None:
            with put_back(self.plan.resume or ""):
                set_rng_state(saved["start"])
        elif seed is not None or self.side_by_side:  # streams that run side by side must not be one
            reseed(self.base + index if seed is None else seed)
        start = self.starts[index] = rng_state()
        environment = self.plan.recipe.environment
        with environment.active():
            model, guide, objective = self.plan.programs(
                self.initial if self.content["runs"] and saved is None else None
            )
        self.plan.batches.start(index, seed)
        return Restart(index, model, guide, environment, seed), objective, start

    def _trainer(self, run: Restart, objective: Any, watch: Watch, saved: Mapping[str, Any] | None) -> Trainer:
        trainer = Trainer(run, objective, self.plan.steps, self.plan.batches, watch)
        if saved is None:
            return trainer
        saved = trainer.stepper.unpacked(saved)
        call = trainer.call = self.plan.batches.share(self.plan.batches.peek())
        self.plan.start.take_back(run, saved)
        evaluate(objective, run.model, run.guide, call)  # parameters exist once the programs have run
        self._check_same(run, call, saved)
        return self._put_back(trainer, saved)

    def _put_back(self, trainer: Trainer, saved: Mapping[str, Any]) -> Trainer:
        run = trainer.run
        run.losses, run.monitored = list(saved["losses"]), list(saved["monitored"])
        run.seconds, run.rollbacks = saved["seconds"], saved["rollbacks"]
        unfinished = saved["reason"] in ("", "num_steps") and run.step < self.plan.watch.num_steps
        with put_back(self.plan.resume or ""):
            if unfinished:
                self.plan.batches.set_state(saved["batches"])
                self.plan.batches.size = saved.get("batch_size")
            trainer.restore(saved)  # the random state comes last: building and running the guide has used it
        if self._goes_on(saved):
            trainer.update.restart_schedule()
        trainer.settle()
        run.reason = "" if unfinished else saved["reason"]
        self.states[run.index] = {**saved}
        return trainer

    def _saver(self, index: int, start: dict[str, Any]) -> Callable[[Training], None] | None:
        if self.plan.checkpoint is None:
            return None

        def save(trainer: Training) -> None:
            self.states[index] = {**run_state(trainer), "start": start}
            self.description = self._description(trainer)
            if not self.side_by_side:
                self._write()

        return save

    def _write(self) -> None:
        """Put what is new into the file; a restart that has no state yet will start anew, and those behind it too."""
        if self.plan.checkpoint is not None and self.description:
            states = takewhile(lambda state: state is not None, map(self.states.get, range(self.plan.restarts)))
            try:
                shards.write_shared(self.plan.checkpoint, {**self.description, "runs": list(states)}, self.plan.ranks)
                self.unwritten = None
            except UnwrittenError as error:  # the training goes on: there may be room next time
                warn(f"{error} The training goes on, and tries again.")
                self.unwritten = error
            self.description = {}

    def _description(self, trainer: Training) -> dict[str, Any]:
        if self.signature is None:
            self.signature = signature(trainer.run, trainer.call)
            self.priors = constants(trainer.run, trainer.call)
        return {
            "model": self.signature,
            "priors": self.priors,
            "settings": dict(self.plan.settings or {}),
            "initial": self.initial,
        }

    def _check_same(self, run: Restart, call: Call, saved: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another model, guide, objective, optimiser or data."""
        name = fspath(self.plan.resume or "")
        check_equal(
            name, "parameters", shapes(saved["params"]), shapes(dict(pyro.get_param_store().named_parameters()))
        )
        check_equal(name, "buffers", shapes(saved["buffers"]), shapes(run.buffers()))
        check_equal(name, "sites", self.content["model"], signature(run, call))
        if "priors" in self.content:
            check_equal(name, "constants", self.content["priors"], constants(run, call))
        given = dict(self.plan.settings or {})
        if self._goes_on(saved):  # with a schedule of its own
            given["schedule"] = self.content["settings"]["schedule"]
        check_equal(name, "settings", self.content["settings"], given)

    def _goes_on(self, saved: Mapping[str, Any]) -> bool:
        """Whether a run that took all its steps is to take more, at rates that start anew."""
        kind, _, length = str(self.content["settings"].get("schedule")).rpartition(" over ")
        longer = saved["reason"] == "num_steps" and self.plan.watch.num_steps > len(saved["losses"])
        asked = str((self.plan.settings or {}).get("schedule")).rpartition(" over ")
        return longer and kind == asked[0] == "'cosine'" and length != asked[2]


def check_apart(plan: TrainingPlan) -> None:
    """Check that two restarts have no parameter tensor in common.

    :raises ValueError: with their names, if they have.
    """
    first, second = _trial(plan), _trial(plan)
    shared = sorted(name for name in first if name in second and first[name] is second[name])
    if shared:
        raise ValueError(
            f"restarts={plan.restarts} would share the parameters {shared}: a program passes tensors from outside to "
            "pyro.param or pyro.module. Make the model a module or a method of one, pass a function "
            "(pyro.param('x', lambda: init.clone())), or use restarts=1."
        )


def _trial(plan: TrainingPlan) -> dict[str, Tensor]:
    with scratch(), plan.recipe.environment.active():
        model, guide, objective = plan.programs()
        call = plan.batches.peek()
        _ = plain_run(model, *call) if plan.start.searches(guide) else evaluate(objective, model, guide, call)
        return dict(pyro.get_param_store().named_parameters())


def best_of(runs: list[Restart], comparable: bool) -> int:
    """Index of the run with the least score; the first where the objective is not comparable between runs."""
    return min(runs, key=lambda run: run.score).index if comparable else 0
