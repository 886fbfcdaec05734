"""Optimisers as pure functions of one flat parameter vector, for steps that are traced and compiled.

Each is the update of the torch (or Pyro) optimiser of the same name: the same arithmetic on one vector that holds all
parameters, with hyperparameters as numbers or, where they differ between parameters, as vectors along the flat one.
Counts, rates and bias corrections are kept in float64, as torch keeps them in Python numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import pyro.optim
import torch
from pyro.optim import PyroOptim
from pyro.optim.adagrad_rmsprop import AdagradRMSProp
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import Optimizer

from pplvi.kinds.checked import checked

Hyper = Mapping[str, Any]
State = tuple[Tensor, ...]
TorchFactory = Callable[[list[Tensor]], Optimizer]
OptimFactory = PyroOptim | TorchFactory
Clip = float | Literal["adaptive"] | None

CLIP_FACTOR, CLIP_WINDOW = 10.0, 100  # of "adaptive": times the median norm of so many steps


def check_clip(clip: Any) -> None:
    """Check an argument of this name.

    :raises ValueError: for anything but ``"adaptive"``, a positive norm or ``None``.
    """
    number = isinstance(clip, (int, float)) and not isinstance(clip, bool) and clip > 0
    if not number and clip is not None and clip != "adaptive":
        raise ValueError(f"clip={clip!r}: expected 'adaptive', a positive norm, or None.")


@dataclass(frozen=True)
class FlatUpdate:
    """A pure update ``(parameters, gradient, state, rate) -> (parameters, state)`` on flat vectors.

    :ivar rule: the update of one optimiser; ``rate`` multiplies its learning rate.
    :ivar slots: how many vectors of state it keeps; a step count comes with them.
    :ivar hyper: its hyperparameters, numbers or vectors.
    :ivar clip: largest Euclidean norm of the whole gradient; ``"adaptive"`` is ten times the median norm of the last
        100 steps (:class:`pplvi.training.AdaptiveClip`).

    >>> parameters = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> update = flat_update(partial(torch.optim.SGD, lr=0.5), {"x": parameters})
    >>> update(parameters.detach(), torch.ones(2), update.init(parameters), torch.tensor(1.0))[0]
    tensor([0.5000, 1.5000])
    """

    rule: Callable[..., tuple[Tensor, State]]
    slots: int
    hyper: Hyper = field(default_factory=dict)
    clip: Clip = None

    def __post_init__(self) -> None:
        check_clip(self.clip)

    def init(self, parameters: Tensor) -> State:
        """The state before the first step: a count, zeros, and the norms of past gradients if the clip needs them."""
        count = parameters.new_zeros((), dtype=torch.float64)
        norms = (parameters.new_full((CLIP_WINDOW,), math.nan),) if self.clip == "adaptive" else ()
        return (count, *(parameters.new_zeros(parameters.shape) for _ in range(self.slots)), *norms)

    def __call__(self, parameters: Tensor, gradient: Tensor, state: State, rate: Tensor) -> tuple[Tensor, State]:
        """New parameters and state."""
        count, slots, norms = state[0] + 1, state[1 : 1 + self.slots], state[1 + self.slots :]
        if self.clip == "adaptive":
            gradient, norms = _adaptive_clip(gradient, count, norms[0])
        elif self.clip is not None:
            gradient = _shrunk(gradient, torch.as_tensor(self.clip, dtype=gradient.dtype), gradient.norm())
        parameters, slots = self.rule(parameters, gradient, count, slots, rate, **self.hyper)
        return parameters, (count, *slots, *norms)


def _shrunk(g: Tensor, limit: Tensor, norm: Tensor) -> Tensor:
    return g * torch.where(norm > limit, limit / norm, 1.0)


def _adaptive_clip(g: Tensor, count: Tensor, norms: Tensor) -> tuple[Tensor, State]:
    norm = g.norm()
    limit = CLIP_FACTOR * nanmedian(norms)
    g = _shrunk(g, torch.where(limit > 0, limit, math.inf), norm)
    here = torch.arange(CLIP_WINDOW, device=g.device) == torch.remainder(count - 1, CLIP_WINDOW)
    return g, (torch.where(here, norm, norms),)


def nanmedian(x: Tensor) -> Tensor:
    """The lower median of the entries that are no NaN, as ``torch.nanmedian``, by counting: it fuses where sorting
    does not.

    >>> nanmedian(torch.tensor([5.0, 1.0, 3.0, 2.0, math.nan]))
    tensor(2.)
    """
    below = (x.unsqueeze(0) <= x.unsqueeze(1)).sum(1)
    enough = 2 * below >= (x == x).sum()
    found = torch.where(enough & (x == x), x, math.inf).amin()
    return torch.where((x == x).any(), found, math.nan)


def _as(coefficient: Tensor, g: Tensor) -> Tensor:
    """A coefficient in the dtype of the vectors; float64 ones without dimensions need no cast."""
    return coefficient.to(g.dtype)


def _cast(g: Tensor, *coefficients: Any) -> tuple[Any, ...]:
    """Coefficients, worked out in float64, in the dtype of the vectors."""
    return tuple(_as(c, g) if isinstance(c, Tensor) else c for c in coefficients)


def _adam(
    p: Tensor, g: Tensor, count: Tensor, slots: State, rate: Tensor, *, lr: Any, betas: Any, eps: Any,
    weight_decay: Any, amsgrad: bool = False, maximize: bool = False, decoupled: bool = False,
) -> tuple[Tensor, State]:  # fmt: skip
    """Adam (Kingma & Ba 2015); AdamW with ``decoupled`` (Loshchilov & Hutter 2019)."""
    beta1, beta2 = betas
    shrink, size = _cast(g, 1 - lr * rate * weight_decay, lr * rate / (1 - beta1**count))
    correction, beta1, rest1, beta2, rest2, eps, weight_decay = _cast(
        g, (1 - beta2**count) ** 0.5, beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay
    )
    g = -g if maximize else g
    p, g = (p * shrink, g) if decoupled else (p, g + weight_decay * p)
    mean = beta1 * slots[0] + rest1 * g
    square = beta2 * slots[1] + rest2 * g * g
    largest = torch.maximum(slots[2], square) if amsgrad else square
    moved = p - size * mean / (largest.sqrt() / correction + eps)
    return moved, (mean, square, largest) if amsgrad else (mean, square)


def _clipped_adam(
    p: Tensor, g: Tensor, count: Tensor, slots: State, rate: Tensor, *, lr: Any, betas: Any, eps: Any,
    weight_decay: Any, clip_norm: Any, lrd: Any, centered_variance: bool = False,
) -> tuple[Tensor, State]:  # fmt: skip
    """Pyro's ClippedAdam: gradients clipped elementwise, learning rate decayed by ``lrd`` a step."""
    beta1, beta2 = betas
    size = lr * rate * lrd**count * (1 - beta2**count) ** 0.5 / (1 - beta1**count)
    size, beta1, rest1, beta2, rest2, eps, weight_decay = _cast(
        g, size, beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay
    )
    limit = torch.as_tensor(clip_norm, dtype=g.dtype, device=g.device)
    g = torch.maximum(torch.minimum(g, limit), -limit) + weight_decay * p
    mean = beta1 * slots[0] + rest1 * g
    centred = g - mean if centered_variance else g
    square = beta2 * slots[1] + rest2 * centred * centred
    return p - size * mean / (square.sqrt() + eps), (mean, square)


