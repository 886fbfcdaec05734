"""Restarts, each in a parameter scope of its own, and the checkpoint that holds them all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from os import fspath
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pplvi import checkpoint
from pplvi.batches import Batches, FullData, OneShot
from pplvi.checkpoint import PathLike
from pplvi.lockstep import Lockstep, Member
from pplvi.optimizers import Update
from pplvi.programs.joint import execute
from pplvi.programs.running import isolated, plain_run
from pplvi.programs.sites import is_deterministic, sample_sites, site_plates
from pplvi.programs.state import clone, preserved_rng, rng_state, set_rng_state
from pplvi.progress import Progress
from pplvi.recipes import Recipe
from pplvi.starts import begin, searches, take_back
from pplvi.stepping import CompiledUpdates
from pplvi.training import Run, Trainer, TrainingError, Watch, evaluate, unobtrusive
from pplvi.types import Call, Program


@dataclass(frozen=True)
class Plan:
    """Everything that :func:`train_restarts` needs.

    :ivar make_update: makes the optimiser of a restart.
    :ivar settings: readable settings that a resumed run has to share, by name.
    :ivar init: where a guide starts: see :func:`pplvi.starts.begin`.
    """

    recipe: Recipe
    objective: Any
    make_update: Callable[[], Update]
    batches: Batches
    watch: Watch
    restarts: int = 1
    seed: int | None = None
    progress: bool = True
    checkpoint: PathLike | None = None
    resume: PathLike | None = None
    settings: Mapping[str, Any] | None = None
    init: str | None = None

    def programs(self, initial: Mapping[str, Tensor] | None = None) -> tuple[Program, Program, Any]:
        """Model, guide and objective of one restart; Pyro's objectives remember the first programs that they see."""
        return *self.recipe.build(initial), copy.deepcopy(self.objective)


def train_restarts(plan: Plan) -> list[Run]:
    """Train ``plan.restarts`` runs; restart ``r`` has the seed ``plan.seed + r``.

    One after another, or, with compiled steps on the full data, side by side (:mod:`pplvi.lockstep`). With a seed, the
    global random state is left as it was.

    :returns: the runs, fewer than asked for if the user interrupted them.
    :raises ValueError: if restarts would share parameters, for a checkpoint that does not fit, or if a loss stays
        non-finite.
    """
    check_paths(plan)
    _check_data(plan)
    plan.batches.environment = plan.recipe.environment
    session = _Session(plan, checkpoint.load(plan.resume) if plan.resume is not None else {"runs": []})
    with preserved_rng(active=plan.seed is not None or session.side_by_side):
        try:
            session.go()
        finally:
            plan.batches.finish()
    return session.runs


def check_paths(plan: Plan) -> None:
    """Refuse to overwrite a checkpoint that is not being resumed, and data that cannot be resumed.

    :raises ValueError: for either.
    """
    if plan.checkpoint is None:
        return
    path = Path(plan.checkpoint)
    if path.exists() and (plan.resume is None or path.resolve() != Path(plan.resume).resolve()):
        raise ValueError(
            f"checkpoint={str(path)!r} exists already and would be overwritten: pass resume={str(path)!r} to continue "
            "it, or another path."
        )
    if not path.parent.is_dir():
        raise ValueError(f"checkpoint={str(path)!r}: expected an existing directory, {str(path.parent)!r} is none.")
    if not plan.batches.resumable:
        raise ValueError(
            "checkpoint= needs data that can be gone through again, got a one-shot iterator: expected a DataLoader, "
            "another re-iterable, or an iterator with state_dict() and load_state_dict()."
        )


def _check_data(plan: Plan) -> None:
    if isinstance(plan.batches, OneShot) and plan.restarts > 1:
        raise ValueError(
            f"restarts={plan.restarts} need data that can be gone through again, got a one-shot iterator: expected a "
            "DataLoader or another re-iterable. Pass a list of its items, or use restarts=1."
        )


