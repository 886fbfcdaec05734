"""How the programs of a restart are made: in place, or as copies of what the user passed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from pplvi.programs.handlers import parameters_of
from pplvi.programs.parts import is_part, put_apart
from pplvi.programs.running import plain_run
from pplvi.programs.state import Environment, buffers_of, module_of, sharded_of
from pplvi.programs.summing import leaves_out_summed
from pplvi.training.restart import Restart, copy_into, scratch
from pplvi.types import Program


@dataclass(frozen=True)
class Recipe:
    """How the programs of a restart are made.

    :ivar guide: a guide, or what makes one from the model if ``makes_guide`` is true.
    :ivar apart: give every restart copies of the modules; otherwise they are trained in place.
    """

    model: Program
    guide: Any
    makes_guide: bool
    apart: bool
    environment: Environment

    def build(self, initial: Mapping[str, Tensor] | None = None) -> tuple[Program, Program]:
        """Model and guide of one restart, whose modules start from ``initial``, or as they are.

        :raises ValueError: if a module cannot be copied.
        """
        put_apart(sharded_of(self.model, self.guide))
        model, guide = self._copies() if self.apart else (self.model, self.guide)
        copy_into(_tensors(model, None if self.makes_guide else guide), initial or {})
        self.environment.move_module(model)
        guide = leaves_out_summed(guide(model) if self.makes_guide else guide)
        self.environment.move_module(guide)
        return model, guide

    def _copies(self) -> tuple[Program, Any]:
        try:
            return copy.deepcopy((self.model, self.guide))
        except Exception as error:  # whatever the module's own __deepcopy__ raises
            raise ValueError(
                f"the model or the guide cannot be copied ({type(error).__name__}: {error}): expected modules that "
                "copy.deepcopy takes, one for each restart. Use restarts=1."
            ) from error

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the modules that the user passed, by role and name, but for parts of tensors."""
        return _tensors(self.model, None if self.makes_guide else self.guide)

    def adopt(self, run: Restart) -> None:
        """Copy the parameters and buffers of a restart into the modules that the user passed."""
        for mine, theirs in ((self.model, run.model), (None if self.makes_guide else self.guide, run.guide)):
            source, target = module_of(theirs), module_of(mine)
            if self.apart and source is not None and target is not None:
                values = {**dict(source.named_parameters()), **dict(source.named_buffers())}
                places = {**dict(target.named_parameters()), **dict(target.named_buffers())}
                copy_into(places, {name: value for name, value in values.items() if name in places})


def _tensors(model: Any, guide: Any) -> dict[str, Tensor]:
    modules = {"model": module_of(model), "guide": module_of(guide)}
    return {
        f"{role}.{name}": value
        for role, module in modules.items()
        if module is not None
        for name, value in (*module.named_parameters(), *module.named_buffers())
        # The first call of a lazy one draws it, with the seed of the restart.
        if not (is_lazy(value) or is_part(value))
    }


Result = TypeVar("Result")


class Originals:
    """Tensors that fits of a model change in place: parameters and buffers of modules, and those in its closure.

    :ivar trainable: whether the model has parameters.

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
