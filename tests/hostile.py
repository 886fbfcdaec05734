"""Hostile values for every argument of every public class and function, found by their signatures.

A new public name is walked without a word here, unless it needs an argument of a kind that :data:`EXAMPLES` has no
value of: then that is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

import pplvi
from pplvi import energies, models, objectives, programs, samplers

SECONDS = 10.0  # of CPU time
Y = torch.tensor([0.5, -0.3, 1.2])
BINARY = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])


def model(y: torch.Tensor = Y) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def local_model(y: torch.Tensor = Y) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def guide(y: torch.Tensor = Y) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))


def rbm() -> Any:
    return pplvi.RestrictedBoltzmannMachine(3, 2)


def network() -> Any:
    return pplvi.DeepBeliefNetwork([3, 2, 2])


def amortized() -> Any:
    return pplvi.AutoAmortized(local_model, torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1))), "data")


def seen() -> Any:
    made = amortized()
    made(Y)
    return made


@cache
def draws() -> Any:
    return pplvi.Posterior(model, guide, num_draws=20, seed=0)


@cache
def saved() -> str:
    path = str(Path(tempfile.mkdtemp()) / "fit.pt")
    short_fit().save(path)
    return path


@cache
def short_fit() -> Any:
    return pplvi.fit(model, AutoNormal, num_steps=3, seed=0, progress=False)


def compared() -> Any:
    numbers = {"elpd_loo": [-30.0, -32.0], "se": [1.0, 1.1], "elpd_diff": [0.0, -2.0], "dse": [0.0, 0.5]}
    table = pandas.DataFrame(numbers, index=["flow", "normal"])
    return table.assign(rank=[0, 1], p_loo=1.0, weight=0.5, warning=False)


def step() -> Any:
    return objectives.Step.from_proposal(torch.zeros(4), torch.ones(4))


# What an argument without a default can be: by its name, or by owner and name where the name stands for several things.
EXAMPLES: dict[str, Callable[[], Any]] = {
    "model": lambda: model,
    "target": lambda: model,
    "base": lambda: guide,
    "initial": lambda: guide,
    "prior": lambda: guide,
    "proposal": lambda: guide,
    "guide": lambda: guide,
    "targets": lambda: (guide, model),
    "steps": lambda: [(guide, guide, model)],
    "args": lambda: (),
    "kwargs": dict,
    "log_weight": lambda: torch.zeros(5),
    "x": lambda: torch.zeros(5),
    "values": lambda: torch.ones(5),
    "step": step,
    "run": lambda: lambda: guide(),
    "machine": rbm,
    "network": network,
    "data": lambda: BINARY,
    "v": lambda: BINARY,
    "training": lambda: BINARY,
    "validation": lambda: BINARY,
    "samples": lambda: BINARY,
    "images": lambda: torch.rand(4, 9),
    "dictionary": lambda: torch.randn(3, 2),
    "maximum_mean_discrepancy x": lambda: torch.rand(4, 2),
    "maximum_mean_discrepancy y": lambda: torch.rand(4, 2),
    "data_hash x": lambda: BINARY,
    "widths": lambda: [3, 2, 2],
    "units": lambda: energies.BernoulliUnits(3),
    "layers": lambda: {"v": energies.BernoulliUnits(3), "h": energies.BernoulliUnits(2)},
    "connections": lambda: [("v", "h")],
    "coding": lambda: models.BinarySparseCoding(3, 2),
    "source": draws,
    "reference": draws,
    "fits": lambda: {"a": draws(), "b": draws()},
    "encoder": lambda: torch.nn.Linear(3, 2),
    "plates": lambda: "data",
    "sites": lambda: "z",
    "objective": lambda: objectives.RenyiBound(0.0),
    "optims": lambda: {"model": torch.optim.Adam, "guide": torch.optim.Adam},
    "losses": lambda: list(range(40)),
    "path": lambda: "/nowhere/run.pt",
    "train": lambda: lambda rate: short_fit(),
    "optim": lambda: torch.optim.Adam,
    "name": lambda: "z",
    "beta": lambda: 0.5,
    "latents": lambda: [2],
    "hidden": lambda: [4],
    "y": lambda: torch.ones(4, 3),
    "centres": lambda: BINARY,
    "radius": lambda: 0.5,
    "seed": lambda: 0,
    "models": lambda: {"a": models.FactorAnalysis(3, 2)},
    "test": lambda: torch.randn(6, 3),
    "DensityEstimate kind": lambda: "exact",
    "DensityEstimate log_prob": lambda: torch.zeros(4),
    "DensityEstimate data": lambda: "a hash",
    "Unnormalised log_density": lambda: None,
    "Unnormalised log_z": lambda: 0.0,
    "Unnormalised interval": lambda: None,
    "Unnormalised ess": lambda: 10.0,
    "Unnormalised reliable": lambda: True,
    "Unnormalised sample": lambda: lambda count: torch.zeros(count, 3),
    "Generator network": lambda: torch.nn.Linear(2, 3),
    "log_density model": lambda: models.FactorAnalysis(3, 2),
    "log_density x": lambda: torch.randn(6, 3),
    "unnormalised model": lambda: models.FactorAnalysis(3, 2),
    "alpha": lambda: 0.5,
    "log_threshold": lambda: 0.0,
    "f": lambda: "chi_square",
    "log_weight_in": lambda: torch.zeros(4),
    "log_target": lambda: torch.zeros(4),
    "log_target_fixed": lambda: torch.zeros(4),
    "log_reverse": lambda: torch.zeros(4),
    "log_initial": lambda: torch.zeros(4),
    "log_forward": lambda: torch.zeros(4),
    "batch_shape": tuple,
    "like": lambda: torch.zeros(()),
    "field": lambda: torch.zeros(4, 3),
    "mask": lambda: BINARY > 0,
    "value": lambda: BINARY,
    "means": lambda: {"h": torch.full((4, 2), 0.5)},
    "entropy": lambda: torch.zeros(4),
    "weights": lambda: [torch.zeros(3, 2)],
    "biases": lambda: [torch.zeros(2), torch.zeros(2)],
    "edge": lambda: ("v", "h"),
    "draws": lambda: draws().draws,
    "centered": lambda: True,
    "environment": lambda: programs.state.Environment(),
    "inpaint observed": lambda: BINARY > 0,
    "SparseCoding coding": lambda: models.SparseCoding(3, 2),
    "learn_dictionary coding": lambda: models.SparseCoding(3, 2),
    "learn_binary_coding posterior": lambda: "exact",
    "AutoSemiDAIS base": amortized,
    "refine guide": seen,
    "amortization_gap guide": seen,
    "start_at_pathfinder guide": lambda: AutoNormal(model),
    "refine args": lambda: (Y,),
    "amortization_gap args": lambda: (Y,),
    "AutoAmortized model": lambda: local_model,
    "AutoHierarchical model": lambda: local_model,
    "BoltzmannClassifier units": lambda: [energies.BernoulliUnits(2)],
    "BoltzmannClassifier biases": lambda: [torch.zeros(2)],
    "FlatParameters named": lambda: {"loc": torch.zeros(2, requires_grad=True)},
    "record step": lambda: lambda x: (x + 1.0,),
    "record inputs": lambda: [torch.zeros(2)],
    "record parameters": dict,
    "load path": saved,
    "Minibatches data": lambda: [(Y,)],
    "StateSpace model": lambda: samplers.StateSpace,
    "DenseCoupling widths": lambda: (3, 2),
    "FactoredCoupling widths": lambda: (3, 2),
    "PooledUnits shape": lambda: (2, 2),
    "image": lambda: (1, 4, 4),
    "fit guide": lambda: AutoNormal,
    "calibrate guide": lambda: AutoNormal,
    "Calibration ranks": lambda: {"z": np.arange(20)},
    "Calibration recipe": lambda: "AutoNormal",
    "Calibration prob": lambda: 0.95,
    "Calibration pareto_k": lambda: np.zeros(20),
    "plot_compare table": compared,
    "LISTA num_layers": lambda: 2,
    "MeanField values": lambda: {"h": torch.zeros(4, 2)},
    "MeanField fields": lambda: {"h": torch.zeros(4, 2)},
    "ProgramPath targets": lambda: (guide, model),
    "BaseMeasure units": lambda: energies.BernoulliUnits(3),
    "CompiledSVI loss": lambda: pplvi.ELBO(),
    "Condition words": lambda: "a number",
    "Condition holds": lambda: callable,
    "Coordinates shape": tuple,
    "Coordinates transform": lambda: torch.distributions.transforms.identity_transform,
    "Coordinates plates": tuple,
    "Draws latents": lambda: {"z": torch.zeros(3)},
    "Draws deterministics": dict,
    "Draws observed": dict,
    "Draws log_likelihood": dict,
    "Draws log_p": lambda: torch.zeros(3),
    "Draws log_q": lambda: torch.zeros(3),
    "Draws batch": tuple,
    "Draws plates": lambda: {"z": ()},
    "Draws factors": frozenset,
    "Fit runs": lambda: short_fit().runs,
    "Fit best": lambda: 0,
    "Fit guide_name": lambda: "guide",
    "Fit seed": lambda: None,
    "Stage network": lambda: pplvi.DeepBoltzmannMachine([3, 2, 2]),
    "Stage below": lambda: "v",
    "Stage above": lambda: "h1",
    "Stage copies": lambda: (1, 1),
    "PartitionEstimate log_z": lambda: 0.0,
    "PartitionEstimate interval": lambda: (-1.0, 1.0),
    "PartitionEstimate ess": lambda: 10.0,
    "PartitionEstimate log_weights": lambda: torch.zeros(3),
    "Verdict word": lambda: "reliable",
    "Verdict reasons": tuple,
    "Verdict next": tuple,
    "plot_objective source": lambda: short_fit(),
}
# Arguments that make a call short, where its defaults would take a while.
SHORT: dict[str, dict[str, Any]] = {
    "fit": {"num_steps": 2, "progress": False, "callbacks": [lambda run: run.step >= 2]},
    "calibrate": {"num_simulations": 1, "num_steps": 2, "progress": False},
    "plot_predictive": {"num_draws": 3},
    "annealed_importance_sampling": {"num_chains": 4, "num_betas": 5},
    "raise_bound": {"num_chains": 2, "num_betas": 5},
    "chain_mixing": {"num_sweeps": 10},
    "inpaint": {"num_sweeps": 5},
    "pretrain": {"num_steps": 2, "progress": False},
    "to_arviz": {"num_prior": 5},
    "refine": {"num_steps": 2, "args": (Y,)},
    "amortization_gap": {"num_draws": 5, "num_steps": 2, "args": (Y,)},
    "learn_dictionary": {"num_steps": 2},
    "learn_binary_coding": {"num_steps": 2},
    "Posterior": {"num_draws": 10},
    "compare_densities": {"num_samples": 5},
    "init_to_pathfinder": {"num_paths": 1},
    "start_at_pathfinder": {"num_paths": 1},
    "GeometricPath": {"num_steps": 2},
    "plot_filters": {"shape": (1, 3)},
}
COUNTS = {
    "num_steps": 2,
    "num_visible": 3,
    "num_hidden": 2,
    "num_latents": 2,
    "num_units": 3,
    "num_categories": 3,
    "num_codes": 2,
}
COUNTS |= {
    "num_latents": 2,
    "given": 3,
    "maps": 2,
    "filter_size": 3,
    "num_factors": 2,
    "num_labels": 2,
    "num_covariance": 2,
    "num_mean": 2,
    "num_state": 2,
    "num_classes": 2,
    "num_draws": 10,
    "num_particles": 2,
    "index": 0,
    "nesting": 1,
    "dim": -1,
    "size": 3,
    "full_size": 3,
}


class Hang(BaseException):
    """A call that did not end in time."""


def values() -> dict[str, Any]:
    """Hostile values by what they are called."""
    return {
        "None": None,
        "True": True,
        "-1": -1,
        "0": 0,
        "10**18": 10**18,
        "2**64": 2**64,
        "0.5": 0.5,
        "1e308": 1e308,
        "nan": float("nan"),
        "inf": float("inf"),
        "''": "",
        "'nonsense'": "nonsense",
        "b'x'": b"x",
        "[]": [],
        "[None]": [None],
        "{}": {},
        "{3: 4}": {3: 4},
        "()": (),
        "object()": object(),
        "lambda": lambda *args, **kwargs: None,
        "a class": int,
        "a module": torch.nn.Identity(),
        "tensor(nan)": torch.tensor(float("nan")),
        "tensor(True)": torch.tensor(True),
        "zeros(0)": torch.zeros(0),
        "ones(2, 3)": torch.ones(2, 3),
        "full(inf)": torch.full((4, 3), float("inf")),
        "full(nan)": torch.full((4, 3), float("nan")),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.ones(3, device="meta"),
        "zeros(0, 3)": torch.zeros(0, 3),
        "bool matrix": torch.ones(4, 3, dtype=torch.bool),
        "needs grad": torch.ones(3, requires_grad=True) * 2,
        "complex": torch.zeros(3, dtype=torch.complex64),
        "array of text": np.array(["a", "b"]),
    }


def public() -> dict[str, Any]:
    """Public classes that can be made, and functions, by name."""
    rooms = [
        importlib.import_module(f"pplvi.{path.parent.name}") for path in Path(pplvi.__path__[0]).glob("*/__init__.py")
    ]
    found = {name: getattr(room, name) for room in [*rooms, pplvi] for name in room.__all__}
    return {name: thing for name, thing in sorted(found.items()) if _is_walked(thing)}


_UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)


def _is_walked(thing: Any) -> bool:
    if inspect.isfunction(thing):
        return not hasattr(thing, "register")  # of those that go by the type of their argument
    if not inspect.isclass(thing) or inspect.isabstract(thing) or getattr(thing, "_is_protocol", False):
        return False
    if issubclass(thing, (tuple, BaseException)):
        return False
    maker = getattr(thing.__init__, "__module__", "")
    return maker.startswith("pplvi") or "__dataclass_fields__" in vars(thing)  # and no constructor that Pyro has


def parameters(thing: Any) -> list[str]:
    """The arguments that have a name, and one that no signature has."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in inspect.signature(thing).parameters.values() if p.kind in named] + ["nonsense"]


