"""The loop of one restart: step, watch, stop, and go back when a loss is not a number.

Nothing here knows about guides or ArviZ. The replaceable core is a :data:`pplvi.stepping.Step`; the loop
around it keeps the trace, takes a copy of the state every :data:`SETTLE_EVERY` steps, and returns to the last copy
when the loss or a parameter is no longer finite.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pplvi.batches import Batches
from pplvi.optimizers import Update
from pplvi.programs.first_run import first_bad_site
from pplvi.programs.state import Environment, buffers_of, clone, preserved_rng, rng_state, set_rng_state
from pplvi.rates import Cosine
from pplvi.stepping import Loss, Turns, drive, next_calls, replayed, stride, svi_step
from pplvi.stopping import Plateau
from pplvi.types import Call, Program

SETTLE_EVERY = 50
MAX_ROLLBACKS = 10
TAIL = 0.1


class Run:
    """One restart: its programs, its parameters in a scope of their own, and the trace of its objective.

    :ivar losses: the objective at every step, in nats.
    :ivar monitored: a monitor named by the user, evaluated now and then, in nats; empty without one.
    :ivar reason: why training ended: ``"num_steps"``, ``"converged"``, ``"callback"``, ``"data"`` (an iterator was
        used up), ``"found"`` (the guide found itself) or ``"interrupted"``; empty while it goes on.
    :ivar rollbacks: how many times training went back because of a loss that was not finite.
    """

    def __init__(
        self, index: int, model: Program, guide: Program, environment: Environment, seed: int | None = None
    ) -> None:
        self.index, self.model, self.guide, self.seed = index, model, guide, seed
        self.environment = environment
        self.store: Any = {"params": {}, "constraints": {}}
        self.losses: list[Any] = []
        self.monitored: list[float] = []
        self.reason, self.seconds, self.rollbacks = "", 0.0, 0

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Make the restart's parameters, dtype and device the global ones inside the block."""
        with self.environment.active(), pyro.get_param_store().scope(self.store):
            yield

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return len(self.losses)

    @property
    def loss(self) -> float:
        """The last loss, in nats."""
        return float(self.losses[-1])

    @property
    def score(self) -> float:
        """Mean of the last tenth of the monitor's trace, in nats: what the best restart has the least of."""
        trace = self.monitored or self.losses
        tail = trace[-max(1, int(TAIL * len(trace))) :]
        return sum(map(float, tail)) / len(tail) if tail else math.inf

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters by name, constrained and detached."""
        with self.scope():
            return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}

    def buffers(self) -> dict[str, Tensor]:
        """Buffers of the modules behind model and guide."""
        return buffers_of(model=self.model, guide=self.guide)


class ScopedProgram:
    """A program that runs under the parameters of its restart, whatever the global store holds."""

    def __init__(self, program: Program, run: Run) -> None:
        self.program, self.run = program, run
        self.__wrapped__ = program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program inside the restart's scope."""
        with self.run.scope():
            return self.program(*args, **kwargs)


class TrainingError(ValueError):
    """A loss that stays non-finite.

    :ivar runs: the restarts that were finished before.
    """

    runs: Sequence[Run] = ()


def evaluate(objective: Any, model: Program, guide: Program, call: Call) -> float:
    """The loss without its gradient, in nats."""
    function: Callable[..., Any] = getattr(objective, "loss", objective)
    with torch.no_grad():
        loss = function(model, guide, *call[0], **call[1])
    return float(sum(loss) if isinstance(loss, tuple) else loss)


@contextmanager
def unobtrusive(run: Run) -> Iterator[None]:
    """Run programs without a trace: the random state and the buffers of modules are put back."""
    buffers = clone(run.buffers())
    with preserved_rng():
        yield
    copy_into(run.buffers(), buffers)


@dataclass(frozen=True)
class Monitor:
    """A loss that the user named to watch, evaluated every ``every`` steps on held-back data if there are any."""

    objective: Any
    held_back: Call | None = None
    every: int = 10

    def __call__(self, run: Run, call: Call) -> float:
        """Its value (nats); the random state is left as it was, so that watching changes nothing."""
        with unobtrusive(run):
            return evaluate(self.objective, run.model, run.guide, self.held_back or call)


@dataclass
class Watch:
    """What is looked at between the steps.

    :ivar num_steps: the most steps to take.
    :ivar stop: when to stop before that; ``None`` for never.
    :ivar monitor: a loss to watch beside the objective.
    :ivar callbacks: called with the run after every step, inside its scope; returning true ends it.
    :ivar save: writes a checkpoint.
    :ivar save_every: steps between checkpoints.
    :ivar report: called with the run after every step, for a progress bar.
    """

    num_steps: int
    stop: Plateau | None = None
    monitor: Monitor | None = None
    callbacks: Sequence[Callable[[Run], Any]] = ()
    save: Callable[[Trainer], None] | None = None
    save_every: int = 500
    report: Callable[[Run], None] = field(default=lambda run: None)


