"""What torch's functions give for polynomials of latent sites in another arrangement: reshapes, gathers, stacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from pplvi.guides.conjugate.expressions import Expression, Function, Symbolic, example, expression, rule
from pplvi.guides.conjugate.operations import add, as_pair, dims_of
from pplvi.guides.conjugate.terms import Gather, Label, Labelling, simplified


@rule("unsqueeze")
def unsqueeze(a: Any, dim: int) -> Any:
    """One more dimension of size one."""
    if not isinstance(a, Expression):
        return NotImplemented
    dim %= a.dim() + 1
    return expression(a.terms, (*a.labels[:dim], None, *a.labels[dim:]), a.shown.unsqueeze(dim))


@rule("squeeze")
def squeeze(a: Any, dim: Any = None) -> Any:
    """Dimensions of size one left out."""
    if not isinstance(a, Expression):
        return NotImplemented
    dims = [i for i in dims_of(dim, a.dim()) if a.shape[i] == 1] if a.dim() else []
    labels = [n for i, n in enumerate(a.labels) if i not in dims]
    return expression(a.terms, labels, a.shown.squeeze(dims) if dims else a.shown)


def _ordered(a: Expression, order: Sequence[int]) -> Expression:
    return expression(a.terms, [a.labels[i] for i in order], a.shown.permute((*order,)))


@rule("permute")
def permute(a: Any, *dims: Any) -> Any:
    """Dimensions in another order."""
    if not isinstance(a, Expression):
        return NotImplemented
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
    return _ordered(a, [d % a.dim() for d in order]) if a.dim() else a


@rule("transpose", "swapaxes", "t", "T", "mT")
def transpose(a: Any, first: int = -2, second: int = -1) -> Any:
    """Two dimensions exchanged, the last two unless named."""
    if not isinstance(a, Expression):
        return NotImplemented
    if a.dim() < 2:
        return a
    order = list(range(a.dim()))
    order[first], order[second] = order[second], order[first]
    return _ordered(a, order)


@rule("expand", "broadcast_to", "expand_as")
def expand(a: Any, *shape: Any) -> Any:
    """Dimensions of size one repeated."""
    if not isinstance(a, Expression):
        return NotImplemented if not isinstance(a, Tensor) or isinstance(a, Symbolic) else a.expand(shape[0].shape)
    if len(shape) == 1 and isinstance(shape[0], Tensor):
        shape = (shape[0].shape,)
    size = shape[0] if len(shape) == 1 and isinstance(shape[0], (list, tuple)) else shape
    shown = a.shown.expand(*size) if len(size) else a.shown
    return expression(a.terms, (None,) * (shown.dim() - a.dim()) + a.labels, shown)


@rule("broadcast_tensors")
def broadcast_tensors(*values: Any) -> Any:
    """All of one shape."""
    parts = tuple(values[0]) if len(values) == 1 and isinstance(values[0], (list, tuple)) else values
    shape = torch.broadcast_shapes(*(part.shape for part in parts))
    return tuple(part.expand(shape) for part in parts)


@rule("type_as")
def type_as(a: Any, other: Any) -> Any:
    """``a`` in the dtype of ``other``."""
    if isinstance(a, Function):
        return NotImplemented
    return a if isinstance(a, Expression) else a.to(example(other).dtype)


@rule("clone", "contiguous", "detach", "to", "double", "float", "data", "real", "type", "requires_grad_", "positive")
def same(a: Any, *args: Any, **kwargs: Any) -> Any:
    """The value as it is."""
    return a if isinstance(a, Expression) else NotImplemented


def _arranging(name: str) -> None:
    def arrange(a: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(a, Expression):
            return NotImplemented
        function: Callable[..., Any] = getattr(torch.Tensor, name)
        places = torch.arange(a.numel(), device=a.device).reshape(a.shape)
        return picked(a, function(places, *args, **kwargs), function(a.shown, *args, **kwargs))

    rule(name)(arrange)


for _name in (
    "reshape", "view", "flatten", "flip", "roll", "movedim", "index_select", "take", "diagonal", "unflatten",
    "narrow", "select", "gather", "repeat", "repeat_interleave", "tile", "reshape_as", "view_as", "ravel",
    "take_along_dim",
):  # fmt: skip
    _arranging(_name)


def picked(a: Expression, places: Tensor, shown: Tensor) -> Expression:
    """Elements of an expression by their places in its flattened form."""
    labels = tuple(Label(size) if size != 1 else None for size in places.shape)
    names = tuple(n for n in labels if n is not None)
    index = places.reshape([size for size in places.shape if size != 1])
    indices = torch.unravel_index(index, a.shape) if a.dim() else ()
    entries = [Gather(part, names) for part in indices]
    return _indexed(a, entries, labels, shown)


def _indexed(a: Expression, entries: Sequence[Gather], labels: tuple[Label | None, ...], shown: Tensor) -> Expression:
    """``a`` with an index for each of its dimensions."""
    found = [simplified(*e, n) for e, n in zip(entries, a.shape, strict=True)]
    terms = [term.renewed(n for n in a.labels if n is not None) for term in a.terms]
    used = {n for e in found for n in ((e,) if isinstance(e, Label) else e.labels)}
    for name, entry in zip(a.labels, found, strict=True):
        if name is None:
            continue
        if isinstance(entry, Label):
            terms = [term.relabelled({name: entry}) for term in terms]
        else:
            terms = [term.gathered(name, *entry) for term in terms]
    return expression(terms, [n if n in used else None for n in labels], shown)


@rule("getitem")
def getitem(a: Any, index: Any) -> Any:
    """Indexing by numbers, slices, ``None``, ``...`` and tensors, as torch's."""
    if not isinstance(a, Expression) or isinstance(index, Symbolic):
        return NotImplemented
    items = index if isinstance(index, tuple) else (index,)
    if any(isinstance(item, Symbolic) for item in items):
        return NotImplemented
    shown = a.shown[index]
    labels = tuple(Label(size) if size != 1 else None for size in shown.shape)
    entries = []
    for d, size in enumerate(a.shape):  # each dimension's own index, over the dimensions that it comes to vary with
        counted = torch.arange(size, device=a.device).reshape([-1 if i == d else 1 for i in range(a.dim())])
        entries.append(_own_index(counted.expand(a.shape)[index], labels))
    return _indexed(a, entries, labels, shown)


