"""What torch's functions give for polynomials of latent sites: sums, products, contractions, gathers, reshapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pplvi.guides.conjugate.expressions import Expression, Function, Symbolic, constant, example, expression, rule
from pplvi.guides.conjugate.terms import Constant, Gather, Label, Labels, Term, missing_size, simplified


def _pair(a: Any, b: Any) -> tuple[Expression, Expression] | None:
    """Two factors as expressions; ``None`` if one of them is no polynomial."""
    if isinstance(a, Function) or isinstance(b, Function):
        return None
    like = a if isinstance(a, Expression) else b
    a, b = (x if isinstance(x, Expression) else constant(x, like.shown) for x in (a, b))
    return a, b


def aligned(a: Expression, b: Expression) -> tuple[tuple[Term, ...], tuple[Label | None, ...]]:
    """Terms of ``b`` with labels of their own but for the dimensions that broadcast against those of ``a``, and the
    labels of what comes of both."""
    dims = max(a.dim(), b.dim())
    left = (None,) * (dims - a.dim()) + a.labels
    right = (None,) * (dims - b.dim()) + b.labels
    own = {label: Label(label.size) for term in b.terms for label in term.labels}
    own |= {label: Label(label.size) for label in b.labels if label is not None and label not in own}
    names = own | {y: x for x, y in zip(left, right, strict=True) if x is not None and y is not None}
    out = tuple(x if x is not None else y and names[y] for x, y in zip(left, right, strict=True))
    return tuple(term.relabelled(names) for term in b.terms), out


@rule("add", "radd", "iadd")
def add(a: Any, b: Any, alpha: float = 1.0) -> Any:
    """``a + alpha b``."""
    if (parts := _pair(a, b)) is None:
        return NotImplemented
    terms, labels = aligned(*parts)
    terms = tuple(term._replace(factor=alpha * term.factor) for term in terms)
    return expression(parts[0].terms + terms, labels, parts[0].shown + alpha * parts[1].shown)


@rule("sub", "subtract")
def sub(a: Any, b: Any, alpha: float = 1.0) -> Any:
    """``a - alpha b``."""
    return add(a, b, -alpha)


@rule("rsub")
def rsub(a: Any, b: Any, alpha: float = 1.0) -> Any:
    """``b - alpha a``."""
    return add(b, a, -alpha)


@rule("neg", "negative")
def neg(a: Any) -> Any:
    """``-a``."""
    return mul(a, -1.0)


@rule("mul", "multiply", "rmul")
def mul(a: Any, b: Any) -> Any:
    """``a b``, element by element."""
    if (parts := _pair(a, b)) is None:
        return NotImplemented
    terms, labels = aligned(*parts)
    products = [x.times(y) for x, y in product(parts[0].terms, terms)]
    return expression(products, labels, parts[0].shown * parts[1].shown)


@rule("div", "true_divide", "divide")
def div(a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    """``a / b``, for one term in the denominator."""
    if rounding_mode is not None or isinstance(a, Function) or isinstance(b, Function):
        return NotImplemented
    inverse = power(b, -1.0) if isinstance(b, Expression) else 1.0 / b
    return NotImplemented if inverse is NotImplemented else mul(a, inverse)


@rule("rdiv", "rtruediv")
def rdiv(a: Any, b: Any) -> Any:
    """``b / a``."""
    return div(b, a)


@rule("reciprocal")
def reciprocal(a: Any) -> Any:
    """``1 / a``."""
    return power(a, -1.0)


@rule("sqrt")
def sqrt(a: Any) -> Any:
    """The square root of one term."""
    return power(a, 0.5)


@rule("rsqrt")
def rsqrt(a: Any) -> Any:
    """One over the square root of one term."""
    return power(a, -0.5)


@rule("square")
def square(a: Any) -> Any:
    """``a a``."""
    return power(a, 2.0)


@rule("pow")
def power(a: Any, exponent: Any) -> Any:
    """One term to a power, or a polynomial to a whole one of at most three."""
    if not isinstance(a, Expression) or not isinstance(exponent, (int, float)):
        return NotImplemented
    if len(a.terms) == 1 and _is_elementwise(a):
        (term,) = a.terms
        if term.factor < 0 and exponent != round(exponent):
            return NotImplemented
        constants = tuple(Constant(c.value**exponent, c.labels) for c in term.constants)
        atoms = tuple(atom._replace(power=atom.power * exponent) for atom in term.atoms)
        return expression([Term(term.factor**exponent, constants, atoms)], a.labels, a.shown**exponent)
    if exponent not in (1, 2, 3):
        return NotImplemented
    return a if exponent == 1 else mul(a, power(a, exponent - 1))


def _is_elementwise(a: Expression) -> bool:
    return all(term.labels <= set(a.labels) for term in a.terms)


@rule("sum")
def total(a: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    """The sum over dimensions; that of a site which sums to one is one."""
    if not isinstance(a, Expression):
        return NotImplemented
    dims = _dims(dim, a.dim())
    shown = a.shown.sum(dims, keepdim=keepdim) if dims else a.shown
    if len(dims) == 1 and is_simplex(a, dims[0]):
        return torch.ones_like(shown)
    dropped: list[Label] = [n for i in dims if (n := a.labels[i]) is not None]
    repeated = math.prod(a.shape[i] for i in dims if a.labels[i] is None)
    terms = [term._replace(factor=term.factor * repeated * missing_size(term, dropped)) for term in a.terms]
    kept = [None if i in dims else n for i, n in enumerate(a.labels) if keepdim or i not in dims]
    return expression(terms, kept, shown)


def is_simplex(a: Expression, dim: int) -> bool:
    """Whether an expression is a site that sums to one over a dimension, with all its elements there."""
    if len(a.terms) != 1 or len(a.terms[0].atoms) != 1 or a.terms[0].constants or a.terms[0].factor != 1.0:
        return False
    (atom,) = a.terms[0].atoms
    whole = atom.power == 1.0 and atom.entries[-1] is not None and atom.entries[-1] is a.labels[dim]
    return whole and bool(torch.allclose(a.shown.sum(dim), torch.ones((), dtype=a.dtype), atol=1e-5))


def _dims(dim: Any, ndim: int) -> list[int]:
    if dim is None:
        return list(range(ndim))
    dims = [dim] if isinstance(dim, int) else list(dim)
    return sorted({d % ndim for d in dims}) if dims else list(range(ndim))


@rule("mean")
def mean(a: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    """The mean over dimensions."""
    if not isinstance(a, Expression):
        return NotImplemented
    return mul(total(a, dim, keepdim), 1.0 / math.prod(a.shape[i] for i in _dims(dim, a.dim())))


# ---------------------------------------------------------------------- contractions


@rule("matmul", "mm", "mv", "bmm", "dot")
def matmul(a: Any, b: Any) -> Any:
    """The product of matrices and vectors, as torch's."""
    if (parts := _pair(a, b)) is None:
        return NotImplemented
    a, b = parts
    left = a if a.dim() > 1 else a.unsqueeze(0)
    right = b if b.dim() > 1 else b.unsqueeze(-1)
    found: Any = contracted(left, right)
    if a.dim() == 1:
        found = found.squeeze(-2)
    return found.squeeze(-1) if b.dim() == 1 else found


