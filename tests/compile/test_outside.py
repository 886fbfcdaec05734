"""Graphs whose sums come first are the graphs that they were, with fewer passes over the data."""

from collections.abc import Callable

import pytest
import torch
from step_cases import with_gradient
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pplvi.compile.broadcasting import Shapes, without_repetition
from pplvi.compile.outside import outside_of_sums

X = torch.linspace(-1.0, 1.0, 120, dtype=torch.float64).reshape(40, 3).sin()
Y = torch.linspace(-2.0, 2.0, 40, dtype=torch.float64)

Function = Callable[[Tensor], tuple[Tensor, ...]]


def normal(mean: Tensor, scale: Tensor) -> Tensor:
    return -((Y - mean) ** 2) / (2 * scale**2) - scale.log() - 0.9


def shared_scale(z: Tensor) -> Tensor:
    return normal(z[:, :3] @ X.T, z[:, 3:].exp()).sum(1)


def own_scales(z: Tensor) -> Tensor:
    return normal(z[:, :3] @ X.T, z[:, 3:].exp() + Y**2).sum(1)


def seen_through_views(z: Tensor) -> Tensor:
    return (normal(z[:, :3] @ X.T, z[:, 3:].exp()).reshape(len(z), 1, 40, 1) * 3.0).sum((1, 2, 3))


def over_rows_and_columns(z: Tensor) -> Tensor:
    square = (z[:, :1, None] - Y.reshape(8, 5)) ** 2 / (1 + z[:, 1:2, None] ** 2)
    return (square - square.sum(2, keepdim=True) * X[:8, :1]).sum((1, 2)) + square.sum(1).sum(-1)


def of_one(z: Tensor) -> Tensor:
    return (z[:, :1] * 2.0).sum(1) - z.square().sum(-1)


@pytest.mark.parametrize("log_density", [shared_scale, own_scales, seen_through_views, over_rows_and_columns, of_one])
def test_values_and_gradients_stay(log_density: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    first, other = torch.randn(2, 6, 4, dtype=torch.float64)
    function = with_gradient(log_density)
    traced = make_fx(function)(first)
    graph = outside_of_sums(without_repetition(traced, (first,)), (first,))
    for found, expected in zip(graph(other), function(other), strict=True):
        torch.testing.assert_close(found, expected)


def passes(graph: torch.fx.GraphModule, z: Tensor) -> int:
    """Operations that make something for each datum of each row."""
    seen = Shapes(graph)
    seen.run(z)
    whole = len(z) * len(Y)
    wide = [n for n, shape in seen.shapes.items() if torch.Size(shape).numel() == whole and "Tensor" in str(n.target)]
    return len(wide)


def test_a_regression_passes_over_its_data_a_few_times() -> None:
    z = torch.zeros(6, 4, dtype=torch.float64)
    before = without_repetition(make_fx(with_gradient(shared_scale))(z), (z,))
    most = passes(before, z)
    assert passes(outside_of_sums(before, (z,)), z) <= 3 < 9 <= most
