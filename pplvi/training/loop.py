"""The loop of one restart: step, watch, stop, and go back when a loss is not a number.

Nothing here knows about guides or ArviZ. The replaceable core is a :class:`pplvi.training.Stepper`; the loop
around it keeps the trace, takes a copy of the state every :data:`SETTLE_EVERY` steps, and returns to the last copy
when the loss or a parameter is no longer finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pplvi.programs.errors import warn
from pplvi.programs.first_run import first_bad_site
from pplvi.programs.ranks import RanksLeftError
from pplvi.programs.state import clone, rng_state, set_rng_state
from pplvi.training.batches import Batches
from pplvi.training.restart import Restart, TrainingError, bad_parameter, copy_into, is_numerical
from pplvi.training.steps import StepLoss, Steps, Turns, drive, next_calls
from pplvi.training.watch import Watch
from pplvi.types import Call

SETTLE_EVERY = 50
MAX_ROLLBACKS = 10


class Trainer:
    """Trains one :class:`Restart`; call :meth:`train` inside ``run.scope()``.

    :param run: the restart.
    :param objective: a Pyro ``ELBO``, or a loss as ``SVI`` takes it.
    :param steps: makes what takes the steps.
    :param batches: where the data come from.
    :param watch: what is done between the steps.
    """

    def __init__(self, run: Restart, objective: Any, steps: Steps, batches: Batches, watch: Watch) -> None:
        self.run, self.batches, self.watch = run, batches, watch
        self.stepper = steps(run.model, run.guide, objective, self.settle)
        self.update, run.exact = self.stepper.update, self.stepper.exact
        self.good: dict[str, Any] = {}
        self.settle()
        self.call: Call = ((), {})
        self.since: list[Call]  # the calls of the steps since the last good state

    def train(self) -> None:
        """Take steps until there is a reason to end.

        :raises TrainingError: if the loss stays non-finite after :data:`MAX_ROLLBACKS` returns to a good state with
            half the learning rate each; the message names the first site at fault.
        """
        drive(self.turns(), self.stepper.many)

    def turns(self) -> Turns:
        """Ask for steps on some calls, and look at the losses that are sent back, until there is a reason to end."""
        before, start = self.run.seconds, time.perf_counter()
        self.run.reason = "" if self.run.step < self.watch.num_steps else "num_steps"
        try:
            while not self.run.reason:
                yield from self._advance()
                self.run.seconds = before + time.perf_counter() - start
            self.stepper.answered(bool)  # nothing: of several ranks, one may have been interrupted in the last step
        except RanksLeftError:
            raise
        except KeyboardInterrupt:
            self.run.reason = "interrupted"
            self._read()
            if self.good["step"]:  # or else it starts anew, with the random numbers of its start
                self._save()
        self._read()

    def _advance(self) -> Turns:
        most = self.stepper.stride(self.run.step, self.batches, self.watch, SETTLE_EVERY)
        if not (calls := next_calls(self.batches, most)):
            self._end("data")
            return
        self.call = calls[-1]
        if (yield from self._attempt(calls)):
            self._after_step(self.call)

    def _attempt(self, calls: Sequence[Call]) -> Generator[Sequence[Call], Sequence[StepLoss], bool]:
        """Take steps; false if one failed and they were taken back."""
        careful = self.capture() if self.run.rollbacks else self.good
        call = calls[0]
        self.since.extend(calls)
        try:
            losses = yield calls
        except (ValueError, LinAlgError) as error:
            if not is_numerical(error):
                raise
            if self.run.step == 0:  # half a learning rate does not change where training starts
                raise self._failure(call, careful, 0, error) from error
            return self._roll_back(call, careful, error)
        if not isinstance(loss := losses[0], Tensor) and not math.isfinite(loss):
            return self._roll_back(call, careful, f"the loss is {loss}")
        self.run.losses.extend(losses)
        return not self._is_due() or self._check(call, careful)

    def _is_due(self) -> bool:
        step = self.run.step
        return step % SETTLE_EVERY == 0 or step >= self.watch.num_steps or self._is_save_due()

    def _is_save_due(self) -> bool:
        return self.watch.save is not None and self.run.step % self.watch.save_every == 0

    def _check(self, call: Call, careful: dict[str, Any]) -> bool:
        self._read()
        if self.stepper.agreed(bad := bad_parameter()):
            return self._roll_back(call, careful, f"parameter {bad!r} is not finite")
        if not all(map(math.isfinite, self.run.losses[self.good["step"] :])):
            return self._roll_back(call, careful, "the loss is not finite")
        return True

    def _read(self) -> None:
        """Turn losses that are still tensors into numbers, all at once."""
        late = [i for i, loss in enumerate(self.run.losses) if isinstance(loss, Tensor)]
        values = torch.stack([self.run.losses[i].detach() for i in late]).tolist() if late else []
        for i, value in zip(late, values, strict=True):
            self.run.losses[i] = value

    def _after_step(self, call: Call) -> None:
        run, watch = self.run, self.watch
        if watch.monitor is not None and run.step % watch.monitor.every == 0:
            run.monitored.append(self.stepper.watched(watch.monitor, run, call))
        due = self._is_due()
        reason = self._reason_to_end()
        if due or reason:
            self.settle()
        if reason:
            self._end(reason)
        elif self._is_save_due():
            self._save()
        asked = [partial(callback, run) for callback in watch.callbacks]
        if asked and self.stepper.answered(lambda: sum(bool(ask()) for ask in asked)) and not run.reason:
            self._end("callback")
        watch.report(run)

    def _end(self, reason: str) -> None:
        self.run.reason = reason
        self._read()
        if self.watch.monitor is not None and self.run.losses and not self.run.monitored:
            self.run.monitored.append(self.stepper.watched(self.watch.monitor, self.run, self.call))
        self.settle()
        self._save()

    def _save(self) -> None:
        if self.watch.save is not None:
            self.watch.save(self)

    def _reason_to_end(self) -> str:
        left = self.update.left
        if left is not None and left <= 0:
            return "converged"
        if self.run.step >= self.watch.num_steps:
            return "num_steps"
        if left is not None or not self._is_flat():
            return ""
        # Where that can be, the last steps are small ones, so that the iterate settles before the end.
        return "" if self.update.cool_down(max(SETTLE_EVERY, self.run.step // 4)) else "converged"

    def _is_flat(self) -> bool:
        """Ask the stopping rule, whose counts are in entries of the trace that it looks at."""
        stop, monitor = self.watch.stop, self.watch.monitor
        if stop is None or not stop.is_due(self.run.step):
            return False
        self._read()
        return (
            stop.reached(self.run.losses)
            if monitor is None
            else stop.thinned(monitor.every).reached(self.run.monitored)
        )

    def capture(self) -> dict[str, Any]:
        """A copy of all that the next steps depend on, except for the data."""
        params = dict(pyro.get_param_store().named_parameters())
        return {
            "params": clone(params),
            "buffers": clone(self.run.buffers()),
            "update": self.stepper.get_state(),
            "rng": rng_state(),
            "step": self.run.step,
            "watched": len(self.run.monitored),
        }

    def restore(self, state: Mapping[str, Any], rng: bool = True) -> None:
        """Go back to a copy; parameters that were made since are forgotten."""
        store = pyro.get_param_store()
        for name in set(store.keys()) - set(state["params"]):
            del store[name]
        params = dict(store.named_parameters())
        copy_into(params, state["params"])
        copy_into(self.run.buffers(), state["buffers"])
        for p in params.values():
            p.grad = None
        self.stepper.set_state(state["update"])
        del self.run.losses[state["step"] :], self.run.monitored[state["watched"] :]
        if rng:
            set_rng_state(state["rng"])

    def settle(self) -> None:
        """Take a copy of the state, with the place in the data that goes with it, to come back to."""
        place = {"batches": self.batches.get_state(), "batch_size": self.batches.size}
        self.good, self.since = {**self.capture(), **place}, []

    def _roll_back(self, call: Call, careful: Mapping[str, Any], cause: object) -> bool:
        """Return to the last good state with half the learning rate.

        The random state goes back too, unless the step right after the good state failed: the same draws with the same
        parameters would fail again.
        """
        failed = self.run.step
        self.run.rollbacks += 1
        if self.run.rollbacks > MAX_ROLLBACKS:
            raise self._failure(call, careful, failed, cause)
        backoff = self.update.backoff
        self.restore(self.good, rng=self.good["step"] < failed)
        self.update.backoff = 0.5 * backoff
        self.settle()
        self._save()
        warn(
            f"restart {self.run.index}, step {failed}: {cause}. Went back to step {self.run.step} and halved the "
            f"learning rate ({self.run.rollbacks} of at most {MAX_ROLLBACKS} times).",
        )
        return False

    def _failure(self, call: Call, careful: Mapping[str, Any], failed: int, cause: object) -> ValueError:
        # Losses that were not looked at one by one are looked at again, from where all was well.
        state, calls = (self.good, self.since) if self.stepper.reads_late else (careful, [call])
        self.restore(state)
        site = self.stepper.replay(partial(first_bad_site, self.run.model, self.run.guide), calls)
        self.restore(self.good)
        where = f"the first site at fault is {site!r}" if site else "every site is finite, but its gradient is not"
        tries = self.run.rollbacks - 1
        again = f", and after {tries} returns to a good state with half the learning rate each" if tries > 0 else ""
        return TrainingError(
            f"training failed at step {failed} of restart {self.run.index}{again}: {where}. "
            f"Last cause: {cause}\nExpected finite log densities: check the data and the scales of the priors, try a "
            "smaller learning rate, another init_loc_fn, or float64."
        )
