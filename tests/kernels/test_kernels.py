"""Kernels and paths: densities against pairs worked by hand, in constrained and unconstrained sites."""

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pplvi.kernels.coordinates import coordinates_of
from pplvi.kernels.langevin import LangevinKernel
from pplvi.kernels.residual import ResidualKernel
from pplvi.programs.single import log_density_of, run_alone
from pplvi.samplers.paths import GeometricPath, ProgramPath

pytestmark = pytest.mark.usefixtures("float64")


def model() -> None:
    """A location, a positive scale and a probability vector, with local latents in a plate."""
    pyro.sample("loc", dist.Normal(1.0, 2.0))
    pyro.sample("scale", dist.Gamma(3.0, 2.0))
    with pyro.plate("data", 4):
        pyro.sample("mix", dist.Dirichlet(torch.ones(3)))


def values(count: int) -> dict[str, Tensor]:
    return {
        "loc": torch.randn(count, 1),
        "scale": torch.rand(count, 1) + 0.5,
        "mix": torch.softmax(torch.randn(count, 4, 3), -1),
    }


def no_density(*_: Any) -> Tensor:
    raise AssertionError("this kernel does not look at the target")


def kernel_density(kernel: Any, previous: dict[str, Tensor], reached: dict[str, Tensor]) -> Tensor:
    run = run_alone(kernel, (previous,), {}, num_particles=5, nesting=1, values=reached, complete=True)
    return run.log_target()


def test_sites_in_unconstrained_coordinates() -> None:
    sites = {site.name: site for site in coordinates_of(model, (), {})}
    assert {name: (site.size, [p.name for p in site.plates]) for name, site in sites.items()} == {
        "loc": (1, []),
        "scale": (1, []),
        "mix": (2, ["data"]),
    }
    at = values(5)
    for site in sites.values():
        torch.testing.assert_close(site.write(site.read(at)), at[site.name])
    torch.testing.assert_close(sites["scale"].read(at)[..., 0], at["scale"].log())
    torch.testing.assert_close(sites["scale"].log_jacobian(at), at["scale"].log())


def test_residual_kernel_is_a_random_walk_at_first_with_its_jacobian() -> None:
    sites = coordinates_of(model, (), {})
    forward, reverse = ResidualKernel(hidden=6, covariance=0.25).build(sites, no_density)
    previous, reached = values(5), values(5)
    normal = torch.distributions.Normal
    by_hand = normal(previous["loc"], 0.5).log_prob(reached["loc"])[:, 0]
    by_hand += (normal(previous["scale"].log(), 0.5).log_prob(reached["scale"].log()) - reached["scale"].log())[:, 0]
    stick = torch.distributions.StickBreakingTransform()
    free = stick.inv(reached["mix"])
    moved = normal(stick.inv(previous["mix"]), 0.5).log_prob(free).sum(-1)
    by_hand += (moved - stick.log_abs_det_jacobian(free, reached["mix"])).sum(-1)
    torch.testing.assert_close(kernel_density(forward, previous, reached), by_hand)
    torch.testing.assert_close(kernel_density(reverse, previous, reached), by_hand)


def test_residual_kernel_after_its_weights_have_moved() -> None:
    def normal_model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    forward, reverse = ResidualKernel(hidden=7).build(coordinates_of(normal_model, (), {}), no_density)
    owner = PyroModule("owner")  # gives the parameters of the two programs different names
    owner.forward_1, owner.reverse_1 = forward, reverse
    for program in (forward, reverse):
        for parameter in program.parameters():
            torch.nn.init.normal_(parameter)
    weight, bias, outputs = (getattr(forward, f"{part}_0") for part in ("weight", "bias", "outputs"))
    x, z = torch.randn(5, 2), torch.randn(5, 2)
    hidden = torch.relu(x @ weight.T + bias)
    shift, spread = (hidden @ outputs[:, :7].T + outputs[:, 7]).chunk(2, -1)
    offset = math.log(math.e - 1)
    covariance = torch.diag_embed(torch.log1p((spread + offset).exp()))
    by_hand = torch.distributions.MultivariateNormal(x + shift, covariance).log_prob(z)
    run = run_alone(forward, ({"z": x},), {}, num_particles=5, nesting=0, values={"z": z})
    torch.testing.assert_close(run.log_target(), by_hand)
    other = run_alone(reverse, ({"z": x},), {}, num_particles=5, nesting=0, values={"z": z})
    assert not torch.allclose(other.log_target(), by_hand)


