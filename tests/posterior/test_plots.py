"""The plots show what they say: the content of the axes is checked, not only that something was drawn."""

import math
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import same_color
from pyro.infer.autoguide import AutoDelta

from pplvi.posterior.arviz.export import to_arviz
from pplvi.posterior.arviz.versions import is_legacy
from pplvi.posterior.plots import plot_against_reference, plot_objective, plot_weights
from pplvi.posterior.posterior import Posterior

pytestmark = pytest.mark.usefixtures("float64")

Y = (1.0, 2.0, 0.5)


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    pyplot.close("all")


def model(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def posterior(loc=0.875, scale=0.5, seed=0, num_draws=1000):
    def guide(y):
        pyro.sample("z", dist.Normal(loc, scale))

    return Posterior(model, guide, (torch.tensor(Y),), num_draws=num_draws, seed=seed)


def labels(ax):
    legend = ax.get_legend() or ax.figure.legends[0]  # ArviZ 1.x has one for all panels
    return [text.get_text() for text in legend.get_texts()]


# Nothing but the curves, from the least to the largest draw.
CURVES = (
    {"hdi_prob": 1.0, "point_estimate": None}
    if is_legacy()
    else {"visuals": dict.fromkeys(["credible_interval", "point_estimate", "point_estimate_text"], False)}
)


# --- objective ------------------------------------------------------------------------------------------------------

LOSSES = np.array([[8.0, 4.0, 2.0, 0.0], [9.0, np.nan, 3.0, np.inf]])


def test_objective_has_the_trace_and_its_moving_average():
    ax = plot_objective(LOSSES, window=2)
    raw, average, other_raw, other = ax.lines
    np.testing.assert_array_equal(raw.get_ydata(), LOSSES[0])
    np.testing.assert_array_equal(average.get_ydata(), [8.0, 6.0, 3.0, 1.0])
    np.testing.assert_array_equal(other_raw.get_ydata(), LOSSES[1])
    np.testing.assert_array_equal(other.get_ydata(), [9.0, 9.0, 3.0, 3.0])  # of the finite steps in the window
    assert same_color(raw.get_color(), average.get_color())
    assert not same_color(raw.get_color(), other.get_color())
    assert labels(ax) == ["restart 0, mean of 2 steps", "restart 1, mean of 2 steps"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "objective (nats)")


def test_average_of_steps_that_never_came_is_missing():
    average = plot_objective(np.array([[1.0, 3.0, np.nan, np.nan, np.nan]]), window=2).lines[1].get_ydata()
    np.testing.assert_array_equal(average, [1.0, 2.0, 3.0, np.nan, np.nan])


def test_steep_start_does_not_stretch_the_axis():
    losses = np.concatenate([np.linspace(1e6, 10.0, 100), 10.0 + 0.1 * np.sin(np.arange(900))])
    low, high = plot_objective(losses).get_ylim()
    assert 9 < low < 10 < high < 11


@pytest.mark.parametrize("kind", ["fit", "inference data", "tensor"])
def test_objective_of_everything_that_has_one(kind):
    losses = torch.arange(200.0).reshape(2, 100)
    sources = {
        "fit": lambda: types.SimpleNamespace(losses=losses.numpy()),
        "inference data": lambda: to_arviz([posterior(), posterior()], losses=losses, num_prior=0),
        "tensor": lambda: losses,
    }
    given = pyplot.subplots()[1]
    ax = plot_objective(sources[kind](), labels=["a", "b"], ax=given)
    assert ax is given
    np.testing.assert_array_equal(ax.lines[2].get_ydata(), losses[1])
    assert labels(ax) == ["a, mean of 2 steps", "b, mean of 2 steps"]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (LOSSES, {"window": 0}, "window=0: expected"),
        (LOSSES, {"labels": ["one"]}, "1 labels for 2 restarts"),
        ("nothing", {}, "source is str without a trace"),
        (np.zeros((0, 3)), {}, "ndarray without a trace"),
        (types.SimpleNamespace(losses=None), {}, "SimpleNamespace without a trace"),
    ],
)
def test_objective_refuses_what_it_cannot_plot(source, options, message):
    with pytest.raises(ValueError, match=message):
        plot_objective(source, **options)


def test_export_without_losses_has_no_objective():
    with pytest.raises(ValueError, match=r"(InferenceData|DataTree) without a trace of an objective"):
        plot_objective(to_arviz(posterior(), num_prior=0))


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_show_their_density_and_k_hat():
    posteriors = [posterior(1.0, 0.6, seed) for seed in range(2)]
    density, pareto_k = plot_weights(types.SimpleNamespace(posteriors=posteriors))
    for line, each in zip(density.lines, posteriors, strict=True):
        relative = np.sort((each.log_weight - each.log_evidence[0]).numpy())[10:]  # all but the lightest hundredth
        x, y = line.get_data()
        assert np.trapezoid(y, x) == pytest.approx(1.0, abs=0.03)
        assert x.min() == pytest.approx(relative.min(), abs=0.05)
        assert x.max() == pytest.approx(relative.max(), abs=0.05)
    k = [each.pareto_k.item() for each in posteriors]
    assert labels(density) == [
        f"restart {i}: k-hat {k[i]:.1f}, ESS {each.ess:.0f} of 1000" for i, each in enumerate(posteriors)
    ]
    np.testing.assert_allclose(pareto_k.collections[0].get_offsets(), [(0, k[0]), (1, k[1])])
    lines = sorted(segment[0, 1] for segment in pareto_k.collections[1].get_segments())
    assert lines == pytest.approx([0.0, 1 - 1 / math.log10(1000), 1.0])
    assert density.get_xlabel() == "log weight minus log evidence (nats)"
    assert (pareto_k.get_xlabel(), pareto_k.get_ylabel()) == ("restart", "Pareto k-hat")


