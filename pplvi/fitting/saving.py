"""What a file holds of a fit: its parameters or draws, its data, and how its guide was made; no code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import pyro
import torch

from pplvi.programs.reparam import Reparametrized
from pplvi.programs.running import plain_run
from pplvi.programs.state import clone
from pplvi.programs.ways import Vectorize
from pplvi.training import checkpoint
from pplvi.training.checkpoint import PathLike, encode
from pplvi.training.describe import describe
from pplvi.training.restart import Restart
from pplvi.training.resume import describe_sites, signature
from pplvi.types import Call, Program

_LIBRARIES = {"pyro": "pyro.infer.autoguide", "pplvi": "pplvi.guides"}


class Saveable(Protocol):
    """What is read of a fit to save it: see :class:`pplvi.fitting.Fit`."""

    runs: list[Restart]
    best: int
    args: tuple[Any, ...] | None
    kwargs: dict[str, Any]
    guide_name: str
    origin: Any
    reformed: bool
    objective: Any
    seed: int | None
    is_bound: bool
    vectorize: Vectorize
    notes: dict[str, str]
    mcmc: Any

    @property
    def seconds(self) -> float:
        """Time that it took."""
        ...


def save(fit: Saveable, path: PathLike, data: bool) -> None:
    """Write a fit into a file that :func:`pplvi.load` reads, and ``fit(resume=...)`` goes on from.

    :raises ValueError: for data that a file cannot hold, and where the file cannot be written.
    """
    best = fit.runs[fit.best]
    call = _data_of(fit) if data else None
    content: dict[str, Any] = {
        "model": _signature(fit, best),
        "settings": best.ended.settings,
        "initial": best.ended.initial,
        "runs": [run.ended.state for run in fit.runs if run.ended.state],
        "fit": {**_facts(fit), "data": call, "runs": list(map(_state_of, fit.runs)), "mcmc": _chains(fit)},
    }
    checkpoint.write(path, content)


def _facts(fit: Saveable) -> dict[str, Any]:
    with fit.runs[fit.best].environment.active():
        dtype = str(torch.get_default_dtype()).removeprefix("torch.")
    return {
        "best": fit.best,
        "guide_name": fit.guide_name,
        "guide": recipe_of_guide(fit.origin),
        "form": _form(fit),
        "objective": None if fit.objective is None else describe(fit.objective),
        "seed": fit.seed,
        "is_bound": fit.is_bound,
        "vectorize": fit.vectorize,
        "notes": fit.notes,
        "seconds": fit.seconds,
        "whole": fit.args is not None,
        "dtype": dtype,
    }


def _form(fit: Saveable) -> dict[str, Any] | None:
    """The form of the model that ``"auto"`` took, if it is not as written."""
    model = fit.runs[fit.best].model
    if not (fit.reformed and isinstance(model, Reparametrized)):
        return None
    return {"centered": model.centered, "sites": sorted(model.sites or ())}


def _data_of(fit: Saveable) -> Any:
    """Arguments and keyword arguments: the full data or, without them, the last minibatch."""
    call: Call = fit.runs[fit.best].ended.call if fit.args is None else (fit.args, fit.kwargs)
    try:
        return encode(call, "data")
    except ValueError as error:
        raise ValueError(
            f"the data cannot be saved: {str(error).split(':')[0]}. Expected tensors, arrays, numbers, strings and "
            "containers of them. Use fit.save(path, data=False), and give load(path, model, args=...) the data."
        ) from error


def _state_of(run: Restart) -> dict[str, Any]:
    with run.scope():
        params = clone(dict(pyro.get_param_store().named_parameters()))
    return {
        "index": run.index,
        "seed": run.seed,
        "losses": list(map(float, run.losses)),
        "monitored": list(run.monitored),
        "reason": run.reason,
        "seconds": run.seconds,
        "rollbacks": run.rollbacks,
        "params": params,
        "buffers": clone(run.buffers()) if run.ended.state else {},
        "start": run.ended.state.get("start"),
    }


def _signature(fit: Saveable, run: Restart) -> dict[str, str]:
    call = run.ended.call if fit.args is None else (fit.args, fit.kwargs)
    return signature_of(run, call, chains=fit.mcmc is not None)


def signature_of(run: Restart, call: Call, chains: bool) -> dict[str, str]:
    """The sample sites of model and guide; of MCMC chains those of the model."""
    with run.scope():
        return describe_sites("model", plain_run(run.model, *call).model) if chains else signature(run, call)


def _chains(fit: Saveable) -> dict[str, Any] | None:
    if fit.mcmc is None:
        return None
    return {"samples": dict(fit.mcmc.get_samples(group_by_chain=True)), "diagnostics": fit.mcmc.diagnostics()}


def recipe_of_guide(origin: Any) -> dict[str, Any] | None:
    """The name and the options of a guide class of Pyro or of this package, ``None`` for what is neither.

    >>> from pplvi.guides import AutoFlow
    >>> recipe_of_guide(partial(AutoFlow, flow="iaf"))
    {'library': 'pplvi', 'name': 'AutoFlow', 'options': {'flow': 'iaf'}}
    """
    kind, options = (origin.func, origin.keywords) if isinstance(origin, partial) and not origin.args else (origin, {})
    name = getattr(kind, "__name__", "")
    library = next((lib for lib in _LIBRARIES if isinstance(kind, type) and _guide_class(lib, name) is kind), None)
    if library is None:
        return None
    try:
        return {"library": library, "name": name, "options": encode(dict(options))}
    except ValueError:  # functions, modules: they have to be given again
        return None


def _guide_class(library: str, name: str) -> type | None:
    """A class that a library exports, ``None`` for anything else."""
    module = import_module(_LIBRARIES[library]) if library in _LIBRARIES else None
    found = getattr(module, name) if module is not None and name in module.__all__ else None
    return found if isinstance(found, type) else None


def guide_of_recipe(recipe: Mapping[str, Any]) -> Callable[[Program], Any]:
    """The class that a file names, with its options.

    :raises ValueError: for a name that neither library has.

    >>> guide_of_recipe({"library": "pyro", "name": "AutoNormal", "options": {}}).__name__
    'AutoNormal'
    """
    kind = _guide_class(recipe["library"], recipe["name"])
    if kind is None:
        raise ValueError(f"the file names the guide {recipe['name']!r}, which is not known here: expected guide=.")
    return partial(kind, **recipe["options"]) if recipe["options"] else kind
