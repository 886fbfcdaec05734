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


def given_parameters(fn: Any) -> dict[str, Any]:
    """Parameters that a distribution can be made with anew: of several forms of one matrix the first."""
    found = parameters(fn)
    matrices = [name for name in ("precision_matrix", "covariance_matrix", "scale_tril") if name in found]
    forms = [name for name in ("probs", "logits") if name in found]
    return {name: value for name, value in found.items() if name not in (*matrices[1:], *forms[1:])}
