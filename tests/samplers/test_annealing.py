"""Annealed and nested sampling: proper weights, gradients level by level, resampling, batches."""

import gc
import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pplvi.fitting.entry import fit
from pplvi.guides.annealed import AnnealedGuide, NestedGuide
from pplvi.kernels.coordinates import coordinates_of
from pplvi.kernels.langevin import LangevinKernel
from pplvi.kernels.residual import ResidualKernel, ResidualProgram
from pplvi.losses.base import WeightedELBO
from pplvi.losses.elbo import ELBO, ImportanceWeightedELBO
from pplvi.losses.nested import NestedELBO
from pplvi.objectives.bounds import RenyiBound
from pplvi.objectives.nested import FilteringBound, IncrementalBound, NestedForwardKL, NestedReverseKL
from pplvi.objectives.step import Routing, Step
from pplvi.programs.joint import execute
from pplvi.programs.single import run_alone
from pplvi.samplers.annealed import Annealed, Resampling
from pplvi.samplers.base import Request
from pplvi.samplers.paths import GeometricPath
from pplvi.weights.algebra import logmeanexp

pytestmark = pytest.mark.usefixtures("float64")

LOG_8 = math.log(8)
LOCAL = Routing(detach=True, local=True)


def mixture(locs: Tensor, scale: float) -> dist.Distribution:
    parts = dist.Normal(locs, scale).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(locs))), parts)


def gaussian() -> None:
    """Z = 3, mean (1, -1), sd 1/2."""
    pyro.sample("z", dist.Normal(torch.tensor([1.0, -1.0]), 0.5).to_event(1))
    pyro.factor("mass", torch.tensor(3.0).log())


def bimodal() -> None:
    """Z = 1/2, modes at (2, 0) and (-2, 0) with sd 0.7: the second moment of the first coordinate is 4.49."""
    pyro.sample("z", mixture(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), 0.7))
    pyro.factor("mass", torch.tensor(0.5).log())


def base() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))


TARGETS = {"gaussian": (gaussian, 3.0, 1.25), "bimodal": (bimodal, 0.5, 4.49)}
KERNELS = {"residual": ResidualKernel(hidden=4, covariance=0.3), "langevin": LangevinKernel(step_size=0.1)}


def shifted(previous: dict[str, Tensor]) -> None:
    pyro.sample("z", dist.Normal(previous["z"], 1.0).to_event(1))


def shrunk(previous: dict[str, Tensor]) -> None:
    pyro.sample("z", dist.Normal(0.7 * previous["z"], 0.8).to_event(1))


def between() -> None:
    pyro.sample("z", dist.Normal(torch.tensor([0.3, -0.3]), 1.5).to_event(1))
    pyro.factor("mass", torch.tensor(20.0).log())


def guides(target: Callable[[], None]) -> dict[str, Any]:
    geometric = {name: AnnealedGuide(target, base, 3, kernel) for name, kernel in KERNELS.items()}
    uneven = AnnealedGuide(target, base, 3, ResidualKernel(4, 0.3), learn_path=True, betas=(0.1, 0.4))
    own = NestedGuide(base, [(between, shifted, shrunk), (target, shifted, shrunk)])
    return {**geometric, "learned path": uneven, "programs": own}


def walk(model: Any, guide: Any, *args: Any, count: int, routing: Routing, resample: Any = False) -> list[Step]:
    request = Request(count, routing=routing)
    return list(Annealed(Resampling(resample))(model, guide, args, {}, request))


def last_draws(model: Any, guide: Any, count: int, resample: Any, **change: Any) -> tuple[Tensor, Tensor]:
    """Log weights and squared first coordinates of the draws that reach the model."""
    seen: list[Tensor] = []

    steps = walk(Recorder(model, seen), guide, count=count, routing=LOCAL, resample=resample)
    return steps[-1].log_weight, seen[-1][:, 0] ** 2


class Recorder:
    """A model that keeps the values that it was scored at."""

    def __init__(self, model: Callable[[], None], seen: list[Tensor]) -> None:
        self.model, self.seen = model, seen

    def __call__(self) -> None:
        trace = pyro.poutine.trace(self.model)
        trace()
        self.seen.append(trace.trace.nodes["z"]["value"].detach())


@pytest.mark.table(4)
@pytest.mark.parametrize("resample", [False, True, 0.7])
@pytest.mark.parametrize("path", ["residual", "langevin", "learned path", "programs"])
@pytest.mark.parametrize("target", TARGETS)
def test_weights_are_proper(target: str, path: str, resample: bool | float) -> None:
    model, mass, moment = TARGETS[target]
    guide = guides(model)[path]
    estimates = []
    for _ in range(25):  # independent walks, for standard errors that resampling does not spoil
        log_weight, squares = last_draws(model, guide, 400, resample)
        weight = log_weight.exp()
        estimates.append(torch.stack([weight.mean(), (weight * squares).mean()]))
    found = torch.stack(estimates)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - mass * torch.tensor([1.0, moment])).abs() < 4 * error).all(), (found.mean(0), error)
    assert (error < 0.1 * mass * torch.tensor([1.0, moment])).all(), (found.mean(0), error)


