"""Parameters of distributions, symbolic ones among them."""

from __future__ import annotations

from typing import Any


def parameters(fn: Any) -> dict[str, Any]:
    """The parameters that a distribution was made with.

    >>> import torch, pyro.distributions as dist
    >>> sorted(parameters(dist.Normal(torch.zeros(2), 1.0)))
    ['loc', 'scale']
    """
    names = [*fn.arg_constraints, "total_count", "log_factor"]
    found = {name: fn.__dict__[name] for name in names if name in fn.__dict__}
    for part in ("_categorical", "_dirichlet"):
        if part in fn.__dict__:
            found |= parameters(fn.__dict__[part])
    inner = fn.arg_constraints if hasattr(fn, "base_dist") and type(fn).__name__ != "TransformedDistribution" else ()
    return found | {name: getattr(fn, name) for name in inner if name not in found}
