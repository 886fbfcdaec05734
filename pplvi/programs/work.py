"""What a program computes, counted as it runs: elements, and the largest tensor on the way. Numbers, and no times."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from pplvi.programs.randomness import of_all

_CALL = 5_000  # elements that take as long as the call of an operation
_CUBIC = ("mm", "linalg", "cholesky", "triangular", "inverse")  # in names of operations: rows times columns
_NOTHING = ("__get__", "detach", "expand", "reshape", "view")  # functions that compute nothing
_PRODUCTS = 32  # of theirs take as long as one element elsewhere


class Work(TorchFunctionMode):
    """Counts what functions of torch compute in the block.

    A dispatch mode would see single operations, and has torch import its compiler, which takes seconds.

    :ivar elements: how many, a call of a function being so many more.
    :ivar widest: bytes of the largest tensor that was made.

    >>> import torch
    >>> with Work() as work:
    ...     _ = torch.zeros(1_000, dtype=torch.float64) + 1
    >>> work.widest, work.elements
    (8000, 12000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.widest = 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of torch, and count it."""
        found = func(*args, **(kwargs or {}))
        if not isinstance(found, Tensor) or func.__name__ in _NOTHING:
            return found
        whole = of_all(found)
        self.widest = max(self.widest, whole.numel() * whole.element_size())
        tensors = [whole, *(of_all(each) for each in args if isinstance(each, Tensor))]
        inner = 1
        if any(part in func.__name__ for part in _CUBIC):
            inner += max((each.shape[-1] for each in tensors if each.dim()), default=0) // _PRODUCTS
        self.elements += _CALL + inner * max((each.numel() for each in tensors), default=0)
        return found
