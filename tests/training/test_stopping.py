"""The stopping rule."""

import numpy as np
import pytest

from pplvi.training.stopping import Plateau, has_settled, mean_with_error


def test_error_of_independent_values():
    mean, error = mean_with_error(np.random.default_rng(0).normal(3.0, 2.0, size=40_000))
    assert abs(mean - 3.0) < 4 * 0.01
    assert error == pytest.approx(0.01, rel=0.25)  # 200 batches: the error of the error is 5 %


def test_error_counts_autocorrelation():
    rng, x, rho = np.random.default_rng(0), np.zeros(40_000), 0.8
    for t in range(1, len(x)):
        x[t] = rho * x[t - 1] + rng.normal()
    exact = 1 / (1 - rho) / np.sqrt(len(x))
    assert mean_with_error(x)[1] == pytest.approx(exact, rel=0.25)


def traces(shape, steps, seeds=range(40)):
    for seed in seeds:
        yield shape(np.arange(steps)) + np.random.default_rng(seed).normal(size=steps)


def first_stop(rule, trace):
    return next((n for n in range(1, len(trace) + 1) if rule.is_due(n) and rule.reached(trace[:n])), None)


def test_a_level_trace_stops_soon():
    stops = [first_stop(Plateau(), t) for t in traces(lambda t: 0.0 * t, 4000)]
    assert all(s is not None for s in stops)
    assert np.median(stops) <= 1500
    assert min(stops) >= 1200


def test_an_improving_trace_goes_on():
    assert not any(first_stop(Plateau(), t) for t in traces(lambda t: -0.005 * t, 3000))


def test_the_start_of_training_does_not_hold_up_the_end():
    stops = [first_stop(Plateau(), t) for t in traces(lambda t: 1e4 * np.exp(-t / 50), 6000)]
    assert all(s is not None for s in stops)
    assert np.median(stops) < 3000


def test_stops_once_what_is_left_is_below_the_error():
    shape = lambda t: 20.0 * np.exp(-t / 500)  # noqa: E731
    stops = np.array([first_stop(Plateau(), t) or 10_000 for t in traces(shape, 10_000)])
    assert (stops < 10_000).all()
    assert shape(np.median(stops)) < 0.5


def test_a_rising_trace_stops():
    assert first_stop(Plateau(), next(traces(lambda t: 0.01 * t, 3000))) == 1200


def test_thinned_rule_counts_in_entries():
    rule = Plateau(min_steps=1000, every=100).thinned(10)
    assert (rule.min_steps, rule.every) == (100, 10)


@pytest.mark.parametrize("options", [{"min_steps": 10}, {"every": 0}, {"patience": 0}, {"threshold": 0.0}])
def test_wrong_numbers_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        Plateau(**options)


def test_the_verdict_on_a_finished_trace():
    settled = [has_settled(t) for t in traces(lambda t: 0.0 * t, 1000)]
    assert all(settled)
    assert all(has_settled(t) for t in traces(lambda t: -1e-4 * t, 1000))  # significant or not, 0.025 nats are nothing
    assert not any(has_settled(t) for t in traces(lambda t: -0.005 * t, 1000))


@pytest.mark.parametrize("height", [0.0, 1e3, 1e6])
def test_spikes_do_not_hide_an_improvement(height):
    rng = np.random.default_rng(0)
    spikes = height * rng.exponential(size=2000) * (rng.uniform(size=2000) < 0.02)
    noise = 5.0 * rng.normal(size=2000)
    falling = 2000.0 - 0.2 * np.arange(2000) + noise + spikes
    assert not has_settled(falling)
    assert not Plateau().reached(falling)
    assert has_settled(noise + spikes)


def test_error_of_a_short_trace_is_that_of_its_batches():
    """Four batches of four: the unbiased standard deviation of their means, by the root of their number."""
    values = np.arange(18.0) ** 2
    means = values[2:].reshape(4, 4).mean(1)
    exact = np.sqrt(((means - means.mean()) ** 2).sum() / 3) / 2
    assert mean_with_error(values) == pytest.approx((values.mean(), exact))
