"""Simulation-based calibration: exact recipes are calibrated, others are named by what is wrong with them."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pplvi
from pplvi.fitting import Calibration
from pplvi.posterior.ranks import UniformBand, frame_of_ranks, miscalibration, rank_among

QUICK = {"num_steps": 1, "seed": 0, "progress": False, "schedule": None, "stop": None}
X = torch.tensor([[1.0, 0.5], [-1.0, 0.3], [0.2, -0.7], [0.4, 2.0], [1.5, -1.0]])


def model(y=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.deterministic("double", 2 * z)
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def guide_of(shift=0.0, stretch=1.0):
    """The posterior of ``model``, moved and stretched; its parameter hardly moves in one step."""

    def guide(y):
        slope = pyro.param("slope", torch.tensor(0.5))
        pyro.sample("z", dist.Normal(slope * y + shift, stretch * 0.5**0.5))

    return guide


def calibrate(guide, *, of=model, observed=("y",), num_simulations=25, **options):
    options = {**QUICK, "learning_rate": 1e-6, **options}
    return pplvi.calibrate(of, guide, observed=observed, num_simulations=num_simulations, **options)


def test_an_exact_guide_is_calibrated_and_a_seed_has_one_result():
    found, again = calibrate(guide_of(), num_simulations=30), calibrate(guide_of(), num_simulations=4)
    assert found.is_calibrated
    assert found.verdict == "calibrated"
    assert found.ranks["z"].shape == (30,)
    assert (found.ranks["z"][:4] == again.ranks["z"]).all()
    assert (found.ranks["z"] == found.ranks["double"]).all()
    assert found.ranks["z"].min() >= 0
    assert found.ranks["z"].max() <= 99


def test_what_is_wrong_is_named():
    def four(y=None):
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    def guide(y):
        shift = pyro.param("shift", torch.tensor([0.0, 0.0, -0.9, 0.9]))
        scale = torch.tensor([0.2, 4.0, 1.0, 1.0]) * 0.5**0.5
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(y / 2 + shift, scale))

    found = calibrate(guide, of=four, draws="guide", num_simulations=30)
    assert list(found.summary()["verdict"]) == ["too narrow", "too wide", "too low", "too high"]
    assert "too narrow for 1" in str(found)
    assert not found.is_calibrated


def test_weights_mend_a_guide_that_is_elsewhere():
    found = [calibrate(guide_of(-0.7, 1.8), draws=draws) for draws in ("psis", "guide")]
    assert [each.is_calibrated for each in found] == [True, False]


def regression(X, y=None):
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(X @ b, 0.5), obs=y)


@pytest.fixture(scope="module")
def known_ranks():
    """With data that are an argument of the model."""
    options = {"num_simulations": 6, "seed": 0, "progress": False}
    return pplvi.calibrate(regression, pplvi.AutoConjugate, args=(X, torch.ones(5)), **options).ranks["b"]


@pytest.mark.parametrize(
    ("of", "args", "observed"),
    [
        (regression, (X,), ("y",)),
        (regression, (X.numpy(), np.zeros(5)), None),
        (pyro.condition(regression, data={"y": torch.zeros(5)}), (X,), None),
    ],
    ids=["left out", "given", "conditioned"],
)
def test_data_are_replaced_wherever_they_enter(of, args, observed, known_ranks):
    options = {"observed": observed, "num_simulations": 6, "seed": 0, "progress": False}
    found = pplvi.calibrate(of, pplvi.AutoConjugate, args=args, **options)
    assert found.is_calibrated
    assert found.ranks["b"].std() > 15  # posteriors of the zeros that are given would be at one place
    assert (found.ranks["b"] == known_ranks).all()


@pytest.mark.parametrize("guide", ["nuts", "smc"])
def test_draws_that_are_made_are_ranked_too(guide):
    options = {"num_steps": 100, **({"restarts": 2} if guide == "smc" else {})}
    found = pplvi.calibrate(model, guide, observed=("y",), num_simulations=2, seed=0, progress=False, **options)
    assert found.num_simulations == 2
    assert np.isnan(found.pareto_k).all()
    assert found.recipe == guide


def test_an_amortised_guide_is_calibrated_as_it_is():
    fit = pplvi.fit(model, guide_of(), args=(torch.tensor(0.3),), learning_rate=1e-6, **QUICK)
    found = pplvi.calibrate(model, fit, num_simulations=20, seed=0, progress=False)
    assert found.is_calibrated
    one = pplvi.fit(model, AutoNormal, args=(torch.tensor(0.3),), **QUICK)
    with pytest.raises(ValueError, match="draws the same whatever the data: expected an amortised"):
        pplvi.calibrate(model, one, num_simulations=3, seed=0, progress=False)


def test_networks_of_a_recipe_are_trained_anew():
    net = torch.nn.Linear(1, 2)
    before = net.weight.detach().clone()
    started = []

    def recipe(model):
        started.append(net.weight.detach().clone())
        return lambda y: pyro.sample("z", dist.Normal(*_split(pyro.module("net", net)(y[None]))))

    calibrate(recipe, num_simulations=3, learning_rate=0.1)
    assert all((weight == before).all() for weight in started)


def _split(out):
    return out[0], out[1].exp()


def test_single_fits_that_fail_are_counted():
    def fragile(y):
        if y > 0.5:
            raise RuntimeError("no luck")
        guide_of()(y)

    found = calibrate(fragile, num_simulations=12, seed=1)
    assert found.failures
    assert found.num_simulations == 12 - len(found.failures)
    assert set(found.failures.values()) == {"RuntimeError: no luck"}
    assert f"{len(found.failures)} fits failed" in str(found)


def test_what_fails_always_is_told_at_once():
    with pytest.raises(RuntimeError, match="never"):
        calibrate(lambda y: (_ for _ in ()).throw(RuntimeError("never")), num_simulations=50)


def _factored(y=None):
    model(y)
    pyro.factor("penalty", torch.tensor(0.5))


def _scaled(y=None):
    with pyro.poutine.scale(scale=0.5):
        model(y)


def _minibatch(y=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=5):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def _learned(y=None):
    pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0)), 1.0), obs=y)


def _improper(y=None):
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": _factored}, "it has the factors"),
        ({"of": _scaled}, "are scaled, by a subsampled plate or poutine.scale"),
        ({"of": _minibatch}, "are scaled, by a subsampled plate or poutine.scale"),
        ({"of": _learned}, r"has the parameters \['m'\]"),
        ({"of": _improper}, "expected proper priors"),
        ({"observed": None}, r"the data are \[\]: expected sites of the model"),
        ({"observed": ("w",)}, r"the data are \['w'\]: expected sites of the model"),
        ({"guide": AutoNormal(model)}, "expected its class or a function"),
        ({"draws": "all"}, "draws='all'"),
        ({"data": [1.0]}, r"\['data'\] cannot be given"),
        ({"num_simulations": 0}, "num_simulations=0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_simulated_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(**{"guide": guide_of(), "num_simulations": 3, **options})


def test_a_guide_that_would_not_see_the_data_is_refused():
    def logged(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y.log())

    with pytest.raises(ValueError, match="would not see what is simulated"):
        pplvi.calibrate(logged, guide_of(), args=(torch.tensor(2.0),), num_simulations=5, **QUICK)
    found = pplvi.calibrate(logged, pplvi.AutoPathfinder, args=(torch.tensor(2.0),), num_simulations=3, seed=0)
    assert found.ranks["z"].std() > 0


# ---------------------------------------------------------------------- the statistics


@pytest.mark.parametrize(("num_simulations", "num_draws"), [(50, 20), (200, 99)])
def test_the_band_holds_uniform_ranks_as_often_as_it_says(num_simulations, num_draws):
    band = UniformBand(num_simulations, num_draws)
    ranks = np.random.default_rng(1).integers(0, num_draws + 1, size=(500, num_simulations))
    low, high = band.limits(0.9)
    counts = np.stack([band.counts(row) for row in ranks])
    inside = ((counts >= low) & (counts <= high)).all(1).mean()
    assert abs(inside - 0.9) < 4 * (0.09 / 500) ** 0.5
    p_values = np.array([band.p_value(row) for row in ranks])
    assert abs((p_values < 0.1).mean() - 0.1) < 4 * (0.09 / 500) ** 0.5


def test_ties_are_split_evenly():
    rng = np.random.default_rng(0)
    ranks = np.array([rank_among(np.array(1), np.array([0, 1, 1, 1, 2]), rng) for _ in range(2_000)])
    assert np.abs(np.bincount(ranks, minlength=5)[1:] / 2_000 - 0.25).max() < 4 * (0.1875 / 2_000) ** 0.5
    assert ranks.min() == 1


def test_many_elements_are_judged_together():
    """At 5 % one of forty calibrated elements is outside its own band more often than not."""
    ranks = np.random.default_rng(3).integers(0, 100, size=(100, 40))
    frame = frame_of_ranks({"z": ranks}, 99, 0.95)
    assert (frame["verdict"] == "calibrated").all()
    assert list(frame.index[:2]) == ["z[0]", "z[1]"]
    assert miscalibration(0.5, 1.0, 100) == "of another shape"


def test_pictures_and_tables():
    ranks = {"z": np.arange(100), "a": np.random.default_rng(0).integers(0, 100, size=(100, 2))}
    found = Calibration(ranks, 99, "<lambda>", 0.95, np.full(100, 0.9), {3: "ValueError: no"})
    ecdf = found.plot()
    assert [len(ax.lines) for ax in ecdf] == [1, 2]
    low = ecdf[0].collections[0].get_paths()[0].vertices[:, 1].min()
    assert -0.2 < low < -0.1  # at 100 simulations the 95 % band is 0.15 wide in the middle
    assert np.abs(ecdf[0].lines[0].get_ydata()).max() < 1e-12
    (hist,) = found.plot(["a"], kind="rank")
    assert sum(patch.get_height() for patch in hist.patches) == pytest.approx(len(hist.patches))
    with pytest.raises(ValueError, match="expected sites among"):
        found.plot(["b"])
    html = found._repr_html_()
    assert "&lt;lambda&gt;" in html
    assert "k-hat above 0.7 in 100 of 100" in html
    assert "1 fits failed, the first, of simulation 3, with ValueError: no" in html
