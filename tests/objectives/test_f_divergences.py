"""Divergences by a function of the weight: gradients against exact ones, by enumeration and by quadrature."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pplvi.losses.nested import NestedELBO
from pplvi.objectives.bounds import RenyiBound
from pplvi.objectives.f_divergences import NestedDivergence
from pplvi.objectives.nested import NestedForwardKL, NestedReverseKL
from pplvi.objectives.step import Step

pytestmark = pytest.mark.usefixtures("float64")
HALF = math.log(0.5)


def alpha(log_ratio: Tensor) -> Tensor:
    return (torch.expm1(0.7 * log_ratio) - 0.7 * torch.expm1(log_ratio)) / (0.7 * -0.3)


# Each with its definition from log p and log q on points of log mass m.
DEFINITIONS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda p, q: (p.exp() * (p - q)).sum(),
    "reverse_kl": lambda p, q: (q.exp() * (q - p)).sum(),
    "chi_square": lambda p, q: (2 * p - q).exp().sum() - 1,
    "hellinger": lambda p, q: 1 - (0.5 * (p + q)).exp().sum(),
    "jensen_shannon": lambda p, q: 0.5 * sum((x.exp() * (x - torch.logaddexp(p, q) - HALF)).sum() for x in (p, q)),
    alpha: lambda p, q: ((0.7 * p + 0.3 * q).exp().sum() - 1) / (0.7 * -0.3),
}
PARAMETERS = ("previous", "forward", "target", "reverse")


def discrete(leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """The four log densities of a level of three values and three again, at all nine pairs (z[k-1], z[k])."""
    previous, forward, target, reverse = leaves
    initial = previous[:, None].expand(3, 3)  # not normalised
    densities = initial, torch.log_softmax(forward, 1), target.expand(3, 3), torch.log_softmax(reverse, 0)
    return tuple(density.flatten() for density in densities)


@pytest.mark.parametrize("f", DEFINITIONS, ids=lambda f: f if isinstance(f, str) else "function")
def test_gradients_of_a_discrete_level_are_exact_by_enumeration(f: Any) -> None:
    """All pairs stand as particles, weighted by the extended proposal: averages over them are exact."""
    torch.manual_seed(0)
    leaves = [torch.randn(shape).requires_grad_() for shape in (3, (3, 3), 3, (3, 3))]
    initial, forward, target, reverse = discrete(leaves)
    proposal = initial.detach() + forward.detach()
    value, surrogate = NestedDivergence(f, estimator="score")(
        Step(proposal, torch.zeros(9), target, target, reverse, initial, forward)
    )
    exact = DEFINITIONS[f](*(torch.log_softmax(x, 0) for x in (target + reverse, initial + forward)))
    torch.testing.assert_close(value, exact.detach())
    found, wanted = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (surrogate, exact))
    for name, one, other in zip(PARAMETERS, found, wanted, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def normal(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return torch.distributions.Normal(loc, scale).log_prob(x)


class GaussianLevel:
    """A level of normals: two parameters for each of its four densities."""

    def __init__(self) -> None:
        rows = [[0.2, 0.9], [0.3, -0.5], [0.5, 0.4], [-0.2, 0.9]]
        self.leaves = [torch.tensor(row, requires_grad=True) for row in rows]

    def initial(self, z: Tensor) -> Tensor:
        """A normal times exp(loc), so that the normaliser is learned too."""
        loc, scale = self.leaves[0]
        return normal(z, loc, scale) + loc

    def moved(self, z: Tensor, noise: Tensor) -> Tensor:
        shift, width = self.leaves[1]
        return 0.7 * z + shift + softplus(width + 0.8) * noise

    def forward(self, z: Tensor, after: Tensor) -> Tensor:
        shift, width = self.leaves[1]
        return normal(after, 0.7 * z + shift, softplus(width + 0.8))

    def target(self, after: Tensor) -> Tensor:
        loc, log_scale = self.leaves[2]
        return normal(after, loc, (0.5 * log_scale).exp() * 0.9) + 2 * loc

    def reverse(self, after: Tensor, z: Tensor) -> Tensor:
        loc, scale = self.leaves[3]
        return normal(z, 0.6 * after + loc, scale)


def frozen_step(level: GaussianLevel, z: Tensor, noise: Tensor, log_weight: Tensor) -> Step:
    """The step that a walk makes of these draws: densities at leaves, and the paths of the draws through them."""
    live = level.moved(z, noise)
    point = live.detach().requires_grad_()
    target, reverse, forward = level.target(point), level.reverse(point, z), level.forward(z, point)
    paths = [
        torch.autograd.grad(x.sum(), point, retain_graph=True)[0] * (live - live.detach())
        for x in (target, reverse, forward)
    ]
    return Step(
        log_weight_in=log_weight,
        log_weight=torch.zeros_like(z),
        log_target=target + paths[0],
        log_target_fixed=target,
        log_reverse=reverse + paths[1],
        log_reverse_fixed=reverse,
        log_initial=level.initial(z),
        log_forward=forward.detach() + paths[2],
    )


@pytest.mark.parametrize("f", DEFINITIONS, ids=lambda f: f if isinstance(f, str) else "function")
def test_gradients_along_the_path_of_normal_draws_are_exact_by_quadrature(f: Any) -> None:
    level = GaussianLevel()
    nodes, masses = (torch.tensor(x) for x in np.polynomial.hermite_e.hermegauss(60))
    loc, scale = level.leaves[0].detach()
    z, noise = (x.flatten() for x in torch.meshgrid(loc + scale * nodes, nodes, indexing="ij"))
    log_mass = (masses.log()[:, None] + masses.log()).flatten()
    value, surrogate = NestedDivergence(f)(frozen_step(level, z, noise, log_mass))
    grid = torch.linspace(-11.0, 11.0, 441)
    before, after = torch.meshgrid(grid, grid, indexing="ij")
    target, proposal = (
        level.target(after) + level.reverse(after, before),
        level.initial(before) + level.forward(before, after),
    )
    exact = DEFINITIONS[f](*(torch.log_softmax(x.flatten(), 0) for x in (target, proposal)))
    torch.testing.assert_close(value, exact.detach(), rtol=1e-6, atol=1e-8)
    found, wanted = (torch.autograd.grad(x, level.leaves, retain_graph=True) for x in (surrogate, exact))
    for name, one, other in zip(PARAMETERS, found, wanted, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def random_step() -> tuple[dict[str, Tensor], Step]:
    torch.manual_seed(3)
    names = ("log_target", "log_target_fixed", "log_reverse", "log_reverse_fixed", "log_initial", "log_forward")
    leaves = {name: torch.randn(5, 2).requires_grad_() for name in names}
    with torch.no_grad():
        leaves["log_target_fixed"].copy_(leaves["log_target"])
        leaves["log_reverse_fixed"].copy_(leaves["log_reverse"])
    return leaves, Step(log_weight_in=torch.randn(5, 2), log_weight=torch.zeros(5, 2), **leaves)


def test_the_closed_forms_of_both_kl_divergences_are_special_cases() -> None:
    for special, general, same in (
        (NestedReverseKL(), NestedDivergence("reverse_kl"), ("log_target", "log_initial", "log_forward")),
        (NestedForwardKL(), NestedDivergence("forward_kl", estimator="score"), ("log_target_fixed", "log_initial")),
    ):
        leaves, step = random_step()
        terms = [objective(step) for objective in (special, general)]
        torch.testing.assert_close(terms[0].value, terms[1].value)
        found = [torch.autograd.grad(t.surrogate.sum(), [leaves[name] for name in same]) for t in terms]
        torch.testing.assert_close(found[0], found[1])
    leaves, step = random_step()
    objective = NestedDivergence("forward_kl", reverse="reverse_kl", estimator="score")
    (found,) = torch.autograd.grad(objective(step).surrogate.sum(), leaves["log_reverse_fixed"])
    a, b = torch.softmax(step.log_weight_in, 0), torch.softmax(step.log_weight_out.detach(), 0)
    torch.testing.assert_close(found, b - a)


@pytest.mark.parametrize("f", DEFINITIONS, ids=lambda f: f if isinstance(f, str) else "function")
def test_there_is_no_noise_where_proposal_and_target_agree(f: Any) -> None:
    leaves, step = random_step()
    with torch.no_grad():
        leaves["log_forward"].copy_(leaves["log_target"] + leaves["log_reverse"] - leaves["log_initial"] + 0.3)
    value, surrogate = NestedDivergence(f)(step)
    assert value.abs().max() < 1e-12
    found = dict(zip(leaves, torch.autograd.grad(surrogate.sum(), list(leaves.values())), strict=True))
    a = torch.softmax(step.log_weight_in, 0)
    moved = found["log_target"] / a
    torch.testing.assert_close(moved, moved[:1, :1].expand_as(moved))  # the slope of log v along the path is 0
    torch.testing.assert_close(found["log_forward"], -found["log_target"])
    for name in ("log_initial", "log_target_fixed"):
        rest = found[name] + (found["log_target"] if name == "log_target_fixed" else 0)
        assert rest.abs().max() < 1e-10


def test_draws_without_weight_or_density_do_no_harm() -> None:
    for f in DEFINITIONS:
        leaves, step = random_step()
        with torch.no_grad():
            step.log_weight_in[0] = -torch.inf
            leaves["log_target"][0], leaves["log_target_fixed"][0] = torch.inf, torch.inf
        rest = Step(step.log_weight_in[1:], step.log_weight[1:], **{n: x.detach()[1:] for n, x in leaves.items()})
        value, surrogate = NestedDivergence(f)(step)
        torch.testing.assert_close(value, NestedDivergence(f)(rest).value)
        assert torch.autograd.grad(surrogate.sum(), leaves["log_forward"])[0].isfinite().all()
    for f, wanted in (("forward_kl", 2.0 * math.log(2.0) / 2), ("chi_square", 1.0), ("hellinger", 1 - 0.5**0.5)):
        half = Step.from_proposal(torch.tensor([0.0, -torch.inf]), torch.zeros(2))  # no density at one of two draws
        assert float(NestedDivergence(f)(half).value) == pytest.approx(wanted)


def kink(log_ratio: Tensor) -> Tensor:
    return torch.expm1(log_ratio).abs()


BAD: dict[str, tuple[Any, str]] = {
    "no function": (3.0, "f=3.0"),
    "another name": ("kl", "'kl'"),
    "a number": (lambda x: 0.5, "cannot be differentiated"),
    "detached": (lambda x: x.detach() ** 2, "cannot be differentiated"),
    "a mean": (lambda x: x.mean() - x, "depends on which"),
    "a sum": (lambda x: -x.sum(), "finite number at each"),
    "not finite": (lambda x: -torch.log(x), "finite number at each"),
    "off by one": (lambda x: 1 - x, "is 1 where the ratio is 1: expected 0"),
    "concave": (lambda x: x, "not convex"),
    "nothing": (lambda x: 0 * x, "not convex"),
    "a kink": (kink, "kink.*estimator='score'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_divergence_is_refused(name: str) -> None:
    f, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        NestedDivergence(f)
    with pytest.raises(ValueError, match=words.replace("f=3.0", "divergence=3.0")):
        NestedELBO(f)


def test_total_variation_has_a_score_estimator() -> None:
    _, step = random_step()
    value, _ = NestedDivergence(kink, estimator="score")(step)
    a, b = torch.softmax(step.log_weight_in, 0), torch.softmax(step.log_weight_out.detach(), 0)
    torch.testing.assert_close(value, (a - b).abs().sum(0))


def test_pairs_objectives_and_their_refusals() -> None:
    assert NestedELBO("hellinger").objective == NestedDivergence("hellinger")
    assert NestedELBO(("hellinger", "reverse_kl")).objective == NestedDivergence("hellinger", "reverse_kl")
    assert NestedELBO(NestedDivergence(alpha, estimator="score")).objective.routing.detach
    assert repr(NestedELBO((alpha, "reverse_kl"))) == (
        "NestedELBO(divergence=(alpha, 'reverse_kl'), num_particles=10, resample=False)"
    )  # without addresses, so that a run can be resumed in another process
    for bad in (RenyiBound(0.0), ("avo", "reverse_kl"), ("forward_kl", "avo"), ()):
        with pytest.raises(ValueError, match="divergence="):
            NestedELBO(bad)
    with pytest.raises(ValueError, match="at least 2"):
        NestedELBO(alpha, 1)
