"""One restart: its parameters in a scope of their own, and how they are published."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import pyro
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pplvi.programs.errors import warn
from pplvi.programs.parts import local
from pplvi.programs.state import Environment, buffers_of, clone, preserved_rng
from pplvi.types import Call, Program

TAIL = 0.1


@dataclass(frozen=True)
class Ended:
    """What is kept of a training that has ended, to go on from there.

    :ivar state: of the restart, as in a checkpoint (:func:`pplvi.training.resume.run_state`).
    :ivar call: the last batch, or the full data.
    :ivar settings: readable ones that a continuation has to share.
    :ivar initial: what the user's modules were worth before the first restart.
    """

    state: Mapping[str, Any] = field(default_factory=dict)
    call: Call = ((), {})
    settings: Mapping[str, Any] = field(default_factory=dict)
    initial: Mapping[str, Tensor] = field(default_factory=dict)


class Restart:
    """One restart: its programs, its parameters in a scope of their own, and the trace of its objective.

    :ivar losses: the objective at every step, in nats.
    :ivar monitored: a monitor named by the user, evaluated now and then, in nats; empty without one.
    :ivar reason: why training ended: ``"num_steps"``, ``"converged"``, ``"callback"``, ``"data"`` (an iterator was
        used up), ``"found"`` (the guide found itself) or ``"interrupted"``; empty while it goes on.
    :ivar exact: whether losses have no Monte Carlo error, so that the last one is the score.
    :ivar rollbacks: how many times training went back because of a loss that was not finite.
    :ivar ended: what a continuation needs, once training has ended.
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
        self.exact = False
        self.ended = Ended()

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Make the restart's parameters, dtype and device the global ones inside the block."""
        with self.environment.active(), pyro.get_param_store().scope(self.store):
            _INSIDE.append(self)
            try:
                yield
            finally:
                _INSIDE.pop()

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
        tail = trace[-1 if self.exact else -max(1, int(TAIL * len(trace))) :]
        return sum(map(float, tail)) / len(tail) if tail else math.inf

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters by name, constrained and detached."""
        with self.scope():
            return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}

    def buffers(self) -> dict[str, Tensor]:
        """Buffers of the modules behind model and guide."""
        return buffers_of(model=self.model, guide=self.guide)


_INSIDE: list[Restart] = []
"""The runs whose scopes are open, the innermost last."""

_THREAD = threading.RLock()


class ScopedProgram:
    """A program that runs under the parameters of its restart, whatever the global store holds."""

    def __init__(self, program: Program, run: Restart) -> None:
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

    runs: Sequence[Restart] = ()


def bad_parameter() -> str | None:
    """The first parameter in the store that is not finite."""
    named = pyro.get_param_store().named_parameters()
    return next((name for name, p in named if not bool(local(p).detach().isfinite().all())), None)


def is_numerical(error: Exception) -> bool:
    """Whether an error came from numbers that ran away, and not from a mistake in a program or the data."""
    named = any(text in str(error) for text in ("Expected parameter", "the log density at site"))
    return isinstance(error, LinAlgError) or named or bad_parameter() is not None


def evaluate(objective: Any, model: Program, guide: Program, call: Call) -> float:
    """The loss without its gradient, in nats."""
    function: Callable[..., Any] = getattr(objective, "loss", objective)
    with torch.no_grad():
        loss = function(model, guide, *call[0], **call[1])
    return float(sum(loss) if isinstance(loss, tuple) else loss)


@contextmanager
def unobtrusive(run: Restart) -> Iterator[None]:
    """Run programs without a trace: the random state and the buffers of modules are put back."""
    buffers = clone(run.buffers())
    with preserved_rng():
        yield
    copy_into(run.buffers(), buffers)


def copy_into(target: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Set tensors in place: modules and the parameter store go on sharing them."""
    with torch.no_grad():
        for name, value in values.items():
            target[name].copy_(value)


@contextmanager
def scratch() -> Iterator[None]:
    """Try programs out: the random state and the parameter store are put back."""
    with preserved_rng(), pyro.get_param_store().scope():
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Refuse what is inside to all threads but one: Pyro's handlers and parameters are those of the whole process.

    :raises ValueError: in a second thread.
    """
    if not _THREAD.acquire(blocking=False):
        raise ValueError(
            "another thread of this process is in fit(): expected one at a time, since Pyro's handlers and its "
            "parameter store belong to the process. Fit in processes of their own, or one after another."
        )
    try:
        yield
    finally:
        _THREAD.release()


_LEFT: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
"""Parameters that fits have left in the global store, by name."""


def publish(run: Restart) -> None:
    """Leave a restart's parameters in the global store; others that are there stay.

    Inside of another fit, such as in its callback, the store is that fit's, which goes on with it as it is. A parameter
    of the same name and another shape, which no fit has left there, is replaced with a warning.
    """
    if _INSIDE:
        return
    store = pyro.get_param_store()
    mine = run.store["params"]
    old = {name: store._params[name] for name in mine if name in store}
    if other := sorted(n for n, x in old.items() if x.shape != mine[n].shape and x is not _LEFT.get(n)):
        warn(
            f"parameters {other} of Pyro's global store, which are another program's, are replaced by those of this "
            "fit: give them other names, or fit inside of `with pyro.get_param_store().scope():`."
        )
    for name in mine:
        if name in store:
            del store[name]
    store.set_state(run.store)
    _LEFT.update({name: store._params[name] for name in mine})
