"""What happens before the first step: guides that find themselves search, others may start where Pathfinder ends."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import pyro
from torch import Tensor

from pplvi.compile.iterating import RecordedMap
from pplvi.compile.svi import CompileMode
from pplvi.fitting.recorded import RecordedDensity
from pplvi.guides.conjugate.auto import AutoConjugate
from pplvi.guides.recording import Recorder
from pplvi.guides.search.base import FoundGuide, Search
from pplvi.guides.search.batch_and_match import AutoBatchAndMatch
from pplvi.guides.search.pathfinder import AutoPathfinder
from pplvi.guides.search.proximal import AutoProximal
from pplvi.guides.search.start import start_at_pathfinder
from pplvi.losses.elbo import ELBO
from pplvi.programs.deadline import is_time_over
from pplvi.programs.running import plain_run
from pplvi.training.batches import FullData
from pplvi.training.loop import Trainer
from pplvi.training.plan import Start
from pplvi.training.restart import Restart, evaluate, unobtrusive
from pplvi.types import Call, Program

_NUMBERS = 2**21  # of latent values that are scored at once
SEARCHES: dict[str, Any] = {"pathfinder": AutoPathfinder, "match": AutoBatchAndMatch}


def check_init(init: Any) -> None:
    """Check ``fit``'s argument of this name.

    :raises ValueError: for an unknown one.
    """
    if init is not None and init not in SEARCHES:
        raise ValueError(f"init={init!r}: expected one of {list(SEARCHES)}, or None for the guide's own init_loc_fn.")


class SearchedStart(Start):
    """Guides that find themselves search before the first step; others may start at a Gaussian that was searched for.

    :param init: ``"pathfinder"``, ``"match"``, or ``None`` for the guide's own start.
    :param compile: how sweeps of coordinate ascent and iterations of sparse codes are recorded.
    """

    def __init__(self, init: str | None = None, compile: CompileMode = False) -> None:
        self.init, self.compile = init, compile

    def begin(self, trainer: Trainer) -> bool:
        """Search for a guide that finds itself, or start one at Pathfinder's Gaussian.

        :returns: whether nothing is left to train.
        :raises ValueError: for minibatches, and where the search fails.
        """
        run = trainer.run
        if run.reason == "found":
            return True
        if run.step or not (self.init or self.searches(run.guide)):
            return False
        if isinstance(run.guide, Search) and run.guide.takes_minibatches and not isinstance(trainer.batches, FullData):
            return False
        start = time.perf_counter()
        done = self._ascend(trainer) if isinstance(run.guide, AutoConjugate) else self._begin_at_full_data(trainer)
        run.seconds = time.perf_counter() - start
        if done:
            _finish(trainer)
        return done

    def searches(self, guide: Program) -> bool:
        """Whether a guide finds itself, so that its first run is a search."""
        return isinstance(guide, Search)

    def needs_all_data(self, guide: Program) -> bool:
        """Whether there is a search, for this guide or for where it starts."""
        return self.init is not None or self.searches(guide)

    def take_back(self, run: Restart, saved: Mapping[str, Any]) -> None:
        """Give a guide that finds itself what a checkpoint holds of it, so that it does not search again."""
        if self.searches(run.guide) and saved["reason"] == "found":
            named = {
                name.removeprefix("guide."): b for name, b in saved["buffers"].items() if name.startswith("guide.")
            }
            cast(Any, run.guide).load_state_dict(named)

    def _begin_at_full_data(self, trainer: Trainer) -> bool:
        call = trainer.call = _full_call(trainer, self.init)
        return self._search(trainer, call)

    def _ascend(self, trainer: Trainer) -> bool:
        """Sweep to the end, or take one natural-gradient step for each minibatch."""
        run, guide = trainer.run, cast(AutoConjugate, trainer.run.guide)
        if guide.rate is None:
            call = trainer.call = _full_call(trainer, None)
            guide.recorder = self._recorder()
            guide.run(*call[0], **call[1])
            if _parameters(run, call):
                return False
            run.losses.extend(-bound for bound in guide.bounds)
            run.monitored.append(-guide.bounds[-1])
            return True
        if self.compile not in (False, "auto"):
            raise ValueError(
                f"compile={self.compile!r} of AutoConjugate with minibatches: expected compile=False, since the "
                "program is read anew for each of them. Sweeps over all data at once are recorded."
            )
        for _ in range(trainer.watch.num_steps):
            try:
                call = trainer.call = next(trainer.batches)
            except StopIteration:
                break
            guide.step(*call[0], **call[1])
            run.losses.append(-guide.bounds[-1])
        return True

    def _recorder(self) -> Recorder | None:
        return None if self.compile is False else cast(Recorder, partial(RecordedMap, mode=self.compile))

    def _search(self, trainer: Trainer, call: Call) -> bool:
        run, guide = trainer.run, cast(Any, trainer.run.guide)
        if not self.searches(guide):
            start_at_pathfinder(guide, run.model, *call, search=SEARCHES[cast(str, self.init)])
            return False
        if isinstance(guide, FoundGuide):
            guide.make_density = RecordedDensity
        if isinstance(guide, AutoProximal):
            guide.recorder = self._recorder()
        guide.run(*call[0], **call[1])
        if _parameters(run, call):
            return False
        run.monitored.append(_score(trainer, guide, call))
        return True


def _finish(trainer: Trainer) -> None:
    trainer.run.reason = "found"
    trainer.settle()
    if trainer.watch.save is not None:
        trainer.watch.save(trainer)


def _full_call(trainer: Trainer, init: str | None) -> Call:
    if not isinstance(trainer.batches, FullData):
        what = type(trainer.run.guide).__name__ if init is None else f"init={init!r}"
        raise ValueError(
            f"{what} searches with all data at once, got minibatches (data=): expected args= with the full data. Start "
            "other guides by init_loc_fn=init_to_pathfinder(model, full_args)."
        )
    return next(trainer.batches)


def _parameters(run: Restart, call: Call) -> list[Tensor]:
    """What of the model can be trained."""
    with unobtrusive(run):
        plain_run(run.model, *call)
    return [p for _, p in pyro.get_param_store().named_parameters() if p.requires_grad]


def _score(trainer: Trainer, guide: Any, call: Call) -> float:
    """What the best restart has the least of: the user's monitor, or minus the ELBO."""
    run, monitor = trainer.run, trainer.watch.monitor
    if monitor is not None:
        return monitor(run, call)
    size, done, total = max(1, _NUMBERS // max(1, getattr(guide, "latent_dim", 1))), 0, 0.0
    with unobtrusive(run):
        while done < guide.score_draws and not (done and is_time_over()):
            some = min(size, guide.score_draws - done)
            loss = evaluate(ELBO(some, vectorize_particles=guide.vectorize), run.model, guide, call)
            done, total = done + some, total + some * loss
    return total / done
