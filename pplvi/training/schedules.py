"""How large a step is: schedules of the learning rate, and clips of the gradient of all parameters together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pplvi.compile.flat_optimizers import CLIP_FACTOR, CLIP_WINDOW, check_clip
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Positive

Schedule = Callable[[int], float]


@checked
class Cosine:
    r"""Cosine decay of the learning rate from 1 to 0 times its value, over ``num_steps`` steps.

    .. math:: f(t) = \tfrac12 (1 + \cos(\pi t / T))

    :meth:`cool_down` brings the end forward when the objective has levelled off: from then on the factor falls from
    where it is to 0 by another half cosine. :meth:`restart` begins anew, for a training that goes on after its end.

    Source: Loshchilov & Hutter (2017), "SGDR: Stochastic gradient descent with warm restarts".

    :param num_steps: steps until the factor is 0.

    >>> [round(Cosine(100)(t), 2) for t in (0, 50, 100)]
    [1.0, 0.5, 0.0]
    """

    def __init__(self, num_steps: Count) -> None:
        self.num_steps = num_steps
        self.start, self.level = 0, 1.0
        self.end, self.cooling = num_steps, False

    def __call__(self, step: int) -> float:
        """The factor of the learning rate at this step."""
        progress = min(1.0, (step - self.start) / max(1, self.end - self.start))
        return self.level * 0.5 * (1.0 + math.cos(math.pi * progress))

    def cool_down(self, step: int, length: int) -> None:
        """Let the factor fall to 0 within ``length`` steps from ``step``, never later than ``num_steps``."""
        self.level = self(step)
        self.start, self.end, self.cooling = step, min(step + length, self.num_steps), True

    def restart(self, step: int) -> None:
        """Fall from 1 to 0 between ``step`` and ``num_steps``: a warm restart.

        >>> schedule = Cosine(200)
        >>> schedule.restart(100)
        >>> [round(schedule(t), 2) for t in (100, 150, 200)]
        [1.0, 0.5, 0.0]
        """
        self.start, self.level, self.end, self.cooling = step, 1.0, self.num_steps, False

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes."""
        return {"start": self.start, "level": self.level, "end": self.end, "cooling": self.cooling}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was called."""
        self.start, self.level, self.end = state["start"], state["level"], state["end"]
        self.cooling = state.get("cooling", self.start > 0)


class NormClip:
    r"""Scale the whole gradient so that its Euclidean norm is at most ``max_norm``.

    .. math:: g \leftarrow g \min(1, c / \lVert g \rVert)

    Source: Pascanu, Mikolov & Bengio (2013), "On the difficulty of training recurrent neural networks".

    >>> g = [torch.tensor([3.0]), torch.tensor([4.0])]
    >>> NormClip(1.0)(g); torch.cat(g)
    tensor([0.6000, 0.8000])
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def __call__(self, gradients: list[Tensor], norm: Tensor | None = None) -> None:
        """Clip in place; ``norm`` is that of these and of others elsewhere, if there are any."""
        _shrink(gradients, torch.as_tensor(self.max_norm), norm_of(gradients) if norm is None else norm)

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


@checked
class AdaptiveClip:
    r"""Clip the norm of the whole gradient at ``factor`` times the median of the last ``window`` norms.

    Only outliers are cut, at whatever scale the model has, so that the gradient stays almost unbiased; a fixed norm
    that is exceeded at every step would turn the mean of the gradient into the mean of its direction.

    Source: after Seetharaman et al. (2020), "AutoClip: adaptive gradient clipping for source separation networks",
    which clips at a quantile of all norms so far.

    >>> clip, g = AdaptiveClip(factor=2.0), torch.ones(1)
    >>> for _ in range(5): clip([torch.ones(1)])
    >>> g = torch.tensor([100.0]); clip([g]); g
    tensor([2.])
    """

    def __init__(self, factor: Positive = CLIP_FACTOR, window: Count = CLIP_WINDOW) -> None:
        self.factor, self.window = factor, window
        self.count = 0
        self.norms: Tensor | None = None

    def __call__(self, gradients: list[Tensor], norm: Tensor | None = None) -> None:
        """Clip in place; the first gradient passes. ``norm`` is that of these and of others elsewhere, if any."""
        norm = norm_of(gradients) if norm is None else norm
        if self.norms is None:
            self.norms = torch.full((self.window,), math.nan, dtype=norm.dtype, device=norm.device)
        self.norms = self.norms.to(norm)  # a checkpoint is read onto the CPU
        limit = self.factor * self.norms.nanmedian()
        _shrink(gradients, torch.where(limit > 0, limit, math.inf), norm)
        self.norms[self.count % self.window] = norm
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """The last norms."""
        return {"count": self.count, "norms": self.norms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was called."""
        self.count, self.norms = state["count"], state["norms"]


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of several tensors together.

    >>> norm_of([torch.tensor([3.0]), torch.tensor([4.0])])
    tensor(5.)
    """
    return torch.stack([g.norm() for g in gradients]).norm()


def _shrink(gradients: list[Tensor], limit: Tensor, norm: Tensor) -> None:
    # A norm that is 0, NaN or within the limit leaves the gradient as it is, to the bit.
    for g in gradients:
        g.mul_(torch.where(norm > limit, limit / norm, 1.0).to(g))


def make_schedule(schedule: str | Schedule | None, num_steps: int, *, scheduled: bool = False) -> Schedule | None:
    """``"cosine"``, ``None`` or a callable from the step to the factor of the learning rate.

    :param scheduled: whether the optimiser brings a schedule of its own.

    :raises ValueError: for anything else, and for two schedules at once.
    """
    if schedule is None:
        return None
    if scheduled:
        raise ValueError(
            f"optim is a learning-rate scheduler already and schedule={schedule!r} was asked for too: "
            "pass schedule=None to keep the optimiser's own."
        )
    if schedule == "cosine":
        return Cosine(num_steps)
    if callable(schedule):
        return copy.deepcopy(schedule)
    raise ValueError(f"schedule={schedule!r}: expected 'cosine', None, or a callable from the step to a factor.")


def make_clip(clip: str | float | None) -> NormClip | AdaptiveClip | None:
    """``"adaptive"``, ``None`` or the largest norm of the gradient.

    :raises ValueError: for anything else.
    """
    check_clip(clip)
    if clip is None:
        return None
    return AdaptiveClip() if clip == "adaptive" else NormClip(float(clip))
