"""Modules of which every rank holds a part: what of FSDP2's ``fully_shard`` can be trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
from pyro.nn.module import PyroModule
from torch import Tensor
from torch.nn.parameter import is_lazy

from pplvi.programs.parts import holding_all, is_part, put_apart
from pplvi.programs.ranks import ProcessGroup


@dataclass(frozen=True)
class Parts:
    """The modules that the ranks hold in parts.

    :ivar modules: those of FSDP2, those outside first.
    :ivar held: their parameters.
    """

    modules: Sequence[Any] = ()
    held: Sequence[Tensor] = ()

    @classmethod
    def of(cls, modules: Sequence[Any], ranks: ProcessGroup) -> Parts:
        """These modules, each looked at.

        :raises ValueError: for modules whose parameters Pyro makes when they are called, and for meshes that are not a
            line of all ranks.
        """
        put_apart(modules)
        if made := sorted({type(m).__name__ for module in modules for m in module.modules() if _is_pyro(m)}):
            raise ValueError(
                f"{made} were sharded by fully_shard, but are PyroModules, which look their parameters up in Pyro's "
                "store: expected fully_shard on the networks inside of them, plain torch.nn modules."
            )
        held = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        if any(not is_part(p) or p.device_mesh.ndim > 1 or p.device_mesh.size() != ranks.size for p in held):
            meshes = sorted({repr(p.device_mesh) if is_part(p) else "none" for p in held})
            raise ValueError(
                f"the parameters of sharded modules are on the meshes {meshes}: expected one dimension of all "
                f"{ranks.size} ranks, fully_shard(module) without mesh=, or on CPUs "
                "mesh=init_device_mesh('cpu', (world_size,))."
            )
        return cls(list(modules), held)

    @property
    def mesh(self) -> Any:
        """The ranks that hold parts, as torch sees them; ``None`` if there are no parts."""
        held: Sequence[Any] = self.held
        return held[0].device_mesh if held else None

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, modules whose parameters Pyro knows hold all of them, and calls exchange nothing."""
        store = pyro.get_param_store()
        return holding_all(self.modules) if any(store.param_name(p) for p in self.held) else nullcontext()

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Check that all parts among parameters are known.

        :raises ValueError: if others are.
        """
        known = set(map(id, self.held))
        if other := sorted(name for name, p in parameters.items() if id(p) not in known and _is_strange(p)):
            raise ValueError(
                f"{other} are DTensor parameters, of which a rank holds a part, of modules that are not seen from "
                "outside, that fully_shard has not made, or that the first step has not called: expected modules of "
                "fully_shard that the model or the guide refers to by name (a variable, an attribute, an argument of "
                "functools.partial) and calls in every step."
            )


def _is_pyro(module: Any) -> bool:
    return isinstance(module, PyroModule)


def _is_strange(parameter: Tensor) -> bool:
    """Whether it is a part, or what a module has gathered and let go of again."""
    return is_part(parameter) or (
        not is_lazy(parameter) and parameter.numel() > 0 and not parameter.untyped_storage().size()
    )


def check_whole_modules(modules: Sequence[Any], what: str) -> None:
    """Refuse modules of which every rank has a part to what each rank does by itself.

    :raises ValueError: if there are any.
    """
    if modules:
        names = sorted({type(module).__name__ for module in modules})
        raise ValueError(
            f"{what} with modules that fully_shard has sharded ({names}): expected the training of a guide with "
            "parallel=None or pplvi.fitting.DataParallel(), in which all ranks call them together."
        )