@rule("rmatmul")
def rmatmul(a: Any, b: Any) -> Any:
    """``b @ a``."""
    return matmul(b, a)


def contracted(a: Expression, b: Expression) -> Any:
    """``sum_k a[..., i, k] b[..., k, j]``."""
    return total(mul(unsqueeze(a, -1), unsqueeze(b, -3)), -2)


@rule("linear")
def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """``x weight' + bias``."""
    found = matmul(x, weight.mT if weight.dim() > 1 else weight)
    return found if bias is None or found is NotImplemented else found + bias


@rule("addmm", "addmv")
def addmm(bias: Any, a: Any, b: Any) -> Any:
    """``bias + a b``."""
    found = matmul(a, b)
    return found if found is NotImplemented else bias + found


@rule("outer", "ger")
def outer(a: Any, b: Any) -> Any:
    """``a[i] b[j]``."""
    return NotImplemented if isinstance(a, Function) or isinstance(b, Function) else a.unsqueeze(-1) * b


@rule("einsum")
def einsum(equation: Any, *operands: Any) -> Any:
    """An einsum in letters, without an ellipsis."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "." in equation or any(isinstance(o, Function) for o in operands):
        return NotImplemented
    like = next(o for o in operands if isinstance(o, Expression))
    inputs, _, out = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if "->" not in equation:
        out = "".join(sorted(c for c in set(inputs) - {","} if inputs.count(c) == 1))
    if any(len(set(part)) < len(part) for part in letters):
        return NotImplemented
    every = sorted(set(inputs) - {","})
    found: Any = 1.0
    for operand, part in zip(operands, letters, strict=True):
        as_expression = operand if isinstance(operand, Expression) else constant(operand, like.shown)
        found = _laid_out(as_expression, part, every) * found
    summed = [i for i, c in enumerate(every) if c not in out]
    kept = [c for c in every if c in out]
    return (found.sum(summed) if summed else found).permute([kept.index(c) for c in out])


def _laid_out(a: Any, letters: str, every: Sequence[str]) -> Any:
    a = a.permute([letters.index(c) for c in every if c in letters])
    for i, c in enumerate(every):
        a = a if c in letters else a.unsqueeze(i)
    return a


# ---------------------------------------------------------------------- the same elements, arranged in another way


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
    dims = [i for i in _dims(dim, a.dim()) if a.shape[i] == 1] if a.dim() else []
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
    names: Labels = tuple(n for n in labels if n is not None)
    return Gather(places.reshape([n for n in places.shape if n != 1]), names)


# ---------------------------------------------------------------------- several in one


@rule("stack")
def stack(parts: Any, dim: int = 0) -> Any:
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
    if isinstance(condition, Symbolic) or (parts := _pair(a, b)) is None:
        return NotImplemented
    a, b = (x if isinstance(x, Symbolic) else _filled(x, keep) for x, keep in ((a, condition), (b, ~condition)))
    return a * condition.to(parts[0].dtype) + b * (~condition).to(parts[0].dtype)


def _filled(value: Any, keep: Tensor) -> Tensor:
    """Zero where a value does not count: it may be missing there."""
    return torch.where(keep, torch.as_tensor(value), torch.zeros(()).to(torch.as_tensor(value).dtype))