class _Session:
    """The restarts so far, and what of them is in the file."""

    def __init__(self, plan: Plan, content: Mapping[str, Any]) -> None:
        self.plan, self.content = plan, content
        self.runs: list[Run] = []
        self.states: dict[int, dict[str, Any]] = {}
        self.description: dict[str, Any] = {}
        self.base = int(torch.randint(2**31, ())) if plan.seed is None and self.side_by_side else 0
        self.signature: dict[str, str] | None = None
        self.initial: dict[str, Tensor] = content.get("initial", clone(plan.recipe.tensors()))
        if len(content["runs"]) > plan.restarts:
            raise ValueError(
                f"the checkpoint {fspath(plan.resume or '')!r} holds {len(content['runs'])} restarts, got "
                f"restarts={plan.restarts}: expected at least as many."
            )
        if 0 < len(content["runs"]) < plan.restarts:  # the others start where the first did
            sizes = [
                {name: str(tuple(t.shape)) for name, t in x.items()} for x in (self.initial, plan.recipe.tensors())
            ]
            compare(fspath(plan.resume or ""), "modules", *sizes)  # whose dtype a run in place may have changed

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
        make = self.plan.make_update
        compiled = isinstance(make, CompiledUpdates) and make.mode in ("trace", True, "auto")
        return compiled and self.plan.restarts > 1 and isinstance(self.plan.batches, FullData)

    def _go_side_by_side(self) -> None:
        progress = Progress(self.plan.watch.num_steps, 1, self.plan.progress)
        members: list[Member] = []

        def report(run: Run) -> None:
            if run is next((m.trainer.run for m in members if not m.trainer.run.reason), run):
                progress(run)

        try:
            for index in range(self.plan.restarts):
                trainer, found = self._started(index, report)
                self.runs.append(trainer.run)
                if not found:
                    members.append(Member(len(members), trainer))
            Lockstep(members, self._write).train()
        except TrainingError as error:
            error.runs = [run for run in self.runs if run.reason]
            raise
        finally:
            progress.close()
        if all(run.reason == "interrupted" and not run.losses for run in self.runs):
            raise KeyboardInterrupt
        self.runs = [run for run in self.runs if run.losses or run.reason == "found"]

    def _go_one_by_one(self) -> None:
        for index in range(self.plan.restarts):
            progress = Progress(self.plan.watch.num_steps, self.plan.restarts, self.plan.progress)
            try:
                run = self._train(index, progress)
            except KeyboardInterrupt:  # before the first step of this restart
                if not self.runs:
                    raise
                return
            except TrainingError as error:
                error.runs = list(self.runs)
                raise
            finally:
                progress.close()
            if run.reason == "interrupted":
                return

    def _started(self, index: int, report: Callable[[Run], None]) -> tuple[Trainer, bool]:
        """A restart before its next step, and whether nothing is left to train."""
        saved = self.content["runs"][index] if index < len(self.content["runs"]) else None
        run, objective, start = self._begin(index, saved)
        watch = replace(self.plan.watch, report=report, save=self._saver(index, start))
        with run.scope():
            trainer = self._trainer(run, objective, watch, saved)
            return trainer, begin(trainer, self.plan.init)

    def _train(self, index: int, progress: Progress) -> Run:
        trainer, found = self._started(index, progress)
        run = trainer.run
        with run.scope():
            if not found:
                trainer.train()
            if run.reason == "interrupted" and not run.losses:
                raise KeyboardInterrupt
            if not run.losses and not found:
                raise ValueError("data= yielded no batch: expected at least one.")
        self.runs.append(run)
        return run

    def _begin(self, index: int, saved: Mapping[str, Any] | None) -> tuple[Run, Any, dict[str, Any]]:
        seed = None if self.plan.seed is None else self.plan.seed + index
        if saved is not None:
            set_rng_state(saved["start"])
        elif seed is not None or self.side_by_side:  # streams that run side by side must not be one
            pyro.set_rng_seed(self.base + index if seed is None else seed)
        start = rng_state()
        environment = self.plan.recipe.environment
        with environment.active():
            model, guide, objective = self.plan.programs(
                self.initial if self.content["runs"] and saved is None else None
            )
        self.plan.batches.start(index, seed)
        return Run(index, model, guide, environment, seed), objective, start

    def _trainer(self, run: Run, objective: Any, watch: Watch, saved: Mapping[str, Any] | None) -> Trainer:
        if saved is not None:
            call = self.plan.batches.peek()
            take_back(run, saved)
            evaluate(objective, run.model, run.guide, call)  # parameters exist once the programs have run
            self._check_same(run, call, saved)
        trainer = Trainer(run, objective, self.plan.make_update(), self.plan.batches, watch)
        return trainer if saved is None else self._put_back(trainer, saved)

    def _put_back(self, trainer: Trainer, saved: Mapping[str, Any]) -> Trainer:
        run = trainer.run
        run.losses, run.monitored = list(saved["losses"]), list(saved["monitored"])
        run.seconds, run.rollbacks = saved["seconds"], saved["rollbacks"]
        unfinished = saved["reason"] in ("", "num_steps") and run.step < self.plan.watch.num_steps
        if unfinished:
            self.plan.batches.set_state(saved["batches"])
            self.plan.batches.size = saved.get("batch_size")
        trainer.restore(saved)  # the random state comes last: building and running the guide has used it
        trainer.good = trainer.capture()
        run.reason = "" if unfinished else saved["reason"]
        self.states[run.index] = {**saved}
        return trainer

    def _saver(self, index: int, start: dict[str, Any]) -> Callable[[Trainer], None] | None:
        if self.plan.checkpoint is None:
            return None

        def save(trainer: Trainer) -> None:
            self.states[index] = {**run_state(trainer), "start": start}
            self.description = self._description(trainer)
            if not self.side_by_side:
                self._write()

        return save

    def _write(self) -> None:
        """Put what is new into the file; a restart that has no state yet will start anew, and those behind it too."""
        if self.plan.checkpoint is not None and self.description:
            states = takewhile(lambda state: state is not None, map(self.states.get, range(self.plan.restarts)))
            checkpoint.save(self.plan.checkpoint, {**self.description, "runs": list(states)})
            self.description = {}

    def _description(self, trainer: Trainer) -> dict[str, Any]:
        if self.signature is None:
            self.signature = signature(trainer.run, trainer.call)
        return {"model": self.signature, "settings": dict(self.plan.settings or {}), "initial": self.initial}

    def _check_same(self, run: Run, call: Call, saved: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another model, guide, objective, optimiser or data."""
        name = fspath(self.plan.resume or "")
        compare(name, "parameters", shapes(saved["params"]), shapes(dict(pyro.get_param_store().named_parameters())))
        compare(name, "buffers", shapes(saved["buffers"]), shapes(run.buffers()))
        compare(name, "sites", self.content["model"], signature(run, call))
        compare(name, "settings", self.content["settings"], dict(self.plan.settings or {}))


def run_state(trainer: Trainer) -> dict[str, Any]:
    """What the continuation of a run depends on, as of its last good state."""
    run = trainer.run
    return {
        **trainer.good,
        "losses": list(map(float, run.losses)),
        "monitored": list(run.monitored),
        "reason": run.reason,
        "seconds": run.seconds,
        "rollbacks": run.rollbacks,
        "batches": trainer.batches.get_state(),
        "batch_size": trainer.batches.size,
    }


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Shape and dtype of every tensor, readable.

    Example:
        >>> import torch
        >>> shapes({"loc": torch.zeros(3)})
        {'loc': '(3,) torch.float32'}
    """
    return {name: f"{tuple(t.shape)} {t.dtype}" for name, t in tensors.items()}


def signature(run: Run, call: Call) -> dict[str, str]:
    """The sample sites of the programs: distribution, event shape and plates (not their sizes, which batches change).

    Empty for programs that only Pyro's own objectives can run.
    """
    try:
        with unobtrusive(run), isolated():
            joint = execute(run.model, run.guide, *call)
    except ValueError:
        return {}
    sites = {"model": joint.model, "guide": joint.guide}
    return {
        f"{role}.{name}": f"{type(s['fn']).__name__} {tuple(s['fn'].event_shape)} {[p.name for p in site_plates(s)]}"
        for role, trace in sites.items()
        for name, s in sample_sites(trace)
        if not is_deterministic(s)
    }


def compare(path: str, what: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check that a checkpoint belongs to this run.

    :raises ValueError: with every difference.
    """
    keys = sorted({*saved, *given})
    found = [f"{k}: {saved.get(k, 'none')} in the file, {given.get(k, 'none')} here" for k in keys]
    wrong = [line for k, line in zip(keys, found, strict=True) if saved.get(k) != given.get(k)]
    if wrong:
        raise ValueError(
            f"the checkpoint {path!r} is of another model or run; its {what} differ: {'; '.join(wrong)}. Expected the "
            "call of fit that wrote it. The file was left as it is."
        )


@contextmanager
def scratch() -> Iterator[None]:
    """Try programs out: the random state and the parameter store are put back."""
    with preserved_rng(), pyro.get_param_store().scope():
        yield


def check_apart(plan: Plan) -> None:
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


def _trial(plan: Plan) -> dict[str, Tensor]:
    with scratch(), plan.recipe.environment.active():
        model, guide, objective = plan.programs()
        call = plan.batches.peek()
        _ = plain_run(model, *call) if searches(guide) else evaluate(objective, model, guide, call)
        return dict(pyro.get_param_store().named_parameters())


def best_of(runs: list[Run], comparable: bool) -> int:
    """Index of the run with the least score; the first where the objective is not comparable between runs."""
    return min(runs, key=lambda run: run.score).index if comparable else 0


def publish(run: Run) -> None:
    """Leave a restart's parameters in the global store; others that are there stay."""
    store = pyro.get_param_store()
    for name in run.store["params"]:
        if name in store:
            del store[name]
    store.set_state(run.store)
