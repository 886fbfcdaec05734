"""Autoregressive models: normalised, as slow arithmetic has them, drawn as they are scored, with numbers missing."""

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

import pplvi
from pplvi import MADE, NADE, RNADE, FullyVisibleBeliefNetwork, OrderlessNADE
from pplvi.energies import RestrictedBoltzmannMachine

BITS = 10
MAKERS: dict[str, Callable[[], Any]] = {
    "NADE": lambda: NADE(BITS, 6, init_scale=1.0),
    "tied NADE": lambda: NADE(BITS, 6, init_scale=1.0, tied=True),
    "MADE": lambda: MADE(BITS, [12, 9], order=torch.randperm(BITS)),
    "MADE without direct weights": lambda: MADE(BITS, [12], direct=False),
    "logistic network": lambda: FullyVisibleBeliefNetwork(BITS),
    "neural network": lambda: FullyVisibleBeliefNetwork(BITS, 3),
    "orderless NADE": lambda: OrderlessNADE(BITS, [12, 8]),
}


def states(width: int = BITS) -> Tensor:
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * width)


def shaken(make: Callable[[], Any]) -> Any:
    """A model whose parameters are all at random."""
    torch.manual_seed(3)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return model


def distribution_of(model: Any) -> Any:
    return model.distribution(num_orders=3) if isinstance(model, OrderlessNADE) else model.distribution()


@pytest.fixture(params=MAKERS)
def model(request: pytest.FixtureRequest, float64: None) -> Any:
    return shaken(MAKERS[request.param])


def test_probabilities_sum_to_one(model: Any) -> None:
    log_prob = distribution_of(model).log_prob(states())
    torch.testing.assert_close(log_prob.exp().sum(), torch.tensor(1.0))
    assert log_prob.std() > 0.3


def test_draws_are_of_the_distribution(model: Any) -> None:
    """Means and second moments of 4,000 draws, within five standard errors of enumeration."""
    p, x = distribution_of(model), states()
    draws, weight = p.sample((4000,)), p.log_prob(x).exp().detach()
    for moment in (lambda v: v, lambda v: v[:, 1:] * v[:, :-1]):
        exact = weight @ moment(x)
        assert ((moment(draws).mean(0) - exact).abs() < 5 * (exact * (1 - exact) / 4000).sqrt() + 1e-9).all()