def test_weights_per_datum_have_a_point_for_each():
    def local(y):
        with pyro.plate("datum", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    def guide(y):
        with pyro.plate("datum", len(y)):
            pyro.sample("z", dist.Normal(0.4 * y, 0.8))

    each = Posterior(local, guide, (torch.tensor(Y),), num_draws=1000, seed=0)
    given = pyplot.subplots(1, 2)[1]
    axes = plot_weights(each, axes=given)
    assert list(axes) == list(given)
    np.testing.assert_allclose(axes[1].collections[0].get_offsets(), list(enumerate(each.pareto_k)))
    assert axes[1].get_xlabel() == "restart x datum"
    assert labels(axes[0]) == [f"k-hat {each.pareto_k.max():.1f}, ESS {each.ess.min():.0f} of 1000"]


def test_exact_guide_has_a_single_weight():
    density, _ = plot_weights(posterior())
    np.testing.assert_allclose(density.lines[0].get_xdata(), 0.0, atol=1e-6)
    assert labels(density) == ["k-hat 0.0, ESS 1000 of 1000"]


def test_weights_refuse_what_has_none():
    guide = AutoDelta(model)
    guide(torch.tensor(Y))
    with pytest.raises(ValueError, match="at a point"):
        plot_weights(Posterior(model, guide, (torch.tensor(Y),), num_draws=10))
    with pytest.raises(ValueError, match="expected a posterior, a list of them"):
        plot_weights([])
    with pytest.raises(ValueError, match=r"axes has shape \(1,\); expected two axes"):
        plot_weights(posterior(), axes=[pyplot.subplots()[1]])


# --- reference ------------------------------------------------------------------------------------------------------


def draws(loc, names=("a", "b"), size=2000):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (), "b": (2,), "c": ()}
    return {name: loc + torch.randn(size, *shapes[name], generator=generator) for name in names}


def panels(axes):
    return {ax.get_title(): ax for ax in np.ravel(axes) if ax.get_title()}


def peak(line):
    x, y = line.get_data()
    return x[np.argmax(y)]


def test_marginals_lie_on_top_of_each_other():
    axes = panels(plot_against_reference(draws(0.0), draws(3.0, ("b", "a", "c")), **CURVES))
    assert set(axes) == {"a", "b\n0", "b\n1"}
    for ax in axes.values():
        lines = [line for line in ax.lines if len(line.get_xdata()) > 100]
        assert peak(lines[0]) == pytest.approx(0.0, abs=0.6)
        assert peak(lines[1]) == pytest.approx(3.0, abs=0.6)
    assert labels(axes["a"]) == ["posterior", "reference"]


def test_labels_of_plates_come_from_the_posterior():
    def local(y):
        with pyro.plate("datum", len(y)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    each = Posterior(local, local, (torch.tensor(Y),), num_draws=200, seed=0)
    data = to_arviz(each, coords={"datum": ["u", "v", "w"]}, num_prior=0)
    axes = panels(plot_against_reference(data, each.draws.latents, labels=["guide", "NUTS"]))
    assert list(axes) == ["z\nu", "z\nv", "z\nw"]
    assert labels(axes["z\nu"]) == ["guide", "NUTS"]


def test_posteriors_and_fits_are_resampled_before_they_are_compared():
    wrong = posterior(0.375, 0.5, num_draws=4000)
    fit = types.SimpleNamespace(to_arviz=lambda **options: to_arviz(wrong, seed=0, **options))
    reference = {"z": dist.Normal(0.875, 0.5).sample((4000,))}
    for source in (wrong, fit):
        axes = plot_against_reference(source, reference, **CURVES)
        lines = [line for line in axes.ravel()[0].lines if len(line.get_xdata()) > 100]
        assert peak(lines[0]) == pytest.approx(0.875, abs=0.25)


@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        (draws(0.0, ("c",)), {}, r"got the variables \[\]; expected some that both"),
        (draws(0.0), {"var_names": ["c"]}, r"got the variables \['c'\]; expected some.*\['a', 'b'\]"),
        ({"a": torch.zeros(10, 3)}, {}, r"variable 'a' has shape \(\) in the posterior and \(3,\)"),
    ],
)
def test_reference_has_to_fit(reference, options, message):
    with pytest.raises(ValueError, match=message):
        plot_against_reference(draws(0.0), reference, **options)
