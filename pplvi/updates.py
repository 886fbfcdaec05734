"""Optimisers as pure functions of one flat parameter vector, for steps that are traced and compiled.

Each is the update of the torch (or Pyro) optimiser of the same name: the same arithmetic on one vector that holds all
parameters, with hyperparameters as scalars or, where they differ between parameters, as vectors of the same length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro.optim
import torch
from pyro.optim import PyroOptim
from pyro.optim.adagrad_rmsprop import AdagradRMSProp
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor

Hyper = Mapping[str, Any]
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class FlatUpdate:
    """A pure update ``(parameters, gradient, state, rate) -> (parameters, state)`` on flat vectors.

    :ivar rule: the update of one optimiser; ``rate`` multiplies its learning rate.
    :ivar slots: how many vectors of state it keeps; a step count comes with them.
    :ivar hyper: its hyperparameters, numbers or vectors.

    >>> update = FlatUpdate(_sgd, 1, {"lr": 0.5, "momentum": 0.0, "dampening": 0.0, "nesterov": False,
    ...                               "weight_decay": 0.0, "maximize": False})
    >>> parameters = torch.tensor([1.0, 2.0])
    >>> update(parameters, torch.ones(2), update.init(parameters), torch.tensor(1.0))[0]
    tensor([0.5000, 1.5000])
    """

    rule: Callable[..., tuple[Tensor, State]]
    slots: int
    hyper: Hyper = field(default_factory=dict)

    def init(self, parameters: Tensor) -> State:
        """The state before the first step: zeros, and a count of steps."""
        return (parameters.new_zeros(()), *(torch.zeros_like(parameters) for _ in range(self.slots)))

    def __call__(self, parameters: Tensor, gradient: Tensor, state: State, rate: Tensor) -> tuple[Tensor, State]:
        """New parameters and state."""
        count = state[0] + 1
        parameters, slots = self.rule(parameters, gradient, count, state[1:], rate, **self.hyper)
        return parameters, (count, *slots)


def _adam(
    p: Tensor, g: Tensor, count: Tensor, slots: State, rate: Tensor, *, lr: Any, betas: Any, eps: Any,
    weight_decay: Any, amsgrad: bool = False, maximize: bool = False, decoupled: bool = False,
) -> tuple[Tensor, State]:  # fmt: skip
    """Adam (Kingma & Ba 2015); AdamW with ``decoupled`` (Loshchilov & Hutter 2019)."""
    beta1, beta2 = betas
    lr = lr * rate
    g = -g if maximize else g
    p, g = (p * (1 - lr * weight_decay), g) if decoupled else (p, g + weight_decay * p)
    mean = beta1 * slots[0] + (1 - beta1) * g
    square = beta2 * slots[1] + (1 - beta2) * g * g
    largest = torch.maximum(slots[2], square) if amsgrad else square
    denominator = largest.sqrt() / (1 - beta2**count).sqrt() + eps
    moved = p - lr / (1 - beta1**count) * mean / denominator
    return moved, (mean, square, largest) if amsgrad else (mean, square)


def _clipped_adam(
    p: Tensor, g: Tensor, count: Tensor, slots: State, rate: Tensor, *, lr: Any, betas: Any, eps: Any,
    weight_decay: Any, clip_norm: Any, lrd: Any, centered_variance: bool = False,
) -> tuple[Tensor, State]:  # fmt: skip
    """Pyro's ClippedAdam: gradients clipped elementwise, learning rate decayed by ``lrd`` a step."""
    beta1, beta2 = betas
    limit = torch.as_tensor(clip_norm, dtype=g.dtype, device=g.device)
    g = torch.maximum(torch.minimum(g, limit), -limit) + weight_decay * p
    mean = beta1 * slots[0] + (1 - beta1) * g
    square = beta2 * slots[1] + (1 - beta2) * g * g
    centred = square - mean * mean if centered_variance else square
    correction = (1 - beta2**count).sqrt() / (1 - beta1**count)
    return p - lr * rate * lrd**count * correction * mean / (centred.sqrt() + eps), (mean, square)


