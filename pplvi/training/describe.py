"""Readable names of guides, objectives, optimisers and settings, for reports and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pyro.optim import PyroOptim


def describe(thing: Any) -> str:
    """A readable name that is the same in every process.

    >>> describe(partial(torch.optim.Adam, lr=0.1)), describe(None)
    ('Adam(lr=0.1)', 'None')
    """
    if isinstance(thing, partial):
        options = [*map(describe, thing.args), *(f"{k}={describe(v)}" for k, v in thing.keywords.items())]
        return f"{describe(thing.func)}({', '.join(options)})"
    if isinstance(thing, Mapping):
        return f"{{{', '.join(f'{key}: {describe(value)}' for key, value in thing.items())}}}"
    if isinstance(thing, PyroOptim):
        return _describe_optim(thing)
    if hasattr(thing, "__name__"):
        return str(thing.__name__)
    plain = isinstance(thing, torch.nn.Module) or " object at 0x" in repr(thing)
    return type(thing).__name__ if plain else repr(thing)


def _describe_optim(optim: Any) -> str:
    options = optim.pt_optim_args
    inner = f"{describe(optim.pt_optim_constructor)}({options if isinstance(options, dict) else describe(options)})"
    outer = getattr(optim, "pt_scheduler_constructor", None)
    return inner if outer is None else f"{describe(outer)}({inner}, {optim.kwargs})"
