"""Running a program under handlers: with all particles, alone, or without touching any state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pplvi.programs.errors import explained
from pplvi.programs.factorising import retried
from pplvi.programs.handlers import Detach, Somewhere, SubsampleRecorder, Supply
from pplvi.programs.masks import balance_missing
from pplvi.programs.minibatches import FewIndices
from pplvi.programs.sharding import unsplit
from pplvi.programs.sites import PARTICLES, is_subsample
from pplvi.programs.state import is_recording, preserved_buffers, preserved_parameters, preserved_rng, reseed
from pplvi.programs.traces import Run
from pplvi.types import Program


@dataclass(frozen=True)
class How:
    """How to run a pair of programs."""

    num_particles: int = 1
    nesting: int = 0
    enumerated: bool = False
    detach: bool = False
    values: Mapping[str, Tensor] | None = None

    def particles(self) -> AbstractContextManager[Any]:
        """The plate of the particles."""
        # One particle runs the programs as they are: models that cannot be vectorised work too.
        if self.num_particles == 1:
            return nullcontext()
        return pyro.plate(PARTICLES, self.num_particles, dim=-self.nesting - 1)

    def enumerating(self, *, first: bool) -> AbstractContextManager[Any]:
        """Enumeration on the dimensions left of plates and particles; ``first`` for what runs first."""
        if not self.enumerated:
            return nullcontext()
        return poutine.enum(first_available_dim=-self.nesting - 2 if first else None)

    def drawing(self) -> AbstractContextManager[Any]:
        """How draws are made: detached, or with their path."""
        return Detach() if self.detach else nullcontext()


def run_pair(model: Program, guide: Program, args: Any, kwargs: Any, how: How) -> Run:
    """Run the guide, and the model replayed against it."""
    guide_trace = run_guide(guide, args, kwargs, how)
    if isinstance(messenger := poutine.unwrap(guide), GuideMessenger):  # it ran the model already
        return Run(guide_trace, messenger.get_traces()[0], how.num_particles, how.nesting, how.enumerated)
    # Replay goes outside enumeration, which has to see every site before it is replaced.
    around = poutine.replay(trace=guide_trace), how.enumerating(first=False), how.particles()
    recorder = SubsampleRecorder()
    model_trace = trace_within(recorder(model), args, kwargs, *around)
    balance_missing(model_trace, guide_trace)
    given = frozenset(recorder.given)
    return Run(guide_trace, model_trace, how.num_particles, how.nesting, how.enumerated, given)


def run_guide(guide: Program, args: Any, kwargs: Any, how: How) -> Trace:
    """Trace the guide alone."""
    with how.drawing(), Supply(how.values or {}):
        trace = trace_within(guide, args, kwargs, how.enumerating(first=True), how.particles())
    if not isinstance(messenger := poutine.unwrap(guide), GuideMessenger):
        return trace
    guide_trace = messenger.get_traces()[1]
    guide_trace.nodes.update({name: site for name, site in trace.nodes.items() if is_subsample(site)})
    return guide_trace


def trace_within(program: Program, args: Any, kwargs: Any, *contexts: AbstractContextManager[Any]) -> Trace:
    """Trace a program inside contexts, the first outermost."""

    def run() -> None:
        with ExitStack() as stack:
            for context in (FewIndices(), *contexts):
                stack.enter_context(context)
            program(*args, **kwargs)

    return poutine.trace(run).get_trace()


@contextmanager
def isolated() -> Iterator[None]:
    """Run a program for inspection: no gradient, no new parameter in the store (its initial value would depend on who
    inspected first), and a random state that is neither advanced nor used twice."""
    with preserved_rng(), preserved_parameters(), torch.no_grad(), unsplit():
        if not is_recording():
            reseed(int(torch.randint(2**31, ())))
        yield


def plain_run_of_pair(model: Program, guide: Program, args: Any, kwargs: Any) -> Run:
    """One run of a pair as it is, without particles, that leaves the random state as it was."""
    with isolated(), preserved_buffers(model=model, guide=guide), explained():
        run = retried(lambda: run_pair(model, guide, args, kwargs, How()))
    return replace(run, nesting=run.deepest)


def plain_run(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    """One run of a model alone, without particles, that leaves the random state as it was."""
    with Somewhere():
        return plain_run_of_pair(model, no_guide, args, kwargs)


def no_guide(*args: Any, **kwargs: Any) -> None:
    """A guide without sites."""