@pytest.mark.parametrize("count", [60, 400, 1000])
def test_weights_are_proper_when_the_number_of_particles_changes(count: int) -> None:
    guide, estimates = guides(bimodal)["residual"], []
    for _ in range(30):
        seen: list[Tensor] = []
        request = Request(400, routing=LOCAL)
        steps = list(Annealed(Resampling(True, num_particles=count))(Recorder(bimodal, seen), guide, (), {}, request))
        assert [len(step.log_weight) for step in steps] == [400, count, count]
        weight = steps[-1].log_weight.exp()
        estimates.append(torch.stack([weight.mean(), (weight * seen[-1][:, 0] ** 2).mean()]))
    found = torch.stack(estimates)
    error = found.std(0) / len(found) ** 0.5
    exact = 0.5 * torch.tensor([1.0, 4.49])
    assert ((found.mean(0) - exact).abs() < 4 * error).all(), (found.mean(0), error)
    assert (error < 0.1 * exact).all()


def test_training_with_fewer_particles_after_the_first_level() -> None:
    guide = AnnealedGuide(bimodal, base, 3, ResidualKernel(hidden=4))
    loss = NestedELBO("reverse_kl", 20, resample=Resampling(True, num_particles=8))
    loss.loss_and_grads(bimodal, guide)
    assert all(parameter.grad is not None for parameter in guide.parameters())
    with pytest.raises(ValueError, match="number of particles changes"):
        NestedELBO("avo", 20, resample=Resampling(True, num_particles=8), vectorize_levels=True).loss(bimodal, guide)


@pytest.mark.parametrize("num_inner", [1, 6])
@pytest.mark.parametrize("resample", [False, True])
def test_weighted_draws_of_one_guide_are_the_proposal_of_another(num_inner: int, resample: bool) -> None:
    inner = NestedGuide(base, [(between, shifted, shrunk), (between, shifted, shrunk)])
    guide = NestedGuide(inner, [(gaussian, shifted, shrunk)], num_inner=num_inner)
    estimates, spread = [], []
    for _ in range(40):
        log_weight, squares = last_draws(gaussian, guide, 300, resample)
        assert len(log_weight) == 300
        weight = log_weight.exp()
        estimates.append(torch.stack([weight.mean(), (weight * squares).mean()]))
        spread.append(walk(gaussian, guide, count=300, routing=LOCAL, resample=resample)[-1].log_weight_in.var())
    found = torch.stack(estimates)
    error = found.std(0) / len(found) ** 0.5
    exact = 3 * torch.tensor([1.0, 1.25])
    assert ((found.mean(0) - exact).abs() < 4 * error).all(), (found.mean(0), error)
    assert (error < 0.1 * exact).all()
    if not resample:  # the mean of six weights varies less than one of them
        assert (torch.stack(spread).mean() < 0.4) == (num_inner == 6)


def test_one_particle_is_picked_from_its_inner_draws() -> None:
    """For each of 4000 independent data: the mean weight is the mass of the target, 3."""

    def each(loc: float, scale: float) -> None:
        with pyro.plate("data", 4000):
            pyro.sample("z", dist.Normal(loc, scale))
            pyro.factor("mass", torch.tensor(3.0).log())

    def start() -> None:
        with pyro.plate("data", 4000):
            pyro.sample("z", dist.Normal(0.0, 1.5))

    def moved(previous: dict[str, Tensor]) -> None:
        with pyro.plate("data", 4000):
            pyro.sample("z", dist.Normal(0.5 * previous["z"] + 0.3, 0.8))

    between, wanted = partial(each, 0.5, 1.0), partial(each, 1.0, 0.5)
    guide = NestedGuide(NestedGuide(start, [(between, moved, moved)]), [(wanted, moved, moved)], num_inner=5)
    request = Request(1, routing=Routing(detach=True, local=True))
    *_, step = Annealed()(wanted, guide, (), {}, request)
    assert step.log_weight_in.shape == step.log_weight.shape == (1, 4000)
    weight = step.log_weight[0].exp()
    error = weight.std() / 4000**0.5
    assert error < 0.2
    assert abs(weight.mean() - 3) < 4 * error


def test_a_nested_sampler_trains_both_guides_and_has_no_density() -> None:
    inner = AnnealedGuide(between, base, 2, ResidualKernel(hidden=3), name="inner")
    kernel = ResidualProgram(ResidualKernel(hidden=3), coordinates_of(gaussian, (), {}))
    guide = NestedGuide(inner, [(gaussian, kernel, shrunk)], num_inner=4)
    NestedELBO("reverse_kl", 10).loss_and_grads(gaussian, guide)
    assert len(list(guide.parameters())) == 15
    assert all(parameter.grad is not None for parameter in guide.parameters())
    with pytest.raises(ValueError, match="walked level by level"):
        ELBO(3).loss(gaussian, guide)


# ---------------------------------------------------------------- gradients of a level against the closed forms

K = 24


def learned_target() -> None:
    """An unnormalised intermediate target whose mean and mass are learned."""
    theta = pyro.param("theta", torch.tensor(0.4))
    z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
    pyro.factor("density", -((z - theta) ** 2) + 0.3 * theta * z.sin())


def final_target() -> None:
    pyro.sample("z", dist.Normal(1.5, 0.7))
    pyro.factor("mass", torch.tensor(2.0).log())


def wide() -> None:
    pyro.sample("z", dist.Normal(0.0, 2.0))


