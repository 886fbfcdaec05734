"""Kernels that move draws by maps: Jacobians by autograd, weights by hand, training."""

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import bimodal, gamma_target
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pplvi.guides.annealed import AnnealedGuide
from pplvi.kernels.coordinates import coordinates_of
from pplvi.kernels.flow import FlowKernel
from pplvi.kernels.uncorrected import UncorrectedHamiltonianKernel
from pplvi.losses.elbo import ELBO
from pplvi.losses.nested import NestedELBO
from pplvi.objectives.step import Routing, Step
from pplvi.posterior.posterior import Posterior
from pplvi.programs.single import log_density_of, run_alone
from pplvi.samplers.annealed import Annealed, Resampling
from pplvi.samplers.base import Request
from pplvi.weights.algebra import effective_sample_size, logmeanexp

pytestmark = pytest.mark.usefixtures("float64")

LOCAL = Routing(detach=True, local=True)


def mixed() -> None:
    """A location in two dimensions, a positive scale and local probabilities in a plate."""
    pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("scale", dist.Gamma(3.0, 2.0))
    with pyro.plate("data", 2):
        pyro.sample("mix", dist.Dirichlet(torch.ones(3)))


def some_values(count: int) -> dict[str, Tensor]:
    return {
        "loc": torch.randn(count, 1, 2),
        "scale": torch.rand(count, 1) + 0.5,
        "mix": torch.softmax(torch.randn(count, 2, 3), -1),
    }


def randomise(program: Any, scale: float = 0.4) -> None:
    for parameter in program.parameters():
        with torch.no_grad():
            parameter.normal_(0.0, scale)


def run(program: Any, given: Any, values: dict[str, Tensor], count: int, nesting: int) -> Any:
    return run_alone(program, (given,), {}, num_particles=count, nesting=nesting, values=values)


def moved_by(program: Any, given: dict[str, Tensor], count: int, nesting: int) -> dict[str, Tensor]:
    nodes = run(program, given, {}, count, nesting).model.nodes
    return {name: site["value"] for name, site in nodes.items() if site["type"] == "sample" and name != "data"}


def test_density_ratio_of_a_flow_is_the_jacobian_of_its_map() -> None:
    sites = coordinates_of(mixed, (), {})
    ahead, back = FlowKernel(hidden=5, num_layers=2).build(sites, lambda *_: torch.zeros(()))
    randomise(ahead)
    before = some_values(3)
    after = moved_by(ahead, before, 3, 1)

    def flat(values: dict[str, Tensor]) -> Tensor:
        """Values without the redundant coordinate of the probabilities: the Lebesgue measure of their density."""
        return torch.cat([values["loc"].flatten(1), values["scale"], values["mix"][..., :2].flatten(1)], 1)

    def unflat(x: Tensor) -> dict[str, Tensor]:
        mix = x[:, 3:].reshape(-1, 2, 2)
        mix = torch.cat([mix, 1 - mix.sum(-1, keepdim=True)], -1)
        return {"loc": x[:, :2].unsqueeze(1), "scale": x[:, 2:3], "mix": mix}

    def whole(x: Tensor) -> Tensor:
        return flat(moved_by(ahead, unflat(x), 3, 1))

    jacobian = torch.autograd.functional.jacobian(whole, flat(before))
    by_hand = torch.stack([jacobian[i, :, i].slogdet()[1] for i in range(3)])
    forward = run(ahead, before, after, 3, 1).log_target()
    reverse = run(back, after, before, 3, 1).log_target()
    torch.testing.assert_close(reverse - forward, by_hand)


def test_a_flow_is_the_identity_at_first() -> None:
    ahead, back = FlowKernel(hidden=5).build(coordinates_of(mixed, (), {}), lambda *_: torch.zeros(()))
    before = some_values(4)
    after = moved_by(ahead, before, 4, 1)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)
    ratio = run(back, after, before, 4, 1).log_target()
    torch.testing.assert_close(ratio, torch.zeros(4), rtol=0, atol=1e-12)


