"""Functions of tensors as graphs of their operations: equal to the functions, and to what ``make_fx`` writes down."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pplvi.compile.listing import listed
from pplvi.programs.state import is_recording

WEIGHT = torch.linspace(-1.0, 1.0, 3)


def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = (leaf.exp().tanh() * WEIGHT).sigmoid().sum() + leaf.cumsum(0).prod()
        return value.detach(), torch.autograd.grad(value, leaf)[0]


def carried(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.func.vmap(lambda row: torch.cat([row * WEIGHT[0], row[None].sum(1).exp()]))(x[:, None]),)


def written(x: Tensor) -> tuple[Tensor, ...]:
    counted = torch.tensor([1.0, 2.0, 3.0])
    counted.add_(x)
    counted[1:].mul_(2.0)
    return (counted * 2.0,)


def several(x: Tensor) -> tuple[Tensor, ...]:
    top, place = x.max(0)
    first, *_ = x.split(1)
    return top, place, first, torch.stack([x, x.flip(0)]), WEIGHT


@pytest.mark.parametrize("function", [gradient, carried, written, several])
def test_a_graph_gives_what_the_function_gives(function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    graph, known = listed(function, [torch.tensor([0.3, -0.2, 0.9])]), make_fx(function)(torch.ones(3))
    for x in (torch.tensor([0.3, -0.2, 0.9]), torch.tensor([1.0, 2.0, -3.0]), torch.zeros(3)):
        for found, own, other in zip(graph(x), function(x), known(x), strict=True):
            assert torch.equal(found, own)
            assert torch.equal(found, other)


def test_what_is_reached_otherwise_is_an_attribute() -> None:
    graph = listed(lambda x: (x + WEIGHT, x * WEIGHT), [torch.ones(3)])
    constants = [node for node in graph.graph.nodes if node.op == "get_attr"]
    assert [getattr(graph, node.target) is WEIGHT for node in constants] == [True]
    assert [tuple(node.meta["val"].shape) for node in graph.graph.nodes if node.op == "call_function"] == [(3,), (3,)]


def test_it_is_a_recording_and_holds_no_values() -> None:
    seen: list[bool] = []
    alive: list[weakref.ref[Tensor]] = []

    def function(x: Tensor) -> tuple[Tensor]:
        seen.append(is_recording())
        between = x * 2
        alive.append(weakref.ref(between))
        return (between + 1,)

    graph = listed(function, [torch.ones(3)])
    assert seen == [True]
    assert not is_recording()
    assert alive[0]() is None
    assert isinstance(graph, fx.GraphModule)
