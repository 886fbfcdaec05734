"""Tensors of which every rank holds a part: DTensors, such as the parameters of modules that FSDP2 has sharded.

A module of ``torch.distributed.fsdp.fully_shard`` gathers its parameters from all ranks when it is called, and shows
plain tensors from then on until a gradient, or :func:`put_apart`, has put them back. Its gradients are means over the
ranks already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module


def is_part(value: Any) -> bool:
    """Whether a tensor is one of which a rank has a part.

    >>> is_part(torch.zeros(2))
    False
    """
    return hasattr(value, "placements")  # of DTensor, whose import takes long


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here, the same memory; all of a plain one.

    >>> local(torch.ones(2))
    tensor([1., 1.])
    """
    if not is_part(tensor):
        return tensor
    whole: Any = tensor.detach()
    with torch.no_grad():
        part: Tensor = whole.to_local()
        return part


def sharded_in(modules: Iterable[Module]) -> list[Any]:
    """The modules of FSDP2 in these, each once, those outside first.

    >>> sharded_in([torch.nn.Linear(2, 1)])
    []
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # without it there are none
    if fsdp is None:
        return []
    found = (inner for module in modules for inner in module.modules() if isinstance(inner, fsdp.FSDPModule))
    return list(dict.fromkeys(found))


@contextmanager
def holding_all(modules: Iterable[Any]) -> Iterator[None]:
    """Inside, modules of FSDP2 hold all parameters: calls exchange nothing more, their gradients still do.

    So that ranks whose programs run more or less often, such as one that fails, wait for nobody.
    """
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        put_apart(modules)


def put_apart(modules: Iterable[Any]) -> None:
    """Let modules of FSDP2 hold their parts alone, now and whenever a call has ended.

    Pyro, which looks at parameters before it calls a module, would otherwise find gathered ones.
    """
    for module in modules:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()