def forward(k: int) -> Callable[..., None]:
    def kernel(previous: dict[str, Tensor]) -> None:
        shift, scale = pyro.param(f"shift_{k}", torch.tensor(0.1 * k)), pyro.param(f"scale_{k}", torch.tensor(0.9))
        pyro.sample("z", dist.Normal(previous["z"] * 0.8 + shift, scale))

    return kernel


def reverse(k: int) -> Callable[..., None]:
    def kernel(following: dict[str, Tensor]) -> None:
        pyro.sample("z", dist.Normal(following["z"] + pyro.param(f"rho_{k}", torch.tensor(-0.2)), 1.1))

    return kernel


class Alike:
    """A kernel that says so: all that differs between levels are its parameters."""

    def __init__(self, kernel: Callable[..., None], alike: str) -> None:
        self.kernel, self.alike = kernel, alike

    def __call__(self, values: dict[str, Tensor]) -> None:
        self.kernel(values)


NAMES = ["theta", "shift_1", "scale_1", "shift_2", "scale_2", "rho_1", "rho_2"]


def learned_guide(alike: bool = False) -> NestedGuide:
    ahead, back = [forward(1), forward(2)], [reverse(1), reverse(2)]
    if alike:
        ahead, back = [Alike(kernel, "forward") for kernel in ahead], [Alike(kernel, "reverse") for kernel in back]
    return NestedGuide(wide, [(learned_target, ahead[0], back[0]), (final_target, ahead[1], back[1])])


def by_hand() -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The two levels in plain torch with the same noise: every density as a function of parameters and draws."""
    p = {"theta": 0.4, "rho_1": -0.2, "rho_2": -0.2, "shift_1": 0.1, "shift_2": 0.2, "scale_1": 0.9, "scale_2": 0.9}
    p = {name: torch.tensor(value, requires_grad=True) for name, value in p.items()}
    normal = torch.distributions.Normal
    start, noise = torch.empty(K).normal_(), [torch.empty(K).normal_(), torch.empty(K).normal_()]
    targets = [
        lambda z: normal(0.0, 2.0).log_prob(z),
        lambda z: -((z - p["theta"]) ** 2) + 0.3 * p["theta"] * z.sin(),
        lambda z: normal(1.5, 0.7).log_prob(z) + math.log(2.0),
    ]
    z, levels, log_weight = 2.0 * start, [], torch.zeros(K)
    for k in (1, 2):
        mean = 0.8 * z + p[f"shift_{k}"]
        moved = mean + p[f"scale_{k}"] * noise[k - 1]
        q = lambda x, k=k, z=z: normal(0.8 * z + p[f"shift_{k}"], p[f"scale_{k}"]).log_prob(x)  # noqa: E731
        r = lambda x, k=k, z=z: normal(x + p[f"rho_{k}"], 1.1).log_prob(z)  # noqa: E731
        point = moved.detach().requires_grad_()
        log_v = targets[k](point) + r(point) - targets[k - 1](z) - q(point)
        slope = torch.autograd.grad(log_v.sum(), point, retain_graph=True)[0]
        after = (log_weight + log_v).detach()
        levels.append(
            {
                "a": torch.softmax(log_weight, 0),
                "b": torch.softmax(after, 0),
                "log_v": log_v.detach(),
                "slope": slope,
                "moved": moved,
                "initial": targets[k - 1](z) + torch.zeros(K),
                "target": targets[k](point.detach()),
                "reverse": r(point.detach()),
                "forward": q(point.detach()),
            }
        )
        z, log_weight = moved.detach(), after
    return levels, p


def reverse_kl_by_hand(level: dict[str, Any]) -> Tensor:
    """The four closed forms of the level's gradient as one function to differentiate."""
    a, b, log_v = level["a"], level["b"], level["log_v"]
    return (
        -(a * (log_v - (a * log_v).sum()) * level["initial"]).sum()
        - (a * level["slope"] * level["moved"]).sum()
        + ((b - a) * level["target"]).sum()
        - (a * level["reverse"]).sum()
    )


def forward_kl_by_hand(level: dict[str, Any]) -> Tensor:
    a, b, log_v = level["a"], level["b"], level["log_v"]
    return (
        -(b * level["forward"]).sum()
        + ((a - b) * level["initial"]).sum()
        + (b * (log_v - (b * log_v).sum()) * level["target"]).sum()
    )


def both_by_hand(level: dict[str, Any]) -> Tensor:
    return forward_kl_by_hand(level) - (level["a"] * level["reverse"]).sum()


def avo_by_hand(level: dict[str, Any]) -> Tensor:
    path = (level["slope"] * level["moved"]).mean()
    return -path - (level["target"] + level["reverse"] - level["initial"]).mean()


CLOSED_FORMS = {
    "reverse_kl": reverse_kl_by_hand,
    "forward_kl": forward_kl_by_hand,
    ("forward_kl", "reverse_kl"): both_by_hand,
    "avo": avo_by_hand,
}


def gradients(loss: Any, model: Any, guide: Any, names: list[str] = NAMES) -> list[Tensor]:
    for _, parameter in pyro.get_param_store().named_parameters():
        parameter.grad = None
    pyro.set_rng_seed(3)
    loss.loss_and_grads(model, guide)
    grads = [pyro.param(name).unconstrained().grad for name in names]
    return [torch.zeros(()) if grad is None else grad.clone() for grad in grads]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("divergence", CLOSED_FORMS, ids=str)
