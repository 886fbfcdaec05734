"""State-space models, one time step after another: what runs at a step, and what it remembers of the steps before.

Two ways to write such a model are understood. An object with methods ``init`` and ``step``, as for Pyro's
``SMCFilter``: ``init(state, **kwargs)`` and then ``step(state, *data of the step)`` write to ``state``, a dictionary,
whatever later steps need of the draws; the proposal has the same methods and only reads it. Or an ordinary program
with a ``pyro.markov`` loop, whose iterations are the steps; the proposal is a program with a loop of the same length.
Tensors in the state have the particles leftmost, then the plates, then event dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from pyro.nn import PyroModule
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.programs.errors import warn
from pplvi.programs.handlers import parameters_of
from pplvi.programs.markov import Iterations, Numbered, OnlyIteration
from pplvi.programs.running import isolated
from pplvi.programs.single import run_alone
from pplvi.programs.sites import Plate, common_plates, is_deterministic, sample_sites
from pplvi.programs.traces import Run
from pplvi.types import Program

Memory = dict[str, Any]


class Course(Protocol):
    """A model and its proposal, cut into time steps."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the two."""
        ...

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Their keyword arguments."""
        ...

    @property
    def num_steps(self) -> int:
        """Number of steps, the first one included."""
        ...

    def propose(self, step: int, memory: Memory) -> Program:
        """What draws the latents of a step."""
        ...

    def score(self, step: int, memory: Memory) -> Program:
        """The model's part of a step; it may write to the memory."""
        ...

    def remember(self, memory: Memory, values: Mapping[str, Tensor]) -> Memory:
        """The memory after a step in which the latents had these values."""
        ...

    def look_ahead(self, step: int, memory: Memory) -> Tensor | None:
        """Log of the factor that stands for the data to come, ``(num_particles, *plates)``; ``None`` without one."""
        ...


