"""The parameters that a model has before it is fitted, so that several fits of it start alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from pplvi.programs.handlers import parameters_of
from pplvi.programs.running import plain_run
from pplvi.programs.state import Environment, buffers_of
from pplvi.restarts import scratch
from pplvi.types import Program

Result = TypeVar("Result")


class Originals:
    """Tensors that fits of a model change in place: parameters and buffers of modules, and those in its closure.

    :ivar trainable: whether the model has parameters.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> layer = torch.nn.Linear(1, 1)
        >>> def model():
        ...     pyro.module("layer", layer)
        ...     pyro.sample("z", dist.Normal(layer.bias, 1.0).to_event(1))
        >>> originals = Originals(model, (), {}, Environment())
        >>> with torch.no_grad():
        ...     layer.bias.fill_(3.0).item(), originals.restore(), layer.bias.item() == 3.0
        (3.0, None, False)
    """

    def __init__(
        self, model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], environment: Environment
    ) -> None:
        self.environment = environment
        self.call = environment.move((args, dict(kwargs)))
        environment.move_module(model)
        with scratch(), environment.active():
            parameters = parameters_of(lambda: plain_run(model, *self.call))
        self.trainable = bool(parameters)
        self.tensors = [*parameters.values(), *buffers_of(model=model).values()]
        self.first = self.state()

    def look(self, function: Callable[..., Result], model: Program) -> Result:
        """What a function of the model and its arguments says where the model is at home."""
        with scratch(), self.environment.active():
            return function(model, *self.call)

    def state(self) -> list[Tensor]:
        """What the tensors are worth now."""
        return [tensor.detach().clone() for tensor in self.tensors]

    def restore(self, state: list[Tensor] | None = None) -> None:
        """Set them to a state, the first unless given."""
        with torch.no_grad():
            for tensor, value in zip(self.tensors, self.first if state is None else state, strict=True):
                tensor.copy_(value)
