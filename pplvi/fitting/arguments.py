"""The arguments of ``fit``: what is accepted, and what is said of the rest."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pyro.infer
import torch
from pyro.infer.elbo import ELBO as PyroELBO

from pplvi.fitting.clock import Clock, Timing
from pplvi.kinds.kinds import is_number, is_whole
from pplvi.losses.base import Loss
from pplvi.programs.calls import check_counts, to_call
from pplvi.programs.handlers import sized
from pplvi.programs.inputs import to_inputs
from pplvi.programs.state import Environment
from pplvi.programs.ways import Vectorize
from pplvi.training.batches import Batches, FullData
from pplvi.training.optimizers import OptimLike
from pplvi.training.replicas import Recipe
from pplvi.training.restart import scratch
from pplvi.training.stopping import Plateau
from pplvi.training.watch import Monitor
from pplvi.types import Program

_PYRO_BOUNDS = (
    pyro.infer.Trace_ELBO,
    pyro.infer.TraceGraph_ELBO,
    pyro.infer.TraceEnum_ELBO,
    pyro.infer.TraceTMC_ELBO,
    pyro.infer.RenyiELBO,
)


def monitor_of(objective: Any) -> str | None:
    """``"lower"`` or ``"upper"`` for a loss that bounds the log evidence, ``None`` for one that does not.

    >>> monitor_of(pyro.infer.Trace_ELBO()), monitor_of(pyro.infer.ReweightedWakeSleep())
    ('lower', None)
    """
    if hasattr(objective, "monitor"):
        found: str | None = objective.monitor
        return found
    return "lower" if isinstance(objective, _PYRO_BOUNDS) else None


def stopping_rule(stop: Any, schedule: Any) -> Plateau | None:
    """The rule that ``stop`` names.

    :raises ValueError: for anything else.
    """
    if stop == "auto":
        return Plateau() if schedule is not None else None
    if stop is None or isinstance(stop, Plateau):
        return stop
    raise ValueError(f"stop={stop!r}: expected 'auto', None, or a pplvi.training.stopping.Plateau.")


def named_monitor(monitor: Any, environment: Environment) -> Monitor | None:
    """The loss to judge by that the user named, with its data where the model is.

    :raises ValueError: if it is no loss.
    """
    if monitor is None:
        return None
    whole = monitor if isinstance(monitor, Monitor) else Monitor(monitor)
    check_loss(whole.objective, "monitor")
    if whole.held_back is None:
        return whole
    args, kwargs = to_inputs(None, *to_call(whole.held_back), environment)
    return replace(whole, held_back=kwargs or args)


def optimizer_of(optim: OptimLike, learning_rate: float | None) -> OptimLike:
    """The optimiser, or Adam with the learning rate.

    :raises ValueError: for both, or a rate that is no positive number.
    """
    if learning_rate is None:
        return optim
    if optim is not None:
        raise ValueError(
            f"learning_rate={learning_rate!r} beside optim=: expected one of them, since an optimiser has a learning "
            "rate of its own. Leave optim= out for Adam."
        )
    if not (is_number(learning_rate) and 0 < learning_rate < torch.finfo(torch.float32).max):
        raise ValueError(f"learning_rate={learning_rate!r}: expected a positive number, such as 0.01.")
    return partial(torch.optim.Adam, lr=float(learning_rate))


def recipe_of(model: Program, guide: Any, batches: Batches, restarts: int, environment: Environment) -> Recipe:
    """How the programs of the restarts are made.

    :raises ValueError: for a guide that is none, or one module for several restarts.
    """
    if isinstance(guide, str) or not callable(guide):
        raise ValueError(
            f"guide={guide!r}: expected a guide class such as pyro.infer.autoguide.AutoNormal or pplvi.AutoFlow, a "
            "function from the model to a guide, a guide, 'auto', or 'nuts'."
        )
    if isinstance(guide, torch.nn.Module) and restarts > 1:
        raise ValueError(
            f"restarts={restarts} need a guide each, got one {type(guide).__name__}: expected its class, or a function "
            f"from the model to a guide, such as lambda model: {type(guide).__name__}(model)."
        )
    makes_guide = not isinstance(guide, torch.nn.Module) and makes_guides(guide, model, batches)
    if makes_guide:
        guide = _of_sized_plates(guide, model, batches, environment)
    return Recipe(model, guide, makes_guide, restarts > 1, environment)


def _of_sized_plates(
    guide: Callable[..., Any], model: Program, batches: Batches, environment: Environment
) -> Callable[..., Any]:
    """What makes a guide, given the model with plates that have sizes: automatic guides make plates of their own."""
    args, kwargs = batches.call if isinstance(batches, FullData) else batches.peek()
    with (
        scratch(),
        environment.active(),
        suppress(Exception),
    ):  # what is wrong with the model is said where it is trained
        if sized(model, args, kwargs) is not model:
            return lambda model: guide(sized(model, args, kwargs))
    return guide


def makes_guides(guide: Callable[..., Any], model: Program, batches: Batches) -> bool:
    """Whether a callable makes guides (a class, a function of the model) or is one.

    What takes exactly one argument, named ``model``, makes guides, and so does what cannot take the arguments of the
    model. What can take either is tried on the model: guides return no callable.
    """
    if isinstance(guide, type):
        return True
    if not _takes(guide, (model,), {}):
        return False
    if next(iter(inspect.signature(guide).parameters), "") == "model":
        return True
    call = batches.call if isinstance(batches, FullData) else batches.peek()
    if not _takes(guide, *call):
        return True
    with scratch():
        try:
            return callable(guide(model))
        except Exception:  # a guide that was given a model in place of its data may fail in any way
            return False


def _takes(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def check_loss(loss: Any, name: str) -> Any:
    """A loss, as it is.

    :raises ValueError: for anything else.
    """
    if isinstance(loss, type) or not (isinstance(loss, PyroELBO) or callable(loss)):
        raise ValueError(f"{name}={loss!r}: expected a loss such as pplvi.ELBO(), or pyro.infer.Trace_ELBO().")
    return loss


def in_way(objective: Any, vectorize: Vectorize) -> Any:
    """An objective that runs its particles in this way; the same one if it does so already."""
    if vectorize is None or not isinstance(objective, Loss):
        return objective
    objective = copy.copy(objective)
    objective.vectorize_particles = vectorize
    return objective


def check_model(model: Any) -> None:
    """Check that this is a program.

    :raises ValueError: if not.
    """
    if isinstance(model, type):
        raise ValueError(
            f"model={model.__name__}: expected a Pyro program, got a class. Model and guide may be swapped: "
            "fit(model, guide). Of a module, pass an instance."
        )
    if not callable(model):
        raise ValueError(f"model={model!r}: expected a Pyro program, that is a callable with pyro.sample statements.")


def check_numbers(**numbers: Any) -> None:
    """Check that what is given, and not ``None``, is a whole number of at least 1.

    :raises ValueError: with the name, if not.
    """
    check_counts(**{name: value for name, value in numbers.items() if value is not None})


def check_seed(seed: Any, restarts: int) -> None:
    """Check that every restart has a seed.

    :raises ValueError: if not.
    """
    if seed is None:
        return
    if not (is_whole(seed) and 0 <= seed <= 2**32 - restarts):
        raise ValueError(f"seed={seed!r}: expected a whole number from 0 to 2**32 - restarts, or None.")


def refuse(given: Mapping[str, Any], what: str, others: str) -> None:
    """Refuse arguments that say nothing to MCMC or ``"auto"``.

    :param given: by name, ``None`` for those that were left alone.
    :param others: those that do.
    :raises ValueError: with the names.
    """
    if found := sorted(name for name, value in given.items() if value is not None):
        raise ValueError(f"{what} has no use for {found}: expected args, kwargs, {others}restarts and seed.")


def check_budget(budget: Any) -> None:
    """Check the seconds of ``"auto"``.

    :raises ValueError: if they are no positive number.
    """
    if budget is None or isinstance(budget, (Clock, Timing)):
        return
    if not (is_number(budget) and budget > 0):
        raise ValueError(f"budget={budget!r}: expected a positive number of seconds, or the timing of a fit.")