def test_gradients_of_every_level_equal_the_closed_forms(divergence: Any, together: bool) -> None:
    loss = NestedELBO(divergence, K, vectorize_levels=together)
    found = gradients(loss, final_target, learned_guide(alike=together))
    pyro.set_rng_seed(3)
    levels, parameters = by_hand()
    sum(CLOSED_FORMS[divergence](level) for level in levels).backward()
    for name, gradient in zip(NAMES, found, strict=True):
        wanted = parameters[name].grad
        wanted = torch.zeros(()) if wanted is None else wanted
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("resample", [False, True, 0.9])
@pytest.mark.parametrize("divergence", [*CLOSED_FORMS, "chi_square"], ids=str)
def test_backward_level_by_level_equals_one_backward(divergence: Any, resample: bool | float) -> None:
    loss, guide = NestedELBO(divergence, K, resample=resample), learned_guide()
    found = gradients(loss, final_target, guide)
    value = loss_at_seed(loss, final_target, guide)
    for name in NAMES:
        pyro.param(name).unconstrained().grad = None
    pyro.set_rng_seed(3)
    total = loss.differentiable_loss(final_target, guide)
    total.backward()
    for name, gradient in zip(NAMES, found, strict=True):
        other = pyro.param(name).grad
        torch.testing.assert_close(torch.zeros(()) if other is None else other, gradient, rtol=0, atol=1e-12)
    assert float(total.detach()) == pytest.approx(value, abs=1e-12)


def several() -> tuple[Callable[..., None], Callable[..., None]]:
    """Global, positive, local and simplex latents; the base."""

    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.Gamma(3.0, 2.0))
        with pyro.plate("data", len(y)):
            mix = pyro.sample("mix", dist.Dirichlet(torch.ones(3) * (1 + scale.unsqueeze(-1))))
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(z + mix[..., 0], 1.0), obs=y)

    def flat(y: Tensor) -> None:
        pyro.sample("scale", dist.LogNormal(0.3, 0.6))
        with pyro.plate("data", len(y)):
            pyro.sample("mix", dist.Dirichlet(torch.ones(3) * 2.0))
            pyro.sample("z", dist.Normal(0.0, 2.0))

    return model, flat


def only_local() -> tuple[Callable[..., None], Callable[..., None]]:
    def model(y: Tensor) -> None:
        with pyro.plate("data", 2 * len(y), subsample_size=len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    def flat(y: Tensor) -> None:
        with pyro.plate("data", 2 * len(y), subsample_size=len(y)):
            pyro.sample("z", dist.Normal(0.0, 2.0))

    return model, flat


@pytest.mark.table(3)
@pytest.mark.parametrize("resample", [False, True, 0.9])
@pytest.mark.parametrize("divergence", [*CLOSED_FORMS, "hellinger"], ids=str)
@pytest.mark.parametrize("programs", [several, only_local])
def test_all_levels_at_once_equal_one_by_one(divergence: Any, resample: bool | float, programs: Any) -> None:
    y = torch.tensor([0.5, -1.0, 2.0])
    model, flat = programs()
    guide = AnnealedGuide(model, flat, 3, ResidualKernel(hidden=4, covariance=0.2), learn_path=True)
    guide(y)
    with torch.no_grad():  # away from the symmetric start
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    found = []
    for together in (False, True):
        loss = NestedELBO(divergence, 8, resample=resample, vectorize_levels=together)
        for parameter in guide.parameters():
            parameter.grad = None
        pyro.set_rng_seed(5)
        value = loss.loss_and_grads(model, guide, y)
        pyro.set_rng_seed(5)
        assert loss.loss(model, guide, y) == pytest.approx(value, rel=1e-10)
        named = sorted(guide.named_parameters())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in named]
        found.append(torch.cat([torch.tensor([value]), *[g.flatten() for g in grads]]))
    assert found[0].abs().max() > 0.1
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


def test_kernels_of_different_size_are_grouped() -> None:
    guide = learned_guide(alike=True)
    one, other = guide._ahead[0], guide._ahead[1]
    other.alike = "another kind"
    assert one.alike != other.alike
    loss = NestedELBO("reverse_kl", K, resample=True)
    found = gradients(loss, final_target, guide)
    wanted = gradients(NestedELBO("reverse_kl", K, resample=True, vectorize_levels=False), final_target, guide)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_levels_at_once_are_refused_where_kernels_do_not_allow_them() -> None:
    with pytest.raises(ValueError, match="alike"):
        NestedELBO("reverse_kl", K, vectorize_levels=True).loss(final_target, learned_guide())
    assert NestedELBO("reverse_kl", K).loss(final_target, learned_guide()) != 0.0


def loss_at_seed(loss: Any, model: Any, guide: Any) -> float:
    pyro.set_rng_seed(3)
    return loss.loss(model, guide)