def _sgd(
    p: Tensor, g: Tensor, count: Tensor, slots: State, rate: Tensor, *, lr: Any, momentum: Any, dampening: Any,
    nesterov: bool, weight_decay: Any, maximize: bool = False,
) -> tuple[Tensor, State]:  # fmt: skip
    """Stochastic gradient descent with momentum, as torch has it: the first step is not dampened."""
    size, momentum, fresh, weight_decay = _cast(g, lr * rate, momentum, 1 - dampening, weight_decay)
    g = (-g if maximize else g) + weight_decay * p
    if not slots:
        return p - size * g, ()
    velocity = torch.where(count == 1, g, momentum * slots[0] + fresh * g)
    direction = g + momentum * velocity if nesterov else velocity
    return p - size * direction, (velocity,)


def _adagrad(
    p: Tensor, g: Tensor, count: Tensor, slots: State, rate: Tensor, *, lr: Any, lr_decay: Any, eps: Any,
    weight_decay: Any, initial_accumulator_value: Any, maximize: bool = False,
) -> tuple[Tensor, State]:  # fmt: skip
    """Adagrad (Duchi et al. 2011)."""
    size = lr * rate / (1 + (count - 1) * lr_decay)
    size, eps, weight_decay, initial = _cast(g, size, eps, weight_decay, initial_accumulator_value)
    g = (-g if maximize else g) + weight_decay * p
    total = torch.where(count == 1, initial, slots[0]) + g * g
    return p - size * g / (total.sqrt() + eps), (total,)


