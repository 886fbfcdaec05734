"""Random numbers, and all else that programs do and ``torch.func.vmap`` does not know, for a run of many particles.

Pyro's distributions draw in place (``x.normal_()``), read ``.data``, reject and try again. Inside :func:`carried` these
happen out of place, for every particle by itself, and a factorisation that fails does so for its particle alone.

Draws of these branch on their values, or have gradients of their own, and are left to the loop: AVFMultivariateNormal,
CoalescentTimes, DirichletMultinomial, GaussianScaleMixture, MixtureOfDiagNormals, MixtureOfDiagNormalsSharedCovariance,
OMTMultivariateNormal, ProjectedNormal, SineBivariateVonMises, SineSkewed, SpanningTree, Stable, StableWithLogProb,
Wishart. Their densities at given values are carried, except those of SineBivariateVonMises, SineSkewed, Stable and
Wishart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.ops import special
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.distributions import dirichlet, von_mises

from pplvi.programs.factorising import FACTORISATIONS, SoundFactors
from pplvi.programs.together import TOGETHER, all_together, at_front, is_batched


def of_all(value: Tensor) -> Tensor:
    """The tensor of all particles behind that which is seen, inside ``vmap``, as one particle's."""
    while _functorch.is_functorch_wrapped_tensor(value):
        value = _functorch.get_unwrapped(value)
    return value


def carries_gradient(value: Tensor) -> bool:
    """Whether a tensor requires a gradient, seen through ``vmap``, inside of which none seems to."""
    return of_all(value).requires_grad


@contextmanager
def for_all_particles() -> Iterator[None]:
    """Leave ``vmap`` for a while: what is drawn here, such as a minibatch, is the same for all particles."""
    if _functorch.maybe_current_level() is None:
        yield
    else:
        with temporarily_pop_interpreter_stack():
            yield


def _normal(x: Tensor, mean: Any = 0.0, std: Any = 1.0, **_: Any) -> Tensor:
    return mean + std * _like(torch.randn, x)


def _uniform(x: Tensor, a: float = 0.0, b: float = 1.0, **more: Any) -> Tensor:
    low, high = more.get("from", a), more.get("to", b)
    return low + (high - low) * _like(torch.rand, x)


def _exponential(x: Tensor, lambd: float = 1.0, **_: Any) -> Tensor:
    return -torch.log1p(-_like(torch.rand, x)) / lambd


def _cauchy(x: Tensor, median: float = 0.0, sigma: float = 1.0, **_: Any) -> Tensor:
    return median + sigma * (math.pi * (_like(torch.rand, x) - 0.5)).tan()


def _log_normal(x: Tensor, mean: float = 1.0, std: float = 2.0, **_: Any) -> Tensor:
    return _normal(x, mean, std).exp()


def _geometric(x: Tensor, p: float, **_: Any) -> Tensor:
    return (torch.log1p(-_like(torch.rand, x)) / math.log1p(-p)).ceil()


def _bernoulli(x: Tensor, p: Any = 0.5, **_: Any) -> Tensor:
    return torch.bernoulli(torch.as_tensor(p, device=x.device, dtype=torch.get_default_dtype()).expand(x.shape)).to(x)


def _like(make: Callable[..., Tensor], x: Tensor) -> Tensor:
    return make(x.shape, dtype=x.dtype, device=x.device)


_DRAWS: dict[Any, Callable[..., Tensor]] = {
    torch.Tensor.normal_: _normal,
    torch.Tensor.uniform_: _uniform,
    torch.Tensor.exponential_: _exponential,
    torch.Tensor.cauchy_: _cauchy,
    torch.Tensor.log_normal_: _log_normal,
    torch.Tensor.geometric_: _geometric,
    torch.Tensor.bernoulli_: _bernoulli,
}

_FACTORIES = frozenset(
    {
        *(torch.zeros, torch.ones, torch.empty, torch.full, torch.eye, torch.arange, torch.tensor),
        *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like),
        *(torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_empty, torch.Tensor.new_full),
        *(torch.Tensor.clone, torch.clone, torch.Tensor.new_tensor),
    }
)

_DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_OTHERWISE = frozenset(
    {*_DRAWS, *_FACTORIES, *FACTORISATIONS, *TOGETHER, _DATA, torch.Tensor.clamp_, torch.binomial, torch.Tensor.new}
)


