"""Objectives as pure functions of steps: values, and surrogate gradients against closed forms."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pplvi.objectives.bounds import RenyiBound, ThermodynamicBound
from pplvi.objectives.forward_kl import ForwardKLDivergence
from pplvi.objectives.step import Step

pytestmark = pytest.mark.usefixtures("float64")

ORDERS = [0.0, 0.3, 1.0, -1.0]
K, N = 5, 3


def densities(requires_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """log_target, log_target_fixed and log_forward as leaves, so that gradients are those of the objective alone."""
    leaves = (2 * torch.randn(3, K, N)).unbind(0)
    return tuple(leaf.clone().requires_grad_(requires_grad) for leaf in leaves)


def sign(alpha: float) -> float:
    return -1.0 if alpha >= 0 else 1.0


def plain_bound(log_weight: Tensor, alpha: float) -> Tensor:
    if alpha == 1.0:
        return log_weight.mean(0)
    return ((1 - alpha) * log_weight).exp().mean(0).log() / (1 - alpha)


def normalised(log_weight: Tensor, power: float = 1.0) -> Tensor:
    weight = (power * log_weight).exp()
    return (weight / weight.sum(0)).detach()


def test_steps_of_moves_carry_their_weights_on() -> None:
    weight, target, initial, reverse, forward = torch.randn(5, K, N).unbind(0)
    target.requires_grad_()
    step = Step.from_move(weight, target, initial, reverse, forward, scale=2.0, subsampled=("data",))
    assert torch.allclose(step.log_weight_out, weight + target + reverse - initial - forward)
    assert torch.equal(step.log_weight, step.log_weight_out.detach())
    assert not step.log_weight.requires_grad
    assert (step.scale, step.subsampled) == (2.0, ("data",))
    assert torch.equal(step.log_target_fixed, target)


def test_draws_that_stay_are_weighted_by_the_ratio_of_targets() -> None:
    weight, target, initial = torch.randn(3, K, N).unbind(0)
    assert torch.allclose(Step.from_move(weight, target, initial).log_weight, weight + target - initial)


def test_a_first_move_is_ordinary_importance_sampling() -> None:
    target, fixed, forward = densities(requires_grad=False)
    zero = torch.zeros_like(target)
    moved = Step.from_move(zero, target, zero, log_forward=forward, log_target_fixed=fixed)
    plain = Step.from_proposal(target, forward, fixed)
    for name in ("log_weight", "log_target", "log_target_fixed", "log_forward", "log_increment"):
        assert torch.equal(getattr(moved, name), getattr(plain, name)), name


def test_equally_weighted_draws_leave_the_gradient_of_their_density() -> None:
    target, _, _ = densities()
    step = Step.equally_weighted(target)
    assert not step.log_weight.any()
    assert not step.log_increment.any()
    (slope,) = torch.autograd.grad(step.log_increment.sum(), target)
    assert torch.equal(slope, torch.ones(K, N))


def test_increment_has_the_reverse_and_initial_densities() -> None:
    terms = torch.randn(7, K, N)
    step = Step(*terms)
    torch.testing.assert_close(step.log_increment, terms[2] + terms[4] - terms[5] - terms[6])
    assert step.num_particles == K


def test_the_weight_of_a_step_is_detached() -> None:
    target, _, forward = densities()
    step = Step.from_proposal(target, forward)
    assert not step.log_weight.requires_grad
    torch.testing.assert_close(step.log_weight, (target - forward).detach())
    assert step.log_target_fixed is target


def test_concatenated_steps_are_one_step_with_all_particles() -> None:
    target, fixed, forward = densities()
    whole = Step.from_proposal(target, forward, fixed, forward, scale=2.0, subsampled=("rows",))
    parts = [
        Step.from_proposal(*(x[i : i + 1] for x in (target, forward, fixed, forward)), 2.0, ("rows",)) for i in range(K)
    ]
    joined = Step.concatenate(parts)
    assert (joined.scale, joined.subsampled, joined.averaged) == (2.0, ("rows",), False)
    for name in ("log_weight", "log_target", "log_target_fixed", "log_forward", "log_score", "log_weight_in"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name


@pytest.mark.parametrize("alpha", ORDERS)
def test_renyi_value_and_gradient(alpha: float) -> None:
    target, _, forward = densities()
    value, surrogate = RenyiBound(alpha)(Step.from_proposal(target, forward))
    torch.testing.assert_close(value, sign(alpha) * plain_bound(target - forward, alpha).detach())
    assert not value.requires_grad
    surrogate.sum().backward()
    weight = normalised(target - forward, 1 - alpha)
    torch.testing.assert_close(target.grad, sign(alpha) * weight)
    torch.testing.assert_close(forward.grad, -sign(alpha) * weight)


@pytest.mark.parametrize("alpha", ORDERS)
def test_incoming_weights_multiply_the_increment(alpha: float) -> None:
    target, incoming, forward = densities(requires_grad=False)
    step = replace(Step.from_proposal(target, forward), log_weight_in=incoming)
    torch.testing.assert_close(
        RenyiBound(alpha)(step).value, sign(alpha) * plain_bound(incoming + target - forward, alpha)
    )


def test_orders_near_one_approach_the_elbo() -> None:
    target, _, forward = densities(requires_grad=False)
    step = Step.from_proposal(target, forward)
    torch.testing.assert_close(RenyiBound(1 - 1e-7)(step).value, RenyiBound(1.0)(step).value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", ORDERS)
def test_doubly_reparameterised_coefficients(alpha: float) -> None:
    """With u = softmax((1-alpha) log w): alpha u + (1-alpha) u^2 on the path, what is missing to u on the model."""
    target, fixed, forward = densities()
    RenyiBound(alpha, "dreg")(Step.from_proposal(target, forward, fixed)).surrogate.sum().backward()
    u = normalised(target - forward, 1 - alpha)
    path = alpha * u + (1 - alpha) * u**2
    torch.testing.assert_close(target.grad, sign(alpha) * path)
    torch.testing.assert_close(forward.grad, -sign(alpha) * path)
    torch.testing.assert_close(fixed.grad, sign(alpha) * (u - path))


def test_doubly_reparameterised_gradient_is_that_of_the_design() -> None:
    """For the importance-weighted bound: -sum sg(w^2) log v - sum sg(w - w^2) log_target_fixed."""
    target, fixed, forward = densities()
    step = Step.from_proposal(target, forward, fixed)
    w = normalised(target - forward)
    expected = -(w**2 * (target - forward) + (w - w**2) * fixed).sum()
    wanted = torch.autograd.grad(expected, (target, fixed, forward))
    found = torch.autograd.grad(RenyiBound(0.0, "dreg")(step).surrogate.sum(), (target, fixed, forward))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("alpha", ORDERS)
def test_vimco_signal_leaves_one_particle_out_at_a_time(alpha: float) -> None:
    target, score, forward = densities()
    step = Step.from_proposal(target.detach(), forward.detach(), log_score=score)
    RenyiBound(alpha, "vimco")(step).surrogate.sum().backward()
    log_weight = (target - forward).detach()
    for k in range(K):
        others = torch.cat([log_weight[:k], log_weight[k + 1 :]])
        without = torch.cat([others, others.mean(0, keepdim=True)])
        signal = plain_bound(log_weight, alpha) - plain_bound(without, alpha)
        control = 1 / K if alpha == 1.0 else 0.0  # E[grad log q] = 0 is taken out of the linear bound
        torch.testing.assert_close(score.grad[k], sign(alpha) * (signal + control))


@pytest.mark.parametrize("alpha", ORDERS)
def test_plain_score_signal(alpha: float) -> None:
    target, score, forward = densities()
    step = Step.from_proposal(target.detach(), forward.detach(), log_score=score)
    RenyiBound(alpha, "score")(step).surrogate.sum().backward()
    log_weight = (target - forward).detach()
    signal = (log_weight + 1) / K if alpha == 1.0 else plain_bound(log_weight, alpha).expand(K, N)
    torch.testing.assert_close(score.grad, sign(alpha) * signal)


@pytest.mark.parametrize("estimator", [None, "vimco", "dreg"])
def test_impossible_draws_leave_nonlinear_bounds_finite(estimator: str | None) -> None:
    target, fixed, forward = densities()
    impossible = torch.zeros(K, N, dtype=torch.bool)
    impossible[0, 0] = True
    step = Step.from_proposal(
        target.masked_fill(impossible, -torch.inf),
        forward,
        fixed.masked_fill(impossible, -torch.inf),
        log_score=forward if estimator == "vimco" else None,
    )
    value, surrogate = RenyiBound(0.0, estimator)(step)
    surrogate.sum().backward()
    assert value.isfinite().all()
    assert surrogate.isfinite().all()
    assert target.grad.isfinite().all()
    assert forward.grad.isfinite().all()


def test_impossible_draws_leave_the_forward_kl_finite() -> None:
    target, _, forward = densities()
    impossible = torch.zeros(K, N, dtype=torch.bool)
    impossible[0] = True
    step = Step.from_proposal(target.masked_fill(impossible, -torch.inf), forward)
    assert ForwardKLDivergence()(step).surrogate.isfinite().all()


def test_forward_kl_weighs_the_guide_and_leaves_the_model_alone() -> None:
    target, _, forward = densities()
    value, surrogate = ForwardKLDivergence()(Step.from_proposal(target, forward))
    weight = normalised(target - forward)
    torch.testing.assert_close(value, -(weight * forward).sum(0).detach())
    surrogate.sum().backward()
    torch.testing.assert_close(forward.grad, -weight)
    assert target.grad is None


@pytest.mark.parametrize("betas", [(0.0,), (0.0, 0.5), (0.0, 0.01, 0.3, 0.9)])
def test_thermodynamic_value_and_covariance_gradient(betas: tuple[float, ...]) -> None:
    target, _, forward = densities()
    value, surrogate = ThermodynamicBound(betas)(Step.from_proposal(target, forward))
    log_weight = (target - forward).detach()
    expected, on_target, on_forward = torch.zeros(N), torch.zeros(K, N), torch.zeros(K, N)
    for beta, upper in zip(betas, (*betas[1:], 1.0), strict=True):
        weight = normalised(log_weight, beta)
        mean = (weight * log_weight).sum(0)
        expected += (upper - beta) * mean
        centred = weight * (log_weight - mean)
        on_target += (upper - beta) * (weight + beta * centred)
        on_forward += (upper - beta) * (-weight + (1 - beta) * centred)
    torch.testing.assert_close(value, -expected)
    surrogate.sum().backward()
    torch.testing.assert_close(target.grad, -on_target)
    torch.testing.assert_close(forward.grad, -on_forward)


def test_thermodynamic_values_lie_between_the_elbo_and_the_importance_weighted_bound() -> None:
    target, _, forward = densities(requires_grad=False)
    step = Step.from_proposal(target, forward)
    values = [ThermodynamicBound(betas)(step).value for betas in ((0.0,), (0.0, 0.5), (0.0, 0.25, 0.5, 0.75))]
    torch.testing.assert_close(values[0], RenyiBound(1.0)(step).value)
    for loose, tight in zip(values, [*values[1:], RenyiBound(0.0)(step).value], strict=True):
        assert (loose >= tight).all()


def test_declarations() -> None:
    lower = [RenyiBound(0.0), RenyiBound(0.5), RenyiBound(1.0), ThermodynamicBound((0.0,))]
    assert [objective.monitor for objective in lower] == ["lower"] * 4
    assert RenyiBound(-1.0).monitor == "upper"
    assert ForwardKLDivergence().monitor is None
    assert [RenyiBound(a).linear for a in (1.0, 0.0, 0.999)] == [True, False, False]
    assert not ForwardKLDivergence().linear
    assert ForwardKLDivergence().proposals == {"guide", "model", "mixture"}
    assert RenyiBound(0.0).proposals == {"guide"}
    assert RenyiBound(0.0, "vimco").min_particles == ThermodynamicBound((0.0,)).min_particles == 2
    assert all(RenyiBound(0.0, e).routing.freeze for e in ("stl", "dreg"))
    assert all(RenyiBound(0.0, e).routing.detach for e in ("score", "vimco"))
    assert ForwardKLDivergence().routing.detach
    assert ThermodynamicBound((0.0,)).routing.detach


def test_sites_without_a_path_gradient_are_refused_where_there_is_no_estimator() -> None:
    target, score, forward = densities()
    step = Step.from_proposal(target, forward, log_score=score)
    with pytest.raises(ValueError, match=r"cannot be reparameterised.*Use estimator=None"):
        RenyiBound(1.0, "reparam")(step)
    single = Step.from_proposal(target[:1], forward[:1], log_score=score[:1])
    plain, alone = RenyiBound(1.0, "score")(single), RenyiBound(1.0)(single)  # one particle has no baseline
    assert torch.equal(plain.surrogate, alone.surrogate)
