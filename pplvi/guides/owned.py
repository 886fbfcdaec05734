"""Guides whose parameters belong to one instance, and whose copies leave the original alone.

Pyro names a guide's parameters after its class, so that two guides of one class share them through the global store,
and copying or pickling an automatic guide takes the original's model away. :class:`OwnedGuide` mends both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.nn.module import PyroModule
from torch.utils.weak import WeakTensorKeyDictionary

from pplvi.types import Program

__all__ = ["OwnedGuide", "claim_name"]

# Which guide put a tensor into the parameter store. Weak, so it forgets a parameter when the store does.
_OWNERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

# The last module that took a name by itself.
_HOLDERS: WeakValueDictionary[str, PyroModule] = WeakValueDictionary()


class OwnedGuide(AutoGuide):
    """Base of guides that never share parameters with another of their class.

    The second guide of a class in one parameter store takes the name ``AutoFlow_1``, and so on. Values that were
    *loaded* into the store (``pyro.get_param_store().load(...)``) belong to nobody and are taken over by the first
    guide of that name, as Pyro does.

    :cvar marker: dotted name of the parameter that says whose the name is.
    """

    marker = "loc"

    def __init__(self, model: Program, **options: Any) -> None:
        super().__init__(model, **options)
        self._token = object()

    def _claim_name(self) -> None:
        if self.master is not None or "." in self._pyro_name:
            return  # a part of a larger module: that module names it
        free = (name for name in _numbered(self) if self._is_free(name))
        _rename(self, next(free))

    def _is_free(self, name: str) -> bool:
        held = pyro.get_param_store()._params.get(f"{name}.{self.marker}")
        return held is None or _OWNERS.get(held, self._token) is self._token

    def _own(self, parameter: torch.Tensor | None) -> None:
        """Say that the marker's tensor in the parameter store is this guide's."""
        _OWNERS[parameter] = self._token

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Marginal medians of every latent site: see :meth:`quantiles`."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @property
    def model(self) -> Callable[..., Any]:
        """The model. A guide that was unpickled has none: models hold closures."""
        if self._model is None:
            raise ValueError(
                f"this {type(self).__name__} was unpickled, without its model; make a new guide of the model"
            )
        return self._model[0]

    def __getstate__(self) -> dict[str, Any]:
        _drop_weakrefs(self)
        return {**self.__dict__, "_model": None, "master": None, "_token": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._token = object()

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnedGuide:
        shared = {"_model": self._model, "prototype_trace": self.prototype_trace, "master": None, "_token": object()}
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k not in shared}, memo), **shared)
        return new


def claim_name(module: PyroModule) -> None:
    """Give a module the first name under which no other one has parameters in the store, numbered as guides are.

    Values that were loaded into the store belong to nobody, and are taken over.
    """
    if "." not in module._pyro_name:  # else a part of a larger module: that module names it
        name = next(name for name in _numbered(module) if _has_no_other(name, module))
        _rename(module, name)
        _HOLDERS[name] = module


def network_of(module: PyroModule, name: str) -> torch.nn.Module:
    """A network inside a module, to be called; Pyro knows its parameters by dotted names, also if ranks hold them in
    parts (FSDP2's ``fully_shard``), so that it is no ``PyroModule``."""
    network: Any = module._modules[name]
    if isinstance(network, PyroModule):
        return getattr(module, name)
    for key, parameter in network.named_parameters() if module._pyro_context.active else ():
        pyro.param(module._pyro_get_fullname(f"{name}.{key}"), parameter)
    return network


def _numbered(module: PyroModule) -> Iterator[str]:
    yield module._pyro_name
    yield from (f"{type(module).__name__}_{i}" for i in count(1))


def _has_no_other(name: str, module: PyroModule) -> bool:
    holder = _HOLDERS.get(name)
    if holder is None or holder is module:
        return True
    theirs = {id(parameter) for parameter in holder.parameters()}
    stored = pyro.get_param_store()._params.items()
    return not any(key.startswith(f"{name}.") and id(value) in theirs for key, value in stored)


def _rename(module: PyroModule, name: str) -> None:
    module._pyro_name = name
    for key, child in module._modules.items():
        if isinstance(child, PyroModule):
            _rename(child, f"{name}.{key}")


def _drop_weakrefs(module: torch.nn.Module) -> None:
    # Pyro hangs a weak reference on every parameter it hands out, which pickle cannot write; it puts it back when read.
    for parameter in module.parameters():
        parameter.__dict__.pop("unconstrained", None)