class OutOfPlace(SoundFactors):
    """Do out of place what ``vmap`` cannot do in place.

    :param token: a number of each particle: new tensors are then one of each particle, into which draws can be written.
    :param spoil: leave NaN where a program wrote random numbers in place and may read them again, for a check to see.
    """

    def __init__(self, token: Tensor | None = None, *, spoil: bool = False, drawing: bool = False) -> None:
        super().__init__(drawing=drawing)
        self.token, self.spoil = token, spoil

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of torch in its own or in another way."""
        kwargs = kwargs or {}
        if func not in _OTHERWISE:  # most by far
            return func(*args, **kwargs)
        if func in TOGETHER:
            known = all_together(func, args, kwargs)
            return func(*args, **kwargs) if known is None else known
        if func in _DRAWS and not (is_batched(args[0]) and self.token is not None):
            return self._drawn(func, args, kwargs)
        if func is torch.Tensor.clamp_:
            return args[0].copy_(torch.clamp(*args, **kwargs))
        if func is torch.binomial:
            return torch.binomial(*_alike(*args), **kwargs)
        if func == _DATA:
            return args[0].detach()
        if func is torch.Tensor.new:
            return self._of_each(_renewed(*args, **kwargs))
        found = super().__torch_function__(func, types, args, kwargs)
        return self._of_each(found) if func in _FACTORIES else found

    def _drawn(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        found = _DRAWS[func](*args, **kwargs)
        if self.spoil and args[0].is_floating_point() and not is_batched(args[0]):
            args[0].detach().fill_(math.nan)
        return found

    def _of_each(self, found: Tensor) -> Tensor:
        if self.token is None or is_batched(found) or _functorch.maybe_current_level() is None:
            return found
        return torch.where(self.token == self.token, found, found)


def _alike(count: Tensor, prob: Tensor) -> tuple[Tensor, Tensor]:
    """Both numbers as each particle's, if one is."""
    own = (count == count) & (prob == prob)
    return torch.where(own, count, count), torch.where(own, prob, prob)


def _renewed(like: Tensor, *size: Any, **options: Any) -> Tensor:
    """The legacy constructor ``x.new(...)``: a new tensor of a shape, or of data."""
    if len(size) == 1 and not isinstance(size[0], int):
        if not isinstance(size[0], torch.Size):
            return torch.as_tensor(size[0], dtype=like.dtype, device=like.device)
        size = tuple(size[0])
    return torch.empty(size, dtype=like.dtype, device=options.get("device") or like.device)


class _WithoutGradient(torch.autograd.Function):
    """A function that is a constant to autograd, and that ``vmap`` can carry."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _DirichletSlope(_WithoutGradient):
    """The derivative of a Dirichlet draw, element by element: all particles at once."""

    @staticmethod
    def forward(*args: Tensor) -> Tensor:
        return torch._dirichlet_grad(*args)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        return _DirichletSlope.apply(*at_front(info.batch_size, in_dims, args)), 0


class _Dirichlet(torch.autograd.Function):
    """A draw of a Dirichlet distribution with its implicit gradient, as torch has it, that ``vmap`` can carry."""

    generate_vmap_rule = True

    @staticmethod
    def forward(concentration: Tensor) -> Tensor:
        return torch._sample_dirichlet(concentration)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        value, concentration = ctx.saved_tensors
        total = concentration.sum(-1, True).expand_as(concentration)
        slope = _DirichletSlope.apply(value, concentration, total)
        (grad,) = grads
        return slope * (grad - (value * grad).sum(-1, True))


class _Rejection(_WithoutGradient):
    """Draws by rejection, which takes as many rounds as the slowest element needs: one loop for all particles."""

    @staticmethod
    def forward(*args: Tensor) -> Tensor:
        return _REJECTION(*args)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        moved = at_front(info.batch_size, in_dims, args)
        return _Rejection.apply(*moved[:-1], moved[-1].contiguous()), 0


_REJECTION = von_mises._rejection_sample


def _rejected(loc: Tensor, concentration: Tensor, proposal: Tensor, x: Tensor) -> Tensor:
    found: Tensor = _Rejection.apply(loc, concentration, proposal, _like(torch.rand, x))
    return found


class _SafeLog(torch.autograd.Function):
    """Pyro's logarithm with a finite slope at zero, used to sum over enumerated values, that ``vmap`` can carry."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.log()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,), (grad,) = ctx.saved_tensors, grads
        return grad / x.clamp(min=torch.finfo(x.dtype).eps)


@contextmanager
def carried(mode: OutOfPlace) -> Iterator[None]:
    """Run programs inside ``vmap``: random numbers of each particle's own, and no checks of arguments, which would
    branch on values and have been made in a plain run."""
    known = dirichlet._Dirichlet, von_mises._rejection_sample, special._SafeLog
    dirichlet._Dirichlet, von_mises._rejection_sample = _Dirichlet, _rejected  # type: ignore[misc, assignment]
    special._SafeLog = _SafeLog  # type: ignore[misc, assignment]
    try:
        with pyro.validation_enabled(False), mode:
            yield
    finally:
        dirichlet._Dirichlet, von_mises._rejection_sample, special._SafeLog = known  # type: ignore[misc]