def course_of(model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Course:
    """Cut a model and its proposal into time steps.

    :raises ValueError: if the two are not written in the same way, or the data do not fit together.
    """
    forms = [has_steps(program) for program in (model, guide)]
    if all(forms):
        return Stepped(model, guide, args, kwargs)
    if any(forms) or not (callable(model) and callable(guide)):
        raise ValueError(
            f"model {model!r} and proposal {guide!r}: expected two objects with methods init and step, or two programs "
            "with a pyro.markov loop. Write both in the same way."
        )
    return Looped(model, guide, args, kwargs)


def has_steps(program: Any) -> bool:
    """Whether a model or proposal is an object with the methods ``init`` and ``step``."""
    return callable(getattr(program, "init", None)) and callable(getattr(program, "step", None))


def inside(owner: Any) -> AbstractContextManager[Any]:
    """Where the methods of an object run, so that parameters of a Pyro module are Pyro's."""
    context: AbstractContextManager[Any] = owner._pyro_context if isinstance(owner, PyroModule) else nullcontext()
    return context


@dataclass(frozen=True)
class Stepped:
    """Objects with ``init`` and ``step``: positional arguments are sequences over time, keywords go to ``init``.

    Step 0 is ``init(state, **kwargs)``, step ``t`` is ``step(state, *(arg[t - 1] for arg in args))``, and a proposal's
    ``look_ahead(state, *(arg[t:] for arg in args))`` sees the data that are still to come.
    """

    model: Any
    guide: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __post_init__(self) -> None:
        if len(set(self._lengths)) != 1 or 0 in self._lengths:
            raise ValueError(
                f"{len(self.args)} positional arguments of lengths {self._lengths}: expected at least one, all with "
                "time as their first dimension and equally long, one entry for each call of step. What is not a "
                "sequence over time goes to init, as a keyword argument."
            )

    @cached_property
    def _lengths(self) -> list[int]:
        return [len(arg) if isinstance(arg, Sequence | Tensor) and not _is_scalar(arg) else 0 for arg in self.args]

    @property
    def num_steps(self) -> int:
        """``init``, and a step for each entry of the data."""
        return 1 + self._lengths[0]

    def _call(self, owner: Any, step: int, state: Memory) -> Program:
        def part() -> None:
            with inside(owner):
                if step == 0:
                    owner.init(state, **self.kwargs)
                else:
                    owner.step(state, *(arg[step - 1] for arg in self.args))

        return part

    def propose(self, step: int, memory: Memory) -> Program:
        """The proposal's method, on a copy of the state that nobody reads again."""

        def part() -> None:
            state = dict(memory)
            self._call(self.guide, step, state)()
            if state.keys() != memory.keys() or any(state[key] is not memory[key] for key in memory):
                raise ValueError(
                    f"the proposal {self.guide!r} writes to the state: expected it to read only. Let the model's init "
                    "or step write what later steps need."
                )

        return part

    def score(self, step: int, memory: Memory) -> Program:
        """The model's method; it writes to the state."""
        return self._call(self.model, step, memory)

    def remember(self, memory: Memory, values: Mapping[str, Tensor]) -> Memory:
        """The state as the model has written it."""
        return memory

    def look_ahead(self, step: int, memory: Memory) -> Tensor | None:
        """The proposal's ``look_ahead``, if it has one."""
        if (factor := getattr(self.guide, "look_ahead", None)) is None:
            return None
        with inside(self.guide):
            found: Tensor = factor(memory, *(arg[step:] for arg in self.args))
        return found


def _is_scalar(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.dim() == 0


@dataclass(frozen=True)
class Looped:
    """Programs with a ``pyro.markov`` loop. What stands before the loop belongs to its first step.

    A program cannot be stopped and resumed with other draws, so each step runs it again from its start: time grows
    with the square of the length. A proposal's ``look_ahead(values, step, *args, **kwargs)`` sees all draws by name.
    """

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @cached_property
    def num_steps(self) -> int:
        """Number of iterations of the two loops."""
        counts = {name: self._count(program) for name, program in (("model", self.model), ("proposal", self.guide))}
        if len(set(counts.values())) > 1:
            raise ValueError(f"pyro.markov loops of {counts} iterations: expected one length. Give both the same loop.")
        return counts["model"]

    def _count(self, program: Program) -> int:
        with isolated(), Iterations() as iterations:
            program(*self.args, **self.kwargs)
        return iterations.count + 1

    def _part(self, program: Program, step: int, memory: Memory) -> Program:
        def part() -> None:
            with OnlyIteration(step, memory):
                program(*self.args, **self.kwargs)

        return part

    def propose(self, step: int, memory: Memory) -> Program:
        """One iteration of the proposal."""
        return self._part(self.guide, step, memory)

    def score(self, step: int, memory: Memory) -> Program:
        """One iteration of the model."""
        return self._part(self.model, step, memory)

    def remember(self, memory: Memory, values: Mapping[str, Tensor]) -> Memory:
        """All values so far, by name."""
        return {**memory, **values}

    def look_ahead(self, step: int, memory: Memory) -> Tensor | None:
        """The proposal's ``look_ahead``, if it has one."""
        if (factor := getattr(self.guide, "look_ahead", None)) is None:
            return None
        with inside(self.guide):
            found: Tensor = factor(memory, step, *self.args, **self.kwargs)
        return found


@dataclass(frozen=True)
class Plates:
    """How deep the plates of a model and proposal nest, and those around every site of all steps."""

    nesting: int
    common: tuple[Plate, ...]

    @property
    def batch(self) -> frozenset[str]:
        """Names of the plates around every site."""
        return frozenset(plate.name for plate in self.common)

    @property
    def apart(self) -> bool:
        """Whether a value in the shape of one particle shows which of its dimensions are those of common plates."""
        return not self.common or self.nesting == len(self.common)


def plates_of(course: Course) -> Plates:
    """The plates of a course, from a plain run of its first two steps; later ones are taken to have the same."""
    traces: list[Run] = []
    with isolated():
        memory: Memory = {}
        for step in range(min(2, course.num_steps)):
            drawn = _plain(course.propose(step, memory), {})
            values = {name: site["value"] for name, site in sample_sites(drawn.model) if not site["is_observed"]}
            scored = _plain(course.score(step, memory), {**drawn.subsample_indices(of_model=True), **values})
            memory = course.remember(memory, values)
            traces += [drawn, scored]
            if step + 1 < course.num_steps:
                course.look_ahead(step, memory)
    sites = [site for run in traces for _, site in sample_sites(run.model) if not is_deterministic(site)]
    return Plates(max(run.deepest for run in traces), common_plates(sites))


def _plain(program: Program, values: Mapping[str, Tensor]) -> Run:
    return run_alone(program, (), {}, num_particles=1, nesting=0, values=values)


def warn_of_untrained(course: Course, *owners: Any) -> None:
    """Warn of plain torch modules whose parameters Pyro does not see in the first steps: nothing would train them."""
    seen = {id(leaf) for leaf in parameters_of(lambda: plates_of(course)).values()}
    for owner in owners:
        modules = owner.named_modules() if isinstance(owner, torch.nn.Module) else ()
        plain = {
            f"{name}.{part}": leaf for name, m in modules if not isinstance(m, PyroModule) for part, leaf in _own(m)
        }
        if unseen := [name for name, leaf in plain.items() if leaf.requires_grad and id(leaf) not in seen]:
            warn(
                f"parameters {unseen} of {type(owner).__name__} are not trained, because Pyro does not see them: "
                "expected a PyroModule with parts such as PyroModule[torch.nn.Linear](...), all the way down, or "
                "pyro.module(name, part).",
            )


def _own(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return module.named_parameters(recurse=False)


@checked
class StateSpace(PyroModule):
    """A state-space model with ``init`` and ``step`` as an ordinary Pyro program, for posteriors and predictions.

    It is called as the filter is: positional arguments are sequences over time, keyword arguments go to ``init``.
    Sites of ``init`` keep their names, those of step ``t`` get ``_t`` at the end unless they have it.

    :param model: an object with methods ``init(state, ...)`` and ``step(state, ...)``.
    :raises ValueError: for an object without these methods.

    >>> import pyro, pyro.distributions as dist, torch
    >>> class Walk:
    ...     def init(self, state):
    ...         state["z"] = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     def step(self, state, y):
    ...         state["z"] = pyro.sample("z", dist.Normal(state["z"], 1.0))
    ...         pyro.sample("y", dist.Normal(state["z"], 1.0), obs=y)
    >>> model = StateSpace(Walk())
    >>> sorted(name for name, _ in sample_sites(pyro.poutine.trace(model).get_trace(torch.zeros(2))))
    ['y_1', 'y_2', 'z', 'z_1', 'z_2']
    """

    def __init__(self, model: Any, *, name: str = "") -> None:
        super().__init__(name)
        if not has_steps(model):
            raise ValueError(f"{model!r} has no methods init and step: expected a model as for pyro.infer.SMCFilter.")
        self.model = model

    def init(self, state: Memory, **kwargs: Any) -> None:
        """The model's first step."""
        with inside(self.model):
            self.model.init(state, **kwargs)

    def step(self, state: Memory, *args: Any) -> None:
        """The model's later steps."""
        with inside(self.model):
            self.model.step(state, *args)

    def forward(self, *args: Any, **kwargs: Any) -> Memory:
        """All steps, one after another; the state after the last."""
        course, state = Stepped(self, self, args, kwargs), dict[str, Any]()
        course.score(0, state)()
        for number in range(1, course.num_steps):
            with Numbered(number):
                course.score(number, state)()
        return state
