"""Restarts that share a program are those that train alone."""

import copy
import logging
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from test_stepping import Y, fragile, model
from torch import Tensor, nn

import pplvi.compile.vectorized
from pplvi import fit
from pplvi.fitting import Checkpoint
from pplvi.losses.elbo import ELBO
from pplvi.training.restart import TrainingError
from pplvi.training.stopping import Plateau

FIT: dict[str, Any] = {"args": (Y,), "num_steps": 130, "seed": 0, "progress": False, "compile": "trace"}


def same(together: Any, alone: list[Any]) -> None:
    """Restart by restart: the same lengths, and the same losses and parameters up to rounding."""
    assert len(together.runs) == len(alone)
    for run, (other,) in zip(together.runs, (result.runs for result in alone), strict=True):
        assert (run.reason, run.rollbacks, run.seed) == (other.reason, other.rollbacks, other.seed)
        torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(other.losses), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dict(run.params), dict(other.params), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run.buffers(), other.buffers(), rtol=1e-4, atol=1e-4)


def both(program: Any, guide: Any = AutoNormal, restarts: int = 3, **options: Any) -> tuple[Any, list[Any]]:
    options = {**FIT, **options}
    together = fit(copy.deepcopy(program), guide, restarts=restarts, **options)
    seeds = range(options["seed"], options["seed"] + restarts)
    return together, [fit(copy.deepcopy(program), guide, **{**options, "seed": seed}) for seed in seeds]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps were taken in shared programs, call by call."""
    taken: list[int] = []
    call = pplvi.compile.vectorized.Together.__call__

    def counted(self: Any, num_steps: int, random: Any) -> Any:
        taken.append(num_steps)
        return call(self, num_steps, random)

    monkeypatch.setattr(pplvi.compile.vectorized.Together, "__call__", counted)
    return taken


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": None, "clip": 0.5, "optim": pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99})},
        {"objective": ELBO(3, estimator="stl"), "monitor": ELBO(4), "num_steps": 60},
    ],
    ids=["defaults", "clip, decay", "monitor"],
)
@pytest.mark.table(2)
def test_restarts_in_one_program_are_those_alone(options, shared):
    same(*both(model, **options))
    assert shared == [50, 50, 30] or shared[:2] == [10, 10]


def test_an_optimiser_each_for_model_and_guide(shared):
    def learned(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(pyro.param("prior", lambda: torch.tensor(0.5)), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    optim = {"model": pyro.optim.SGD({"lr": 0.01}), "guide": pyro.optim.SGD({"lr": 0.1})}
    same(*both(learned, optim=optim, restarts=2, num_steps=60))
    assert sum(shared) == 60


def test_each_stops_when_it_is_flat(shared):
    """The stopping rule, the cooling after it and the end are of one restart each."""
    options = {"stop": Plateau(min_steps=200, every=60, patience=2), "num_steps": 3000}
    together, alone = both(model, **options)
    same(together, alone)
    assert len({run.step for run in together.runs}) > 1


def test_each_rolls_back_by_itself():
    options = {"args": (torch.tensor(0.0),), "optim": partial(torch.optim.SGD, lr=3.0), "clip": None, "num_steps": 100}
    with pytest.warns(UserWarning, match="Went back to step"):
        same(*both(fragile, **options))


def edge(y: Tensor) -> None:
    """Its density is finite, its gradient is not."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    pyro.factor("fault", (0.0 * mu).sqrt())


def test_a_lasting_failure_ends_all():
    options = {**FIT, "args": (torch.tensor(0.0),)}
    with pytest.warns(UserWarning, match="Went back"), pytest.raises(TrainingError, match="after 10 returns"):
        fit(edge, AutoNormal, restarts=2, **options)


class Encoded(nn.Module):
    """Networks of their own for each restart, with statistics that each step moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.encoder = nn.Linear(2, 2)

    def model(self, x: Tensor) -> None:
        pyro.module("norm", self.norm)
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", 6, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = self.encoder(self.norm(x[index])) + z.unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x[index])


def test_networks_and_buffers(shared):
    x = torch.linspace(-1.0, 2.0, 12).reshape(6, 2)
    same(*both(Encoded().model, AutoDelta, args=(x,), num_steps=60))
    assert sum(shared) == 60


def discrete(y: Tensor) -> None:
    k = pyro.sample("k", dist.Bernoulli(0.3))
    pyro.sample("y", dist.Normal(2 * k, 1.0), obs=y)


def discrete_guide(model: Any) -> Any:
    def guide(y: Tensor) -> None:
        pyro.sample("k", dist.Bernoulli(logits=pyro.param("logit", lambda: torch.randn(()))))

    return guide


def test_what_cannot_be_vectorised_is_trained_side_by_side(shared, caplog):
    with caplog.at_level(logging.INFO, "pplvi.training.lockstep"):
        together, alone = both(
            discrete, discrete_guide, args=(torch.tensor(1.5),), objective=ELBO(6), num_steps=60, restarts=2
        )
    assert "aten.bernoulli.default depend on values" in caplog.text
    assert not shared
    same(together, alone)


STOPPED = {**FIT, "restarts": 3, "stop": Plateau(min_steps=40, every=20, patience=1)}


@cache
def uninterrupted() -> Any:
    return fit(model, AutoNormal, callbacks=[lambda run: False], **STOPPED)


@pytest.mark.parametrize("when", [85, 1])
@pytest.mark.table(2)
def test_resumed_restarts_are_the_uninterrupted_ones(when, tmp_path: Path):
    """Bit for bit, those that had ended included."""

    def interrupt(run: Any) -> None:
        if run.index == 1 and run.step == when:
            raise KeyboardInterrupt

    file = tmp_path / "run.pt"
    whole = uninterrupted()
    broken = fit(model, AutoNormal, checkpoint=Checkpoint(file, every=30), callbacks=[interrupt], **STOPPED)
    assert len(broken.runs) == 3
    assert {run.reason for run in broken.runs} <= {"interrupted", "converged"}
    if not file.exists():
        return
    resumed = fit(model, AutoNormal, resume=file, **STOPPED)
    for run, other in zip(resumed.runs, whole.runs, strict=True):
        assert run.losses == other.losses
        assert all(torch.equal(value, other.params[name]) for name, value in run.params.items())


def test_without_a_seed_restarts_have_streams_of_their_own():
    options = {**FIT, "seed": None, "num_steps": 60}
    torch.manual_seed(4)
    first = fit(model, AutoNormal, restarts=2, **options)
    second = fit(model, AutoNormal, restarts=2, **options)
    losses = torch.cat([torch.as_tensor(result.losses) for result in (first, second)])
    assert losses[:, 5].unique().numel() == 4


def test_two_runs_with_a_seed_are_identical():
    first, second = (fit(model, AutoNormal, restarts=2, **{**FIT, "num_steps": 70}) for _ in range(2))
    assert torch.equal(torch.as_tensor(first.losses), torch.as_tensor(second.losses))


@pytest.mark.slow
def test_compiled_restarts_share_a_program(shared):
    """Inductor computes what the graph does: the noise comes from each restart's stream in both."""
    compiled, traced = (fit(model, AutoNormal, restarts=3, **{**FIT, "compile": c}) for c in (True, "trace"))
    torch.testing.assert_close(torch.as_tensor(compiled.losses), torch.as_tensor(traced.losses), rtol=1e-3, atol=1e-3)
    assert len(shared) == 6
