"""The effect handlers of the inference core: how it looks into programs and steers their draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import ImproperUniform
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor
from torch.distributions import biject_to

from pplvi.kinds.checked import checked
from pplvi.programs.randomness import carries_gradient
from pplvi.programs.sites import can_draw, is_computed, is_delta, is_deterministic, is_factor, is_subsample, site_plates


class Detach(Messenger):
    """Detach every draw where it is made, so that later sites already see the detached value."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            if (is_delta(msg) or is_computed(msg)) and carries_gradient(msg["value"]):
                raise ValueError(
                    f"site {msg['name']!r} is a deterministic function of parameters, so it has no density at fixed "
                    "draws: expected a stochastic guide for this objective or estimator. Use an objective with "
                    "reparameterised draws (estimator=None) or another guide."
                )
            msg["value"] = msg["value"].detach()


class Supply(Messenger):
    """Give the named sample sites these values instead of drawing them."""

    def __init__(self, values: Mapping[str, Tensor], *, but_delta: bool = False) -> None:
        super().__init__()
        self.values, self.but_delta = values, but_delta

    def _pyro_sample(self, msg: Any) -> None:
        if self.but_delta and is_delta(msg):
            return
        if not msg["is_observed"] and msg["name"] in self.values:
            msg["value"], msg["done"] = without_padding(self.values[msg["name"]], msg["fn"]), True


def without_padding(value: Any, fn: Any) -> Any:
    """A value without the dimensions of size 1, left of the shape of its distribution, that stand for nothing here.

    >>> without_padding(torch.zeros(1, 3, 2), pyro.distributions.Normal(torch.zeros(2), 1.0)).shape
    torch.Size([3, 2])
    """
    if not isinstance(value, Tensor) or is_subsample({"type": "sample", "fn": fn}):
        return value
    extra = value.dim() - len(fn.batch_shape) - len(fn.event_shape)
    padding = 0
    while padding < extra and value.shape[padding] == 1:
        padding += 1
    return value.reshape(value.shape[padding:]) if padding else value


class Uncondition(UnconditionMessenger):
    """Draw observed sites; deterministic ones and factors, which Pyro marks as observed too, stay as they are, and so
    do those of densities that have no draws."""

    def _pyro_sample(self, msg: Any) -> None:
        if not (is_deterministic(msg) or is_factor(msg)) and can_draw(msg["fn"]):
            super()._pyro_sample(msg)


class Sized(Messenger):
    """Show the plates of a program as automatic guides can make them again.

    Those that have no size (``pyro.plate("data")``) get the one of what is inside; sequential ones are left out, since
    a guide has a site for each of their turns.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not is_subsample(msg) and _unsized(msg):
            sizes = {p.name: p.size for p in site_plates(msg)}
            frames = (f for f in msg["cond_indep_stack"] if f.vectorized)
            msg["cond_indep_stack"] = tuple(
                f._replace(size=sizes[f.name], full_size=sizes[f.name]) if f.size < 0 else f for f in frames
            )


def _unsized(site: Any) -> bool:
    return any(not f.vectorized or f.size < 0 for f in site["cond_indep_stack"])


def sized(program: Callable[..., Any], args: Any, kwargs: Any) -> Callable[..., Any]:
    """A program whose plates automatic guides can make; the program itself, if they can with these arguments."""
    with poutine.trace() as recorder:
        program(*args, **kwargs)
    if not any(s["type"] == "sample" and _unsized(s) for s in recorder.trace.nodes.values()):
        return program

    @wraps(program)
    def run(*args: Any, **kwargs: Any) -> Any:
        with Sized():
            return program(*args, **kwargs)

    return run


class Somewhere(Messenger):
    """Give latents that cannot be drawn, those with improper priors, values anywhere in their supports."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if isinstance(fn, ImproperUniform) and not msg["is_observed"] and msg["value"] is None:
            transform = biject_to(fn.support)
            free = 2 * torch.rand(transform.inverse_shape(fn.shape()), dtype=float_dtype(fn)) - 1
            msg["value"], msg["done"] = transform(free).expand(fn.shape()), True


def float_dtype(fn: Any) -> torch.dtype:
    """The floating point type of a distribution's draws, which is that of its parameters, without drawing.

    >>> import pyro.distributions as dist
    >>> float_dtype(dist.LogNormal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    torch.float64
    """
    parts = [value for value in vars(fn).values() if isinstance(value, Tensor) and value.is_floating_point()]
    found = [part.dtype for part in parts]
    found += [float_dtype(getattr(fn, base)) for base in ("base_dist", "_normal", "_gamma") if hasattr(fn, base)]
    return max(found, key=lambda dtype: torch.finfo(dtype).bits, default=torch.get_default_dtype())


class SubsampleRecorder(Messenger):
    """Note the indices that a program passes to its plates by itself (``pyro.plate(..., subsample=...)``)."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg) and msg["value"] is not None:
            self.given[msg["name"]] = msg["value"]


class _Noting(Messenger):
    """Note the names of the sites that are met."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        self.names.append(msg["name"])


def within(context: Callable[[], AbstractContextManager[Any]], program: Callable[..., Any]) -> Callable[..., Any]:
    """A program that runs inside a context, and is seen through by what looks for the program behind handlers.

    >>> from contextlib import nullcontext
    >>> inner = lambda x: x + 1
    >>> within(nullcontext, inner)(1), poutine.unwrap(within(nullcontext, inner)) is inner
    (2, True)
    """
    wrapped: Any = partial(_within, context, program)
    wrapped.__wrapped__ = program
    return cast(Callable[..., Any], wrapped)


def _within(context: Callable[[], AbstractContextManager[Any]], program: Any, /, *args: Any, **kwargs: Any) -> Any:
    with context():
        return program(*args, **kwargs)


@contextmanager
def last_site() -> Iterator[list[str]]:
    """A list that grows by the name of each sample site that is met: its last entry says where a failure was."""
    with _Noting() as noting:
        yield noting.names


@checked
def parameters_of(run: Callable[[], Any]) -> dict[str, Tensor]:
    """Unconstrained leaf tensors, by name, of every parameter that a computation asks for; random state untouched."""
    state = pyro.util.get_rng_state()
    with _Leaves() as recorder:
        run()
    pyro.util.set_rng_state(state)
    return {name: leaf for name, leaf in recorder.found.items() if leaf.requires_grad}


class _Leaves(Messenger):
    """Note the leaves of parameters as they are met: some do not outlive the run of the program that made them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Tensor] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        self.found[msg["name"]] = msg["value"].unconstrained()


@contextmanager
def aside() -> Iterator[None]:
    """Run programs for themselves inside the run of another one, without its plates; parameters are shared with it."""
    taken, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        with poutine.block(hide_fn=lambda msg: msg["type"] == "sample"):
            yield
    finally:
        _DIM_ALLOCATOR._stack = taken


def rewritten(program: Callable[..., Any], configure: Callable[[Any], Any]) -> Callable[..., Any]:
    """A program whose sample sites are rewritten by ``pyro.infer.reparam``: ``configure`` has the rule for each."""
    found: Callable[..., Any] = poutine.reparam(program, config=configure)
    return found