def valid(name: str, thing: Any, without: str) -> dict[str, Any]:
    """Arguments that would do.

    :raises KeyError: for an argument that has no example.
    """
    found = dict(SHORT.get(name, {}))
    for parameter in inspect.signature(thing).parameters.values():
        required = parameter.default is parameter.empty and parameter.kind not in _UNNAMED
        if not required or parameter.name in found or parameter.name == without:
            continue
        if f"{name} {parameter.name}" in EXAMPLES:
            found[parameter.name] = EXAMPLES[f"{name} {parameter.name}"]()
        elif parameter.name in COUNTS:
            found[parameter.name] = COUNTS[parameter.name]
        else:
            found[parameter.name] = EXAMPLES[parameter.name]()
    return found


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise :class:`Hang` where what is inside takes more seconds of the processor."""

    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def attempt(name: str, thing: Any, parameter: str, value: Any) -> str | None:
    """What is wrong with how a call takes a value: anything but a result, a ``ValueError`` and a ``TypeError``."""
    arguments = {**valid(name, thing, parameter), parameter: value}
    try:
        with warnings.catch_warnings(), pyro.get_param_store().scope(), limited(SECONDS):
            warnings.simplefilter("ignore")
            thing(**arguments)
    except (ValueError, TypeError):
        return None
    except Hang:
        return "does not end"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def works(name: str, thing: Any) -> None:
    """Call it with the examples, which have to do: a hostile value would be refused for another one's sake."""
    with warnings.catch_warnings(), pyro.get_param_store().scope():
        warnings.simplefilter("ignore")
        thing(*([int] if name == "check_values" else []), **valid(name, thing, ""))
