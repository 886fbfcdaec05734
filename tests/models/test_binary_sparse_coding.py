"""Binary sparse coding: its mean field against exact posteriors, and what learning with either does to the gap."""

import math
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pplvi
from pplvi import BinaryMeanField, BinarySparseCoding, learn_binary_coding

pytestmark = pytest.mark.usefixtures("float64")


def coding_with_data(num_visible: int, num_codes: int, scale: float, count: int) -> tuple[BinarySparseCoding, Tensor]:
    weight = torch.randn(num_visible, num_codes) / math.sqrt(num_visible) * scale
    coding = BinarySparseCoding(num_visible, num_codes, weight=weight)
    h = torch.bernoulli(torch.sigmoid(torch.full((num_codes,), -1.0)).expand(count, num_codes))
    return coding, h @ weight.T + torch.randn(count, num_visible) / 2


def test_the_evidence_is_a_sum_over_the_program() -> None:
    torch.manual_seed(0)
    coding, v = coding_with_data(5, 3, 1.0, 4)
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    joint = []
    for state in states:
        trace = poutine.trace(poutine.condition(coding.model, {"h": state.expand(4, 3)})).get_trace(v)
        trace.compute_log_prob()
        joint.append(trace.nodes["h"]["log_prob"] + trace.nodes["v"]["log_prob"])
    joint = torch.stack(joint, -1).detach()
    log_p, means = coding.exact(v)
    torch.testing.assert_close(log_p, joint.logsumexp(-1))
    torch.testing.assert_close(means, joint.softmax(-1) @ states)
    second = sum(joint[n].softmax(-1) @ torch.einsum("si,sj->sij", states, states).flatten(1) for n in range(4))
    torch.testing.assert_close(coding.exact_moments(v).second, second.reshape(3, 3))


def test_the_bound_is_the_elbo_of_the_guide() -> None:
    torch.manual_seed(0)
    coding, v = coding_with_data(5, 4, 1.0, 6)
    guide = BinaryMeanField(coding)
    pyro.set_rng_seed(0)
    loss = pplvi.ELBO(estimator="score")
    draws = torch.tensor([-loss.loss(coding.model, guide, v) for _ in range(100)])
    error = draws.std() / 10
    assert abs(draws.mean() - guide.bound(v).sum()) < 4 * error < 1


def test_sweeps_are_exact_coordinate_maximisation() -> None:
    torch.manual_seed(0)
    coding, v = coding_with_data(8, 5, 2.0, 20)
    problem = coding.problem(v)
    means = problem.in_turn(torch.rand(20, 5))
    grid = torch.linspace(0, 1, 2001)
    last = means.clone()
    values = []
    for x in grid:
        last[:, -1] = x
        values.append(problem.bound(last))
    best = grid[torch.stack(values).argmax(0)]
    torch.testing.assert_close(means[:, -1], best, atol=6e-4, rtol=0)


def test_in_turn_never_falls_and_at_once_does() -> None:
    """Bounds in nats a datum of 21 starts, which come from the same random numbers as the data."""
    torch.manual_seed(0)
    cases = [((16, 1.0), -14.6901), ((16, 2.0), -17.8779), ((8, 2.0), -11.8465)]
    for (num_visible, scale), expected in cases:
        coding, v = coding_with_data(num_visible, 12, scale, 100)
        guide = BinaryMeanField(coding, restarts=20)
        found, log_p = guide.bound(v), coding.exact(v)[0]
        assert found.mean().item() == pytest.approx(expected, abs=1e-3)
        assert (found <= log_p).all()
        trace = BinaryMeanField(coding, 60).trace(v)
        assert (trace.diff(dim=0) >= -1e-12 * trace[1:].abs()).all()
    for damping in (0.0, 0.5):
        other = BinaryMeanField(coding, 60, update="at once", damping=damping).trace(v)
        assert (other.diff(dim=0) < -1e-9).any(0).sum() >= (80 if damping == 0 else 3)  # of a hundred data


def test_restarts_only_raise_the_bound() -> None:
    torch.manual_seed(3)
    coding, v = coding_with_data(8, 12, 2.0, 50)
    one, many = (BinaryMeanField(coding, restarts=r).bound(v) for r in (0, 10))
    assert (many >= one - 1e-10).all()
    assert (many > one + 0.01).any()


def gap(coding: BinarySparseCoding, v: Tensor) -> float:
    """KL of the best mean field that is found to the posterior, in nats a datum."""
    return float((coding.exact(v)[0] - BinaryMeanField(coding, restarts=5).bound(v)).mean())


