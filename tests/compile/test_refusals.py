"""Steps that cannot be recorded, or compiled, are refused with a reason, or fall back with a warning."""

import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from step_cases import DATA, GROUPS, SGD, Case, assert_same, nested, trajectory, with_guide
from torch import Tensor

from pplvi.compile.svi import CompiledSVI
from pplvi.compile.tracing import Untraceable
from pplvi.losses.elbo import ELBO


def branch_on_draw(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z if z > 0 else -z, 1.0), obs=y)


def branch_on_parameter(y: Tensor) -> None:
    p = pyro.param("p", lambda: torch.tensor(1.0))
    z = pyro.sample("z", dist.Normal(p if p > 0 else -p, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def list_of_draws(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(sum(z.tolist()), 1.0), obs=y.sum())


def array_of_parameter(y: Tensor) -> None:
    p = pyro.param("p", lambda: torch.tensor(1.0))
    z = pyro.sample("z", dist.Normal(float(p.detach().numpy()), 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y.sum())


def boolean_index(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    seen = y[y > z]
    pyro.sample("y", dist.Normal(z, 1.0), obs=seen.sum())


def python_random(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z + np.random.normal(), 1.0), obs=y.sum())


def unsupported(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    values = torch.sparse_coo_tensor([[0]], z.reshape(1), (1,))
    pyro.sample("y", dist.Normal(values.to_dense().sum(), 1.0), obs=y.sum())


REFUSED = {
    "draw": (branch_on_draw, "site 'z'", "a Python value taken from a tensor"),
    "parameter": (branch_on_parameter, "site 'z'", "a Python value taken from a tensor"),
    "list": (list_of_draws, "site 'z'", "a Python value taken from a tensor"),
    "array": (array_of_parameter, "site 'z'", "a Python value taken from a tensor"),
    "shape": (boolean_index, "site 'z'", r"a shape that depends on the data.*test_refusals\.py\", line \d+"),
    "generator": (python_random, "site 'y'", "numbers from Python's or NumPy's random generator"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_untraceable_models_are_refused_and_left_alone(name):
    model, site, reason = REFUSED[name]
    guide = AutoNormal(poutine.block(model, expose=["z"]))
    y = torch.tensor(0.5) if name in ("draw", "parameter") else DATA
    svi = CompiledSVI(model, guide, SGD, ELBO(), mode="trace")
    svi.run(0, y)
    before, rng = svi.parameters.flat.clone(), torch.get_rng_state()
    with pytest.raises(Untraceable, match=f"{site} it met {reason}.*use torch.where"):
        svi.step(y)
    assert torch.equal(svi.parameters.flat, before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert pyro.infer.util.is_validation_enabled()


@pytest.mark.parametrize("name", ["draw", "shape"])
def test_auto_falls_back_to_handlers_with_one_warning(name):
    model = REFUSED[name][0]
    y = torch.tensor(0.5) if name == "draw" else DATA
    pyro.set_rng_seed(4)
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), ELBO(), mode="auto")
    with pytest.warns(UserWarning, match="falls back to Pyro's handlers"):
        first = svi.run(50, y)
    assert svi.mode is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert svi.run(50, y).mean() < first.mean()


def test_constants_may_be_read():
    """Values of closures, and masks that follow from them, do not change from step to step."""
    y = DATA.clone()

    def model() -> None:
        z = pyro.sample("z", dist.Normal(float(y.mean()), 1.0))
        seen = y[y > 0]
        with pyro.plate("data", len(seen)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=seen)

    case = Case(with_guide(model))
    assert_same(trajectory(case, "trace"), trajectory(case, "SVI"))


def test_a_machine_without_a_compiler():
    def broken() -> Any:
        return torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})

    model = nested
    options = {"guide": AutoNormal(model), "optim": SGD, "loss": ELBO(3)}
    import torch._inductor.cpp_builder as builder

    builder.get_cpp_compiler.cache_clear() if hasattr(builder.get_cpp_compiler, "cache_clear") else None
    with broken(), pytest.raises(ValueError, match=r"no working C\+\+ compiler.*compile='trace'"):
        CompiledSVI(model, **options).step(GROUPS)
    svi = CompiledSVI(model, **options, mode="auto")
    with broken(), pytest.warns(UserWarning, match="the graph without a compiler"):
        svi.step(GROUPS)
    assert svi.mode == "trace"


def test_options_are_checked():
    guide = AutoNormal(nested)
    for options, message in (
        ({"mode": "fast"}, "mode='fast'"),
        ({"last_batch": "keep"}, "last_batch='keep'"),
        ({"chunk": 0}, "chunk=0"),
        ({"schedule": "cosine"}, "schedule='cosine'"),
    ):
        with pytest.raises(ValueError, match=message):
            CompiledSVI(nested, guide, SGD, ELBO(), **options)


def test_parameters_that_appear_late_are_refused_without_a_graph():
    steps = []

    def model(y: Tensor) -> None:
        steps.append(1)
        z = pyro.sample("z", dist.Normal(pyro.param(f"p{len(steps) // 9}", lambda: torch.zeros(())), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    svi = CompiledSVI(model, AutoNormal(model), SGD, ELBO(), mode=False)
    with pytest.raises(ValueError, match="appeared, or were replaced"):
        svi.run(20, torch.tensor(0.0))
