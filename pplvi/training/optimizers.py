"""How parameters move: clip the gradient, scale the learning rate, and let a Pyro or torch optimiser make the step.

An :class:`Update` is a ``pyro.optim.PyroOptim``, so it goes to ``SVI`` as it is. Pyro's own optimisers hold one torch
optimiser per parameter; what needs all gradients at once, such as a norm, and what has to be the same for all
parameters, such as a schedule, is done here. Parameters are always visited in the order of their names, so that
floating point sums are the same in every process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.optim.optim import _get_state_dict, _load_state_dict, is_scheduler
from torch import Tensor
from torch.optim import Optimizer

from pplvi.compile.flat_optimizers import OptimFactory, TorchFactory
from pplvi.programs.parts import local
from pplvi.programs.state import clone
from pplvi.training.per_program import PerProgram
from pplvi.training.schedules import Cosine, Schedule, make_clip, make_schedule

OptimLike = OptimFactory | type[Optimizer] | Mapping[str, OptimFactory] | None

DEFAULT_LR = 0.01


class Engine(Protocol):
    """What makes the step once gradients are clipped: adapters of Pyro's and torch's optimisers.

    :ivar optim: what makes the optimisers themselves.
    """

    optim: Any

    def at(self, call: tuple[Any, ...]) -> None:
        """Take note of the programs, and of the call that the next step is for."""

    def prepare(self, named: dict[str, Tensor]) -> None:
        """Make sure that each of these parameters has an optimiser."""

    def groups(self) -> Iterable[dict[str, Any]]:
        """Parameter groups, whose ``"lr"`` may be changed."""

    def step(self, named: dict[str, Tensor]) -> None:
        """Move these parameters."""

    def advance(self) -> None:
        """Advance the optimiser's own schedule, if it has one."""

    def get_state(self) -> dict[str, Any]:
        """State by parameter name (references, not copies)."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Forget all optimisers; rebuild them from this state when their parameters are next seen."""


class PyroEngine:
    """One torch optimiser per parameter, as ``pyro.optim.PyroOptim`` has it."""

    def __init__(self, optim: PyroOptim) -> None:
        self.optim: Any = copy.copy(optim)  # a run must not leave its state in the user's object
        waiting = clone(optim._state_waiting_to_be_consumed)
        self.set_state(waiting)

    def at(self, call: tuple[Any, ...]) -> None:
        """Programs do not matter."""

    def prepare(self, named: dict[str, Tensor]) -> None:
        """Do what ``PyroOptim.__call__`` does for new parameters, but before the step."""
        for name, p in named.items():
            if p not in self.optim.optim_objs:
                self.optim.optim_objs[p] = self.optim._get_optim(p)
                self.optim.grad_clip[p] = self.optim._get_grad_clip(p)
                if (state := self.optim._state_waiting_to_be_consumed.pop(name, None)) is not None:
                    _load_state_dict(self.optim.optim_objs[p], state)

    def groups(self) -> Iterator[dict[str, Any]]:
        """The groups of every parameter's optimiser."""
        for optimizer in self.optim.optim_objs.values():
            yield from (optimizer.optimizer if is_scheduler(optimizer) else optimizer).param_groups

    def step(self, named: dict[str, Tensor]) -> None:
        """Step the optimisers of these parameters."""
        self.optim(list(named.values()))

    def advance(self) -> None:
        """A ``PyroLRScheduler`` advances once a step."""
        if isinstance(self.optim, PyroLRScheduler):
            self.optim.step()

    def get_state(self) -> dict[str, Any]:
        """State of each parameter's optimiser, seen or waiting."""
        name_of = pyro.get_param_store().param_name
        live = {str(name_of(p)): _get_state_dict(o) for p, o in self.optim.optim_objs.items()}
        return {**self.optim._state_waiting_to_be_consumed, **live}

    def set_state(self, state: dict[str, Any]) -> None:
        """Start over from this state."""
        self.optim.optim_objs, self.optim.grad_clip = {}, {}
        self.optim._state_waiting_to_be_consumed = dict(state)


class PerProgramEngine(PyroEngine):
    """An optimiser each for model and guide."""

    def at(self, call: tuple[Any, ...]) -> None:
        """Tell it which is which."""
        self.optim.call = call


