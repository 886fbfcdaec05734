"""How what a model dreams reaches the guide: in the place of the data that the model observed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pplvi.runs import is_deterministic, is_factor, sample_sites, site_plates


def observed(trace: Any) -> dict[str, Any]:
    """What the observed sites of a model held, which were drawn in this trace and now have it as ``infer["obs"]``.

    :raises ValueError: for factors, without which draws are not the model's.
    """
    if factors := [name for name, site in sample_sites(trace) if is_factor(site) and not is_deterministic(site)]:
        raise ValueError(
            f"the model cannot dream: it has the factors {factors}, so that running it forward does not draw from it. "
            "Expected sample sites only; train without a sleep phase, such as ReweightedWakeSleep(insomnia=1.0)."
        )
    return {name: site["infer"].pop("obs") for name, site in sample_sites(trace) if "obs" in site["infer"]}


def separately(site: Any, num_dreams: int, nesting: int) -> Tensor:
    """Values of a site, ``(num_dreams, ...)``, each in the shape that it has without particles."""
    value: Tensor = site["value"]
    depth = site["fn"].event_dim + max((-plate.dim for plate in site_plates(site)), default=0)
    if value.dim() <= nesting + site["fn"].event_dim:  # not one for each particle
        return value.expand(num_dreams, *value.shape)
    return value.reshape(num_dreams, *value.shape[value.dim() - depth :])


def arguments(
    trace: Any,
    observed: Mapping[str, Any],
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the guide with every observed value replaced by its dream, which is among the values.

    Dreams go into the keyword argument ``observations``, a dict from site name to value, if there is one; otherwise
    they replace the arguments that are, by identity, observed values.

    :raises ValueError: for dreams that have no way to the guide.
    """
    if "observations" in kwargs:
        given = kwargs["observations"] or {}
        placed = {name: _placed(trace, name, values[name], given.get(name)) for name in observed}
        return args, {**kwargs, "observations": {**given, **placed}}
    dream_of = {id(value): values[name] for name, value in observed.items()}
    tensors = {id(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
    if lost := sorted(name for name, value in observed.items() if id(value) not in tensors):
        raise ValueError(
            f"the dreams of {lost} cannot reach the guide: expected the data of these sites to be arguments of the "
            "model themselves (not copies, attributes or slices such as x[index] of a minibatch), or to come in its "
            "keyword argument `observations`, a dict from site name to value."
        )
    replaced = {name: dream_of.get(id(value), value) for name, value in kwargs.items()}
    return tuple(dream_of.get(id(value), value) for value in args), replaced


def _placed(trace: Any, name: str, dream: Tensor, given: Any) -> Tensor:
    """A dream in the shape of the given data: that of a minibatch lies at its indices in them."""
    site = trace.nodes[name]
    if not isinstance(given, Tensor) or given.shape == dream.shape:
        return dream
    parts = [p for p in site_plates(site) if p.size != p.full_size]
    event = site["fn"].event_dim
    if len(parts) == 1 and _without(given, dim := parts[0].dim - event) == _without(dream, dim):
        index = trace.nodes[parts[0].name]["value"]
        return torch.index_copy(given.to(dream.dtype), dim, index, dream)
    raise ValueError(
        f"observations[{name!r}] has shape {tuple(given.shape)}, but the model dreams it in shape "
        f"{tuple(dream.shape)}: expected the same shape, or that of the full data of one subsampled plate."
    )


def _without(tensor: Tensor, dim: int) -> list[int]:
    shape = list(tensor.shape)
    del shape[dim]
    return shape
