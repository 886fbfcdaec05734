"""The state of a run, and whether a checkpoint belongs to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pplvi.programs.joint import execute
from pplvi.programs.parts import is_part
from pplvi.programs.running import isolated
from pplvi.programs.sites import base_distribution, is_deterministic, latent_sites, sample_sites, site_plates
from pplvi.training.checkpoint import PathLike, damaged
from pplvi.training.plan import TrainingPlan
from pplvi.training.restart import Restart, unobtrusive
from pplvi.training.watch import Training
from pplvi.types import Call


def check_paths(plan: TrainingPlan) -> None:
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
    if not plan.batches.resumable:
        raise ValueError(
            "checkpoint= needs data that can be gone through again, got a one-shot iterator: expected a DataLoader, "
            "another re-iterable, or an iterator with state_dict() and load_state_dict()."
        )


def run_state(trainer: Training) -> dict[str, Any]:
    """What the continuation of a run depends on, as of its last good state."""
    run, good = trainer.run, trainer.good
    state = {
        **good,
        "losses": list(map(float, run.losses[: good["step"]])),
        "monitored": list(run.monitored[: good["watched"]]),
        "reason": "" if run.reason == "interrupted" else run.reason,
        "seconds": run.seconds,
        "rollbacks": run.rollbacks,
    }
    return trainer.stepper.packed(state)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Shape and dtype of every tensor, readable, and whether every rank has a part of it.

    >>> import torch
    >>> shapes({"loc": torch.zeros(3)})
    {'loc': '(3,) torch.float32'}
    """
    return {name: f"{tuple(t.shape)} {t.dtype}{' in parts' * is_part(t)}" for name, t in tensors.items()}


def signature(run: Restart, call: Call) -> dict[str, str]:
    """The sample sites of the programs: distribution, event shape and plates (not their sizes, which batches change).

    Empty for programs that only Pyro's own objectives can run.
    """
    try:
        with unobtrusive(run), isolated():
            joint = execute(run.model, run.guide, *call)
    except ValueError:
        return {}
    return {**describe_sites("model", joint.model), **describe_sites("guide", joint.guide)}


def constants(run: Restart, call: Call) -> dict[str, str]:
    """The numbers in the model's priors, by site: those that neither draws nor parameters nor data have moved.

    They are what two runs with other draws agree on, where all elements of a distribution have the same.
    """
    with unobtrusive(run), isolated(), torch.enable_grad():
        try:
            traces = [execute(run.model, run.guide, *call).model for _ in range(2)]
        except ValueError:
            return {}
    found = [
        {
            f"model.{name}.{argument}": value
            for name, site in latent_sites(trace).items()
            if not is_deterministic(site)
            for argument, value in _numbers(base_distribution(site["fn"])).items()
        }
        for trace in traces
    ]
    return {name: value for name, value in found[0].items() if found[1].get(name) == value}


def _numbers(fn: Any) -> dict[str, str]:
    values = {name: getattr(fn, name, None) for name in fn.arg_constraints if name in vars(fn)}
    return {
        name: f"{float(x.flatten()[0]):.6g}"
        for name, x in values.items()
        if isinstance(x, Tensor) and x.numel() and not x.requires_grad and bool((x == x.flatten()[0]).all())
    }


def describe_sites(role: str, trace: Any) -> dict[str, str]:
    """Distribution, event shape and plates of the sites of a trace that are drawn or observed."""
    return {
        f"{role}.{name}": f"{type(s['fn']).__name__} {tuple(s['fn'].event_shape)} {[p.name for p in site_plates(s)]}"
        for name, s in sample_sites(trace)
        if not is_deterministic(s)
    }


@contextmanager
def put_back(path: PathLike) -> Iterator[None]:
    """Give inner states back, such as those of optimisers: what they say of a wrong one is said of the file.

    :raises ValueError: for a file whose inner state is no such state.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise damaged(path, f"an inner state of it is none: {type(error).__name__}, {error}") from error


def check_equal(path: str, what: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
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