def test_langevin_density_ratio_on_constrained_and_plain_sites() -> None:
    def target() -> None:
        pyro.sample("z", dist.Normal(1.0, 2.0))
        pyro.sample("s", dist.Gamma(3.0, 2.0))

    def density(at: Any, args: Any, kwargs: Any) -> Tensor:
        return log_density_of(target, args, kwargs, at)

    forward, reverse = LangevinKernel(step_size=0.3).build(coordinates_of(target, (), {}), density)
    a, b = ({"z": torch.randn(5), "s": torch.rand(5) + 0.2} for _ in range(2))

    def by_hand(start: dict[str, Tensor], end: dict[str, Tensor]) -> Tensor:
        normal, sd = torch.distributions.Normal, 0.6**0.5
        z = normal(start["z"] + 0.3 * (1.0 - start["z"]) / 4, sd).log_prob(end["z"])
        # log s has density proportional to s^3 exp(-2 s): slope 3 - 2 s
        u = normal(start["s"].log() + 0.3 * (3.0 - 2.0 * start["s"]), sd).log_prob(end["s"].log())
        return z + u - end["s"].log()

    def found(program: Any, start: dict[str, Tensor], end: dict[str, Tensor]) -> Tensor:
        return run_alone(program, (start,), {}, num_particles=5, nesting=0, values=end).log_target()

    torch.testing.assert_close(
        found(reverse, b, a) - found(forward, a, b), by_hand(b, a) - by_hand(a, b), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(found(forward, a, b), by_hand(a, b), rtol=0, atol=1e-10)


def test_sites_that_cannot_be_moved_are_refused() -> None:
    def discrete() -> None:
        pyro.sample("c", dist.Categorical(torch.ones(3)))

    with pytest.raises(ValueError, match="site 'c' has support"):
        coordinates_of(discrete, (), {})
    with pytest.raises(ValueError, match="no latent site"):
        coordinates_of(lambda: None, (), {})


# ---------------------------------------------------------------- paths


def base() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


def other() -> None:
    pyro.sample("z", dist.Normal(2.0, 0.5))


def test_geometric_path_between_its_ends() -> None:
    path = GeometricPath(other, base, 4, betas=(0.1, 0.2, 0.7))
    assert [len(path.programs(level)) for level in range(5)] == [1, 2, 2, 2, 1]
    low, high = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(path(3, [low, high]), 0.3 * low + 0.7 * high)
    torch.testing.assert_close(path(0, [low]), low)
    assert path.programs(0) == (base,)
    assert path.programs(4) == (other,)
    assert path(2, [torch.tensor(0.0), torch.tensor(-math.inf)]) == -math.inf


@pytest.mark.parametrize("betas", [None, (0.05, 0.3)])
def test_learned_betas_start_where_told_and_stay_ordered(betas: Any) -> None:
    path = GeometricPath(other, base, 3, learn=True, betas=betas)
    torch.testing.assert_close(path.betas.detach(), torch.tensor([0.0, *(betas or (1 / 3, 2 / 3)), 1.0]))
    for _ in range(5):
        with torch.no_grad():
            path.logits_unconstrained.normal_(0.0, 3.0)
        assert (path.betas.diff() > 0).all()
        assert (path.betas[0], path.betas[-1]) == (0.0, 1.0)
    path(1, [torch.zeros(2), torch.ones(2)]).sum().backward()
    assert path.logits_unconstrained.grad is not None


def test_a_list_of_programs_is_a_path() -> None:
    path = ProgramPath((base, other, base))
    assert (path.num_steps, path.programs(1)) == (2, (other,))
    with pytest.raises(ValueError, match="1 targets: expected at least two"):
        ProgramPath((base,))


def test_kernels_are_copied_with_their_path() -> None:
    from pplvi.guides.annealed import AnnealedGuide

    guide = AnnealedGuide(other, base, 2, LangevinKernel(), learn_path=True)
    guide()
    twin = copy.deepcopy(guide)
    assert twin.forward_1.log_density.path is twin.path
    assert twin.path is not guide.path
