"""``fit(compile=...)``: the same training in compiled steps."""

import warnings
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pplvi.compile.svi
from pplvi import fit
from pplvi.fitting import Checkpoint, Minibatches
from pplvi.losses.elbo import ELBO
from pplvi.training.loop import SETTLE_EVERY, Trainer
from pplvi.training.restart import TrainingError
from pplvi.training.steps import CompiledSteps, EagerSteps
from pplvi.training.stopping import Plateau

Y = torch.tensor([1.0, 2.5, 0.5, 3.0, 1.5, 2.0])


def model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)), poutine.scale(scale=6 / len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def train(compile: Any, **options: Any) -> Any:
    settings = {"args": (Y,), "num_steps": 130, "seed": 0, "progress": False, **options}
    return fit(model, AutoNormal, compile=compile, **settings)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": None, "clip": 0.5, "restarts": 2},
        {"optim": pyro.optim.Adam({"lr": 0.05}), "monitor": pyro.infer.Trace_ELBO()},
        {"args": (), "data": list(Y.split(2))},
    ],
    ids=["defaults", "clip, restarts", "monitor", "minibatches"],
)
def test_traced_training_equals_the_eager_one(options):
    ours, theirs = train("trace", **options), train(False, **options)
    torch.testing.assert_close(torch.as_tensor(ours.losses), torch.as_tensor(theirs.losses), rtol=1e-4, atol=1e-4)
    for mine, other in zip(ours.params, theirs.params, strict=True):
        for name, value in mine.items():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "steps", [EagerSteps(clip=None), CompiledSteps(clip=None, mode="trace")], ids=["eager", "compiled"]
)
def test_eager_and_compiled_steps_have_one_interface(steps):
    """Parameters are announced once, untouched; a state that is given back leads to the same steps."""
    moved: list[Tensor] = []
    guide, call = AutoNormal(model), ((Y,), {})
    before = lambda: moved.append(guide.locs.mu.detach().clone())  # noqa: E731
    stepper = steps(model, guide, ELBO(num_particles=4), before)
    pyro.set_rng_seed(1)
    stepper.many([call])
    start, rng = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}, torch.get_rng_state()
    state = stepper.get_state()
    first = [float(loss) for loss in stepper.many([call] * 3)]
    assert len(moved) == 1
    assert moved[0] != guide.locs.mu
    assert stepper.update.count == 4

    for name, p in pyro.get_param_store().named_parameters():
        p.data.copy_(start[name])
    torch.set_rng_state(rng)
    stepper.set_state(state)
    assert stepper.update.count == 1
    assert [float(loss) for loss in stepper.many([call] * 3)] == first
    assert len(moved) == 1


@pytest.mark.parametrize(("last_batch", "sizes"), [("compile", [4, 2]), ("drop", [4]), ("pad", [4, 4])])
@pytest.mark.parametrize("mode", [False, "trace"])
def test_a_short_last_minibatch(last_batch, sizes, mode, monkeypatch):
    """Left as it is, dropped or padded; recorded once for each size."""
    made: list[int] = []
    record = pplvi.compile.svi.record
    monkeypatch.setattr(pplvi.compile.svi, "record", lambda *a: made.append(1) or record(*a))
    seen: list[int] = []

    def counted(y: Tensor) -> None:
        seen.append(len(y))
        model(y)

    options = {"num_steps": 10, "seed": 0, "progress": False, "compile": mode}
    result = fit(counted, AutoNormal, data=Minibatches(list(Y.split(4)), last_batch), **options)
    assert result.losses.shape == (1, 10)
    assert set(seen[-20:]) == set(sizes)
    assert len(made) == (len(set(sizes)) if mode else 0)


def test_a_resumed_run_knows_how_long_a_batch_is(tmp_path: Path):
    """It was interrupted right before the short one."""

    def interrupt(run: Any) -> None:
        if run.step == 51:
            raise KeyboardInterrupt

    file, options = tmp_path / "run.pt", {"args": (), "data": Minibatches(list(Y.split(4)), "pad"), "num_steps": 60}
    whole = train("trace", **options)
    train("trace", checkpoint=Checkpoint(file, every=51), callbacks=[interrupt], **options)
    assert train("trace", resume=file, **options).runs[0].losses == whole.runs[0].losses


def test_last_batch_is_checked():
    with pytest.raises(ValueError, match="last_batch='keep'"):
        train("trace", data=Minibatches([Y], last_batch="keep"))


def test_stopping_and_cooling_are_those_of_the_eager_loop():
    options = {"stop": Plateau(min_steps=200, every=60, patience=2), "num_steps": 3000}
    ours, theirs = train("trace", **options), train(False, **options)
    assert ours.losses.shape == theirs.losses.shape
    assert ours.losses.shape[1] < 3000


