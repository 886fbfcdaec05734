"""What guides need of a recorder: iterations on one state, recorded by whoever runs the guide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Recorder", "Recording"]


class Recording(Protocol):
    """A recorded function from tensors to themselves a step later, and a result: a call takes the step.

    :ivar carried: where the tensors are.
    """

    carried: Sequence[Tensor]

    def __call__(self) -> Tensor:
        """The result."""


Recorder = Callable[[Callable[..., tuple[Tensor, ...]], Sequence[Tensor]], Recording]
