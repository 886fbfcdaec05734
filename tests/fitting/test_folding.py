"""Recorded densities without what is constant: the same numbers, and nothing that is written to is kept."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pplvi.fitting.folding import folded
from pplvi.fitting.recorded import RecordedDensity


def filled(x: Tensor) -> Tensor:
    """Zeros that are written to: by index, through a view, and read before and after."""
    zeros = torch.zeros_like(x)
    before = zeros + 1.0
    zeros.view(-1)[0:1].add_(x.reshape(-1)[0:1])
    return before * x + zeros


def masked(x: Tensor) -> Tensor:
    """A mask of nothing, a mask of something, and sums of one part."""
    nothing, some = torch.zeros_like(x) > 1, torch.ones_like(x).cumsum(0) > 1
    return torch.cat([x.masked_fill(nothing, -1.0)]) * 1.0 + x.masked_fill(some, 2.0) + 0.0


def widened(x: Tensor) -> Tensor:
    """One times a column is no column."""
    return torch.ones(3, 4) * x[:, :1] + torch.zeros(3, 4)


def turned(x: Tensor) -> Tensor:
    """A product with one that is laid out anew, and viewed afterwards."""
    return (x.t() * torch.ones(4, 3)).contiguous().view(-1) / torch.ones(1)


@pytest.mark.parametrize("function", [filled, masked, widened, turned])
def test_the_function_stays_the_same(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    first, other = torch.randn(3, 4), torch.randn(3, 4)
    graph = folded(make_fx(function)(first), [first])
    for x in (other, first, other):
        assert torch.equal(graph(x), function(x))


def test_what_depends_on_nothing_is_no_operation() -> None:
    def function(x: Tensor, scale: Tensor) -> Tensor:
        return (x * torch.ones_like(x) + torch.full_like(x, 0.0)) * scale.log().expand(3)

    x, scale = torch.randn(3), torch.tensor(2.0)
    graph = folded(make_fx(function)(x, scale), (x, scale))
    assert sum(node.op == "call_function" for node in graph.graph.nodes) == 1
    assert torch.equal(graph(x + 1, scale), function(x + 1, scale))


def test_random_numbers_are_drawn_each_time() -> None:
    graph = folded(make_fx(lambda x: x + torch.rand_like(torch.ones(1000)))(torch.zeros(1000)), [torch.zeros(1000)])
    assert not torch.equal(graph(torch.zeros(1000)), graph(torch.zeros(1000)))


def test_a_recorded_density_has_fewer_operations_and_the_same_value() -> None:
    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.StudentT(4.0, z * scale, 0.5), obs=y)

    density, rows = RecordedDensity(model, (torch.tensor([1.0, -2.0, 0.3]),)), torch.randn(64, 4)
    value, gradient = density.value_and_gradient(rows)
    for _ in range(30):
        density.value_and_gradient(rows.flip(0))
    assert density.programs[64] is not None
    torch.testing.assert_close(density.value_and_gradient(rows), (value, gradient), rtol=1e-5, atol=1e-5)