class TorchEngine:
    """One torch optimiser over all parameters; parameters that appear later form further groups."""

    def __init__(self, factory: TorchFactory) -> None:
        self.optim = factory
        self.optimizer: Optimizer | None = None
        self.names: list[list[str]] = []
        self.parameters: dict[str, Tensor] = {}
        self._waiting: dict[str, Any] = {}

    def at(self, call: tuple[Any, ...]) -> None:
        """Programs do not matter."""

    def prepare(self, named: dict[str, Tensor]) -> None:
        """Build the optimiser, from the waiting state if there is one, and add the parameters it does not have."""
        if self.optimizer is None and self._waiting:
            self._rebuild()
        new = [name for name in named if name not in self.parameters]
        if new:
            self._add(new, named)
        for name, p in self.parameters.items():
            if name not in named:
                p.grad = None  # Pyro leaves zeros behind, and Adam would move on them

    def _rebuild(self) -> None:
        store = dict(pyro.get_param_store().named_parameters())
        made = [self._add(names, store) for names in self._waiting["names"]]
        made[-1].load_state_dict(self._waiting["state"])
        self._waiting = {}

    def _add(self, names: list[str], found: Mapping[str, Tensor]) -> Optimizer:
        params = [found[name] for name in names]
        if self.optimizer is None:
            self.optimizer = _checked(self.optim(params), self.optim)
        else:
            self.optimizer.add_param_group({"params": params})
        self.names.append(list(names))
        self.parameters.update(zip(names, params, strict=True))
        return self.optimizer

    def groups(self) -> Iterable[dict[str, Any]]:
        """The optimiser's groups."""
        return [] if self.optimizer is None else self.optimizer.param_groups

    def step(self, named: dict[str, Tensor]) -> None:
        """Step the optimiser."""
        (self.optimizer or self._add(list(named), named)).step()

    def advance(self) -> None:
        """A torch optimiser has no schedule of its own."""

    def get_state(self) -> dict[str, Any]:
        """The optimiser's state and the names that its indices stand for."""
        if self.optimizer is None:
            return self._waiting
        return {"names": self.names, "state": self.optimizer.state_dict()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Start over from this state."""
        self.optimizer, self.names, self.parameters, self._waiting = None, [], {}, state


def _checked(optimizer: Any, factory: Any) -> Optimizer:
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optim={factory!r} returned {type(optimizer).__name__}: expected a callable that takes the list of "
            "parameters and returns a torch.optim.Optimizer, such as functools.partial(torch.optim.Adam, lr=0.01)."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optim=LBFGS evaluates the loss several times a step: expected once, as Adam or SGD do.")
    return optimizer


def resolve(optim: OptimLike) -> Engine:
    """The engine for what the user gave; ``None`` is Adam with learning rate 0.01.

    :raises ValueError: for anything but a ``PyroOptim``, a torch optimiser class or a callable that returns one.
    """
    if optim is None:
        return TorchEngine(partial(torch.optim.Adam, lr=DEFAULT_LR))
    if isinstance(optim, Mapping):
        return PerProgramEngine(PerProgram(optim))
    if isinstance(optim, PerProgram):
        return PerProgramEngine(optim)
    if isinstance(optim, PyroOptim):
        return PyroEngine(optim)
    if callable(optim) and not isinstance(optim, Optimizer):
        return TorchEngine(optim)
    raise ValueError(
        f"optim={type(optim).__name__}: expected a pyro.optim optimiser, a torch optimiser class, a callable that "
        "takes the list of parameters and returns a torch optimiser (parameters exist only once the guide has run), or "
        "a dictionary of two of these, for 'model' and 'guide'."
    )


@contextmanager
def _scaled(groups: Iterable[dict[str, Any]], factor: float) -> Iterator[None]:
    """Multiply learning rates for one step, and keep what the optimiser itself does to them in that step."""
    groups = [g for g in groups if "lr" in g] if factor != 1.0 else []
    before = [g["lr"] for g in groups]
    for g in groups:
        g["lr"] = g["lr"] * factor
    during = [g["lr"] for g in groups]
    yield
    for g, old, scaled in zip(groups, before, during, strict=True):
        g["lr"] = old if g["lr"] is scaled or factor == 0.0 else g["lr"] / factor


def _own_norm(named: Mapping[str, Tensor]) -> None:
    """The norm of the gradient is that of the gradients here."""


def _named(name: str | None) -> str:
    if name is None:
        raise ValueError(
            "a parameter is not in Pyro's parameter store: expected every one to be there, by name. Switch off "
            "pyro.settings' module_local_params."
        )
    return name


class Update(PyroOptim):
    """Clip, scale the learning rate, step: an optimiser for ``SVI`` that also goes back in time.

    :param optim: a Pyro optimiser, a torch optimiser class, or a callable from the list of parameters to a torch
        optimiser; ``{"model": ..., "guide": ...}`` with one of these for each; ``None`` is Adam with learning rate
        0.01.
    :param num_steps: length of the ``"cosine"`` schedule.
    :param schedule: ``"cosine"``, ``None``, or a callable from the step to a factor of the learning rate.
    :param clip: ``"adaptive"``, ``None``, or the largest norm of the gradient of all parameters together.
    :raises ValueError: for an argument of another kind.

    >>> loc = pyro.param("loc", torch.tensor(3.0)).unconstrained()
    >>> (loc**2).backward()
    >>> Update(partial(torch.optim.SGD, lr=0.5), schedule=None, clip=2.0)([loc])
    >>> round(loc.item(), 4)
    2.0
    """

    def __init__(
        self,
        optim: OptimLike = None,
        num_steps: int = 1000,
        schedule: str | Schedule | None = "cosine",
        clip: str | float | None = "adaptive",
    ) -> None:
        self.engine = resolve(optim)
        self.schedule = make_schedule(schedule, num_steps, scheduled=isinstance(optim, PyroLRScheduler))
        self.clip = make_clip(clip)
        self.count, self.backoff = 0, 1.0
        self.norm: Callable[[Mapping[str, Tensor]], Tensor | None] = _own_norm

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Make one step with the gradients that the parameters carry."""
        name_of = pyro.get_param_store().param_name
        named = dict(sorted((_named(name_of(p)), p) for p in params))
        if not named:
            raise ValueError(
                "neither the model nor the guide has parameters, so there is nothing to train: expected pyro.param, a "
                "PyroModule or an autoguide (a bare pyro.poutine.block() around the guide hides its parameters)."
            )
        gradients = [local(p.grad) for p in named.values() if p.grad is not None]
        if self.clip is not None and gradients:
            self.clip(gradients, self.norm(named))
        self.engine.prepare(named)
        with _scaled(self.engine.groups(), self.factor):
            self.engine.step(named)
        self.engine.advance()
        self.count += 1

    @property
    def factor(self) -> float:
        """What learning rates are multiplied with in the next step."""
        return self.factor_at(self.count)

    def factor_at(self, step: int) -> float:
        """What learning rates are multiplied with in this step."""
        return self.backoff * (1.0 if self.schedule is None else self.schedule(step))

    def at(self, *call: Any) -> None:
        """Tell optimisers for model and guide the programs and the call that the next step is for."""
        self.engine.at(call)

    @property
    def left(self) -> int | None:
        """Steps until a schedule whose end was brought forward is over; ``None`` for others."""
        schedule = self.schedule
        return schedule.end - self.count if isinstance(schedule, Cosine) and schedule.cooling else None

    def cool_down(self, length: int) -> bool:
        """Bring the end of the schedule forward, to so many steps from here; whether it has one that can be."""
        if not isinstance(self.schedule, Cosine):
            return False
        self.schedule.cool_down(self.count, length)
        return True

    def restart_schedule(self) -> None:
        """Let the rates of a cosine schedule start anew at this step."""
        if isinstance(self.schedule, Cosine):
            self.schedule.restart(self.count)

    def get_state(self) -> dict[str, Any]:
        """A copy of everything that the next steps depend on."""
        clip = {} if self.clip is None else {"clip": self.clip.state_dict()}
        return clone({**self.pace(), "engine": self.engine.get_state(), **clip})

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`get_state` was called."""
        state = clone(state_dict)
        self.set_pace(state)
        self.engine.set_state(state["engine"])
        if self.clip is not None:
            self.clip.load_state_dict(state["clip"])

    def pace(self) -> dict[str, Any]:
        """How many steps were taken, and what the size of the next ones depends on."""
        schedule: Any = self.schedule
        stateful = {"schedule": schedule.state_dict()} if hasattr(schedule, "state_dict") else {}
        return clone({"count": self.count, "backoff": self.backoff, **stateful})

    def set_pace(self, state: Mapping[str, Any]) -> None:
        """Continue at the pace of :meth:`pace`."""
        self.count, self.backoff = state["count"], state["backoff"]
        schedule: Any = self.schedule
        if hasattr(schedule, "load_state_dict"):
            schedule.load_state_dict(clone(state["schedule"]))