def test_filtering_bound_without_resampling_is_the_importance_bound_of_the_path() -> None:
    guide = learned_guide()
    filtering = WeightedELBO(FilteringBound(), Annealed(), K)
    found = gradients(filtering, final_target, guide)
    end_to_end = gradients(ImportanceWeightedELBO(K), final_target, guide)
    for one, other in zip(found, end_to_end, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    local = gradients(NestedELBO("avo", K), final_target, guide)
    assert not torch.allclose(torch.stack(local), torch.stack(end_to_end))


def log_weight_of_the_path_by_hand(p: dict[str, Tensor]) -> Tensor:
    """Plain torch, draws and weights attached from the first level to the last, with the noise of the seed."""
    normal = torch.distributions.Normal
    start, noise = torch.empty(K).normal_(), [torch.empty(K).normal_(), torch.empty(K).normal_()]
    targets = [
        lambda z: normal(0.0, 2.0).log_prob(z),
        lambda z: -((z - p["theta"]) ** 2) + 0.3 * p["theta"] * z.sin(),
        lambda z: normal(1.5, 0.7).log_prob(z) + math.log(2.0),
    ]
    z, log_weight = 2.0 * start, torch.zeros(K)
    for k in (1, 2):
        q = normal(0.8 * z + p[f"shift_{k}"], p[f"scale_{k}"])
        moved = q.loc + q.scale * noise[k - 1]
        back = normal(moved + p[f"rho_{k}"], 1.1).log_prob(z)
        log_weight = log_weight + targets[k](moved) + back - targets[k - 1](z) - q.log_prob(moved)
        z = moved
    return log_weight


@pytest.mark.parametrize("bound", ["ELBO", "IWAE", "FIVO"])
def test_gradients_of_the_whole_path_equal_plain_torch(bound: str) -> None:
    p = {"rho_1": -0.2, "rho_2": -0.2, "shift_1": 0.1, "shift_2": 0.2, "scale_1": 0.9, "scale_2": 0.9, "theta": 0.4}
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in p.items()}
    pyro.set_rng_seed(3)
    log_weight = log_weight_of_the_path_by_hand(leaves)
    (-log_weight.mean() if bound == "ELBO" else -logmeanexp(log_weight)).backward()
    whole = {"ELBO": ELBO(K), "IWAE": ImportanceWeightedELBO(K)}
    loss = whole.get(bound) or WeightedELBO(FilteringBound(), Annealed(), K)
    names = NAMES[1:]  # without the target between: it cancels
    found = gradients(loss, final_target, learned_guide(), names)
    local = gradients(NestedELBO("reverse_kl", K), final_target, learned_guide(), names)
    for name, gradient in zip(names, found, strict=True):
        torch.testing.assert_close(gradient, leaves[name].grad, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert abs(found[0] - local[0]) > 1e-2  # the first kernel learns from the levels after it


def test_annealed_guide_is_ordinary_variational_inference_on_the_extended_space() -> None:
    guide = learned_guide()
    values = [loss_at_seed(loss, final_target, guide) for loss in (ELBO(K), NestedELBO("avo", K))]
    assert values[0] == pytest.approx(values[1], abs=1e-10)
    pyro_elbo = Trace_ELBO(num_particles=K, vectorize_particles=True, max_plate_nesting=0)
    assert loss_at_seed(pyro_elbo, final_target, guide) == pytest.approx(values[0], abs=1e-10)
    ours = gradients(ELBO(K), final_target, guide)
    for one, other in zip(ours, gradients(pyro_elbo, final_target, guide), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_exact_kernels_give_equal_weights() -> None:
    """Forward and reverse conditionals of one joint distribution: nothing is lost on the way."""

    def start() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def ahead(previous: dict[str, Tensor]) -> None:
        pyro.sample("z", dist.Normal(0.25 + 0.6 * (0.5**0.5) * previous["z"], (0.5 * (1 - 0.36)) ** 0.5))

    def back(following: dict[str, Tensor]) -> None:
        pyro.sample("z", dist.Normal(0.6 * (following["z"] - 0.25) / 0.5**0.5, 0.8))

    def model() -> None:
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(0.5))

    (step,) = walk(model, NestedGuide(start, [(model, ahead, back)]), count=9, routing=LOCAL)
    torch.testing.assert_close(step.log_weight, torch.full((9,), -1.3280121), rtol=0, atol=1e-7)


# ---------------------------------------------------------------- resampling and batches


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "multinomial"])
@pytest.mark.parametrize("when", [True, 0.5])
def test_resampling_keeps_the_mean_weight_of_each_element(when: bool | float, scheme: Any) -> None:
    log_weight = 2 * torch.randn(50, 4, 3) * torch.arange(3)  # the first column is even: its ESS is never low
    chosen, after = Resampling(when, scheme).indices(log_weight)
    torch.testing.assert_close(logmeanexp(after), logmeanexp(log_weight))
    if when is not True:
        assert torch.equal(chosen[..., 0], torch.arange(50)[:, None].expand(50, 4))
    assert chosen.shape == log_weight.shape
    assert not torch.equal(after[..., 2], log_weight[..., 2])


