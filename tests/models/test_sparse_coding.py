"""Sparse coding as a program, and dictionaries that are learned."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pplvi
from pplvi import AutoProximal, SparseCoding, learn_dictionary

pytestmark = pytest.mark.usefixtures("float64")


def sparse_data(seed: int = 0, count: int = 300) -> tuple[Tensor, Tensor]:
    """Sums of some of eight atoms in six dimensions, and the atoms."""
    pyro.set_rng_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(6, 8), dim=0)
    codes = torch.randn(count, 8) * (torch.rand(count, 8) < 0.15)
    return codes @ truth.T + 0.01 * torch.randn(count, 6), truth


def test_the_program_is_the_lasso() -> None:
    v, _ = sparse_data()
    model = SparseCoding(6, 8, penalty=0.3, noise=0.5)
    h = model.codes(v)
    trace = poutine.trace(poutine.condition(model.model, {"h": h})).get_trace(v)
    zero = poutine.trace(poutine.condition(model.model, {"h": torch.zeros_like(h)})).get_trace(v)
    difference = zero.log_prob_sum() - trace.log_prob_sum()
    expected = (model.objective(v, h) - model.objective(v, torch.zeros_like(h))).sum() / 0.25
    torch.testing.assert_close(difference.detach(), expected.detach())
    guide = AutoProximal(model.model, "h")
    torch.testing.assert_close(guide(v)["h"], h, atol=1e-3, rtol=0)


def test_draws_have_the_prior_and_the_noise() -> None:
    model = SparseCoding(6, 8, penalty=0.3, noise=0.5)
    trace = poutine.trace(model.model).get_trace(size=20_000)
    h, v = (trace.nodes[name]["value"].detach() for name in "hv")
    assert h.abs().mean() == pytest.approx(0.25 / 0.3, rel=0.02)
    assert (v - h @ model.dictionary.detach().T).std() == pytest.approx(0.5, rel=0.02)


def test_alternating_steps_never_rise_and_columns_have_length_one() -> None:
    v, _ = sparse_data()
    model = SparseCoding.from_data(v, 8, penalty=0.1)
    before = model.objective(v, model.codes(v)).mean()
    trace = learn_dictionary(model, v)
    assert (trace.diff() <= 1e-12).all()
    assert model.objective(v, model.codes(v)).mean() < 0.8 * before
    torch.testing.assert_close(model.dictionary.norm(dim=0), torch.ones(8))


def test_sparse_data_give_their_dictionary_back() -> None:
    v, truth = sparse_data(3, 600)
    model = SparseCoding.from_data(v, 8, penalty=0.05)
    learn_dictionary(model, v, num_steps=300)
    likeness = (model.dictionary.T @ truth).abs().amax(0).detach()
    assert (likeness > 0.97).sum() >= 7


def test_minibatches_come_near_the_whole() -> None:
    v, _ = sparse_data()
    whole = SparseCoding.from_data(v, 8, penalty=0.1)
    parts = SparseCoding(6, 8, penalty=0.1, dictionary=whole.dictionary)
    learn_dictionary(whole, v)
    start = parts.objective(v, parts.codes(v)).mean()
    learn_dictionary(parts, v, num_steps=150, batch_size=50)
    values = [m.objective(v, m.codes(v)).mean() for m in (whole, parts)]
    assert values[1] < 0.9 * start
    assert values[1] < 1.05 * values[0]


def test_atoms_that_nothing_uses_are_moved() -> None:
    v = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [4.0, 0.0, 0.0]])
    model = SparseCoding(3, 2, penalty=0.1, dictionary=torch.eye(3)[:, [0, 2]])
    learn_dictionary(model, v, num_steps=5)
    assert model.objective(v, model.codes(v)).mean().item() == pytest.approx(0.1 * (3 + 2 + 4) / 3 - 0.005, abs=1e-5)


def test_gradient_steps_learn_too() -> None:
    v, _ = sparse_data()
    model = SparseCoding.from_data(v, 8, penalty=0.1)
    fit = pplvi.fit(
        model.model, lambda model: AutoProximal(model, "h"), args=(v,), num_steps=12, learning_rate=0.05, progress=False
    )
    assert fit.losses[0, -1] < fit.losses[0, 0] - 5
    torch.testing.assert_close(model.dictionary.norm(dim=0), torch.ones(8))
    objective = model.objective(v, model.codes(v)).sum()
    constant = dist.Normal(0.0, 1.0).log_prob(torch.zeros(())) * v.numel()
    constant = constant + dist.Laplace(0.0, 10.0).log_prob(torch.zeros(())) * 8 * len(v)
    loss = pplvi.ELBO().loss(model.model, AutoProximal(model.model, "h"), v)
    assert loss == pytest.approx((objective - constant).item(), rel=1e-6)


def test_gradient_steps_learn_from_minibatches() -> None:
    v, _ = sparse_data()
    model = SparseCoding.from_data(v, 8, penalty=0.1)
    before = model.objective(v, model.codes(v)).mean().item()
    batches = torch.utils.data.DataLoader(v, batch_size=50, shuffle=True)
    pplvi.fit(
        model.model,
        lambda model: AutoProximal(model, "h"),
        data=batches,
        num_steps=30,
        learning_rate=0.02,
        seed=0,
        progress=False,
    )
    assert model.objective(v, model.codes(v)).mean().item() < before - 0.005


def test_two_models_have_parameters_of_their_own() -> None:
    v, _ = sparse_data()
    one, other = SparseCoding(6, 8), SparseCoding(6, 5)
    for model in (one, other, one):
        trace = poutine.trace(model.model).get_trace(v)
        assert trace.nodes["h"]["value"].shape == (300, model.num_codes)
        loc = trace.nodes["h"]["value"] @ model.dictionary.T
        torch.testing.assert_close(trace.nodes["v"]["fn"].base_dist.loc, loc)
    two = (pplvi.BinarySparseCoding(6, size) for size in (3, 4))
    assert [tuple(model.model(size=2).shape) for model in two] == [(2, 6), (2, 6)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: SparseCoding(0, 2), "num_visible=0"),
        (lambda v: SparseCoding(2, 2, penalty=0.0), "penalty=0.0"),
        (lambda v: SparseCoding(2, 2, noise=-1.0), "noise=-1.0"),
        (lambda v: SparseCoding(2, 2, dictionary=torch.eye(3)), r"shape \(3, 3\): expected \(2, 2\)"),
        (lambda v: SparseCoding(2, 2, dictionary=torch.zeros(2, 2)), "no column of zeros"),
        (lambda v: SparseCoding.from_data(v, 500), "300 data that are not zero"),
        (lambda v: SparseCoding(6, 8).codes(v[0]), r"expected floating point data \(N, num_visible\)"),
        (lambda v: learn_dictionary(SparseCoding(5, 8), v), r"expected \(N, 5\)"),
        (lambda v: learn_dictionary(SparseCoding(6, 8), v, num_steps=0), "num_steps=0"),
        (lambda v: learn_dictionary(SparseCoding(6, 8), v, forget=0.3), "forget=0.3"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(sparse_data()[0])
