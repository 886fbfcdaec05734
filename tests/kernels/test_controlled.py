"""Langevin kernels with a learned control: pairs by hand, proper weights, a control known in closed form, training."""

import copy
import math
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import bimodal, gamma_target
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor

from pplvi.compile.svi import CompiledSVI
from pplvi.guides.annealed import AnnealedGuide
from pplvi.kernels.coordinates import coordinates_of
from pplvi.kernels.langevin import ControlledLangevinKernel, LangevinKernel
from pplvi.losses.elbo import ELBO, ImportanceWeightedELBO
from pplvi.losses.nested import NestedELBO
from pplvi.objectives.step import Routing
from pplvi.posterior.posterior import Posterior
from pplvi.programs.single import log_density_of, run_alone
from pplvi.samplers.annealed import Annealed, Resampling
from pplvi.samplers.base import Request

pytestmark = pytest.mark.usefixtures("float64")

CONTROLS: list[Any] = ["both", "reverse"]


def randomise(guide: Any, scale: float = 0.4) -> None:
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if "outputs" in name:
                parameter.normal_(0.0, scale)


def target_density(values: Any, args: Any, kwargs: Any) -> Tensor:
    return log_density_of(gamma_target, args, kwargs, values)


@pytest.mark.parametrize("control", CONTROLS)
def test_pair_by_hand_on_plain_and_constrained_sites(control: Any) -> None:
    kernel = ControlledLangevinKernel(step_size=0.3, hidden=4, control=control)
    ahead, back = kernel.build(coordinates_of(gamma_target, (), {}), target_density)
    randomise(ahead)
    with torch.no_grad():
        ahead.step_size_1_unconstrained.add_(0.5)  # step sizes of their own
    x, y = ({"z": torch.randn(5), "s": torch.rand(5) + 0.2} for _ in range(2))

    def by_hand(start: dict[str, Tensor], end: dict[str, Tensor], sign: float) -> Tensor:
        inputs = torch.stack([start["z"], start["s"].log()], -1)
        slopes = (1.0 - start["z"]) / 4, 3.0 - 2.0 * start["s"]  # of log s: 3 - 2 s
        total = -end["s"].log()  # Jacobian
        for i, (here, there, slope) in enumerate(
            [(start["z"], end["z"], slopes[0]), (start["s"].log(), end["s"].log(), slopes[1])]
        ):
            weight, bias, outputs, size = (
                getattr(ahead, f"{part}_{i}") for part in ("weight", "bias", "outputs", "step_size")
            )
            control = (torch.tanh(inputs @ weight.T + bias) @ outputs[:, :-1].T + outputs[:, -1])[:, 0]
            noise = (2 * size).sqrt()
            mean = here + size * slope + sign * noise * control
            total = total + torch.distributions.Normal(mean, noise).log_prob(there)
        return total

    def found(program: Any, start: dict[str, Tensor], end: dict[str, Tensor]) -> Tensor:
        return run_alone(program, (start,), {}, num_particles=5, nesting=0, values=end).log_target()

    torch.testing.assert_close(found(ahead, x, y), by_hand(x, y, 1.0 if control == "both" else 0.0))
    torch.testing.assert_close(found(back, y, x), by_hand(y, x, -1.0))


# ---------------------------------------------------------------- on a path


def gaussian() -> None:
    """Z = 3, mean 1, sd 1/2."""
    pyro.sample("z", dist.Normal(1.0, 0.5))
    pyro.factor("mass", torch.tensor(3.0).log())


def base() -> None:
    pyro.sample("z", dist.Normal(0.5, 1.5))


def ones() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def threes() -> None:
    pyro.sample("z", dist.Normal(torch.tensor([3.0, -3.0]), 1.0).to_event(1))


@torch.no_grad()
def log_weights(model: Any, guide: Any, count: int) -> Tensor:
    request = Request(count, routing=Routing(detach=True, local=True))
    return list(Annealed(Resampling(False))(model, guide, (), {}, request))[-1].log_weight


