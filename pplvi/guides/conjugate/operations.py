"""What torch's functions give for polynomials of latent sites: sums, products, contractions, gathers, reshapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch

from pplvi.guides.conjugate.expressions import Expression, Function, constant, expression, rule
from pplvi.guides.conjugate.terms import Constant, Label, Term, missing_size


def as_pair(a: Any, b: Any) -> tuple[Expression, Expression] | None:
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
    if (parts := as_pair(a, b)) is None:
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
    if (parts := as_pair(a, b)) is None:
        return NotImplemented
    terms, labels = aligned(*parts)
    products = [x.times(y) for x, y in product(parts[0].terms, terms)]
    return expression(products, labels, parts[0].shown * parts[1].shown)


@rule("div", "true_divide", "divide")
def div(a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    """``a / b``, for one term in the denominator."""
    if rounding_mode is not None or isinstance(a, Function) or isinstance(b, Function):
        return NotImplemented
    if isinstance(a, Expression) and _is_one(b, a.shape):
        return a
    inverse = power(b, -1.0) if isinstance(b, Expression) else 1.0 / b
    return NotImplemented if inverse is NotImplemented else mul(a, inverse)


def _is_one(b: Any, shape: torch.Size) -> bool:
    """Whether a divisor changes nothing, as the sum of a simplex does."""
    plain = isinstance(b, torch.Tensor) and not isinstance(b, Expression)
    constant_ = plain and not b.requires_grad and torch.broadcast_shapes(b.shape, shape) == shape
    return constant_ and bool((b == 1).all())


@rule("rdiv", "rtruediv")
def rdiv(a: Any, b: Any) -> Any:
    """``b / a``."""
    return div(b, a)


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


def _to_the(exponent: float) -> Callable[[Any], Any]:
    return lambda a: power(a, exponent)


for _name, _exponent in {"reciprocal": -1.0, "sqrt": 0.5, "rsqrt": -0.5, "square": 2.0}.items():
    rule(_name)(_to_the(_exponent))


def _is_elementwise(a: Expression) -> bool:
    return all(term.labels <= set(a.labels) for term in a.terms)


@rule("sum")
def total(a: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    """The sum over dimensions; that of a site which sums to one is one."""
    if not isinstance(a, Expression):
        return NotImplemented
    dims = dims_of(dim, a.dim())
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


def dims_of(dim: Any, ndim: int) -> list[int]:
    """Dimensions that an argument ``dim`` names, counted from the left; all of them for ``None``."""
    if dim is None:
        return list(range(ndim))
    dims = [dim] if isinstance(dim, int) else list(dim)
    return sorted({d % ndim for d in dims}) if dims else list(range(ndim))


@rule("mean")
def averaged(a: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    """The mean over dimensions."""
    if not isinstance(a, Expression):
        return NotImplemented
    return mul(total(a, dim, keepdim), 1.0 / math.prod(a.shape[i] for i in dims_of(dim, a.dim())))


# ---------------------------------------------------------------------- contractions


@rule("matmul", "mm", "mv", "bmm", "dot")
def matmul(a: Any, b: Any) -> Any:
    """The product of matrices and vectors, as torch's."""
    if (parts := as_pair(a, b)) is None:
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
    return total(mul(a.unsqueeze(-1), b.unsqueeze(-3)), -2)


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
