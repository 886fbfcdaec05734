"""``fit.save`` and ``load``: the same draws to the bit, training that goes on, and clear words about other files."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal, AutoNormalMessenger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pplvi
from pplvi.training import checkpoint

Y = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.4])

MODEL = """
import pyro
import pyro.distributions as dist


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)
"""
exec(compile(MODEL, "a model in a file of its own", "exec"))
model: Any = globals()["model"]


def by_hand(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.zeros(()))
    pyro.sample("mu", dist.Normal(loc, pyro.param("spread", torch.tensor(0.5), constraint=dist.constraints.positive)))
    pyro.sample("scale", dist.LogNormal(pyro.param("log_scale", torch.tensor(0.1)), 0.3))


def train(guide: Any, **options: Any) -> pplvi.Fit:
    return pplvi.fit(model, guide, **{"args": (Y,), "num_steps": 12, "seed": 3, "progress": False, **options})


def assert_same(first: pplvi.Fit, second: pplvi.Fit, **options: Any) -> None:
    """Draws, losses, and every number of the report but for the verdict, which draws as many more as there is time."""
    assert (first.losses == second.losses).all()
    assert first.reasons == second.reasons
    for r in range(len(first.runs)):
        one, other = (fit.posterior(100, restart=r, **options) for fit in (first, second))
        for name, value in one.draws.latents.items():
            assert torch.equal(value, other.draws.latents[name])
    one_text, other_text = (fit.summary(**options).split("Verdict:")[0] for fit in (first, second))
    assert one_text == other_text


GUIDES = {
    "a class": AutoNormal,
    "options": partial(pplvi.AutoFlow, flow="nsf", passes=2),
    "found": pplvi.AutoPathfinder,
    "effects": AutoNormalMessenger,
    "a function of the model": lambda model: AutoMultivariateNormal(model, init_scale=0.2),
    "by hand": by_hand,
}
GIVEN_AGAIN = {"a function of the model", "by hand"}


@pytest.mark.table(2)
@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("kind", GUIDES)
def test_a_loaded_fit_is_the_saved_one(tmp_path: Path, kind: str, restarts: int) -> None:
    options: dict[str, Any] = {} if kind != "found" else {"num_steps": None}
    fit = train(GUIDES[kind], restarts=restarts, **options)
    before = {name: value.clone() for name, value in fit.params[fit.best].items()}
    fit.save(tmp_path / "fit.pplvi")
    pyro.clear_param_store()
    pyro.set_rng_seed(77)
    rng = torch.get_rng_state()
    again = pplvi.load(tmp_path / "fit.pplvi", model, GUIDES[kind] if kind in GIVEN_AGAIN else None)
    assert torch.equal(torch.get_rng_state(), rng)
    assert set(pyro.get_param_store().keys()) == before.keys()  # as after fit
    assert repr(again) == repr(fit)
    assert_same(fit, again)


def test_in_another_process(tmp_path: Path) -> None:
    fit = train(AutoDiagonalNormal)
    fit.save(tmp_path / "fit.pplvi")
    (tmp_path / "models.py").write_text(MODEL)
    script = "import models, pplvi; fit = pplvi.load('fit.pplvi', models.model)"
    script += "; print(fit.posterior().draws.latents['mu'].sum().item().hex())"
    root = str(Path(pplvi.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = ['', {root!r}]; {script}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert run.stdout.strip() == fit.posterior().draws.latents["mu"].sum().item().hex(), run.stderr


class Net(nn.Module):
    """A decoder with statistics, and an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.decoder = nn.Linear(1, 2)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def test_modules_trained_on_minibatches_get_weights_and_statistics_back(tmp_path: Path) -> None:
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    net = Net()
    loader = DataLoader(TensorDataset(x), batch_size=4, shuffle=True)
    fit = pplvi.fit(net.model, net.guide, data=loader, num_steps=9, seed=0, progress=False)
    fit.save(tmp_path / "net.pplvi")
    fresh = Net()
    again = pplvi.load(tmp_path / "net.pplvi", fresh.model, fresh.guide)
    for name, value in net.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    with pytest.raises(ValueError, match="the fit saw minibatches"):
        again.posterior()
    assert_same(fit, again, args=(x,))


def test_data_stay_out_of_the_file(tmp_path: Path) -> None:
    path, fit = tmp_path / "fit.pplvi", train(AutoNormal)
    fit.save(path, data=False)
    assert checkpoint.read(path)["fit"]["data"] is None
    with pytest.raises(ValueError, match=r"holds no data \(data=False\): expected args="):
        pplvi.load(path, model)
    assert_same(fit, pplvi.load(path, model, args=(Y,)))
    assert_same(fit, pplvi.load(path, model, args=(Y.numpy(),)))