def test_exact_em_widens_the_gap_and_mean_field_em_narrows_it() -> None:
    torch.manual_seed(5)
    truth, v = coding_with_data(12, 8, 1.5, 500)
    start = truth.weight.detach() + 0.3 * torch.randn(12, 8)
    exact, factorised = (BinarySparseCoding(12, 8, weight=start) for _ in range(2))
    first = gap(exact, v)
    evidence = learn_binary_coding(exact, v, "exact", 40)
    bound = learn_binary_coding(factorised, v, BinaryMeanField(factorised), 40)
    for trace in (evidence, bound):
        assert (trace.diff() >= -1e-10).all()
        assert trace[-1] > trace[0] + 0.1
    assert gap(exact, v) > 1.2 * first
    assert gap(factorised, v) < 0.5 * first
    cost = exact.exact(v)[0].mean() - factorised.exact(v)[0].mean()
    assert 0.05 < cost < 0.2  # nats a datum, the price of the approximation in log p


def test_the_m_step_is_the_maximum() -> None:
    torch.manual_seed(2)
    coding, v = coding_with_data(6, 3, 1.0, 200)
    moments = coding.exact_moments(v)
    coding.maximise(v, moments)

    def expected(weight: Tensor, bias: Tensor, precision: Tensor) -> Tensor:
        cross = v.T @ moments.first
        rest = v.square().sum(0) - 2 * (cross * weight).sum(-1) + ((weight @ moments.second) * weight).sum(-1)
        prior = (moments.first * bias - torch.nn.functional.softplus(bias)).sum()
        return 0.5 * (200 * precision.log() - precision * rest).sum() + prior

    leaves = [p.detach().clone().requires_grad_() for p in (coding.weight, coding.bias, coding.precision)]
    gradients = torch.autograd.grad(expected(*leaves), leaves)
    assert max(g.abs().max() for g in gradients) < 1e-8


def test_gradient_steps_on_the_mean_field_bound() -> None:
    torch.manual_seed(1)
    truth, v = coding_with_data(8, 4, 1.5, 100)
    coding = BinarySparseCoding(8, 4, weight=truth.weight.detach() + 0.3 * torch.randn(8, 4))
    before = BinaryMeanField(coding).bound(v).mean()
    fit = pplvi.fit(
        coding.model,
        BinaryMeanField(coding),
        args=(v,),
        objective=pplvi.ELBO(4),
        num_steps=40,
        learning_rate=0.03,
        progress=False,
    )
    assert BinaryMeanField(coding).bound(v).mean() > before + 0.05
    assert fit.reasons == ["num_steps"]


def test_recorded_steps_are_those_of_pyro() -> None:
    losses = []
    for compile in (False, "trace"):
        torch.manual_seed(0)
        pyro.clear_param_store()
        coding, v = coding_with_data(6, 3, 1.0, 20)
        guide = BinaryMeanField(coding, 8, tol=0.0, network=torch.nn.Linear(6, 3))
        options: dict[str, Any] = {"num_steps": 5, "schedule": None, "clip": None, "seed": 0, "progress": False}
        fit = pplvi.fit(coding.model, guide, args=(v,), objective=pplvi.RecognitionLoss(), compile=compile, **options)
        losses.append(torch.tensor(fit.losses))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c, v: BinarySparseCoding(2, 0), "num_codes=0"),
        (lambda c, v: BinarySparseCoding(2, 3, weight=torch.zeros(3, 2)), r"weight of shape \(3, 2\)"),
        (lambda c, v: BinarySparseCoding(2, 3, precision=-torch.ones(2)), "precision of shape"),
        (lambda c, v: c.problem(v[0]), r"expected \(N, 5\)"),
        (lambda c, v: BinarySparseCoding(5, 21).exact(v), "21 codes have too many states"),
        (lambda c, v: BinaryMeanField(c, 0), "sweeps=0"),
        (lambda c, v: BinaryMeanField(c, restarts=-1), "restarts=-1"),
        (lambda c, v: BinaryMeanField(c, update="both"), "update='both'"),
        (lambda c, v: BinaryMeanField(c, damping=0.5), "damping=0.5"),
        (lambda c, v: learn_binary_coding(BinarySparseCoding(5, 3), v, BinaryMeanField(c)), "another model"),
        (lambda c, v: c.maximise(0 * v, c.exact_moments(0 * v)), "without noise"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    coding, v = coding_with_data(5, 3, 1.0, 4)
    with pytest.raises(ValueError, match=message):
        make(coding, v)
