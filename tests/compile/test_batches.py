"""Compiled steps on minibatches, on new shapes and on new values."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from step_cases import DATA, SGD, no_guide
from torch import Tensor

import pplvi.compile.backends
import pplvi.compile.svi
from pplvi.compile.svi import CompiledSVI
from pplvi.losses.elbo import ELBO


def count_traces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    record = pplvi.compile.svi.record
    monkeypatch.setattr(pplvi.compile.svi, "record", lambda *a: made.append(1) or record(*a))
    return made


def data_model(y: Tensor, scale: float = 1.0) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 20, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


@pytest.mark.parametrize(("policy", "losses", "graphs"), [("compile", 3, 2), ("drop", 2, 1), ("pad", 3, 1)])
def test_a_short_last_batch(policy, losses, graphs, monkeypatch):
    made = count_traces(monkeypatch)
    svi = CompiledSVI(data_model, AutoNormal(data_model), SGD, ELBO(), mode="trace", last_batch=policy)
    for _ in range(2):
        assert len(svi.epoch(DATA.split(8))) == losses
    assert len(made) == graphs


def test_recorded_anew_only_for_new_shapes_and_values(monkeypatch):
    made = count_traces(monkeypatch)
    svi = CompiledSVI(data_model, AutoNormal(data_model), SGD, ELBO(), mode="trace")
    for y in (DATA, DATA + 1, DATA * 2):
        svi.step(y)
    assert len(made) == 1
    svi.step(DATA[:5])
    svi.step(DATA, 2.0)
    svi.step(DATA, scale=2.0)
    svi.step(DATA, 2.0)
    assert len(made) == 4
    svi.step(DATA.repeat_interleave(2)[::2])
    assert len(made) == 5, "compiled programs read memory at fixed strides"
    with pytest.warns(UserWarning, match="programs were made"):
        svi.epoch(DATA[:n] for n in range(6, 12))


def numpy_model(y: np.ndarray) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("y", -((mu - float(y.mean())) ** 2))


def test_arrays_are_told_apart_by_their_values():
    svi = CompiledSVI(numpy_model, AutoNormal(numpy_model), partial(torch.optim.SGD, lr=0.0), ELBO(), mode="trace")
    y = np.zeros(5000)
    near = svi.step(y)
    y[2500] = 5e6
    assert svi.step(y) > near + 1e4


def test_data_change_what_a_recorded_step_sees():
    svi = CompiledSVI(data_model, AutoNormal(data_model), partial(torch.optim.SGD, lr=0.0), ELBO(), mode="trace")
    assert svi.step(DATA + 100) > svi.step(DATA) + 1000


def test_subsampled_indices_are_drawn_at_every_step():
    def model(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.zeros(()))
        with pyro.plate("data", 20, subsample_size=1) as index:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[index])

    svi = CompiledSVI(model, no_guide, partial(torch.optim.SGD, lr=0.0), ELBO(), mode="trace")
    assert svi.run(200, torch.arange(20.0)).unique().numel() == 20