def copy_into(target: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Set tensors in place: modules and the parameter store go on sharing them."""
    with torch.no_grad():
        for name, value in values.items():
            target[name].copy_(value)


class Trainer:
    """Trains one :class:`Run`; call :meth:`train` inside ``run.scope()``.

    :param run: the restart.
    :param objective: a Pyro ``ELBO``, or a loss as ``SVI`` takes it.
    :param update: clips, schedules and steps.
    :param batches: where the data come from.
    :param watch: what is done between the steps.
    """

    def __init__(self, run: Run, objective: Any, update: Update, batches: Batches, watch: Watch) -> None:
        self.run, self.update, self.batches, self.watch = run, update, batches, watch
        self.step: Any = svi_step(run.model, run.guide, update, objective)
        self.update.before_first = self._settle
        self.good: dict[str, Any] = self.capture()
        self.call: Call = ((), {})

    def train(self) -> None:
        """Take steps until there is a reason to end.

        :raises TrainingError: if the loss stays non-finite after :data:`MAX_ROLLBACKS` returns to a good state with
            half the learning rate each; the message names the first site at fault.
        """
        drive(self.turns(), self.take)

    def take(self, calls: Sequence[Call]) -> Sequence[Loss]:
        """One step on each of these calls."""
        return self.step.many(calls) if len(calls) > 1 else [self.step(*calls[0])]

    def turns(self) -> Turns:
        """Ask for steps on some calls, and look at the losses that are sent back, until there is a reason to end."""
        before, start = self.run.seconds, time.perf_counter()
        self.run.reason = "" if self.run.step < self.watch.num_steps else "num_steps"
        try:
            while not self.run.reason:
                yield from self._advance()
                self.run.seconds = before + time.perf_counter() - start
        except KeyboardInterrupt:
            self.run.reason = "interrupted"
        self._read()

    def _advance(self) -> Turns:
        most = stride(self.step, self.run.step, self.update, self.batches, self.watch, SETTLE_EVERY)
        if not (calls := next_calls(self.batches, most)):
            self._end("data")
            return
        self.call = calls[-1]
        if (yield from self._attempt(calls)):
            self._after_step(self.call)

    def _attempt(self, calls: Sequence[Call]) -> Generator[Sequence[Call], Sequence[Loss], bool]:
        """Take steps; false if one failed and they were taken back."""
        careful = self.capture() if self.run.rollbacks else self.good
        call = calls[0]
        try:
            losses = yield calls
        except (ValueError, LinAlgError) as error:
            if not self._is_numerical(error):
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
        if (bad := self._bad_parameter()) is not None:
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
            run.monitored.append(watch.monitor(run, call))
        due = self._is_due()
        reason = self._reason_to_end()
        if due or reason:
            self._settle()
        if reason:
            self._end(reason)
        elif self._is_save_due():
            self._save()
        answers = [callback(run) for callback in watch.callbacks]
        if any(answers) and not run.reason:
            self._end("callback")
        watch.report(run)

    def _end(self, reason: str) -> None:
        self.run.reason = reason
        self._read()
        if self.watch.monitor is not None and self.run.losses and not self.run.monitored:
            self.run.monitored.append(self.watch.monitor(self.run, self.call))
        self._settle()
        self._save()

    def _save(self) -> None:
        if self.watch.save is not None:
            self.watch.save(self)

    def _reason_to_end(self) -> str:
        schedule = self.update.schedule
        cooling = isinstance(schedule, Cosine) and schedule.cooling
        if isinstance(schedule, Cosine) and cooling and self.update.count >= schedule.end:
            return "converged"
        if self.run.step >= self.watch.num_steps:
            return "num_steps"
        if cooling or not self._is_flat():
            return ""
        if isinstance(schedule, Cosine):  # the last steps are small ones, so the iterate settles before the end
            schedule.cool_down(self.update.count, max(SETTLE_EVERY, self.run.step // 4))
            return ""
        return "converged"

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
            "update": self.update.get_state(),
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
        self.update.set_state(state["update"])
        del self.run.losses[state["step"] :], self.run.monitored[state["watched"] :]
        if rng:
            set_rng_state(state["rng"])

    def _settle(self) -> None:
        self.good = self.capture()

    def _is_numerical(self, error: Exception) -> bool:
        """Whether an error came from numbers that ran away, and not from a mistake in a program or the data."""
        named = any(text in str(error) for text in ("Expected parameter", "the log density at site"))
        return isinstance(error, LinAlgError) or named or self._bad_parameter() is not None

    def _bad_parameter(self) -> str | None:
        named = pyro.get_param_store().named_parameters()
        return next((name for name, p in named if not bool(p.detach().isfinite().all())), None)

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
        warnings.warn(
            f"restart {self.run.index}, step {failed}: {cause}. Went back to step {self.run.step} and halved the "
            f"learning rate ({self.run.rollbacks} of at most {MAX_ROLLBACKS} times).",
            stacklevel=2,
        )
        return False

    def _failure(self, call: Call, careful: Mapping[str, Any], failed: int, cause: object) -> ValueError:
        self.restore(careful)
        find = partial(first_bad_site, self.run.model, self.run.guide, *call)
        site = replayed(self.step, find, call, SETTLE_EVERY)
        self.restore(self.good)
        where = f"the first site at fault is {site!r}" if site else "every site is finite, but its gradient is not"
        tries = self.run.rollbacks - 1
        again = f", and after {tries} returns to a good state with half the learning rate each" if tries > 0 else ""
        return TrainingError(
            f"training failed at step {failed} of restart {self.run.index}{again}: {where}. "
            f"Last cause: {cause}\nExpected finite log densities: check the data and the scales of the priors, try a "
            "smaller learning rate, another init_loc_fn, or float64."
        )
