"""Two optimisers, one for the model and one for the guide: the same under SVI, fit and the compiled step."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam, ExponentialLR

import pplvi
from pplvi.compile.svi import CompiledSVI
from pplvi.fitting import Checkpoint
from pplvi.fitting.entry import describe
from pplvi.losses.wake_sleep import ReweightedWakeSleep
from pplvi.training.optimizers import Update
from pplvi.training.per_program import PerProgram, roles_of

Y = torch.tensor([0.3, -1.2, 0.8, 2.0])
LOSS = ReweightedWakeSleep(4, 0.5)
TWO = {"model": Adam({"lr": 0.1}), "guide": Adam({"lr": 0.01})}
BY_NAME = Adam(lambda name: {"lr": 0.1 if name in ("prior", "noise") else 0.01})


def model(y):
    prior, noise = pyro.param("prior", torch.tensor(0.5)), pyro.param("noise", torch.tensor(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(prior, 1.0)), noise.abs()), obs=y)


def guide(y):
    slope, spread = pyro.param("slope", torch.tensor(0.1)), pyro.param("spread", torch.tensor(0.2))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(slope * y, spread.exp()))


def test_which_program_asks_for_a_parameter():
    roles = roles_of(model, guide, (Y,), {})
    assert roles == {"prior": "model", "noise": "model", "slope": "guide", "spread": "guide"}
    assert not list(pyro.get_param_store().keys())
    for automatic in (AutoNormal(model), AutoNormalMessenger(model)):
        automatic(Y)
        found = roles_of(model, automatic, (Y,), {})
        assert {name.split(".")[-2] for name, role in found.items() if role == "guide"} == {"locs", "scales"}
        assert {name for name, role in found.items() if role == "model"} == {"prior", "noise"}


def test_a_shared_parameter_is_the_models():
    def same(y):
        model(y)
        pyro.param("slope", torch.tensor(0.1))

    assert roles_of(same, guide, (Y,), {})["slope"] == "model"


def by_svi(optim):
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    svi = SVI(model, guide, optim, LOSS)
    return [svi.step(Y) for _ in range(8)]


def by_fit(optim, **options):
    options = {"schedule": None, "clip": None, "num_steps": 8, "seed": 3, "progress": False, **options}
    return pplvi.fit(model, guide, args=(Y,), objective=LOSS, optim=optim, **options).losses[0].tolist()


def test_two_optimisers_are_one_with_learning_rates_by_name():
    expected = by_svi(BY_NAME)
    assert by_svi(PerProgram(TWO, (model, guide, (Y,), {}))) == expected
    assert by_svi(Adam({"lr": 0.01})) != expected
    assert by_fit(TWO) == expected
    assert by_fit(BY_NAME) == expected
    assert (
        by_fit({role: partial(torch.optim.Adam, lr=lr) for role, lr in (("model", 0.1), ("guide", 0.01))}) == expected
    )


def test_two_optimisers_in_compiled_steps():
    expected = by_fit(BY_NAME)
    assert by_fit(TWO, compile="trace") == pytest.approx(expected, abs=1e-5)
    pyro.clear_param_store()
    svi = CompiledSVI(model, guide, PerProgram(TWO, (model, guide, (Y,), {})), LOSS, mode="trace")
    pyro.set_rng_seed(3)
    assert svi.run(8, Y).tolist() == pytest.approx(expected, abs=1e-5)


def test_two_optimisers_of_different_kinds():
    optims = {"model": pyro.optim.SGD({"lr": 0.05, "momentum": 0.9}, {"clip_norm": 1.0}), "guide": torch.optim.Adagrad}
    assert len(by_fit(optims, schedule="cosine", clip="adaptive")) == 8
    assert describe(TWO) == "{model: Adam({'lr': 0.1}), guide: Adam({'lr': 0.01})}"


def test_two_optimisers_resume_to_the_bit(tmp_path):
    straight = by_fit(TWO, num_steps=12, schedule="cosine")

    def interrupt(run):
        if run.step == 5:
            raise RuntimeError

    options = {"num_steps": 12, "schedule": "cosine"}
    with pytest.raises(RuntimeError):
        by_fit(TWO, checkpoint=Checkpoint(tmp_path / "run.pt", every=5), callbacks=[interrupt], **options)
    assert by_fit(TWO, resume=tmp_path / "run.pt", **options) == straight


def test_modules_have_roles_too():
    class Decoder(PyroModule):
        def __init__(self):
            super().__init__("decoder")
            self.prior, self.noise = PyroParam(torch.tensor(0.5)), PyroParam(torch.tensor(1.0))

        def forward(self, y):
            with pyro.plate("data", len(y)):
                z = pyro.sample("z", dist.Normal(self.prior, 1.0))
                pyro.sample("y", dist.Normal(z, self.noise.abs()), obs=y)

    decoder = Decoder()
    assert roles_of(decoder, guide, (Y,), {})["decoder.prior"] == "model"
    fit = pplvi.fit(decoder, guide, args=(Y,), objective=LOSS, optim=TWO, num_steps=3, seed=0, progress=False)
    assert fit.params[0]["decoder.prior"].item() != 0.5


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"model": Adam({"lr": 0.1})}, r"optim has the keys \['model'\]: expected 'model' and 'guide'"),
        ({"model": Adam({"lr": 0.1}), "guide": 0.1}, r"'guide': 0.1}: expected a dictionary"),
        ({"guide": Adam({"lr": 0.1}), "model": ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1},
          "gamma": 0.9})}, r"optim\['model'\] is a PyroLRScheduler"),
    ],
)  # fmt: skip
def test_what_is_no_pair_of_optimisers(optim, message):
    for make in (Update, by_fit):
        with pytest.raises(ValueError, match=message):
            make(optim)


def test_parameters_that_neither_program_asks_for():
    with pytest.raises(ValueError, match=r"parameter '\w+' was not asked for by model or guide.*by name"):
        by_svi(PerProgram(TWO))