class Table:
    """Rows of a table for draws with particles; zeros for those of inspections, which have none."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = iter(rows)

    def draw(self, shape: torch.Size) -> Tensor:
        return torch.zeros(shape) if len(shape) < 2 else next(self.rows)


class Tabled(dist.Normal):
    """A normal whose noise comes from a table, so that a batch and a loop over it draw the same."""

    noise: Any = None

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.loc + self.scale * Tabled.noise.draw(self._extended_shape(sample_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Tabled":
        return Tabled(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


def batched_programs(y: Tensor) -> tuple[Any, NestedGuide]:
    def plated(fn: Callable[[], Any]) -> None:
        with pyro.plate("data", len(y)):
            fn()

    def model() -> None:
        plated(lambda: pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)).exp(), 0.5), obs=y))

    def start() -> None:
        plated(lambda: pyro.sample("z", Tabled(torch.tensor(0.0), torch.tensor(1.0))))

    def kernel(previous: dict[str, Tensor]) -> None:
        plated(lambda: pyro.sample("z", Tabled(0.8 * previous["z"], torch.tensor(0.6))))

    return model, NestedGuide(start, [(model, kernel, kernel)] * 3)


@pytest.mark.parametrize("resample", [False, True, 0.5])
def test_particles_times_batch_equals_a_loop_over_the_elements(monkeypatch: Any, resample: bool | float) -> None:
    def middle(total: Tensor, count: int, scheme: str) -> Tensor:
        return ((torch.arange(count) + 0.5) / count).expand(*total.shape[:-1], count).contiguous()

    monkeypatch.setattr("pplvi.weights.resampling._uniform_points", middle)
    y, table = torch.linspace(0.1, 3.0, 7), torch.randn(4, 9, 7)

    def run(y: Tensor, table: Tensor) -> list[Step]:
        model, guide = batched_programs(y)
        Tabled.noise = Table(table)
        return walk(model, guide, count=9, routing=LOCAL, resample=resample)

    whole = run(y, table)
    assert whole[-1].log_weight.shape == (9, 7)
    for n in range(7):
        single = run(y[n : n + 1], table[:, :, n : n + 1])
        for one, all_ in zip(single, whole, strict=True):
            torch.testing.assert_close(one.log_weight[:, 0], all_.log_weight[:, n], rtol=0, atol=1e-12)
            for objective in (NestedReverseKL(), NestedForwardKL(), IncrementalBound()):
                torch.testing.assert_close(objective(one).value[0], objective(all_).value[n])


# ---------------------------------------------------------------- the annealing ring


def ring() -> None:
    angle = 2 * math.pi * torch.arange(1, 9) / 8
    modes = 10 * torch.stack([angle.sin(), angle.cos()], -1)
    pyro.sample("z", mixture(modes, 0.5**0.5))
    pyro.factor("mass", torch.tensor(LOG_8))


def ring_base() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2), 5.0).to_event(1))


RING = {1 / 7: -1.02585, 2 / 7: -0.87598, 3 / 7: -0.44861, 4 / 7: 0.10307, 5 / 7: 0.72333, 6 / 7: 1.38664, 1.0: LOG_8}


def test_evidence_of_every_target_on_the_way_to_the_ring() -> None:
    guide = AnnealedGuide(ring, ring_base, 7, LangevinKernel(step_size=0.3))
    found = []
    for _ in range(12):
        steps = walk(ring, guide, count=3000, routing=LOCAL, resample=0.5)
        found.append(torch.stack([logmeanexp(step.log_weight).exp() for step in steps]))
    estimates = torch.stack(found)
    error = estimates.std(0) / len(estimates) ** 0.5
    exact = torch.tensor(list(RING.values())).exp()
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all(), (estimates.mean(0).log(), exact.log(), error)
    assert (error < 0.03 * exact).all()


EXACT = {0.2: -1.01880, 0.25: -0.94996, 1 / 3: -0.75328, 0.4: -0.54676, 0.5: -0.18374, 0.6: 0.22272, 2 / 3: 0.51088}
EXACT |= {0.75: 0.88578, 0.8: 1.11718, **RING}


def test_geometric_targets_of_the_ring_have_their_exact_mass() -> None:
    axis = torch.linspace(-30.0, 30.0, 241)
    grid = torch.cartesian_prod(axis, axis)
    path = GeometricPath(ring, ring_base, len(EXACT), betas=sorted(EXACT)[:-1])
    how: dict[str, Any] = {"num_particles": len(grid), "nesting": 0, "values": {"z": grid}, "complete": True}
    for level, beta in enumerate(sorted(EXACT), 1):
        densities = [run_alone(program, (), {}, **how).log_target() for program in path.programs(level)]
        log_z = path(level, densities).logsumexp(0) + 2 * math.log(60 / 240)
        assert float(log_z) == pytest.approx(EXACT[beta], abs=2e-5)


def test_one_evaluation_of_the_target_for_all_particles_of_a_level() -> None:
    calls = []

    def counted() -> None:
        calls.append(1)
        ring()

    guide = AnnealedGuide(counted, ring_base, 7, ResidualKernel(hidden=5), learn_path=True)
    for resample, together, count in ((True, False, 7), (True, True, 7), (False, False, 7), (False, True, 1)):
        loss = NestedELBO("reverse_kl", 12, resample=resample, vectorize_levels=together)
        loss.loss_and_grads(counted, guide)
        calls.clear()
        loss.loss_and_grads(counted, guide)
        assert len(calls) == count


# ---------------------------------------------------------------- training, and the rest of the package


@pytest.mark.parametrize("divergence", ["reverse_kl", ("forward_kl", "reverse_kl"), "avo"], ids=str)
def test_training_raises_the_effective_sample_size(divergence: Any) -> None:
    guide = AnnealedGuide(bimodal, base, 2, ResidualKernel(hidden=10), learn_path=True)
    loss = NestedELBO(divergence, 100, resample=divergence != "avo")

    def ess() -> float:
        pyro.set_rng_seed(1)
        log_weight = walk(bimodal, guide, count=4000, routing=LOCAL)[-1].log_weight
        return float((2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp()) / 4000

    before, betas = ess(), guide.betas
    svi = SVI(bimodal, guide, Adam({"lr": 0.02}), loss)
    for _ in range(150):
        svi.step()
    assert ess() > before + 0.1
    assert torch.allclose(guide.betas, betas, atol=1e-6) == (divergence == "avo")  # its targets between cancel
    assert (guide.betas.diff() > 0).all()


def test_an_ordinary_guide_is_trained_on_the_whole_posterior() -> None:
    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 0.5))

    for divergence, same in (("reverse_kl", ELBO(6, estimator="stl")), ("avo", ELBO(6, estimator="stl"))):
        loss = NestedELBO(divergence, 6)
        assert loss_at_seed(loss, wide, guide) == loss_at_seed(same, wide, guide)
        torch.testing.assert_close(gradients(loss, wide, guide, ["loc"]), gradients(same, wide, guide, ["loc"]))


def local_model(y: Tensor) -> None:
    with pyro.plate("data", 40, subsample_size=10) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def local_base(y: Tensor) -> None:
    with pyro.plate("data", 40, subsample_size=10):
        pyro.sample("z", dist.Normal(0.0, 1.5))


def test_minibatches_share_their_indices_between_levels_and_scale_the_loss() -> None:
    y = torch.linspace(-1.0, 1.0, 40)
    guide = AnnealedGuide(local_model, local_base, 2, ResidualKernel(hidden=4, covariance=0.1))
    loss = NestedELBO("avo", 5)
    for one_by_one in (False, True):
        steps = NestedELBO("avo", 5, vectorize_levels=not one_by_one).steps(local_model, guide, y)
        for step in steps:
            assert step.log_weight.shape == ((5, 10) if one_by_one else (5, 2, 10))
            assert (step.scale, step.subsampled) == (4.0, ())
    bounds = [loss.loss(local_model, guide, y) for _ in range(60)]
    elbos = [ELBO(5).loss(local_model, guide, y) for _ in range(60)]
    gap = torch.tensor([bounds, elbos])
    assert float((gap[0].mean() - gap[1].mean()).abs()) < 4 * float((gap.var(1) / 60).sum().sqrt())


def test_global_latents_make_joint_weights() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(mu, 1.0))

    guide = AnnealedGuide(model, model, 2, ResidualKernel(hidden=3))
    for divergence in ("reverse_kl", "forward_kl"):
        for step in NestedELBO(divergence, 6, resample=True, vectorize_levels=False).steps(model, guide):
            assert step.log_weight.shape == (6,)
    log_weight = walk(model, guide, count=4000, routing=LOCAL)[-1].log_weight
    found, error = logmeanexp(log_weight).exp(), log_weight.exp().std() / 4000**0.5
    assert abs(float(found) - 1.0) < 4 * float(error)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NestedELBO("kl"), "divergence='kl'"),
        (lambda: NestedELBO("reverse_kl", 1), "at least 2"),
        (lambda: NestedELBO(resample=1.5), "resample=1.5.*above 0 and at most 1"),
        (lambda: AnnealedGuide(ring, ring_base, 0), "num_steps=0"),
        (lambda: AnnealedGuide(ring, ring_base, 3, betas=(0.5, 0.2)), "increase strictly"),
        (lambda: NestedGuide(base, []), "at least two"),
        (lambda: NestedGuide(base, [(gaussian, shifted, shrunk)], num_inner=3), "num_inner=3"),
        (lambda: Resampling(0.5, num_particles=10), "num_particles=10"),
        (lambda: Resampling(True, num_particles=1), "at least 2"),
        (lambda: LangevinKernel(step_size=0.0), "positive"),
        (lambda: ResidualKernel(hidden=0), "hidden=0"),
    ],
)
def test_arguments_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_kernels_have_to_cover_the_sites() -> None:
    def other(previous: dict[str, Tensor]) -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    for steps in ([(gaussian, other, shrunk)], [(gaussian, shifted, other)]):
        with pytest.raises(ValueError, match="expected the model's sites"):
            NestedELBO("reverse_kl", 4).loss(gaussian, NestedGuide(base, steps))


def positive() -> None:
    pyro.sample("z", dist.LogNormal(0.0, 1.0))


def grown(previous: dict[str, Tensor]) -> None:
    pyro.sample("z", dist.LogNormal(previous["z"].log(), 0.5))


def spread_out(previous: dict[str, Tensor]) -> None:
    pyro.sample("z", dist.Normal(previous["z"], 0.5))


def test_a_reverse_kernel_with_another_support_is_refused() -> None:
    """Its density is normalised over more than the target has: weights would be too small."""
    with pytest.raises(ValueError, match="a reverse kernel draws from Real"):
        NestedELBO("reverse_kl", 4).loss(positive, NestedGuide(positive, [(positive, grown, spread_out)]))
    NestedELBO("reverse_kl", 4).loss(positive, NestedGuide(positive, [(positive, grown, grown)]))


def test_a_target_without_the_sites_of_the_path_is_refused() -> None:
    def other() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    guide = NestedGuide(base, [(other, shifted, shrunk), (gaussian, shifted, shrunk)])
    with pytest.raises(ValueError, match=r"latent sites \['x'\]"):
        NestedELBO("reverse_kl", 4).loss(gaussian, guide)


def test_objectives_of_a_single_step_are_refused_on_a_path() -> None:
    loss = WeightedELBO(RenyiBound(0.0), Annealed(), 4)
    with pytest.raises(ValueError, match="single step"):
        loss.loss(final_target, learned_guide())


def test_draws_without_a_path_are_refused_by_objectives_that_follow_it() -> None:
    def start() -> None:
        pyro.sample("z", dist.Categorical(torch.ones(3)))

    def kernel(previous: dict[str, Tensor]) -> None:
        pyro.sample("z", dist.Categorical(logits=pyro.param("logits", torch.zeros(3))))

    def model() -> None:
        pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))

    guide = NestedGuide(start, [(model, kernel, kernel)])
    with pytest.raises(ValueError, match="forward_kl"):
        NestedELBO("reverse_kl", 4).loss_and_grads(model, guide)
    NestedELBO("forward_kl", 4).loss_and_grads(model, guide)  # discrete draws are as good as others
    assert pyro.param("logits").grad is not None


# ---------------------------------------------------------------- the rest of the package


def conjugate(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def conjugate_base(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(0.0, 1.2))


def test_fit_posterior_and_arviz() -> None:
    y = torch.tensor([0.5, -1.0, 2.0])
    fitted = fit(
        conjugate,
        lambda model: AnnealedGuide(model, conjugate_base, 2, ResidualKernel(hidden=8, covariance=0.3)),
        args=(y,),
        objective=NestedELBO("reverse_kl", 20, resample=0.5),
        num_steps=150,
        seed=0,
        progress=False,
    )
    posterior = fitted.posterior(num_draws=2000)
    log_z, error = posterior.log_evidence
    exact = torch.distributions.Normal(0.0, 2**0.5).log_prob(y)
    assert ((log_z - exact).abs() < 4 * error).all()
    assert (posterior.ess > 400).all()
    assert set(fitted.to_arviz().posterior.data_vars) == {"z"}


def test_constrained_and_local_sites_move_together() -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.Gamma(3.0, 2.0))
        with pyro.plate("data", 3):
            pyro.sample("mix", dist.Dirichlet(torch.ones(2) * (1 + scale.unsqueeze(-1))))

    def flat() -> None:
        pyro.sample("scale", dist.LogNormal(0.3, 0.6))
        with pyro.plate("data", 3):
            pyro.sample("mix", dist.Dirichlet(torch.ones(2) * 2.0))

    for kernel in (ResidualKernel(hidden=4, covariance=0.05), LangevinKernel(step_size=0.02)):
        guide = AnnealedGuide(model, flat, 2, kernel, name=type(kernel).__name__)
        log_weight = walk(model, guide, count=20_000, routing=LOCAL)[-1].log_weight
        found, error = logmeanexp(log_weight).exp(), log_weight.exp().std() / len(log_weight) ** 0.5
        assert abs(float(found) - 1.0) < 4 * float(error) < 0.2
        NestedELBO("reverse_kl", 5, resample=True).loss_and_grads(model, guide)


def test_memory_of_the_levels_does_not_add_up() -> None:
    """Level by level, the graph that is alive has the size of a level or two, not of the whole walk."""
    alive, worst = weakref.WeakSet[Any](), {}

    class Probe(IncrementalBound):
        def __call__(self, step: Step) -> Any:
            alive.add(step.log_target)
            self_worst[0] = max(self_worst[0], len(alive))
            return super().__call__(step)

    for num_steps in (2, 12):
        self_worst = [0]
        guide = AnnealedGuide(bimodal, base, num_steps, ResidualKernel(hidden=4), name=f"guide{num_steps}")
        loss = NestedELBO("avo", 5, vectorize_levels=False)
        loss.objective = Probe()
        loss.loss_and_grads(bimodal, guide)
        gc.collect()
        worst[num_steps] = self_worst[0]
    assert worst[12] <= worst[2]


def test_score_functions_leave_reverse_densities_alone() -> None:
    """The reverse kernel's value was drawn by another kernel: its density is no density of a draw."""
    run = execute(final_target, learned_guide(), (), {}, num_particles=5, detach=True)
    densities = run.log_probs(run.guide)
    drawn = [density for name, density in densities.items() if not name.endswith("reverse")]
    assert len(drawn) == len(densities) - 2 == 3
    torch.testing.assert_close(run.log_score(detached=True), torch.stack(drawn).sum(0))


@pytest.mark.parametrize("loss", [ELBO(2000, estimator="score"), ELBO(500, estimator="vimco")], ids=str)
def test_estimators_of_the_extended_bound_agree(loss: ELBO) -> None:
    guide = learned_guide()
    names = ["shift_2", "rho_1", "rho_2"]
    exact = torch.stack(gradients(ELBO(20_000), final_target, guide, names))
    found = []
    for seed in range(30):
        pyro.set_rng_seed(seed)
        for name in names:
            pyro.param(name).unconstrained().grad = None
        loss.loss_and_grads(final_target, guide)
        found.append(torch.stack([pyro.param(name).unconstrained().grad for name in names]))
    estimates = torch.stack(found)
    error = estimates.std(0) / len(found) ** 0.5
    assert ((estimates.mean(0) - exact).abs() < 4 * error + 0.08).all(), (estimates.mean(0), exact, error)


def test_nested_elbo_is_a_torch_module() -> None:
    guide = AnnealedGuide(bimodal, base, 2, ResidualKernel(hidden=3))
    guide()
    module = NestedELBO("reverse_kl", 6, resample=True)(bimodal, guide)
    module().backward()
    assert all(parameter.grad is not None for parameter in guide.parameters())
