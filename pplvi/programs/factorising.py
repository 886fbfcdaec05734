"""Matrices of draws that cannot be factorised: the density is zero there, and what runs beside it goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode

Result = TypeVar("Result")

FACTORISATIONS = frozenset({torch.linalg.cholesky, torch.cholesky, torch.Tensor.cholesky})
_TRIES = 30  # draws of a prior of which one in four is sound all fail once in 5,000 times


def fails_to_factorise(error: Exception) -> bool:
    """Whether an error says that a matrix is not positive definite.

    >>> fails_to_factorise(ValueError("Expected parameter ... to satisfy the constraint PositiveDefinite(), but ..."))
    True
    """
    return isinstance(error, LinAlgError) or (isinstance(error, ValueError) and "PositiveDefinite()" in str(error))


def retried(run: Callable[[], Result]) -> Result:
    """What a program leaves at a draw, new ones being made while matrices of them cannot be factorised.

    :raises Exception: the last of these errors, if every draw has one.

    >>> draws = iter([0.0, 2.0])
    >>> retried(lambda: torch.linalg.cholesky(torch.tensor([[next(draws)]])))
    tensor([[1.4142]])
    """
    for _ in range(_TRIES - 1):
        try:
            return run()
        except Exception as error:
            if not fails_to_factorise(error):
                raise
    return run()


def run_sound(
    run: Callable[[], Result], *, guarded: bool = False, drawing: bool = False
) -> tuple[Result, Tensor | None]:
    """What a program leaves, and whether a factorisation failed in it: a boolean tensor, ``None`` where none can have.

    :param guarded: expect that some may, without an error that says so, as in a recording.
    :param drawing: see :class:`SoundFactors`.

    >>> run_sound(lambda: torch.linalg.cholesky(-torch.eye(1)))
    (tensor([[1.]]), tensor(True))
    """
    if not guarded:
        before = torch.get_rng_state()
        try:
            return run(), None
        except Exception as error:
            if not fails_to_factorise(error):
                raise
        torch.set_rng_state(before)  # the same draws once more
    with pyro.validation_enabled(False), SoundFactors(drawing=drawing) as mode:
        found = run()
    return found, mode.failed if guarded else torch.tensor(True)


class SoundFactors(TorchFunctionMode):
    """Factorise the unit matrix where a matrix cannot be factorised.

    :param drawing: draws are wanted and no density: the factor is NaN instead, so that nobody takes them for draws.
    :ivar failed: whether one could not; ``None`` while none was tried.
    """

    def __init__(self, *, drawing: bool = False) -> None:
        super().__init__()
        self.drawing = drawing
        self.failed: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of torch, in its own way unless it factorises."""
        return self.factor(*args, **kwargs or {}) if func in FACTORISATIONS else func(*args, **kwargs or {})

    def factor(self, matrix: Tensor, upper: bool = False, **_: Any) -> Tensor:
        """The Cholesky factor of a matrix, or of the unit matrix."""
        factor, info = torch.linalg.cholesky_ex(matrix.detach())
        bad = (info != 0).reshape(-1).any()
        self.failed = bad if self.failed is None else self.failed | bad
        factor = self._instead(matrix, factor, (info != 0)[..., None, None])
        return factor.mH if upper else factor

    def _instead(self, matrix: Tensor, factor: Tensor, failed: Tensor) -> Tensor:
        if self.drawing:
            return torch.where(failed, torch.nan, factor)
        unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        if torch.is_grad_enabled():  # no gradient through a factor that is none
            return torch.linalg.cholesky_ex(torch.where(failed, unit, matrix))[0]
        return torch.where(failed, unit, factor)


class JointFactorisation(RuntimeError):
    """Matrices of several particles would be factorised in one call, which fails for all if it does for one."""


class SeparateFactors(TorchFunctionMode):
    """Refuse to factorise matrices of several particles in one call.

    :param num_particles: how many there are.
    :param active: do so, and not only look on.
    """

    def __init__(self, num_particles: int, *, active: bool) -> None:
        super().__init__()
        self.num_particles, self.active = num_particles, active

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of torch.

        :raises JointFactorisation: if it factorises so.
        """
        if self.active and func in FACTORISATIONS and self.num_particles in args[0].shape[:-2]:
            raise JointFactorisation("matrices of all particles are factorised in one call.")
        return func(*args, **kwargs or {})
