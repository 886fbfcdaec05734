"""Log-weight algebra against exact values, plain NumPy and ArviZ."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from arviz_results import psislw
from scipy import stats
from torch import Tensor
from torch.distributions import Normal
from torch.fx.experimental.proxy_tensor import make_fx

from pplvi.posterior.arviz.versions import is_legacy
from pplvi.weights.algebra import effective_sample_size, expectation, log_evidence, logmeanexp, normalize
from pplvi.weights.pareto import pareto_k_threshold, pareto_smooth
from pplvi.weights.resampling import resample

SCHEMES = ["systematic", "stratified", "multinomial"]
DEAD = torch.full((9,), -math.inf, dtype=torch.float64)


@pytest.fixture
def batch() -> Tensor:
    """Log-weights of nine particles for a batch of seven, far from zero."""
    torch.manual_seed(1)
    return 2 * torch.randn(9, 7, dtype=torch.float64) - 800


def conjugate_log_weight(num_draws: int, loc: float = 0.25, scale: float = 0.5**0.5) -> Tensor:
    """log p(0.5, z) - log q(z) for the prior N(0, 1), one observation 0.5 of sd 1 and the guide N(loc, scale)."""
    torch.manual_seed(2)
    guide = Normal(torch.tensor(loc, dtype=torch.float64), scale)
    z = guide.sample((num_draws,))
    return Normal(0.0, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(torch.tensor(0.5)) - guide.log_prob(z)


def test_exact_guide_gives_the_log_evidence_and_full_sample_size() -> None:
    log_weight = conjugate_log_weight(50)
    estimate, error = log_evidence(log_weight)
    assert estimate.item() == pytest.approx(-1.3280121, abs=1e-7)
    assert error.item() == pytest.approx(0.0, abs=1e-7)
    assert effective_sample_size(log_weight).item() == pytest.approx(50, abs=1e-9)


def test_log_evidence_of_an_inexact_guide_covers_the_truth() -> None:
    estimate, error = log_evidence(conjugate_log_weight(20_000, loc=0.0, scale=1.0))
    assert 0 < error.item() < 0.01
    assert abs(estimate.item() + 1.3280121) < 3 * error.item()


def test_standard_error_matches_the_spread_of_repeated_estimates() -> None:
    torch.manual_seed(3)
    estimates, errors = log_evidence(0.7 * torch.randn(400, 2000, dtype=torch.float64))
    assert errors.mean().item() == pytest.approx(estimates.std().item(), rel=0.06)


def test_standard_error_is_the_delta_method_by_hand(batch: Tensor) -> None:
    weight = (batch + 800).exp()
    expected = weight.std(0) / 3 / weight.mean(0)
    torch.testing.assert_close(log_evidence(batch)[1], expected)


def test_one_particle_has_no_standard_error() -> None:
    estimate, error = log_evidence(torch.zeros(1, 2))
    assert estimate.tolist() == [0, 0]
    assert error.tolist() == [math.inf, math.inf]


def test_logmeanexp_and_normalize_survive_large_magnitudes(batch: Tensor) -> None:
    torch.testing.assert_close(logmeanexp(batch), (batch + 800).exp().mean(0).log() - 800)
    torch.testing.assert_close(normalize(batch).sum(0), torch.ones(7, dtype=torch.float64))
    assert logmeanexp(batch, keepdim=True).shape == (1, 7)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1, 1, 1, 1], 4), ([1, 0, 0, 0], 1), ([2, 2, 0, 0], 2), ([3, 1], 1.6), ([1e-30, 1e-30], 2)],
)
def test_effective_sample_size_of_known_weights(weights: list[float], expected: float) -> None:
    log_weight = torch.tensor(weights, dtype=torch.float64).log()
    assert effective_sample_size(log_weight).item() == pytest.approx(expected, rel=1e-12)
    assert effective_sample_size(log_weight - 1e4).item() == pytest.approx(expected, rel=1e-6)


def test_dead_columns_are_minus_infinity_without_nan() -> None:
    log_weight = torch.stack([DEAD, torch.zeros(9, dtype=torch.float64)], 1).requires_grad_()
    assert logmeanexp(log_weight).tolist() == [-math.inf, 0]
    assert normalize(log_weight)[:, 0].eq(0).all()
    assert effective_sample_size(log_weight).tolist() == [0, pytest.approx(9)]
    estimate, error = log_evidence(log_weight)
    assert estimate[0] == -math.inf
    assert error[0] == math.inf
    assert expectation(log_weight, torch.ones(9, 2)).isnan().tolist() == [True, False]
    smoothed, pareto_k = pareto_smooth(log_weight)
    assert smoothed[:, 0].isneginf().all()
    assert pareto_k[0] == math.inf
    assert resample(log_weight)[:, 0].tolist() == list(range(9))


@pytest.mark.parametrize("function", [logmeanexp, normalize, effective_sample_size])
def test_dead_columns_send_no_nan_backwards(function) -> None:  # type: ignore[no-untyped-def]
    log_weight = torch.stack([DEAD, torch.linspace(0, 1, 9, dtype=torch.float64)], 1).requires_grad_()
    function(log_weight)[..., 1].sum().backward()
    assert log_weight.grad is not None
    assert log_weight.grad.isfinite().all()


def test_expectation_by_hand_with_event_dimensions(batch: Tensor) -> None:
    values = torch.randn(9, 7, 3, dtype=torch.float64)
    expected = torch.einsum("sb,sbe->be", torch.softmax(batch, 0), values)
    torch.testing.assert_close(expectation(batch, values), expected)


def test_expectation_detaches_weights_and_differentiates_values(batch: Tensor) -> None:
    log_weight, values = batch.clone().requires_grad_(), torch.ones_like(batch).requires_grad_()
    expectation(log_weight, values).sum().backward()
    assert log_weight.grad is None
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.softmax(batch, 0))


def test_weightless_particles_count_for_nothing_even_where_infinite() -> None:
    log_weight = torch.tensor([0.0, -math.inf])
    values = torch.tensor([2.0, -math.inf], requires_grad=True)
    average = expectation(log_weight, values)
    average.backward()
    assert average.item() == 2
    assert values.grad is not None
    assert values.grad.tolist() == [1, 0]


def test_expectation_refuses_values_of_another_batch(batch: Tensor) -> None:
    with pytest.raises(ValueError, match="does not begin with the shape"):
        expectation(batch, torch.ones(9, 6))


# ArviZ 1.x has other tails where their length is no whole number, and of few draws.
@pytest.mark.parametrize("num_draws", [21, 26, 100, 1000, 4000] if is_legacy() else [100, 900, 3600])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_pareto_smoothing_equals_arviz(num_draws: int, spread: float) -> None:
    torch.manual_seed(4)
    log_weight = spread * torch.randn(num_draws, 3, dtype=torch.float64) - 700
    expected, expected_k = psislw(log_weight.numpy().T.copy())
    smoothed, pareto_k = pareto_smooth(log_weight)
    np.testing.assert_allclose(normalize(smoothed).numpy().T, np.exp(expected), rtol=1e-9)
    np.testing.assert_allclose(pareto_k.numpy(), expected_k, atol=1e-9)


def test_pareto_smoothing_equals_arviz_with_ties_and_weightless_draws() -> None:
    torch.manual_seed(5)
    log_weight = torch.randn(440, dtype=torch.float64)
    log_weight = torch.cat([log_weight, log_weight, torch.full((20,), -math.inf)])
    expected, expected_k = psislw(log_weight.numpy().copy())
    smoothed, pareto_k = pareto_smooth(log_weight)
    # Which of two equal draws gets the larger smoothed weight is arbitrary.
    np.testing.assert_allclose(np.sort(normalize(smoothed).numpy()), np.sort(np.exp(expected)), rtol=1e-9)
    assert pareto_k.item() == pytest.approx(float(expected_k), abs=1e-9)


@pytest.mark.parametrize("shape", [0.3, 0.5, 0.9])
def test_pareto_k_finds_the_shape_of_a_pareto_tail(shape: float) -> None:
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    pareto_k = pareto_smooth(-shape * uniform.log())[1]
    assert pareto_k.item() == pytest.approx(shape, abs=0.02)


def test_pareto_smoothing_never_exceeds_the_largest_weight_and_keeps_order_and_body() -> None:
    torch.manual_seed(16)
    log_weight = 3 * torch.randn(1000, dtype=torch.float64)
    smoothed, _ = pareto_smooth(log_weight)
    assert smoothed.max() <= log_weight.max()
    assert (smoothed[log_weight.argsort()].diff() >= 0).all()
    changed = log_weight[smoothed != log_weight]
    assert changed.min() >= log_weight.sort().values[-math.ceil(3 * math.sqrt(1000))]


def test_pareto_smoothing_with_too_few_draws_leaves_the_weights_alone() -> None:
    log_weight = torch.randn(20)
    smoothed, pareto_k = pareto_smooth(log_weight)
    assert torch.equal(smoothed, log_weight)
    assert pareto_k.item() == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_weights_have_no_tail(dtype: torch.dtype) -> None:
    log_weight = conjugate_log_weight(1000).to(dtype)
    smoothed, pareto_k = pareto_smooth(log_weight)
    assert pareto_k.item() == 0
    assert torch.equal(smoothed, log_weight)
    assert pareto_k.dtype == smoothed.dtype == dtype


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_pareto_smoothing_refuses_nan_and_plus_infinity(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or \\+inf"):
        pareto_smooth(torch.tensor([0.0, bad]))


def test_pareto_smoothing_does_not_depend_on_the_default_device() -> None:
    log_weight = torch.randn(100, device="cpu")
    expected = pareto_smooth(log_weight)[1]
    with torch.device("meta"):
        assert pareto_smooth(log_weight)[1] == expected


def test_pareto_smoothing_of_an_empty_batch() -> None:
    smoothed, pareto_k = pareto_smooth(torch.zeros(30, 0))
    assert smoothed.shape == (30, 0)
    assert pareto_k.shape == (0,)


def test_pareto_k_threshold_grows_with_the_sample_to_its_cap() -> None:
    assert pareto_k_threshold(100) == pytest.approx(0.5)
    assert pareto_k_threshold(2154) < 0.7 == pareto_k_threshold(2155)
    with pytest.raises(ValueError, match="at least 2 draws"):
        pareto_k_threshold(1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resampling_is_unbiased(scheme: str) -> None:
    torch.manual_seed(6)
    weight = torch.tensor([0.02, 0.5, 0.0, 0.18, 0.3], dtype=torch.float64)
    repeats, num_samples = 20_000, 7
    indices = resample(weight.log()[:, None].expand(-1, repeats), num_samples, scheme)  # type: ignore[arg-type]
    counts = torch.stack([(indices == i).sum(0) for i in range(5)]).double()
    error = counts.std(1) / math.sqrt(repeats)
    assert ((counts.mean(1) - num_samples * weight).abs() <= 4 * error + 1e-12).all()
    assert indices.shape == (num_samples, repeats)
    assert indices.dtype == torch.int64


def test_systematic_counts_are_the_neighbouring_integers() -> None:
    torch.manual_seed(7)
    weight = torch.softmax(torch.randn(30, 50, dtype=torch.float64), 0)
    indices = resample(weight.log(), 200)
    counts = torch.stack([(indices == i).sum(0) for i in range(30)])
    assert ((counts - 200 * weight).abs() < 1 + 1e-9).all()


def test_stratified_counts_stay_within_two_of_the_expected() -> None:
    torch.manual_seed(8)
    weight = torch.softmax(torch.randn(30, 50, dtype=torch.float64), 0)
    indices = resample(weight.log(), 200, "stratified")
    counts = torch.stack([(indices == i).sum(0) for i in range(30)])
    assert ((counts - 200 * weight).abs() < 2).all()


def test_multinomial_counts_have_the_binomial_variance() -> None:
    torch.manual_seed(9)
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
    indices = resample(weight.log()[:, None].expand(-1, 20_000), 10, "multinomial")
    variance = indices.eq(0).sum(0).double().var().item()
    assert variance == pytest.approx(10 * 0.3 * 0.7, rel=0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resampling_never_picks_a_weightless_particle(scheme: str) -> None:
    torch.manual_seed(10)
    log_weight = torch.tensor([-math.inf, 0.0, -math.inf, -1.0, -math.inf])
    picked = resample(log_weight[:, None].expand(-1, 5000), 8, scheme).unique()  # type: ignore[arg-type]
    assert picked.tolist() == [1, 3]


def test_resampling_keeps_the_average_and_the_total_weight() -> None:
    torch.manual_seed(11)
    log_weight, values = torch.randn(20_000, dtype=torch.float64), torch.randn(20_000, dtype=torch.float64)
    indices = resample(log_weight)
    kept = logmeanexp(log_weight).expand(20_000)
    assert logmeanexp(kept).item() == pytest.approx(logmeanexp(log_weight).item(), abs=1e-12)
    assert values[indices].mean().item() == pytest.approx(expectation(log_weight, values).item(), abs=0.01)


def test_resampling_refuses_what_it_cannot_do(batch: Tensor) -> None:
    with pytest.raises(ValueError, match="scheme='branching'"):
        resample(batch, scheme="branching")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_samples=0"):
        resample(batch, 0)


FUNCTIONS = {
    "logmeanexp": logmeanexp,
    "normalize": normalize,
    "expectation": lambda x, dim=0: expectation(x, 3 * x, dim),
    "effective_sample_size": effective_sample_size,
    "log_evidence": lambda x, dim=0: log_evidence(x, dim)[0],
    "log_evidence_error": lambda x, dim=0: log_evidence(x, dim)[1],
    "pareto_smooth": lambda x, dim=0: pareto_smooth(x, dim)[0],
    "pareto_k": lambda x, dim=0: pareto_smooth(x, dim)[1],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_batch_equals_a_loop_over_its_elements(name: str, batch: Tensor) -> None:
    loop = torch.stack([FUNCTIONS[name](batch[:, i]) for i in range(7)], -1)
    torch.testing.assert_close(FUNCTIONS[name](batch), loop, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["pareto_smooth", "pareto_k"])
def test_pareto_smoothing_of_a_batch_equals_a_loop_where_tails_are_fitted(name: str) -> None:
    log_weight = torch.randn(60, 2, 3, dtype=torch.float64)
    result = FUNCTIONS[name](log_weight)
    for i in range(2):
        for j in range(3):
            assert torch.equal(result[..., i, j], FUNCTIONS[name](log_weight[:, i, j]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_particle_dimension_can_be_anywhere(name: str, batch: Tensor) -> None:
    result = FUNCTIONS[name](batch.mT, 1)
    torch.testing.assert_close(result, FUNCTIONS[name](batch).mT if result.dim() == 2 else FUNCTIONS[name](batch))
    torch.testing.assert_close(FUNCTIONS[name](batch.mT, -1), result)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resampling_a_batch_equals_a_loop_with_the_same_uniforms(scheme: str, batch: Tensor) -> None:
    torch.manual_seed(12)
    indices = resample(batch, 5, scheme)  # type: ignore[arg-type]
    torch.manual_seed(12)
    loop = torch.stack([resample(batch[:, i], 5, scheme) for i in range(7)], -1)  # type: ignore[arg-type]
    assert torch.equal(indices, loop)
    assert torch.take_along_dim(batch, indices, 0).shape == (5, 7)
    assert resample(batch.mT, 5, scheme, dim=-1).shape == (7, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "function",
    [
        logmeanexp,
        normalize,
        effective_sample_size,
        lambda x: expectation(x, 3 * x),
        lambda x: log_evidence(x)[1],
        resample,
    ],
)
def test_functions_can_be_traced_and_replayed_on_other_values(function, batch: Tensor) -> None:  # type: ignore[no-untyped-def]
    other = torch.randn_like(batch)
    other[:, 0] = -math.inf
    traced = make_fx(lambda x: function(x))(batch)  # make_fx wants to know the number of arguments
    torch.manual_seed(13)
    expected = function(other)
    torch.manual_seed(13)
    torch.testing.assert_close(traced(other), expected, equal_nan=True)


def test_gradients_are_those_of_the_formulas(batch: Tensor) -> None:
    for function in (logmeanexp, normalize, effective_sample_size):
        assert torch.autograd.gradcheck(function, (batch.clone().requires_grad_(),))


@pytest.mark.parametrize(
    ("bad", "dim", "message"),
    [
        (torch.tensor(0.0), 0, "dim=0"),
        (torch.zeros(3, dtype=torch.long), 0, "torch.int64"),
        (torch.zeros(3, 2), 2, "dim=2"),
        (torch.zeros(0, 2), 0, "no particles"),
    ],
)
def test_malformed_log_weights_are_refused(bad: Tensor, dim: int, message: str) -> None:
    for function in (logmeanexp, normalize, effective_sample_size, log_evidence, pareto_smooth):
        with pytest.raises(ValueError, match=message):
            function(bad, dim)


def test_expectation_bias_falls_with_the_number_of_particles() -> None:
    """Under the guide N(0, 1) the self-normalised mean approaches the posterior mean 0.25."""
    torch.manual_seed(14)
    errors = []
    for num_particles in (4, 64):
        z = torch.randn(num_particles, 50_000, dtype=torch.float64)
        errors.append(expectation(Normal(z, 1.0).log_prob(torch.tensor(0.5)), z).mean().item() - 0.25)
    assert errors[0] < -0.02
    assert abs(errors[1]) < 0.004


def test_resampled_draws_follow_the_target() -> None:
    torch.manual_seed(15)
    z = torch.randn(20_000, dtype=torch.float64)
    kept = z[resample(Normal(z, 1.0).log_prob(torch.tensor(0.5)))]
    distance = stats.kstest(kept.numpy(), stats.norm(0.25, 0.5**0.5).cdf).statistic
    assert distance < 1.63 / math.sqrt(10_000)


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "multinomial"])
def test_the_largest_random_number_picks_no_particle_without_weight(scheme: str, monkeypatch: Any) -> None:
    """Rounding makes 1 of it, beyond the last total."""
    largest = 1 - torch.finfo(torch.float64).eps / 2
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.full(shape, largest, **how))
    for log_weight, last in ((torch.zeros(3), 2), (torch.tensor([0.0, 0.0, -math.inf]), 1)):
        assert resample(log_weight, scheme=scheme).max() == last  # type: ignore[arg-type]


def test_rounding_never_resamples_a_particle_of_weight_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points at the very end, and weights whose sum is below one by rounding."""
    log_weight = next(
        w
        for seed in range(100)
        if float(
            (w := torch.randn(50, generator=torch.Generator().manual_seed(seed)).double()).softmax(0).cumsum(0)[-1]
        )
        < 1
    )
    log_weight = torch.cat([log_weight, torch.tensor([-math.inf] * 3)])
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.ones(*size, dtype=torch.float64))
    for scheme in ("systematic", "stratified", "multinomial"):
        assert int(resample(log_weight, scheme=scheme)[-1]) == 49