class Table:
    """Data of a kind that no file holds."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


def test_data_that_no_file_holds_are_refused(tmp_path: Path) -> None:
    fit = pplvi.fit(lambda table: model(table.y), AutoNormal, args=(Table(Y),), num_steps=3, seed=0, progress=False)
    with pytest.raises(ValueError, match=r"cannot be saved: data\[0\]\[0\] is a Table.*data=False"):
        fit.save(tmp_path / "fit.pplvi")
    assert not list(tmp_path.iterdir())
    fit.save(tmp_path / "fit.pplvi", data=False)


def test_in_double_precision(tmp_path: Path) -> None:
    fit = train(AutoNormal, dtype=torch.float64)
    fit.save(tmp_path / "fit.pplvi")
    again = pplvi.load(tmp_path / "fit.pplvi", model)
    assert again.posterior().draws.latents["mu"].dtype == torch.float64
    assert_same(fit, again)
    assert torch.get_default_dtype() == torch.float32


def test_mcmc(tmp_path: Path) -> None:
    fit = train("nuts", num_steps=15, restarts=2)
    fit.save(tmp_path / "fit.pplvi")
    again = pplvi.load(tmp_path / "fit.pplvi", model)
    assert repr(again) == repr(fit)
    assert again.summary() == fit.summary()
    assert again.to_arviz(num_prior=0).sample_stats.equals(fit.to_arviz(num_prior=0).sample_stats)
    assert torch.equal(again.posterior().draws.latents["mu"], fit.posterior().draws.latents["mu"])
    with pytest.raises(ValueError, match="holds MCMC draws, which no training can go on from"):
        train(AutoNormal, resume=tmp_path / "fit.pplvi")


def test_the_form_that_auto_took_comes_back(tmp_path: Path) -> None:
    def funnel() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("many", 20):
            pyro.sample("x", dist.Normal(0.0, (0.5 * v).exp()))

    fit = pplvi.fit(funnel, "auto", seed=0, progress=False)
    assert "x_decentered" in fit.posterior(10).draws.latents
    assert fit.seconds > sum(run.seconds for run in fit.runs)  # of all that was tried
    fit.save(tmp_path / "fit.pplvi")
    assert_same(fit, pplvi.load(tmp_path / "fit.pplvi", funnel))


# ---------------------------------------------------------------------- going on


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": None, "restarts": 2}
    train(AutoNormal, **options).save(tmp_path / "a")
    pplvi.load(tmp_path / "a", model).save(tmp_path / "b")  # what was loaded can be gone on from as well
    whole = train(AutoNormal, **options, num_steps=20)
    for name in ("a", "b"):
        longer = train(AutoNormal, **options, num_steps=20, resume=tmp_path / name)
        assert (longer.losses == whole.losses).all()
        for one, other in zip(longer.params, whole.params, strict=True):
            assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("compile", [False, "trace"])
def test_rates_of_a_cosine_start_anew(tmp_path: Path, compile: Any) -> None:
    """Gradient descent on -loc: the steps are the rates, here 6 of a cosine over 6 and 6 of another one."""

    def slope() -> None:
        pyro.factor("slope", pyro.param("loc", lambda: torch.zeros(())))

    sgd = partial(torch.optim.SGD, lr=1.0)
    options: dict[str, Any] = {
        "optim": sgd,
        "seed": 0,
        "progress": False,
        "clip": None,
        "compile": compile,
        "stop": None,
    }
    objective = pplvi.ELBO()
    first = pplvi.fit(slope, lambda: None, num_steps=6, objective=objective, **options)
    first.save(tmp_path / "fit")
    rates = torch.tensor([(1 + torch.cos(torch.tensor(torch.pi * t / 6))) / 2 for t in range(6)])
    assert first.params[0]["loc"].item() == pytest.approx(rates.sum().item(), rel=1e-5)
    longer = pplvi.fit(slope, lambda: None, num_steps=12, objective=objective, resume=tmp_path / "fit", **options)
    assert longer.params[0]["loc"].item() == pytest.approx(2 * rates.sum().item(), rel=1e-5)
    longer.save(tmp_path / "fit")
    with pytest.raises(ValueError, match="settings differ: schedule"):
        pplvi.fit(slope, lambda: None, num_steps=6, objective=objective, resume=tmp_path / "fit", **options)


# ---------------------------------------------------------------------- other files


def other_model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.pplvi"
    train(AutoNormal, checkpoint=tmp_path / "run.pt").save(path)
    with pytest.raises(ValueError, match=r"of another model or run; its sites differ: model.scale: LogNormal.*Gamma"):
        pplvi.load(path, other_model)
    with pytest.raises(ValueError, match="of another model or run; its parameters differ"):
        pplvi.load(path, model, AutoMultivariateNormal)
    with pytest.raises(ValueError, match=r"is a checkpoint of a training: expected a file that Fit.save wrote"):
        pplvi.load(tmp_path / "run.pt", model)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        pplvi.load(tmp_path / "none", model)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"corrupt or truncated.*take another copy"):
        pplvi.load(path, model)
    torch.save({"format": checkpoint.FORMAT, "version": checkpoint.VERSION + 1}, path)
    with pytest.raises(ValueError, match="read it with the version of pplvi that wrote it"):
        pplvi.load(path, model)


def test_a_guide_that_the_file_cannot_make_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "fit.pplvi"
    train(by_hand).save(path)
    with pytest.raises(ValueError, match=r"cannot say how its guide, by_hand, is made: expected guide="):
        pplvi.load(path, model)


@pytest.mark.parametrize("recipe", [("os", "system"), ("pyro", "init_to_value"), ("pplvi", "__loader__")])
def test_a_file_makes_nothing_but_guides(tmp_path: Path, recipe: tuple[str, str]) -> None:
    """A stranger's file, whole and with a right checksum, that names something else in place of a guide."""
    path = tmp_path / "fit.pplvi"
    train(AutoNormal).save(path)
    content = checkpoint.read(path)
    content["fit"]["guide"] = {"library": recipe[0], "name": recipe[1], "options": {}}
    checkpoint.write(path, content)
    with pytest.raises(ValueError, match="which is not known here: expected guide="):
        pplvi.load(path, model)
