"""Operations that are alike but for the sizes of their data, such as those of groups of 20 to 24 observations.

Their values are padded to one size. What stands in the padding is whatever comes of it: operations that keep data apart
are done on it too, sums leave it out, and nothing else is done on padded values.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pplvi.compile.operations import FILLED, VIEWED, Op, Shape

aten = torch.ops.aten

FACTORIES = {aten.randn.default, aten.rand.default}
SUMS = {aten.sum.default, aten.sum.dim_IntList}
_MASKED = {aten.index.Tensor, aten.index_put.default, aten._index_put_impl.default}
_APART = {*FILLED, aten._to_copy.default, aten.expand.default, aten.softplus_backward.default}
_TURNED = {aten.unsqueeze.default, aten.permute.default, aten.transpose.int}
_SIZED = {*VIEWED, *FACTORIES, aten.expand.default}  # whose arguments say what shape comes out


def blurred(shape: Shape) -> Shape:
    """What shapes that may be padded to one have in common: at most half of a dimension is padding."""
    return Shape(tuple(n.bit_length() for n in shape.size), shape.dtype)


def traits(op: Op) -> tuple[Any, ...]:
    """What alike operations have in common, wherever their inputs come from."""
    together = _together(op)

    def see(shape: Shape) -> Shape:
        return shape if together is None else blurred(shape)

    sized = op.target in _SIZED and together is not None
    kinds: list[Any] = []
    for x in op.leaves:
        if isinstance(x, Op):
            kinds.append(id(x) if mask_of(x, op) else see(x.shape))
        else:
            kinds.append(None if sized and type(x) is int else (type(x), str(x)))
    return (op.target, see(op.shape), str(op.spec), together, *kinds)


def mask_of(x: Op, user: Op) -> bool:
    """Whether a value is a mask of another one: its numbers say what shape comes out."""
    return user.target in _MASKED and x.shape.dtype in (torch.bool, torch.uint8)


def _together(op: Op) -> Any:
    """How dimensions of the inputs and of the result belong together; nothing if padding would do harm."""
    size = op.shape.size
    if op.random:
        return () if not op.inputs else None
    if op.target in VIEWED:
        before = op.inputs[0].shape.size
        same = [n for n in before if n != 1] == [n for n in size if n != 1]
        return tuple(tuple(n != 1 for n in one) for one in (before, size)) if same else None
    if op.target in SUMS or op.target in _TURNED:
        return ()
    if op.target in _APART or torch.Tag.pointwise in getattr(op.target, "tags", ()):
        ends = [x.shape.size[::-1] for x in op.inputs]
        return tuple(tuple(a == b for a, b in zip(end, size[::-1], strict=False)) for end in ends)
    return None


def fitted(x: Tensor, size: Sequence[int]) -> Tensor:
    """A value whose last dimensions have these sizes: cut, or padded."""
    last = x.shape[x.dim() - len(size) :]
    if any(a < b for a, b in zip(last, size, strict=True)):
        return pad(x, [n for a, b in zip(last[::-1], size[::-1], strict=True) for n in (0, b - a)])
    for dim, (a, b) in enumerate(zip(last, size, strict=True), x.dim() - len(size)):
        x = x.narrow(dim, 0, b) if a > b else x
    return x


def padded_together(values: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Values side by side, padded to one size: along one dimension by their own last entries."""
    wrong = [d for d, n in enumerate(size) if any(x.shape[d] != n for x in values)]
    if not wrong:
        return torch.stack(list(values))
    if len(wrong) > 1:
        return torch.stack([fitted(x, size) for x in values])
    (dim,), device = wrong, values[0].device
    sizes = [x.shape[dim] for x in values]
    begins, lasts = [*accumulate(sizes[:-1], initial=0)], [n - 1 for n in sizes]
    first, last = (torch.tensor(x, device=device)[:, None] for x in (begins, lasts))
    index = first + torch.minimum(torch.arange(size[dim], device=device), last)
    whole = torch.cat(list(values), dim).index_select(dim, index.flatten())
    return whole.unflatten(dim, (len(values), size[dim])).movedim(dim, 0)


def zero_padded(stack: Tensor, members: Sequence[Op]) -> Tensor:
    """The same stack, zero where it is padded."""
    for dim, n in enumerate(stack.shape[1:], 1):
        sizes = [op.shape.size[dim - 1] for op in members]
        if any(size != n for size in sizes):
            ends = torch.tensor(sizes, device=stack.device).view(-1, *[1] * (stack.dim() - 1))
            place = torch.arange(n, device=stack.device).view(-1, *[1] * (stack.dim() - 1 - dim))
            stack = torch.where(place < ends, stack, stack.new_zeros(()))
    return stack