def test_nade_is_its_definition() -> None:
    """Values and gradients of the pass by blocks, at a width of several blocks, against a loop; float32."""
    nade, x = NADE(60, 7, init_scale=0.5), torch.bernoulli(torch.rand(9, 60) ** 3)
    x[0] = 0.0
    x[1] = 1.0
    state, terms = nade.hidden_bias.expand(9, -1), []
    for d in range(60):
        terms.append((torch.sigmoid(state) * nade.output[d]).sum(-1) + nade.bias[d])
        state = state + x[:, d : d + 1] * nade.weight[d]
    parameters = list(nade.parameters())
    weight = torch.randn(9, 60)
    expected = torch.autograd.grad((weight * torch.stack(terms, 1)).sum(), parameters)
    found = nade.distribution().logits(x)
    torch.testing.assert_close(found, torch.stack(terms, 1), rtol=1e-4, atol=1e-5)
    for one, other in zip(torch.autograd.grad((weight * found).sum(), parameters), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_nade_is_the_first_step_of_mean_field_in_the_tied_machine(float64: None) -> None:
    rbm, nade = RestrictedBoltzmannMachine(8, 5, init_scale=1.0), NADE(8, 5, tied=True)
    with torch.no_grad():
        nade.weight.copy_(rbm.weight("v", "h"))
        nade.bias.copy_(torch.randn(8))
        nade.hidden_bias.copy_(torch.randn(5))
        for layer, bias in (("v", nade.bias), ("h", nade.hidden_bias)):
            shift = bias - rbm.field(layer, {"v": torch.zeros(8), "h": torch.zeros(5)})
            rbm.biases()[layer].add_(shift)
    x = torch.randint(2, (4, 8)).double()
    found = nade.distribution().logits(x)
    for d in range(8):
        before = torch.where(torch.arange(8) < d, x, 0.0)
        hidden = rbm.layers["h"].mean(rbm.field("h", {"v": before}))
        expected = rbm.field("v", {"h": hidden})[:, d]
        torch.testing.assert_close(found[:, d], expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", ["NADE", "MADE", "orderless NADE"])
def test_compiled_training_is_eager_training(name: str) -> None:
    x = torch.bernoulli(torch.full((20, BITS), 0.3))
    losses = []
    for mode in (False, "trace"):
        pyro.clear_param_store()
        model = shaken(MAKERS[name])
        run = pplvi.fit(model.model, model.guide, args=(x,), num_steps=8, compile=mode, seed=0, progress=False)
        losses.append(run.losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-3)


def test_restarts_are_rows_of_one_program() -> None:
    x = torch.bernoulli(torch.full((20, 6), 0.3))
    nade = NADE(6, 3)
    run = pplvi.fit(
        nade.model,
        lambda model: nade.guide,
        args=(x,),
        num_steps=4,
        restarts=2,
        compile="trace",
        seed=0,
        progress=False,
    )
    assert run.losses.shape == (2, 4)


def marginals(model: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Log probabilities of what was seen under the model's own order, by enumeration."""
    everything = states(x.shape[1])
    agrees = ((everything == x[:, None]) | ~mask[:, None]).all(-1)
    return model.distribution().log_prob(everything).expand(agrees.shape).masked_fill(~agrees, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("name", ["NADE", "MADE"])
def test_missing_numbers_are_drawn_in_their_turn(name: str, float64: None) -> None:
    """The importance-weighted bound meets the enumerated marginal; it is exact if what is missing comes last."""
    model = shaken(MAKERS[name])
    x, mask = torch.randint(2, (5, BITS)).double(), torch.rand(5, BITS) < 0.6
    x[~mask] = 0.0
    bound = -pplvi.ImportanceWeightedELBO(2000).loss(model.model, model.guide, x, mask=mask)
    assert bound == pytest.approx(marginals(model, x, mask).sum().item(), abs=0.25)
    last = torch.zeros(BITS, dtype=torch.bool)
    last[model.distribution().order[:4]] = True
    exact = -pplvi.ELBO().loss(model.model, model.guide, x, mask=last)
    assert exact == pytest.approx(marginals(model, x, last.expand(5, -1)).sum().item())


def test_gradients_with_missing_numbers_are_those_of_what_was_seen(float64: None) -> None:
    """The ELBO's gradient, on average, where what is missing comes last: of the rest alone."""
    model, x = shaken(lambda: NADE(4, 3)), torch.randint(2, (6, 4)).double()
    mask = torch.tensor([True, True, False, False])
    pplvi.ELBO(num_particles=200).differentiable_loss(model.model, model.guide, x, mask=mask).backward()
    found = model.weight.grad[0].clone()
    model.weight.grad = None
    (-model.distribution().log_terms(x)[:, :2].sum()).backward()
    torch.testing.assert_close(found, model.weight.grad[0], rtol=0.3, atol=0.05)


def test_orderless_elbo_is_the_mean_over_orders(float64: None) -> None:
    """And below every ensemble's; what is missing is left out exactly."""
    model = shaken(lambda: OrderlessNADE(4, [6]))
    x = torch.randint(2, (3, 4)).double()
    orders = torch.tensor(list(permutations(range(4))))
    ensemble = model.distribution()
    ensemble.orders = orders
    each = ensemble.each(x)
    elbo = -pplvi.ELBO(num_particles=20_000).loss(model.model, model.guide, x)
    assert elbo == pytest.approx(each.mean(0).sum().item(), abs=0.05)
    assert (ensemble.log_prob(x) >= each.mean(0)).all()
    seen = torch.tensor([True, False, True, False]).expand(3, -1)
    everything = states(4)
    for row, order in zip(ensemble.each(x, seen), orders, strict=True):
        first = torch.cat([order[seen[0][order]], order[~seen[0][order]]])
        ensemble.orders = first[None]
        agrees = ((everything == x[:, None]) | ~seen[:, None]).all(-1)
        whole = ensemble.log_prob(everything).expand(agrees.shape).masked_fill(~agrees, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(row, whole)


@pytest.mark.parametrize("family", ["normal", "laplace"])
def test_rnade_integrates_to_one(family: Any, float64: None) -> None:
    """On a grid of two numbers; and its draws have the grid's means."""
    model = shaken(lambda: RNADE(2, 4, components=2, family=family))
    axis = torch.linspace(-15, 15, 601)
    grid = torch.cartesian_prod(axis, axis)
    density = model.distribution().log_prob(grid).exp().detach() * (axis[1] - axis[0]) ** 2
    assert density.sum().item() == pytest.approx(1.0, abs=2e-3)
    mean, spread = density @ grid, (density @ grid.square()).sqrt()
    assert ((model.sample(4000).mean(0) - mean).abs() < 5 * spread / 4000**0.5).all()


def test_nade_with_conditions_is_nade_with_their_biases() -> None:
    nade, given = NADE(5, 3, given=2), torch.randn(4, 2)
    x = torch.randint(2, (4, 5)).float()
    p = nade.distribution(given)
    assert p.batch_shape == (4,)
    one = NADE(5, 3)
    with torch.no_grad():
        one.weight.copy_(nade.weight)
        one.output.copy_(nade.output)
        one.bias.copy_(given[2] @ nade.given_weight)
        one.hidden_bias.copy_(given[2] @ nade.given_hidden)
    torch.testing.assert_close(p.log_prob(x)[2], one.distribution().log_prob(x[2]))
    assert nade.sample(7, given).shape == (7, 4, 5)
    assert pplvi.ELBO().loss(nade.model, nade.guide, x, given) == pytest.approx(-p.log_prob(x).sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: NADE(0, 3), "num_visible=0"),
        (lambda: NADE(3, 0), "num_hidden=0"),
        (lambda: MADE(3, [2], order=torch.tensor([0, 0, 1])), "permutation"),
        (lambda: OrderlessNADE(3, []), "at least one hidden layer"),
        (lambda: RNADE(3, 2, family="cauchy"), "'normal' or 'laplace'"),
        (lambda: NADE(3, 2).model(torch.zeros(4, 2)), r"\(N, 3\)"),
        (lambda: NADE(3, 2).model(torch.zeros(4, 3), mask=torch.ones(4, 3)), "boolean"),
        (lambda: NADE(3, 2).model(torch.zeros(4, 3), torch.zeros(4, 1)), "no given="),
        (lambda: NADE(3, 2, given=2).model(torch.zeros(4, 3)), r"\(\.\.\., 2\)"),
        (lambda: NADE(3, 2).distribution().log_prob(torch.full((3,), 0.5)), "support"),
        (lambda: OrderlessNADE(3, [2]).distribution(0), "num_orders=0"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
