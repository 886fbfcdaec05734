"""Particles: how they are summed, aligned and taken, against loops over particles and data."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pplvi.objectives.step import Routing
from pplvi.samplers.particles import DrawPaths, Particles, draws_of

pytestmark = pytest.mark.usefixtures("float64")


def particles(count: int = 3, **routing: bool) -> Particles:
    """Two nested plates, the outer of 4 data with weights of their own, the inner of 2."""
    return Particles(count, nesting=2, batch=frozenset({"data"}), routing=Routing(**routing), dims=(-2,))


def test_a_total_keeps_particles_and_data() -> None:
    value = torch.randn(3, 4, 2, 5)
    assert torch.allclose(particles().total(value, events=1), value.sum((-1, -2)))


@pytest.mark.parametrize("shape", [(4, 2), (4, 1), (1, 2)])
def test_each_datum_takes_its_own_particles(shape: tuple[int, int]) -> None:
    value, chosen = torch.randn(3, *shape, 5), torch.randint(3, (6, 4))
    taken = particles().take(value, chosen)
    full = value.expand(3, 4, shape[1], 5)
    assert taken.shape == (6, 4, shape[1], 5)
    for row in range(6):
        for datum in range(4):
            assert torch.equal(taken[row, datum], full[chosen[row, datum], datum])


def test_one_particle_has_no_dimension_of_its_own() -> None:
    assert particles().align(torch.randn(3, 4), events=1).shape == (3, 4, 1, 1)
    assert particles(1).align(torch.randn(1, 4), events=1).shape == (4, 1, 1)


@pytest.mark.parametrize("freeze", [False, True])
def test_frozen_densities_have_the_gradient_of_the_draws_only(freeze: bool) -> None:
    """For ``z = loc + scale e``, ``log q(z) = -log scale - e^2 / 2``; frozen, ``d log q / dz = -e / scale`` is left."""
    loc = torch.tensor(0.3, requires_grad=True)
    scale = torch.tensor(0.7, requires_grad=True)

    def program() -> None:
        pyro.sample("z", dist.Normal(loc, scale))

    own = Particles(3, nesting=0, batch=frozenset(), routing=Routing(freeze=freeze))
    run = own.run(program, (), {}, {})
    paths = DrawPaths.of(own, run, draws_of(run))
    density = paths.log_forward(lambda: own.run(program, (), {}, paths.at))
    noise = ((paths.live["z"] - loc) / scale).detach()
    slopes = torch.autograd.grad(density.sum(), (loc, scale))
    assert torch.allclose(density, dist.Normal(loc, scale).log_prob(paths.live["z"]))
    if freeze:
        assert torch.allclose(slopes[0], -noise.sum() / scale)
        assert torch.allclose(slopes[1], -(noise**2).sum() / scale)
    else:
        assert slopes[0].abs() < 1e-12
        assert torch.allclose(slopes[1], -3 / scale)


def test_the_scale_of_a_plate_that_holds_one_program_only_is_in_its_density() -> None:
    """A kernel whose sites are all in a subsampled plate, on a path whose weights are joint: 4 of 12 stand for all."""
    value = torch.randn(3, 4)

    def program() -> None:
        with pyro.plate("data", 12, subsample=torch.arange(4)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    own = Particles(3, nesting=1, batch=frozenset(), routing=Routing())
    density = own.density(own.run(program, (), {}, {"z": value}))
    torch.testing.assert_close(density, 3 * dist.Normal(0.0, 1.0).log_prob(value).sum(-1))
    assert own.accounts["subsampled"] == ("data",)