@pytest.mark.parametrize("control", CONTROLS)
def test_weights_are_proper_whatever_the_control(control: Any) -> None:
    guide = AnnealedGuide(gaussian, base, 4, ControlledLangevinKernel(0.1, 5, control))
    guide()
    randomise(guide, 0.15)
    weight = log_weights(gaussian, guide, 20_000).exp()
    error = weight.std() / len(weight) ** 0.5
    assert (weight.mean() - 3.0).abs() < 4 * error
    assert error < 0.1
    assert log_weights(gaussian, guide, 2000).std() > 0.1  # the control does play a part


@pytest.mark.parametrize("control", CONTROLS)
def test_without_control_it_is_the_langevin_kernel(control: Any) -> None:
    guides = [
        AnnealedGuide(bimodal, base, 4, kernel, name=str(i))
        for i, kernel in enumerate((ControlledLangevinKernel(0.1, 5, control), LangevinKernel(0.1)))
    ]
    found = []
    for guide in guides:
        guide()
        pyro.set_rng_seed(2)
        found.append(log_weights(bimodal, guide, 50))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_the_best_control_of_a_gaussian_that_is_shifted_makes_weights_constant() -> None:
    """Targets N(m k / K, 1): carried along by m / K, draws keep up with them and time turns back exactly.

    With x = mu[k-1] + e, the step reaches mu[k] + (1 - eps) e + sqrt(2 eps) noise up to terms of the step size, so that
    increments vanish with it.
    """
    steps, size = 40, 0.02
    guides = {c: AnnealedGuide(threes, ones, steps, ControlledLangevinKernel(size, 2), name=str(c)) for c in (0, 1)}
    spread = {}
    for control, guide in guides.items():
        guide()
        with torch.no_grad():
            for name, parameter in guide.named_parameters():
                if "outputs" in name:
                    parameter[:, -1] = control * torch.tensor([3.0, -3.0]) / (steps * (2 * size) ** 0.5)
        spread[control] = float(log_weights(threes, guide, 2000).var())
    assert spread[0] > 4.0
    assert spread[1] < 0.1


@torch.no_grad()
def bound(model: Any, guide: Any) -> float:
    pyro.set_rng_seed(9)
    return -float(ELBO(4000).loss(model, guide))


def test_training_raises_the_bound_above_that_of_no_control() -> None:
    kernels = {name: ControlledLangevinKernel(0.1, 16, name) for name in CONTROLS}
    found = {}
    for name, kernel in {**kernels, "none": LangevinKernel(0.1)}.items():
        pyro.set_rng_seed(0)
        guide = AnnealedGuide(bimodal, base, 3, kernel, name=name)
        svi = SVI(bimodal, guide, Adam({"lr": 0.03}), ELBO(20))
        for _ in range(100):
            svi.step()
        found[name] = bound(bimodal, guide)
    assert found["none"] + 0.05 < found["reverse"] < math.log(0.5) + 0.01, found
    assert found["none"] + 0.05 < found["both"] < math.log(0.5) + 0.01, found


def mixed() -> None:
    """A location in two dimensions, a positive scale and local probabilities in a plate."""
    pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("scale", dist.Gamma(3.0, 2.0))
    with pyro.plate("data", 4):
        pyro.sample("mix", dist.Dirichlet(torch.full((3,), 2.0)))


