"""How the programs of a restart are made: in place, or as copies of what the user passed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from pplvi.programs.state import Environment, module_of
from pplvi.training import Run, copy_into
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
        model, guide = self._copies() if self.apart else (self.model, self.guide)
        copy_into(_tensors(model, None if self.makes_guide else guide), initial or {})
        self.environment.move_module(model)
        guide = guide(model) if self.makes_guide else guide
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
        """Parameters and buffers of the modules that the user passed, by role and name."""
        return _tensors(self.model, None if self.makes_guide else self.guide)

    def adopt(self, run: Run) -> None:
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
        if not is_lazy(value)  # its first call draws it, with the seed of the restart
    }