def _sgd(
    p: Tensor, g: Tensor, count: Tensor, slots: State, rate: Tensor, *, lr: Any, momentum: Any, dampening: Any,
    nesterov: bool, weight_decay: Any, maximize: bool = False,
) -> tuple[Tensor, State]:  # fmt: skip
    """Stochastic gradient descent with momentum, as torch has it: the first step is not dampened."""
    g = (-g if maximize else g) + weight_decay * p
    velocity = torch.where(count == 1, g, momentum * slots[0] + (1 - dampening) * g)
    direction = g + momentum * velocity if nesterov else velocity
    return p - lr * rate * direction, (velocity,)


def _adagrad(
    p: Tensor, g: Tensor, count: Tensor, slots: State, rate: Tensor, *, lr: Any, lr_decay: Any, eps: Any,
    weight_decay: Any, initial_accumulator_value: Any, maximize: bool = False,
) -> tuple[Tensor, State]:  # fmt: skip
    """Adagrad (Duchi et al. 2011)."""
    g = (-g if maximize else g) + weight_decay * p
    total = torch.where(count == 1, initial_accumulator_value + g * g, slots[0] + g * g)
    return p - lr * rate / (1 + (count - 1) * lr_decay) * g / (total.sqrt() + eps), (total,)


def _adagrad_rmsprop(
    p: Tensor, g: Tensor, count: Tensor, slots: State, rate: Tensor, *, eta: Any, delta: Any, t: Any
) -> tuple[Tensor, State]:
    """Pyro's AdagradRMSProp (Kucukelbir et al. 2017)."""
    total = torch.where(count == 1, g * g, (1 - t) * slots[0] + t * g * g)
    return p - rate * eta * count ** (-0.5 + delta) / (1 + total.sqrt()) * g, (total,)


_RULES: dict[type, tuple[Callable[..., Any], int]] = {
    torch.optim.Adam: (_adam, 2),
    torch.optim.AdamW: (partial(_adam, decoupled=True), 2),
    ClippedAdam: (_clipped_adam, 2),
    torch.optim.SGD: (_sgd, 1),
    torch.optim.Adagrad: (_adagrad, 1),
    AdagradRMSProp: (_adagrad_rmsprop, 1),
}
_IGNORED = {"foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}


def flat_update(
    optim: PyroOptim | Callable[[list[Tensor]], torch.optim.Optimizer], named: Mapping[str, Tensor]
) -> FlatUpdate:
    """The pure update of a Pyro optimiser, or of a callable from the list of parameters to a torch optimiser.

    :param named: the parameters by name, in the order of the flat vector.
    :raises ValueError: for optimisers without a pure update here.
    """
    optimizers = [_optimizer(optim, p) for p in named.values()]
    kinds = {type(o) for o in optimizers}
    if len(kinds) != 1 or (kind := kinds.pop()) not in _RULES:
        raise ValueError(
            f"optim={optim!r} has no compiled update: expected one of {', '.join(k.__name__ for k in _RULES)}, the "
            "same for all parameters. Use one of these, or compile=False."
        )
    rule, slots = _RULES[kind]
    groups = [{k: v for k, v in o.param_groups[0].items() if k not in ("params", *_IGNORED)} for o in optimizers]
    hyper = {key: _joined([g[key] for g in groups], list(named.values())) for key in _accepted(rule, groups[0])}
    return FlatUpdate(rule, slots + bool(hyper.get("amsgrad", False)), hyper)


def _optimizer(optim: Any, parameter: Tensor) -> torch.optim.Optimizer:
    if isinstance(optim, pyro.optim.PyroLRScheduler):
        raise ValueError("a PyroLRScheduler has no compiled update: pass its optimiser and schedule= instead.")
    made: torch.optim.Optimizer = optim._get_optim(parameter) if isinstance(optim, PyroOptim) else optim([parameter])
    return made


def _accepted(rule: Callable[..., Any], group: Hyper) -> list[str]:
    code = getattr(rule, "func", rule).__code__
    return [key for key in group if key in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]


def _joined(values: list[Any], parameters: list[Tensor]) -> Any:
    """One value where all parameters agree, else a vector along the flat parameters."""
    if all(v == values[0] for v in values):
        return values[0]
    if isinstance(values[0], tuple):
        return tuple(_joined(list(part), parameters) for part in zip(*values, strict=True))
    return torch.cat(
        [torch.full((p.numel(),), float(v), dtype=p.dtype) for v, p in zip(values, parameters, strict=True)]
    )