def _adagrad_rmsprop(
    p: Tensor, g: Tensor, count: Tensor, slots: State, rate: Tensor, *, eta: Any, delta: Any, t: Any
) -> tuple[Tensor, State]:
    """Pyro's AdagradRMSProp (Kucukelbir et al. 2017)."""
    size, t, rest = _cast(g, rate * eta * count ** (-0.5 + delta), t, 1 - t)
    total = torch.where(count == 1, g * g, rest * slots[0] + t * g * g)
    return p - size / (1 + total.sqrt()) * g, (total,)


_RULES: dict[type, tuple[Callable[..., Any], int]] = {
    torch.optim.Adam: (_adam, 2),
    torch.optim.AdamW: (partial(_adam, decoupled=True), 2),
    ClippedAdam: (_clipped_adam, 2),
    torch.optim.SGD: (_sgd, 1),
    torch.optim.Adagrad: (_adagrad, 1),
    AdagradRMSProp: (_adagrad_rmsprop, 1),
}


class Exchange:
    """What becomes of loss and gradient before the clip: they stay as they are.

    :ivar key: equal where the same recorded program will do.

    >>> Exchange()(torch.tensor(1.0), torch.zeros(2))
    (tensor(1.), tensor([0., 0.]))
    """

    key: Hashable = None

    def __call__(self, loss: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the gradient, along the flat parameters, that the step goes on with."""
        return loss, gradient


@checked
class FlatParameters:
    """The parameters of a model and guide as one flat vector that shares their memory.

    :ivar named: unconstrained leaf tensors by name, in the order of the vector.
    :ivar flat: the vector: writing to it moves the parameters, in the parameter store and in their modules.
    :raises ValueError: if there is nothing to train, or parameters differ in dtype or device.

    >>> loc, scale = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.ones(()))
    >>> flat = FlatParameters({"loc": loc, "scale": scale}).flat
    >>> _ = flat.add_(1.0); loc.detach(), scale.detach()
    (tensor([1., 1.]), tensor(2.))
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        if not named:
            raise ValueError(
                "no parameter requires a gradient: expected a guide or model with pyro.param or a PyroModule."
            )
        kinds = {(p.dtype, p.device) for p in named.values()}
        if len(kinds) != 1:
            raise ValueError(f"parameters have different dtypes or devices, {sorted(map(str, kinds))}: expected one.")
        first = {id(p): name for name, p in reversed(list(named.items()))}
        self.named = {name: p for name, p in named.items() if first[id(p)] == name}  # tied ones once
        self.flat = torch.cat([p.detach().reshape(-1) for p in self.named.values()])
        self._bind()

    def _bind(self) -> None:
        for start, p in self.places.values():
            p.data = self.flat[start : start + p.numel()].view(p.shape)

    def refresh(self) -> None:
        """Take over values that were put in the place of a parameter's memory since (``p.data = ...``)."""
        start = self.flat.data_ptr()
        if any(p.data_ptr() != start + i * p.element_size() for i, p in self.places.values()):
            self.flat.copy_(torch.cat([p.detach().reshape(-1) for p in self.named.values()]))
            self._bind()

    def check(self, named: Mapping[str, Tensor]) -> None:
        """Check that these are parameters of the vector.

        :raises ValueError: if there are others.
        """
        if new := sorted(name for name, p in named.items() if id(p) not in self.places):
            raise late_parameters(new)

    @cached_property
    def places(self) -> dict[int, tuple[int, Tensor]]:
        """By identity: where each parameter starts in the vector, and the parameter."""
        found, start = {}, 0
        for p in self.named.values():
            found[id(p)] = (start, p)
            start += p.numel()
        return found

    def gradient(self, loss: Tensor) -> Tensor:
        """Gradient of a scalar along the vector; zero for parameters that it does not depend on."""
        leaves = list(self.named.values())
        parts = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in parts])