def wider() -> None:
    pyro.sample("loc", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    pyro.sample("scale", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("mix", dist.Dirichlet(torch.ones(3)))


LOSSES = {
    "ELBO": ELBO(6),
    "stl": ELBO(6, estimator="stl"),
    "dreg": ImportanceWeightedELBO(6, estimator="dreg"),
    "reverse KL": NestedELBO("reverse_kl", 6, resample=True),
    "forward KL": NestedELBO(("forward_kl", "reverse_kl"), 6),
    "avo": NestedELBO("avo", 6),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("control", CONTROLS)
def test_every_objective_trains_every_parameter_on_any_support(control: Any, loss: str) -> None:
    guide = AnnealedGuide(mixed, wider, 2, ControlledLangevinKernel(0.02, 3, control))
    guide()
    randomise(guide, 0.1)  # at zero the inner layer has no gradient
    LOSSES[loss].loss_and_grads(mixed, guide)
    for name, parameter in guide.named_parameters():
        if "logits" not in name:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name


def test_elements_of_a_plate_do_not_see_each_other() -> None:
    ahead, _ = ControlledLangevinKernel(0.1, 4).build(coordinates_of(mixed, (), {}), lambda v, a, k: _flat(v))
    randomise(ahead)
    at = {"loc": torch.randn(3, 1, 2), "scale": torch.rand(3, 1), "mix": torch.softmax(torch.randn(3, 4, 3), -1)}
    other = {**at, "mix": at["mix"].clone()}
    other["mix"][:, 0] = torch.tensor([0.2, 0.3, 0.5])

    def means(given: dict[str, Tensor]) -> Tensor:
        pyro.set_rng_seed(0)
        run = run_alone(ahead, (given,), {}, num_particles=3, nesting=1, values={})
        return run.model.nodes["mix"]["value"]

    moved = (means(at) - means(other)).abs().sum(-1)
    assert (moved[:, 0] > 1e-3).all()
    assert (moved[:, 1:] == 0).all()


def _flat(values: Any) -> Tensor:
    return sum((value.sum() for value in values.values()), torch.zeros(())) * 0.0


def train(mode: str) -> tuple[list[float], list[Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    guide, loss = AnnealedGuide(bimodal, base, 2, ControlledLangevinKernel(0.1, 4)), ELBO(8)
    loss.loss(bimodal, guide)
    pyro.set_rng_seed(2)
    if mode == "plain":
        svi: Any = SVI(bimodal, guide, pyro.optim.SGD({"lr": 0.05}), loss)
    else:
        svi = CompiledSVI(bimodal, guide, lambda p: torch.optim.SGD(p, lr=0.05), loss, mode="trace")
    losses = [svi.step() for _ in range(4)]
    return losses, [p.detach().clone() for p in guide.parameters()]


def test_a_traced_step_is_the_plain_step() -> None:
    plain, traced = train("plain"), train("trace")
    torch.testing.assert_close(torch.tensor(plain[0]), torch.tensor(traced[0]))
    for one, other in zip(plain[1], traced[1], strict=True):
        torch.testing.assert_close(one, other)


def test_copies_pickles_and_states_keep_what_was_learned() -> None:
    guide = AnnealedGuide(gaussian, base, 2, ControlledLangevinKernel(0.1, 4))
    guide()
    randomise(guide)

    def draws(guide: Any) -> Tensor:
        pyro.set_rng_seed(3)
        return log_weights(gaussian, guide, 7)

    fresh = AnnealedGuide(gaussian, base, 2, ControlledLangevinKernel(0.1, 4), name="other")
    fresh()
    before = draws(guide)
    assert not torch.equal(draws(fresh), before)
    fresh.load_state_dict(guide.state_dict())
    twins = {"state": fresh}
    for name, twin in (("copy", copy.deepcopy(guide)), ("pickle", pickle.loads(pickle.dumps(guide)))):
        assert twin.reverse_1.ahead is twin.forward_1, name
        twins[name] = twin
    for name, twin in twins.items():
        with pyro.get_param_store().scope():
            torch.testing.assert_close(draws(twin), before, msg=name)


def test_posterior_of_a_trained_guide() -> None:
    guide = AnnealedGuide(gaussian, base, 4, ControlledLangevinKernel(0.1, 8))
    svi = SVI(gaussian, guide, Adam({"lr": 0.02}), ELBO(20))
    for _ in range(60):
        svi.step()
    posterior = Posterior(gaussian, guide, num_draws=4000, seed=0)
    log_z, error = posterior.log_evidence
    assert abs(float(log_z) - math.log(3.0)) < 4 * float(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size=0.0: expected a positive"),
        ({"step_size": math.nan}, "step_size=nan: expected a positive"),
        ({"hidden": 0}, "hidden=0: expected a whole number"),
        ({"control": "forward"}, "control='forward': expected 'both' or 'reverse'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ControlledLangevinKernel(**options)
