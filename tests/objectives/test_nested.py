"""Objectives of one level: surrogate gradients against the closed forms of nested variational inference."""

import pytest
import torch
from torch import Tensor

from pplvi.objectives.nested import (
    FilteringBound,
    FilteringForwardKL,
    IncrementalBound,
    NestedForwardKL,
    NestedReverseKL,
    log_normalizer_ratio,
)
from pplvi.objectives.step import Objective, Step

pytestmark = pytest.mark.usefixtures("float64")

K, N = 6, 3


def level() -> dict[str, Tensor]:
    """The terms of a step, with leaves for every density, so that gradients are those of the objective alone."""
    names = ("log_weight_in", "log_target", "log_target_fixed", "log_reverse", "log_initial", "log_forward")
    leaves = dict(zip(names, (2 * torch.randn(6, K, N)).unbind(0), strict=True))
    leaves = {name: leaf.clone().requires_grad_(name != "log_weight_in") for name, leaf in leaves.items()}
    log_v = leaves["log_target"] + leaves["log_reverse"] - leaves["log_initial"] - leaves["log_forward"]
    return {**leaves, "log_weight": (leaves["log_weight_in"] + log_v).detach()}


def averages(terms: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Incoming and outgoing normalised weights, and log v, all plain numbers."""
    log_v = (terms["log_weight"] - terms["log_weight_in"]).detach()
    return torch.softmax(terms["log_weight_in"], 0), torch.softmax(terms["log_weight"], 0), log_v


def gradients(objective: Objective, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    value, surrogate = objective(Step(**terms))
    assert value.shape == surrogate.shape == (N,)
    assert not value.requires_grad
    surrogate.sum().backward()
    return {name: torch.zeros(K, N) if leaf.grad is None else leaf.grad for name, leaf in terms.items()}


def same(found: dict[str, Tensor], **expected: Tensor) -> None:
    for name, gradient in found.items():
        wanted = expected.get(name, torch.zeros(K, N))
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_reverse_kl_value_and_gradient_in_every_density() -> None:
    terms = level()
    a, b, log_v = averages(terms)
    mean = (a * log_v).sum(0)
    value = NestedReverseKL()(Step(**terms)).value
    torch.testing.assert_close(value, (a * log_v.exp()).sum(0).log() - mean)
    assert (value >= 0).all()
    found = gradients(NestedReverseKL(), terms)
    same(
        found,
        log_target=-a,  # the path of the draws; its parameters' part meets log_target_fixed
        log_target_fixed=b,
        log_reverse=-a,
        log_initial=-a * (log_v - mean),
        log_forward=a,  # frozen by the sampler: only the path is left
    )


def test_forward_kl_value_and_gradient_in_every_density() -> None:
    terms = level()
    a, b, log_v = averages(terms)
    mean = (b * log_v).sum(0)
    value = NestedForwardKL()(Step(**terms)).value
    torch.testing.assert_close(value, mean - (a * log_v.exp()).sum(0).log())
    assert (value >= 0).all()
    same(
        gradients(NestedForwardKL(), terms),
        log_target_fixed=b * (log_v - mean),
        log_initial=a - b,
        log_forward=-b,
    )


def test_forward_kl_can_fit_the_reverse_kernel_by_the_reverse_kl() -> None:
    terms = level()
    a, _, _ = averages(terms)
    found = gradients(NestedForwardKL(fit_reverse=True), terms)
    torch.testing.assert_close(found["log_reverse"], -a)


def test_incremental_bound_counts_particles_equally() -> None:
    terms = level()
    _, _, log_v = averages(terms)
    torch.testing.assert_close(IncrementalBound()(Step(**terms)).value, -log_v.mean(0))
    even = torch.full((K, N), 1 / K)
    same(gradients(IncrementalBound(), terms), log_target=-even, log_reverse=-even, log_initial=even, log_forward=even)


def test_filtering_bound_differentiates_weights() -> None:
    terms = level()
    terms["log_weight_in"].requires_grad_()
    a, b, log_v = averages(terms)
    torch.testing.assert_close(FilteringBound()(Step(**terms)).value, -(a * log_v.exp()).sum(0).log().detach())
    same(
        gradients(FilteringBound(), terms),
        log_target=-b,
        log_reverse=-b,
        log_initial=b,
        log_forward=b,
        log_weight_in=(a - b).detach(),
    )


def test_normalizer_ratio_is_the_weighted_mean_of_increments() -> None:
    terms = level()
    a, _, log_v = averages(terms)
    torch.testing.assert_close(log_normalizer_ratio(Step(**terms)), (a * log_v.exp()).sum(0).log())


def test_particles_of_no_weight_have_no_say() -> None:
    terms = level()
    terms["log_weight_in"] = terms["log_weight_in"].masked_fill(torch.arange(K)[:, None] == 0, -torch.inf)
    rest = {name: (term if name == "log_weight_in" else term.detach())[1:] for name, term in terms.items()}
    for objective in (NestedReverseKL(), NestedForwardKL()):
        torch.testing.assert_close(objective(Step(**terms)), objective(Step(**rest)))


def test_the_filtering_forward_kl_raises_proposal_and_model_where_the_weights_are():
    model, proposal = (torch.tensor(x, requires_grad=True) for x in ([0.0, 1.0], [0.5, -0.5]))
    step = Step.from_proposal(log_target=model, log_forward=proposal)
    FilteringForwardKL()(step).surrogate.backward()
    weight = (model - proposal).detach().softmax(0)
    torch.testing.assert_close(model.grad, -weight)
    torch.testing.assert_close(proposal.grad, -weight)