def late_parameters(names: list[str]) -> ValueError:
    """The error for parameters that are not in the vector."""
    return ValueError(
        f"the parameters {names} appeared, or were replaced in the store, after the first step: expected all of them "
        "at once. Make a new CompiledSVI, or use Pyro's SVI."
    )


def without_new_parameters(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that refuses parameters that the optimiser does not know."""

    def checked(*inputs: Tensor) -> tuple[Tensor, ...]:
        before = set(pyro.get_param_store().keys())
        result: tuple[Tensor, ...] = step(*inputs)
        if new := sorted(set(pyro.get_param_store().keys()) - before):
            raise late_parameters(new)
        return result

    return checked


def flat_update(optim: OptimFactory, named: Mapping[str, Tensor], clip: Clip = None) -> FlatUpdate:
    """The pure update of a Pyro optimiser, or of a callable from the list of parameters to a torch optimiser.

    :param named: the parameters by name, in the order of the flat vector.
    :param clip: ``"adaptive"``, the largest norm of the gradient of all parameters together, or ``None``.
    :raises ValueError: for optimisers without a pure update here, and learning rates that change by themselves.
    """
    parameters = list(named.values())
    kinds, groups = zip(*_groups(optim, parameters), strict=True)
    kind = kinds[0]
    if len(set(kinds)) != 1 or kind not in _RULES:
        raise ValueError(
            f"optim={kind.__name__} has no compiled update: expected one of {', '.join(k.__name__ for k in _RULES)} "
            "(not a subclass), the same for all parameters. Use one of these, or compile=False."
        )
    rule, slots = _RULES[kind]
    hyper = {key: _joined([g[key] for g in groups], parameters) for key in _accepted(rule, groups[0])}
    if kind is torch.optim.SGD and isinstance(hyper["momentum"], (int, float)) and hyper["momentum"] == 0:
        slots = 0
    return FlatUpdate(rule, slots + bool(hyper.get("amsgrad", False)), hyper, clip)


def _groups(optim: OptimFactory, parameters: list[Tensor]) -> Iterable[tuple[type, Hyper]]:
    """Kind of optimiser and hyperparameters of each parameter."""
    if isinstance(optim, pyro.optim.PyroLRScheduler):
        raise ValueError("a PyroLRScheduler has no compiled update: pass its optimiser, and schedule= beside it.")
    if isinstance(optim, PyroOptim):
        _refuse_clip_args(optim)
        made = [optim._get_optim(p) for p in parameters]
        return [(type(o), o.param_groups[0]) for o in made]
    if isinstance(optim, Optimizer) or not callable(optim):
        raise ValueError(
            f"optim={type(optim).__name__}: expected a pyro.optim optimiser, or a callable from the list of parameters "
            "to a torch optimiser, such as functools.partial(torch.optim.Adam, lr=0.01)."
        )
    one = optim(parameters)
    found = {id(p): group for group in one.param_groups for p in group["params"]}
    return [(type(one), found[id(p)]) for p in parameters]


def _refuse_clip_args(optim: Any) -> None:
    if getattr(optim, "pt_clip_args", None):
        raise ValueError("clip_args= of a Pyro optimiser clips parameter by parameter: use clip= (the whole gradient).")


def _accepted(rule: Callable[..., Any], group: Hyper) -> list[str]:
    code = getattr(rule, "func", rule).__code__
    return [key for key in group if key in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]


def _joined(values: list[Any], parameters: list[Tensor]) -> Any:
    """One value where all parameters agree, else a vector along the flat parameters."""
    if any(isinstance(v, Tensor) for v in values):
        values = [float(v) for v in values]
    if all(v == values[0] for v in values):
        return values[0]
    if isinstance(values[0], (tuple, list)):
        return tuple(_joined(list(part), parameters) for part in zip(*values, strict=True))
    if isinstance(values[0], bool):
        raise ValueError(f"parameters differ in a yes-or-no option of their optimiser ({values}): expected the same.")
    sizes = zip(values, parameters, strict=True)
    return torch.cat([torch.full((p.numel(),), float(v), dtype=torch.float64, device=p.device) for v, p in sizes])
