"""Functions that ``vmap`` takes apart, or takes one particle at a time, for all particles at once.

``X @ b`` with one matrix ``X`` of shape ``(n, d)`` and a vector of each of ``K`` particles reads ``X`` ``K`` times, and
once as a product of ``(K, d)`` and ``(d, n)``. The log density of a Bernoulli with logits becomes some twenty passes
over its elements in the place of five.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.nn.functional import binary_cross_entropy_with_logits

_PRODUCTS: tuple[Any, ...] = (
    *(torch.matmul, torch.mv, torch.mm),
    *(torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mv, torch.Tensor.mm),
)


def is_batched(value: Any) -> bool:
    """Whether a value is a tensor of all particles that is seen, inside ``vmap``, as that of one."""
    return isinstance(value, Tensor) and bool(_functorch.is_batchedtensor(value))


def at_front(count: int, in_dims: tuple[int | None, ...], args: tuple[Tensor, ...]) -> list[Tensor]:
    """Arguments of an elementwise operation with the particles at the front of each, ready to broadcast."""
    pairs = zip(args, in_dims, strict=True)
    moved = [x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in pairs]
    width = max(x.dim() for x in moved)
    return [x.reshape(len(x), *(1,) * (width - x.dim()), *x.shape[1:]) for x in moved]


def shared_product(matrix: Tensor, vector: Tensor, **options: Any) -> Tensor | None:
    """The product of a matrix of all particles with a vector, or a column, of each; ``None`` for others.

    Also for one with options, such as ``out=``.

    >>> X, b = torch.arange(6.0).reshape(3, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> torch.func.vmap(lambda b: shared_product(X, b))(b)
    tensor([[0., 2., 4.],
            [1., 3., 5.]])
    """
    column = vector.dim() == 1 or (vector.dim() == 2 and vector.shape[-1] == 1)
    shared = is_batched(vector) and not is_batched(matrix) and matrix.dim() == 2
    if options or not (column and shared and len(vector) == matrix.shape[-1] and vector.dtype == matrix.dtype):
        return None
    found: Tensor = _Product.apply(matrix, vector.reshape(-1))
    return found.reshape(-1, *vector.shape[1:])


def logit_loss(logits: Tensor, value: Tensor, **options: Any) -> Tensor | None:
    """The cross entropy of each value; ``None`` for one that is weighted or summed, or of one particle.

    >>> logits = torch.tensor([[0.0], [50.0]])
    >>> torch.func.vmap(lambda x: logit_loss(x, torch.ones(1), reduction="none"))(logits)
    tensor([[0.6931],
            [0.0000]])
    """
    plain = {name: option for name, option in options.items() if option is not None} == {"reduction": "none"}
    whole = plain and logits.shape == value.shape and logits.dtype == value.dtype
    if not (whole and (is_batched(logits) or is_batched(value))):
        return None
    found: Tensor = _LogitLoss.apply(logits, value)
    return found


TOGETHER: dict[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys(_PRODUCTS, shared_product),
    binary_cross_entropy_with_logits: logit_loss,
}
"""By a function of torch what does it for all particles, or is ``None`` where that is not known."""


def all_together(function: Any, args: Any, kwargs: Any) -> Tensor | None:
    """What a function of :data:`TOGETHER` gives for two tensors, if it is known for all particles at once."""
    plain = len(args) == 2 and all(isinstance(x, Tensor) for x in args) and any(map(is_batched, args))
    return TOGETHER[function](*args, **kwargs) if plain else None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(matrix: Tensor, vector: Tensor) -> Tensor:
        return matrix @ vector

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (matrix, vector), (grad,) = ctx.saved_tensors, grads
        return torch.outer(grad, vector), grad @ matrix

    @staticmethod
    def vmap(info: Any, in_dims: Any, matrix: Tensor, vector: Tensor) -> tuple[Tensor, int]:
        return vector.movedim(in_dims[1], 0) @ matrix.mT, 0


class _LogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, value: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(logits, value, reduction="none")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (logits, value), (grad,) = ctx.saved_tensors, grads
        return grad * (logits.sigmoid() - value), -grad * logits

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Tensor) -> tuple[Tensor, int]:
        logits, value = at_front(info.batch_size, in_dims, args)
        return _LogitLoss.forward(logits, value), 0
