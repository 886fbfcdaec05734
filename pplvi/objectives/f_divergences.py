"""Divergences of one level by a convex function of its incremental weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pplvi.kinds.checked import checked
from pplvi.objectives.forward_kl import weighted_sum
from pplvi.objectives.step import Objective, Routing, Step, Terms
from pplvi.weights.algebra import logmeanexp, normalize

FDivergenceName = Literal["forward_kl", "reverse_kl", "chi_square", "hellinger", "jensen_shannon"]

_FLOOR = -80.0  # u log u is 0 below: where a weight is 0 its logarithm is not asked for


def _forward_kl(log_ratio: Tensor) -> Tensor:
    return log_ratio.exp() * log_ratio.clamp(min=_FLOOR)


def _jensen_shannon(log_ratio: Tensor) -> Tensor:
    u = log_ratio.exp()
    return 0.5 * ((u + 1) * math.log(2.0) - u * softplus(-log_ratio.clamp(min=_FLOOR)) - softplus(log_ratio))


F_DIVERGENCES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": torch.neg,
    "chi_square": lambda log_ratio: torch.expm1(log_ratio) ** 2,
    "hellinger": lambda log_ratio: 0.5 * torch.expm1(0.5 * log_ratio) ** 2,
    "jensen_shannon": _jensen_shannon,
}
"""``f`` of the logarithm of a ratio ``u``: ``u log u``, ``-log u``, ``(u - 1)^2``, ``(sqrt u - 1)^2 / 2`` and
``(u log u - (u + 1) log((u + 1) / 2)) / 2``."""


@checked
@dataclass(frozen=True)
class NestedDivergence(Objective):
    r"""Any f-divergence of one level, from a convex ``f`` of its incremental weight (Zimmermann et al. 2021).

    .. math:: D_f(\check\pi \,\|\, \hat\pi) = E_{\hat\pi}[f(u)], \qquad u = v \, Z_{k-1} / Z_k,

    between the extended target ``gamma[k] r[k-1] / Z[k]`` and the extended proposal ``gamma[k-1] q[k] / Z[k-1]``. The
    value is ``E_A[f(u)]`` with ``u = v / E_A[v]``, which is never negative. ``f`` is written in the *logarithm* of the
    ratio, so ``F(l) = f(exp(l))``; with its derivatives there, ``E_A[F'] = m`` and ``h = F - F'`` the surrogate is

    ``E_A[sg(h - E_A h) log gamma[k-1]] + E_A[sg(F') (log gamma[k] + log r)] - m E_B[log gamma[k] + log r]``

    and for the forward kernel ``E_A[sg(h - E_A h) log q]`` at detached draws (``"score"``), or the doubly
    reparameterised ``-E_A[sg(F'' - F') log v]`` along the path of the draws (``"dreg"``; Tucker et al. 2019), which has
    no variance where the two are equal. Self-normalised, so biased by O(1/K).

    :ivar f: ``"forward_kl"``, ``"reverse_kl"``, ``"chi_square"`` (of Pearson), ``"hellinger"`` (squared, at most 1),
        ``"jensen_shannon"`` (at most log 2); or a function of log ratios in nats, element by element, that is convex in
        the ratio and 0 where that is 1.
    :ivar reverse: another such function whose gradient reverse kernels get: ``f`` itself unless given.
    :ivar estimator: ``"dreg"``, for draws that are reparameterised and an ``f`` that is twice differentiable;
        ``"score"``, for any.
    :raises ValueError: for a function that is not of this kind.

    >>> step = Step.from_proposal(log_target=torch.tensor([0.0, -1.0]), log_forward=torch.zeros(2))
    >>> NestedDivergence("reverse_kl")(step).value
    tensor(0.1201)
    >>> def alpha(log_ratio, a=0.7):  # Amari's family
    ...     return (torch.expm1(a * log_ratio) - a * torch.expm1(log_ratio)) / (a * (a - 1))
    >>> NestedDivergence(alpha)(step).value
    tensor(0.1131)
    """

    proposals: ClassVar[frozenset[str]] = frozenset({"guide", "rejection"})
    f: FDivergenceName | Callable[[Tensor], Tensor]
    reverse: FDivergenceName | Callable[[Tensor], Tensor] | None = None
    estimator: Literal["dreg", "score"] = "dreg"

    def __post_init__(self) -> None:
        for name, f in (("f", self.f), ("reverse", self.reverse)):
            if f is not None and not isinstance(f, str):
                _check(name, f, smooth=self.estimator == "dreg" and name == "f")

    @property
    def routing(self) -> Routing:
        """Draws detached, or with a path and the forward density frozen; within the level only."""
        score = self.estimator == "score"
        return Routing(detach=score, freeze=not score, local=True)

    @property
    def min_particles(self) -> int:
        """Self-normalised averages need two particles."""
        return 2

    def __call__(self, step: Step) -> Terms:
        """Value and surrogate, each of shape ``(*batch)``."""
        weight, log_ratio = _ratios(step)
        value, first, second = _derivatives(_function(self.f), log_ratio)
        back = first if self.reverse is None else _derivatives(_function(self.reverse), log_ratio)[1]
        signal = value - first
        proposal = weight * (signal - weighted_sum(weight, signal))
        target, reverse = _of_target(weight, log_ratio, first), _of_target(weight, log_ratio, back)
        fixed = step.log_reverse if step.log_reverse_fixed is None else step.log_reverse_fixed
        surrogate = weighted_sum(target, step.log_target_fixed) + weighted_sum(reverse, fixed)
        if self.estimator == "score":
            surrogate = surrogate + weighted_sum(proposal, step.log_initial + step.log_forward)
        else:
            path = step.log_target - step.log_target_fixed + step.log_reverse - fixed
            surrogate = surrogate + weighted_sum(proposal, step.log_initial)
            surrogate = surrogate - weighted_sum(weight * (second - first), path - step.log_forward)
        return Terms(weighted_sum(weight, value), surrogate)

    def __repr__(self) -> str:
        return f"NestedDivergence(f={shown(self.f)}, reverse={shown(self.reverse)}, estimator={self.estimator!r})"


def shown(divergence: Any) -> str:
    """A divergence as a representation shows it, the same in every process: a function by its name.

    >>> shown(("hellinger", torch.neg))
    "('hellinger', neg)"
    """
    if isinstance(divergence, tuple | list):
        return f"({', '.join(map(shown, divergence))})"
    if isinstance(divergence, Objective) or not callable(divergence):
        return repr(divergence)
    return str(getattr(divergence, "__name__", type(divergence).__name__))


def _ratios(step: Step) -> tuple[Tensor, Tensor]:
    """Normalised incoming weights, and ``log u`` (0 where the incoming weight is), both detached."""
    weight = normalize(step.log_weight_in.detach())
    log_v = step.log_increment.detach().masked_fill(weight == 0, 0.0)
    log_mean = logmeanexp(weight.log() + log_v) + math.log(len(weight))
    return weight, (log_v - log_mean).masked_fill(weight == 0, 0.0)


def _of_target(weight: Tensor, log_ratio: Tensor, first: Tensor) -> Tensor:
    """What each draw counts in the gradient of the extended target: ``a F' - b sum a F'``."""
    return weight * (first - log_ratio.exp() * weighted_sum(weight, first))


def _function(f: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return F_DIVERGENCES[f] if isinstance(f, str) else f


def _derivatives(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A function of numbers, element by element, with its first two derivatives."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        value = f(point)
        (first,) = torch.autograd.grad(value.sum(), point, create_graph=True)
        second = torch.zeros_like(first)
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), point)
    return value.detach(), first.detach(), second.detach()


def _check(name: str, f: Callable[[Tensor], Tensor], *, smooth: bool) -> None:
    """Look at a function at ratios from 1/20 to 20."""

    def refuse(found: str, expected: str) -> ValueError:
        return ValueError(f"{name}={shown(f)} {found}: expected {expected}")

    grid = torch.linspace(-3.0, 3.0, 601, dtype=torch.float64)
    try:
        value, first, second = _derivatives(f, grid)
        part = f(grid[:200]).detach()
    except Exception as error:
        raise refuse(
            f"cannot be differentiated at log ratios ({error})", "a differentiable function of a tensor, by torch."
        ) from error
    numbers = torch.stack([value, first, second]) if value.shape == grid.shape else value
    if numbers.dim() != 2 or not numbers.isfinite().all():
        raise refuse("is not a finite number at each log ratio from -3 to 3", "one, with two derivatives.")
    if part.shape != grid[:200].shape or not torch.allclose(part, value[:200], rtol=1e-4, atol=1e-6):
        raise refuse("depends on which log ratios it sees together", "a function of each one by itself.")
    if abs(float(value[300])) > 1e-5:
        raise refuse(f"is {float(value[300]):.4g} where the ratio is 1", "0. Subtract it.")
    slope = first * (-grid).exp()  # in the ratio
    rise, spread = slope.diff(), slope.max() - slope.min()
    if spread < 1e-8 or rise.min() < -1e-6 * spread:
        raise refuse("is not convex in the ratio", "a convex function: another one is no divergence.")
    area = torch.trapezoid((second - first) * (-grid).exp(), grid)
    if smooth and abs(area - rise.sum()) > 0.02 * rise.sum():
        raise refuse("has a kink", "a second derivative. Use NestedDivergence(f, estimator='score').")