def _own_index(places: Tensor, labels: tuple[Label | None, ...]) -> Gather:
    names: Labelling = tuple(n for n in labels if n is not None)
    return Gather(places.reshape([n for n in places.shape if n != 1]), names)


# ---------------------------------------------------------------------- several in one


@rule("stack")
def stack_of(parts: Any, dim: int = 0) -> Any:
    """Expressions along a new dimension."""
    if any(isinstance(part, Function) for part in parts):
        return NotImplemented
    return cat([part.unsqueeze(dim) for part in parts], dim)


@rule("cat", "concat", "concatenate")
def cat(parts: Any, dim: int = 0) -> Any:
    """Expressions one after another along a dimension."""
    if any(isinstance(part, Function) for part in parts):
        return NotImplemented
    shown = torch.cat([example(part) for part in parts], dim)
    dim %= shown.dim()
    sizes = [part.shape[dim] for part in parts]
    padded = []
    for i, part in enumerate(parts):
        place = torch.arange(sum(sizes), device=shown.device) - sum(sizes[:i])
        inside = ((place >= 0) & (place < sizes[i])).to(shown.dtype)
        longer = part.index_select(dim, place.clamp(0, sizes[i] - 1))
        padded.append(longer * inside.reshape([-1 if d == dim else 1 for d in range(shown.dim())]))
    return reduce(add, padded)


@rule("where")
def where(condition: Any, a: Any, b: Any) -> Any:
    """One expression where a condition holds, another elsewhere."""
    if isinstance(condition, Symbolic) or (parts := as_pair(a, b)) is None:
        return NotImplemented
    a, b = (x if isinstance(x, Symbolic) else _filled(x, keep) for x, keep in ((a, condition), (b, ~condition)))
    return a * condition.to(parts[0].dtype) + b * (~condition).to(parts[0].dtype)


def _filled(value: Any, keep: Tensor) -> Tensor:
    """Zero where a value does not count: it may be missing there."""
    return torch.where(keep, torch.as_tensor(value), torch.zeros(()).to(torch.as_tensor(value).dtype))