@pytest.mark.parametrize(
    ("mode", "data"),
    [("trace", None), ("trace", "minibatches"), pytest.param("max", "minibatches", marks=pytest.mark.slow)],
)
@pytest.mark.table(3)
def test_resumed_training_is_the_uninterrupted_one(mode, data, tmp_path: Path):
    def loader() -> dict[str, Any]:
        if data is None:
            return {}
        batches = DataLoader(Y, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(1))
        return {"args": (), "data": batches}

    def interrupt(run: Any) -> None:
        if run.step == 85:
            raise KeyboardInterrupt

    file = tmp_path / "run.pt"
    whole = train(mode, **loader())
    train(mode, checkpoint=Checkpoint(file, every=70), callbacks=[interrupt], **loader())
    resumed = train(mode, resume=file, **loader())
    assert torch.equal(torch.as_tensor(whole.losses), torch.as_tensor(resumed.losses))
    for name, value in whole.params[0].items():
        assert torch.equal(value, resumed.params[0][name])


class Autoencoder(nn.Module):
    """Its encoder has statistics that every training step moves on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        self.decoder = nn.Linear(1, 3)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def forward(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def test_statistics_of_an_encoder_are_resumed(tmp_path: Path):
    """Monitoring does not move them; going on after a checkpoint gives what never stopping gives, bit for bit."""
    x = torch.linspace(-1.0, 2.0, 36).reshape(12, 3)

    def autoencode(mode: Any, **options: Any) -> tuple[Any, dict[str, Tensor]]:
        networks = Autoencoder()
        settings = {"data": list(x.split(4)), "num_steps": 70, "seed": 0, "progress": False, "monitor": ELBO(2)}
        result = fit(networks.model, networks, compile=mode, **{**settings, **options})
        return result, {name: b.clone() for name, b in networks.named_buffers()}

    def interrupt(run: Any) -> None:
        if run.step == 45:
            raise KeyboardInterrupt

    whole, buffers = autoencode("trace")
    eager, expected = autoencode(False)
    torch.testing.assert_close(torch.as_tensor(whole.losses), torch.as_tensor(eager.losses), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(buffers, expected, rtol=1e-4, atol=1e-4)
    assert buffers["encoder.1.num_batches_tracked"] == 70
    file = tmp_path / "run.pt"
    autoencode("trace", checkpoint=Checkpoint(file, every=20), callbacks=[interrupt])
    resumed, again = autoencode("trace", resume=file)
    assert torch.equal(torch.as_tensor(resumed.losses), torch.as_tensor(whole.losses))
    assert all(torch.equal(value, buffers[name]) for name, value in again.items())


def test_a_checkpoint_of_another_mode_is_refused(tmp_path: Path):
    file = tmp_path / "run.pt"
    train(False, checkpoint=file)
    with pytest.raises(ValueError, match="compile: none in the file, 'trace' here"):
        train("trace", resume=file)


def fragile(y: Tensor) -> None:
    """Its density is NaN at large values."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("fine", dist.Normal(mu, 1.0), obs=y)
    pyro.factor("fault", (30.0 - mu).sqrt() * 10.0 * mu)


def test_a_step_that_runs_away_is_taken_back():
    optim = partial(torch.optim.SGD, lr=3.0)
    with pytest.warns(UserWarning, match="Went back to step"):
        result = fit(
            fragile,
            AutoNormal,
            args=(torch.tensor(0.0),),
            optim=optim,
            clip=None,
            num_steps=100,
            compile="trace",
            seed=0,
            progress=False,
        )
    assert torch.isfinite(torch.as_tensor(result.losses)).all()


def hopeless(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    pyro.factor("fault", (-1.0 - mu * mu).sqrt())


def test_the_site_of_a_lasting_failure_is_named():
    with pytest.raises(TrainingError, match="first site at fault is 'fault'"), warnings.catch_warnings(action="ignore"):
        fit(hopeless, AutoNormal, args=(torch.tensor(0.0),), num_steps=100, compile="trace", seed=0, progress=False)


def test_callbacks_see_every_step():
    seen = count()
    train("trace", callbacks=[lambda run: next(seen) < 0])
    assert next(seen) == 130


def test_losses_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch):
    """Between two copies of the state no loss leaves the device."""
    reads: list[int] = []
    original = Trainer._read
    monkeypatch.setattr(Trainer, "_read", lambda self: reads.append(self.run.step) or original(self))
    train("trace", num_steps=4 * SETTLE_EVERY)
    assert sorted(set(reads)) == [SETTLE_EVERY * i for i in range(1, 5)]


def branching(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu if mu > 0 else 2 * mu, 1.0), obs=y)


def test_untraceable_models_and_losses():
    options = {"args": (torch.tensor(0.3),), "num_steps": 60, "progress": False, "seed": 0}
    with pytest.raises(ValueError, match="at or after site 'mu' it met"):
        fit(branching, AutoNormal, compile="trace", **options)
    with pytest.warns(UserWarning, match="falls back to Pyro's handlers"):
        result = fit(branching, AutoNormal, compile="auto", restarts=1, **options)
    assert result.losses.shape == (1, 60)
    with warnings.catch_warnings(record=True, action="always") as told:
        fit(branching, AutoNormal, compile="auto", restarts=2, **options)
    assert len([w for w in told if "falls back" in str(w.message)]) == 1
    with pytest.raises(ValueError, match="TraceGraph_ELBO branches on values"):
        fit(branching, AutoNormal, compile="trace", objective=TraceGraph_ELBO(), **options)
    with pytest.raises(ValueError, match="compile='fast'"):
        train("fast")
