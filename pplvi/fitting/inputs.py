"""What ``fit`` is given as data: converted, checked and, where there is none, told of before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pplvi.programs.checks import check_model_run, has_data
from pplvi.programs.errors import warn
from pplvi.programs.inputs import check_finite, to_inputs
from pplvi.programs.running import plain_run
from pplvi.programs.state import Environment
from pplvi.training.restart import scratch
from pplvi.types import Call, Program


def checked_inputs(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], environment: Environment) -> Call:
    """The arguments of a model as its program takes them: tensors, on the device and in the dtype.

    :raises ValueError: for NaN or infinite numbers that a density depends on.

    >>> import pyro, pyro.distributions as dist
    >>> def model(y):
    ...     pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)
    >>> checked_inputs(lambda y: model(y[0]), ([1, 2],), {}, Environment())
    ((tensor([1, 2]),), {})
    """
    environment.move_module(model)
    with scratch(), environment.active():
        call = to_inputs(model, args, kwargs, environment)
        check_finite(model, *call)
    return call


def warn_of_no_data(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], environment: Environment) -> None:
    """Say at once that a model that is given data, or could be, observes nothing; one that takes none is a target.

    It is no error: fitting the prior is a check of model and guide.
    """
    given = any(isinstance(value, Tensor) and value.dim() > 0 for value in (*args, *kwargs.values()))
    if not (given or _takes_data(model)):
        return
    with scratch(), environment.active():
        try:
            found = has_data(plain_run(model, args, kwargs))
        except Exception:  # told where the model is really run
            return
    if not found:
        warn(
            "the model observes nothing with these arguments: no site has obs= and there is no pyro.factor, so that "
            "the posterior is the prior. Pass the data in args= or kwargs=, or condition the model on them.",
        )


def _takes_data(model: Program) -> bool:
    try:
        parameters = inspect.signature(getattr(model, "forward", model)).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.default is None for p in parameters)


def check_chains(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], environment: Environment) -> None:
    """What guides are checked for before the first step, of a model for MCMC.

    :raises ValueError: for a model without latents, undeclared batch dimensions, and NaN in the data.
    """
    with scratch(), environment.active():
        check_model_run(plain_run(model, args, kwargs))
