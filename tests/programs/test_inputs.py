"""Inputs as people have them: arrays, lists, columns and tables, and numbers that are none."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pplvi
from pplvi.energies import RestrictedBoltzmannMachine
from pplvi.programs.inputs import as_tensors, check_finite, to_inputs

RNG = np.random.default_rng(0)
TABLE = pd.DataFrame({"x": RNG.normal(size=20), "group": RNG.integers(0, 3, 20).astype(np.int32)})
TABLE["y"] = 2 * TABLE.x + RNG.normal(size=20) / 2
SHORT: dict[str, Any] = {"seed": 0, "progress": False}


def regression(x: Tensor, group: Tensor, y: Tensor | None = None) -> None:
    """A slope and an effect of each group."""
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a[..., group] + b[..., None] * x if b.dim() else a[group] + b * x, 0.5), obs=y)


def slope(y: Any, x: Tensor) -> None:
    """A slope, by data that it checks for nothing."""
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b * x, 0.5), obs=y)


def exact_slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    precision = 1 + (x**2).sum() / 0.25
    return float((x * y).sum() / 0.25 / precision), float(precision**-0.5)


KINDS: dict[str, Callable[[pd.Series], Any]] = {
    "tensor": lambda c: torch.tensor(c.to_numpy()).to(torch.float32 if c.dtype.kind == "f" else torch.int64),
    "array": lambda c: c.to_numpy(),
    "list": lambda c: c.tolist(),
    "column": lambda c: c,
    "nullable": lambda c: c.astype("Float64" if c.dtype.kind == "f" else "Int64"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_same_fit(kind: str) -> None:
    args = tuple(KINDS[kind](TABLE[name]) for name in ("x", "group", "y"))
    fit = pplvi.fit(regression, AutoNormal, args=args, num_steps=5, **SHORT)
    assert fit.args is not None
    assert [x.dtype for x in fit.args] == [torch.float32, torch.int64, torch.float32]
    tensors = tuple(KINDS["tensor"](TABLE[name]) for name in ("x", "group", "y"))
    assert np.array_equal(fit.losses, pplvi.fit(regression, AutoNormal, args=tensors, num_steps=5, **SHORT).losses)


def test_conversion_to_the_dtype_of_the_model() -> None:
    values = [0.1, 0.2]
    assert to_inputs(None, (values,), {})[0][0].dtype == torch.float32
    assert to_inputs(None, (values, torch.zeros(1).double()), {})[0][0].dtype == torch.float64
    assert to_inputs(torch.nn.Linear(2, 1).double(), (values,), {})[0][0].dtype == torch.float64
    fit = pplvi.fit(slope, AutoNormal, args=([1.0, 2.0], [1, 2]), num_steps=2, dtype=torch.float64, **SHORT)
    assert fit.args is not None
    assert fit.args[0].dtype == torch.float64
    assert fit.posterior(args=(np.ones(3), np.ones(3))).log_p.dtype == torch.float64


def test_what_is_no_data_is_left_alone() -> None:
    ragged, sizes = [[1.0], [2.0, 3.0]], (3, 4)
    tree = as_tensors({"sizes": sizes, "names": ["a", "b"], "n": 3, "ragged": ragged, "none": None, "empty": []})
    assert tree["sizes"] == sizes
    assert tree["names"] == ["a", "b"]
    assert [len(row) for row in tree["ragged"]] == [1, 2]
    assert (tree["n"], tree["none"], tree["empty"]) == (3, None, [])


def test_integers_and_booleans_stay_whole() -> None:
    dtypes = [as_tensors(np.ones(2, dtype=kind)).dtype for kind in ("uint8", "int16", "uint32", "bool", "float16")]
    assert dtypes == [torch.int64] * 3 + [torch.bool, torch.float32]
    with pytest.raises(ValueError, match=r"holds categories.*cat\.codes"):
        as_tensors(TABLE.group.astype("category"))


def matrix(table: Any) -> tuple[Any, Any]:
    return table[:, 0], table[:, 2]


def columns(table: Any) -> tuple[Any, Any]:
    return table["x"], table["y"]


def values(table: Any) -> tuple[Any, Any]:
    return torch.tensor(table["x"].values).float(), torch.tensor(table["y"].to_numpy()).float()


@pytest.mark.table(3)
@pytest.mark.parametrize("guide", [AutoNormal, "nuts", "auto"], ids=["AutoNormal", "nuts", "auto"])
@pytest.mark.parametrize("read", [matrix, columns, values])
def test_table_is_what_the_program_reads_it_as(read: Callable[[Any], Any], guide: Any) -> None:
    """A matrix, a dictionary of columns, or the table itself."""

    def model(table: Any) -> None:
        x, y = read(table)
        slope(y, x)

    steps = {AutoNormal: {"num_steps": 400, "optim": pyro.optim.Adam({"lr": 0.05})}, "nuts": {"num_steps": 300}}
    fit = pplvi.fit(model, guide, args=(TABLE,), **SHORT, **steps.get(guide, {}))
    mean, sd = exact_slope(TABLE.x.to_numpy(), TABLE.y.to_numpy())
    b = fit.posterior().resample(seed=0)["b"]
    assert abs(b.mean().item() - mean) < 5 * sd / math.sqrt(100)
    assert fit.predict(TABLE, num_samples=7).observed["y"].shape == (7, 20)
    assert fit.to_arviz(num_prior=3).observed_data.y.shape == (20,)


def test_minibatches_of_arrays_and_tables() -> None:
    batches = [(TABLE.y[:10], TABLE.x[:10]), [TABLE.y.to_numpy()[10:], TABLE.x.to_numpy()[10:]]]
    fit = pplvi.fit(slope, AutoNormal, data=batches, args=(TABLE.y, TABLE.x), num_steps=4, **SHORT)
    assert fit.posterior().draws.observed["y"].shape == (20,)
    tables = [TABLE.to_numpy()[:10], TABLE[10:]]
    pplvi.fit(lambda table: slope(*matrix(table)[::-1]), AutoNormal, data=tables, num_steps=4, **SHORT)
    with pytest.raises(ValueError, match="Full data are given as args="):
        pplvi.fit(slope, AutoNormal, data=TABLE, num_steps=2, **SHORT)


def test_labels_are_columns_too() -> None:
    fit = pplvi.fit(slope, AutoMultivariateNormal, args=(TABLE.y, TABLE.x), num_steps=2, **SHORT)
    names = pd.Series([f"row {i}" for i in range(20)])
    for labels in (names, names.to_numpy(), names.tolist(), pd.Index(names)):
        exported = fit.to_arviz(num_prior=0, coords={"data": labels})
        assert exported.posterior_predictive.data.values.tolist() == names.tolist()


# --- numbers that are none ------------------------------------------------------------------------------------------

BAD = TABLE.y.where(TABLE.index != 3)


@pytest.mark.parametrize("guide", [AutoNormal, "nuts", "auto", pplvi.AutoPathfinder], ids=str)
@pytest.mark.parametrize("place", ["args", "kwargs"])
def test_first_bad_entry_is_named_before_any_step(guide: Any, place: str) -> None:
    given: dict[str, Any] = {"args": (BAD, TABLE.x)} if place == "args" else {"kwargs": {"y": BAD, "x": TABLE.x}}
    name = r"args\[0\] \(y\)" if place == "args" else r"kwargs\['y'\]"
    with pytest.raises(ValueError, match=name + r" is nan at position \[3\], which site 'y' depends on.*obs_mask="):
        pplvi.fit(slope, guide, **given, **SHORT)


def test_infinite_covariate_is_named_and_not_the_hidden_observation() -> None:
    def model(y: Tensor, x: Tensor, seen: Tensor) -> None:
        with poutine.mask(mask=seen):
            slope(y, x)

    y = torch.tensor([1.0, math.nan, 2.0])
    x = torch.tensor([1.0, 2.0, -math.inf])
    with pytest.raises(ValueError, match=r"args\[1\] \(x\) is -inf at position \[2\]"):
        pplvi.Posterior(model, AutoNormal(model), (y, x, ~y.isnan()))


def _obs_mask(y: Tensor, x: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b * x, 0.5), obs=y, obs_mask=~y.isnan())


def _masked(y: Tensor, x: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.mask(mask=~y.isnan()):
        pyro.sample("y", dist.Normal(b * x, 0.5), obs=y)


def _replaced(y: Tensor, x: Tensor) -> None:
    slope(y.nan_to_num(1.0), x)


@pytest.mark.parametrize("model", [_obs_mask, _masked, _replaced])
def test_hidden_entries_may_be_anything(model: Callable[..., Any]) -> None:
    y = torch.tensor([1.0, math.nan, 2.0])
    check_finite(model, (y, torch.ones(3)), {})
    fit = pplvi.fit(model, AutoNormal, args=(y, torch.ones(3)), num_steps=3, **SHORT)
    assert np.isfinite(fit.losses).all()


def test_missing_units_of_a_machine_may_be_anything() -> None:
    machine = RestrictedBoltzmannMachine(4, 2)
    v = torch.tensor([[0.0, 1.0, math.nan, 1.0]])
    check_finite(machine.model, (v,), {"mask": ~v.isnan()})


def test_model_that_observes_nothing_is_told() -> None:
    with pytest.warns(UserWarning, match=r"observes nothing.*the posterior is the prior.*args="):
        pplvi.fit(regression, AutoNormal, args=(TABLE.x, TABLE.group), num_steps=1, **SHORT)
    with pytest.warns(UserWarning, match="observes nothing"):
        pplvi.fit(regression, "nuts", args=(TABLE.x, TABLE.group), num_steps=2, **SHORT)

    def forgotten(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.deterministic("y", mean + 0 * x)

    with pytest.warns(UserWarning, match="observes nothing"):
        pplvi.fit(forgotten, AutoNormal, args=(torch.zeros(3),), num_steps=1, **SHORT)


# --- what guides are checked for is checked for MCMC ------------------------------------------------------------------


def _undeclared(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


def _nothing(y: Tensor) -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [(_undeclared, r"site 'z' has batch shape \(3,\).*to_event"), (_nothing, "no latent sites.*expected at least one")],
)
def test_chains_are_checked_like_guides(model: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pplvi.fit(model, "nuts", args=(torch.ones(3),), num_steps=2, **SHORT)


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_with_slashes_go_through_netcdf_and_back(tmp_path: Path) -> None:
    def model(y: Tensor) -> None:
        a, b = pyro.sample("a/b", dist.Normal(0.0, 1.0)), pyro.sample("a.b", dist.Normal(0.0, 1.0))
        with pyro.plate("plate/one", 2):
            pyro.sample("y/obs", dist.Normal(a + b, 1.0), obs=y)

    fit = pplvi.fit(model, AutoNormal, args=([0.0, 1.0],), num_steps=5, **SHORT)
    exported = fit.to_arviz(num_prior=5, coords={"plate/one": ["p", "q"]})
    exported.to_netcdf(str(tmp_path / "fit.nc"))
    again = arviz.from_netcdf(str(tmp_path / "fit.nc"))
    assert set(again.posterior.data_vars) == {"a.b", "a.b_"}
    assert again.log_likelihood["y.obs"].dims == ("chain", "draw", "plate.one")
    assert again.observed_data["plate.one"].values.tolist() == ["p", "q"]
    assert np.array_equal(again.posterior["a.b_"], exported.posterior["a.b_"])
    assert "a/b is a.b_" in again.attrs["renamed"]
