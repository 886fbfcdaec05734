"""Graphs in which nothing is computed twice along a dimension are the graphs that they were."""

from collections.abc import Callable, Iterator

import pytest
import torch
from step_cases import with_gradient
from torch import Tensor
from torch.distributions import Normal, StudentT
from torch.fx.experimental.proxy_tensor import make_fx

from pplvi.compile.broadcasting import without_repetition


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    yield
    torch.distributions.Distribution.set_default_validate_args(before)


DATA = torch.linspace(-2.0, 2.0, 30, dtype=torch.float64)


def normal(z: Tensor) -> Tensor:
    return Normal(z[:, :1], z[:, 1:2].exp()).log_prob(DATA).sum(-1)


def student(z: Tensor) -> Tensor:
    return StudentT(1 + z[:, 2:].exp(), z[:, :1], z[:, 1:2].exp()).log_prob(DATA).sum(-1)


def one_by_one(z: Tensor) -> Tensor:
    def single(row: Tensor) -> Tensor:
        return Normal(row[0], torch.nn.functional.softplus(row[1])).log_prob(DATA).sum()

    return torch.func.vmap(single)(z)


def viewed(z: Tensor) -> Tensor:
    wide = z[:, None, :1].expand(len(z), 4, 5)
    return torch.where(wide > 0, wide.reshape(len(z), 20).sum(-1)[:, None, None].sin(), wide**1.0).sum((1, 2))


@pytest.mark.parametrize("log_density", [normal, student, one_by_one, viewed])
def test_values_and_gradients_stay(log_density: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    first, other = torch.randn(2, 6, 3, dtype=torch.float64)
    function = with_gradient(log_density)
    graph = without_repetition(make_fx(function)(first), [first])
    for z in (first, other):
        for found, expected in zip(graph(z), function(z), strict=True):
            assert torch.allclose(found, expected)


def test_special_functions_of_a_parameter_are_taken_once_for_all_data() -> None:
    graph = make_fx(with_gradient(student))(torch.randn(6, 3, dtype=torch.float64))
    graph = without_repetition(graph, [torch.randn(6, 3, dtype=torch.float64)])
    sizes = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n.target in {torch.ops.aten.digamma.default, torch.ops.aten.lgamma.default}:
                sizes.append(value.numel())
            return value

    Watch(graph).run(torch.randn(6, 3, dtype=torch.float64))
    assert sizes
    assert set(sizes) == {6}