def slope(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the log density in z and u = log s: (1 - z) / 4 and 3 - 2 s."""
    return (1.0 - z) / 4, 3.0 - 2.0 * u.exp()


def density(values: Any, args: Any, kwargs: Any) -> Tensor:
    return log_density_of(gamma_target, args, kwargs, values)


@pytest.mark.parametrize("keep", [0.0, 0.7])
def test_hamiltonian_pair_by_hand(keep: float) -> None:
    kernel = UncorrectedHamiltonianKernel(step_size=0.3, num_leapfrog=3, keep=keep)
    ahead, back = kernel.build(coordinates_of(gamma_target, (), {}), density)
    before = {"z": torch.randn(5), "s": torch.rand(5) + 0.3, "_end_z": torch.randn(5, 1), "_end_s": torch.randn(5, 1)}
    pyro.set_rng_seed(4)
    after = moved_by(ahead, before, 5, 0)
    pyro.set_rng_seed(4)
    z, u = before["z"], before["s"].log()
    p, w = (keep * before[f"_end_{n}"][:, 0] + (1 - keep**2) ** 0.5 * torch.randn(5, 1)[:, 0] for n in ("z", "s"))
    kinetic = (p**2 + w**2) / 2
    for _ in range(3):
        a, b = slope(z, u)
        p, w = p + 0.15 * a, w + 0.15 * b
        z, u = z + 0.3 * p, u + 0.3 * w
        a, b = slope(z, u)
        p, w = p + 0.15 * a, w + 0.15 * b
    torch.testing.assert_close(after["z"], z)
    torch.testing.assert_close(after["s"], u.exp())
    by_hand = kinetic - (p**2 + w**2) / 2 + u - before["s"].log()
    ratio = run(back, after, before, 5, 0).log_target() - run(ahead, before, after, 5, 0).log_target()
    torch.testing.assert_close(ratio, by_hand)


def test_one_leapfrog_step_has_the_weights_of_a_langevin_pair() -> None:
    ahead, back = UncorrectedHamiltonianKernel(step_size=0.4).build(coordinates_of(gamma_target, (), {}), density)
    before = {"z": torch.randn(5), "s": torch.rand(5) + 0.3}
    after = moved_by(ahead, before, 5, 0)

    def langevin(start: dict[str, Tensor], end: dict[str, Tensor]) -> Tensor:
        a, b = slope(start["z"], start["s"].log())
        normal = torch.distributions.Normal
        z = normal(start["z"] + 0.08 * a, 0.4).log_prob(end["z"])
        return z + normal(start["s"].log() + 0.08 * b, 0.4).log_prob(end["s"].log()) - end["s"].log()

    ratio = run(back, after, before, 5, 0).log_target()
    torch.testing.assert_close(ratio, langevin(after, before) - langevin(before, after))


# ---------------------------------------------------------------- on a path


def single() -> None:
    """Z = 1/2, one mode: what an affine flow can reach."""
    pyro.sample("z", dist.Normal(1.5, 0.6))
    pyro.factor("mass", torch.tensor(0.5).log())


def base() -> None:
    pyro.sample("z", dist.Normal(0.0, 2.5))


def walk(model: Any, guide: Any, count: int, resample: Any = False) -> list[Step]:
    return list(Annealed(Resampling(resample))(model, guide, (), {}, Request(count, routing=Routing(local=False))))


KERNELS = {
    "flow": FlowKernel(hidden=4),
    "uncorrected": UncorrectedHamiltonianKernel(0.5, 2),
    "kept momenta": UncorrectedHamiltonianKernel(0.4, 2, keep=0.8),
}


@torch.no_grad()
def masses(model: Any, guide: Any) -> Tensor:
    return torch.stack([logmeanexp(walk(model, guide, 300, 0.5)[-1].log_weight).exp() for _ in range(15)])


@pytest.mark.parametrize("name", KERNELS)
def test_training_end_to_end_and_level_by_level_keeps_weights_proper(name: str) -> None:
    model = single if name == "flow" else bimodal
    for loss in (ELBO(10), NestedELBO("reverse_kl", 20, resample=True)):
        pyro.clear_param_store()
        guide = AnnealedGuide(model, base, 3, KERNELS[name], learn_path=True)
        guide()
        if name == "flow":
            randomise(guide, 0.1)

        def ess(guide: Any = guide) -> float:
            pyro.set_rng_seed(1)
            return float(effective_sample_size(walk(model, guide, 2000)[-1].log_weight)) / 2000

        before, svi = ess(), SVI(model, guide, Adam({"lr": 0.02}), loss)
        start = {n: p.detach().clone() for n, p in guide.named_parameters()}
        for _ in range(25):
            svi.step()
        assert ess() > before
        for n, p in guide.named_parameters():
            if n != "forward_1.keep_unconstrained" and ("logits" not in n or isinstance(loss, NestedELBO)):
                assert not torch.equal(p, start[n]), n
        found = masses(model, guide)
        assert (found.mean() - 0.5).abs() < 4 * found.std() / len(found) ** 0.5


def test_gradients_through_a_flow_equal_plain_torch() -> None:
    """One step from N(0, 2.5) by z' = exp(s) z + t: ELBO and nested reverse KL divergence have one gradient."""
    guide = AnnealedGuide(bimodal, base, 1, FlowKernel(hidden=1, num_layers=1))
    guide()
    (second,) = (p for n, p in guide.named_parameters() if "second" in n)
    with torch.no_grad():
        second.copy_(torch.tensor([[0.0, 0.3], [0.0, -0.2]]))
    pyro.set_rng_seed(7)
    z = 2.5 * torch.empty(30).normal_()
    raw, shift = torch.tensor(0.3, requires_grad=True), torch.tensor(-0.2, requires_grad=True)
    s = 3 * torch.tanh(raw / 3)
    moved = s.exp() * z + shift
    modes = torch.distributions.Normal(torch.tensor([2.0, -2.0]), 0.7)
    target = torch.logsumexp(modes.log_prob(moved.unsqueeze(-1)), -1) - math.log(4.0)
    (-(target + s).mean()).backward()
    for loss in (ELBO(30), ELBO(30, estimator="stl"), NestedELBO("reverse_kl", 30), NestedELBO("avo", 30)):
        second.grad = None
        loss.loss(bimodal, guide)
        pyro.set_rng_seed(7)
        loss.loss_and_grads(bimodal, guide)
        torch.testing.assert_close(second.grad[:, 1], torch.stack([raw.grad, shift.grad]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", KERNELS)
def test_guides_on_the_extended_space_are_plain_pyro_guides(name: str) -> None:
    guide = AnnealedGuide(bimodal, base, 2, KERNELS[name])
    pyro_elbo = Trace_ELBO(num_particles=40, vectorize_particles=True, max_plate_nesting=0)
    for loss in (pyro_elbo, ELBO(40)):
        loss.loss(bimodal, guide)
    values = []
    for loss in (pyro_elbo, ELBO(40)):
        pyro.set_rng_seed(3)
        values.append(loss.loss(bimodal, guide))
    assert values[0] == pytest.approx(values[1], abs=1e-10)
    posterior = Posterior(bimodal, guide, num_draws=4000, seed=0)
    log_z, error = posterior.log_evidence
    assert abs(float(log_z) - math.log(0.5)) < 4 * float(error)
    twin = copy.deepcopy(guide)
    assert twin.reverse_1.ahead is twin.forward_1
    assert twin.forward_1 is not guide.forward_1


def test_errors_say_what_to_do() -> None:
    for make in (lambda: FlowKernel(hidden=0), lambda: UncorrectedHamiltonianKernel(keep=1.0)):
        with pytest.raises(ValueError, match=r"=(0|-1|0.0|nan): expected|=.*: expected a"):
            make()
    guide = AnnealedGuide(bimodal, base, 2, FlowKernel(hidden=3))
    with pytest.raises(ValueError, match="deterministic function of parameters"):
        NestedELBO("forward_kl", 5).loss_and_grads(bimodal, guide)
