"""Training steps traced once and compiled: an unchanged Pyro program without Pyro's handlers at run time.

A step is a pure function of parameters, optimiser state and data: run guide and model, take the objective's gradient,
update. :mod:`pplvi.compile.tracing` records it once as a graph of tensor operations, in which the parameters are
slices of one flat vector; :mod:`pplvi.compile.backends` runs the graph as it is (``"trace"``), compiled by inductor
(``True``), or compiled with a loop of many steps inside (``"max"``). Random numbers are drawn anew at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, Literal, cast

import pyro
import torch
from torch import Tensor

from pplvi.compile import backends
from pplvi.compile.flat_optimizers import (
    Clip,
    Exchange,
    FlatParameters,
    FlatUpdate,
    OptimFactory,
    State,
    flat_update,
    without_new_parameters,
)
from pplvi.compile.reading import Guard, Programs, Variant
from pplvi.compile.stacking import stacked_alike
from pplvi.compile.tracing import Traced, Untraceable, check_variants, record, unchanged
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.losses.elbo import own_loss
from pplvi.programs.calls import Arguments, LastBatch, check_last_batch, in_runs, stacked, to_call
from pplvi.programs.errors import warn
from pplvi.programs.first_run import first_bad_site
from pplvi.programs.handlers import parameters_of
from pplvi.programs.state import buffers_of
from pplvi.types import Call, Program

_Loop = tuple[int, Sequence[Tensor]]
CompileMode = Literal["trace", "max", "auto"] | bool

MODES = (False, "trace", True, "max", "auto")


@checked
class CompiledSVI:
    r"""Pyro's ``SVI`` with a step that is traced once and compiled.

    One step takes the gradient estimate :math:`g` of the loss (nats), clips it, and updates all parameters as one
    vector, with :math:`f` the schedule:

    .. math:: (\theta, s) \leftarrow \text{update}(\theta, \text{clip}(g), s; \; \text{lr} \cdot f(t))

    :param model: a Pyro model.
    :param guide: a Pyro guide.
    :param optim: a Pyro optimiser, or a callable from the list of parameters to a torch optimiser, among Adam, AdamW,
        ClippedAdam, SGD, Adagrad and AdagradRMSProp.
    :param loss: any loss of this package; exactly Pyro's ``Trace_ELBO`` and ``TraceEnum_ELBO`` stand for
        :class:`pplvi.ELBO`, and ``TraceMeanField_ELBO`` for ``pplvi.ELBO(entropy="kl")``.
    :param mode: ``True`` (inductor), ``"trace"`` (the graph run eagerly; needs no compiler), ``"max"`` (inductor, with
        a loop of steps inside for :meth:`run` and :meth:`epoch`), ``False`` (Pyro's handlers at every step), or
        ``"auto"``: ``True`` where the step can be traced and there is a compiler, and otherwise ``"trace"`` or
        ``False``, with one warning.
    :param schedule: a function from the step to a factor of the learning rate, such as :class:`pplvi.training.Cosine`.
    :param clip: ``"adaptive"``, the largest norm of the gradient of all parameters together, or ``None``.
    :param last_batch: what to do with a batch that is shorter than the first: ``"compile"`` a second program for it,
        ``"drop"`` it, or ``"pad"`` it with its own first elements, which count twice in that step.
    :param chunk: steps in one call of a ``"max"`` program.
    :param exchange: of loss and gradient with other processes, before the clip.
    :raises ValueError: for an optimiser, loss or option that is not one of these; at the first step, for programs that
        cannot be traced, with the site and the reason, and without a compiler. Parameters are as they were then.

    A new graph is recorded for every new shape, dtype, or value of an argument that is no tensor, and for new values
    of what the programs read of tensor arguments, such as ``int(lengths.max())``. Python code runs only while
    recording: counters and closures keep the values that they had. Parameters share the memory of one vector:
    ``guide.median`` and ``Predictive`` see every step. What is compiled for the CPU is in ``TORCHINDUCTOR_CACHE_DIR``.

    Source: Ranganath, Gerrish & Blei (2014), "Black box variational inference", for the step.

    >>> import pyro.distributions as dist
    >>> from pplvi.losses.elbo import ELBO
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(y):
    ...     pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)
    >>> guide = AutoNormal(model)
    >>> svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.02}), ELBO(num_particles=8), mode="trace")
    >>> losses = svi.run(500, torch.tensor(2.0))
    >>> losses.shape, round(guide.median()["z"].item(), 1)
    (torch.Size([500]), 1.0)
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        optim: OptimFactory,
        loss: Any,
        *,
        mode: CompileMode = True,
        schedule: Callable[[int], float] | None = None,
        clip: Clip = None,
        last_batch: LastBatch = "compile",
        chunk: Count = 100,
        exchange: Exchange | None = None,
    ) -> None:
        check_last_batch(last_batch)
        self.model, self.guide, self.optim, self.mode = model, guide, optim, mode
        self.loss, self.exchange = own_loss(loss), exchange or Exchange()
        self.schedule, self.clip, self.last_batch, self.chunk = schedule, clip, last_batch, chunk
        self.parameters: FlatParameters | None = None
        self.state, self.count = cast(State, ()), 0
        self._update: FlatUpdate | None = None
        self._waiting: Mapping[str, Any] | None = None
        self._programs = Programs()
        self._size: int | None = None

    def __getstate__(self) -> Any:
        raise ValueError(
            "a CompiledSVI holds recorded and compiled programs, which neither pickle nor copy: expected its "
            "state_dict(), which does, and load_state_dict() of a new one."
        )

    # ------------------------------------------------------------------ training

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One training step.

        :returns: the loss before the step, in nats.
        """
        return float(self.run(1, *args, **kwargs))

    def run(self, num_steps: int, *args: Any, **kwargs: Any) -> Tensor:
        """Several training steps on the same arguments.

        :returns: the losses, ``(num_steps,)``, in nats; reading them is the first wait for the device.
        """
        arguments = Arguments.of(args, kwargs)
        flat = self._ready(arguments).flat
        losses = [flat.new_zeros(0)]
        while num_steps > 0:
            taken = min(self.chunk, num_steps)
            losses.append(self._same(arguments, taken))
            num_steps -= taken
        return torch.cat(losses)

    def epoch(self, batches: Iterable[Any]) -> Tensor:
        """One training step on each batch: a tuple of arguments, a dictionary of keyword arguments, or one tensor.

        :returns: the losses, one for each batch that was used, in nats.
        """
        calls = (call for batch in batches if (call := self._fitted(batch)) is not None)
        losses = [self._each(run) for run in in_runs(calls, self.chunk)]
        return torch.cat(losses) if losses else torch.zeros(0)

    def steps(self, calls: Sequence[Call]) -> Tensor:
        """One training step on each call, ``(args, kwargs)``; calls that are one object are not stacked.

        :returns: the losses, ``(len(calls),)``, in nats.
        """
        if all(call is calls[0] for call in calls):
            return self.run(len(calls), *calls[0][0], **calls[0][1])
        return torch.cat([self._each(run) for run in in_runs((Arguments.of(*c) for c in calls), self.chunk)])

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Make the parameters, without a step."""
        self._ready(Arguments.of(args, kwargs))

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss at the present parameters, through Pyro's handlers."""
        return float(self.loss.loss(self.model, self.guide, *args, **kwargs))

    def first_bad_site(self, *args: Any, **kwargs: Any) -> str | None:
        """First site whose value or density is not finite, in an eager replay at the present parameters."""
        return first_bad_site(self.model, self.guide, args, kwargs)

    def _fitted(self, batch: Any) -> Arguments | None:
        """The batch, dropped or padded if it is shorter than the first one."""
        arguments = Arguments.of(*to_call(batch))
        size = self._size = self._size or arguments.size
        return arguments.fitted(size, self.last_batch)

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, but for the data: parameters, buffers, optimiser, random state.

        :raises ValueError: before the first step.
        """
        parameters, _ = self._made()
        return {
            "parameters": {name: p.detach().clone() for name, p in parameters.named.items()},
            "buffers": {name: b.clone() for name, b in self.buffers().items()},
            "optimizer": self.optimizer_state(),
            "count": self.count,
            "rng": pyro.util.get_rng_state(),
        }

    def optimizer_state(self) -> list[Tensor]:
        """Copies of the step count, the optimiser's vectors and the clip's norms; none before the first step."""
        waiting = self._waiting or {}
        return [s.clone() for s in (self.state or waiting.get("optimizer", ()))]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was called; before the first step, the state waits for it.

        What the state lacks, among parameters, buffers and random state, stays; no optimiser state starts it anew.

        :raises ValueError: if the state is of other parameters or another optimiser.
        """
        self._waiting = state
        if self.parameters is not None:
            self._put_back(*self._made(), state)

    def _put_back(self, parameters: FlatParameters, update: FlatUpdate, state: Mapping[str, Any]) -> None:
        values = state.get("parameters", parameters.named)
        optimizer = state["optimizer"] or update.init(parameters.flat)
        mine, theirs = ({n: tuple(p.shape) for n, p in named.items()} for named in (parameters.named, values))
        if mine != theirs or [s.shape for s in self.state] != [s.shape for s in optimizer]:
            raise ValueError(f"the state has the parameters {theirs}: expected {mine}, the same optimiser and clip.")
        with torch.no_grad():
            for name, p in parameters.named.items():
                p.copy_(values[name])
            for name, buffer in self.buffers().items():
                buffer.copy_(state.get("buffers", {}).get(name, buffer))
            for old, value in zip(self.state, optimizer, strict=True):
                old.copy_(value)
        self.count, self._waiting = state["count"], None
        if "rng" in state:
            pyro.util.set_rng_state(state["rng"])

    # ------------------------------------------------------------------ the step

    def _made(self) -> tuple[FlatParameters, FlatUpdate]:
        if self.parameters is None or self._update is None:
            raise ValueError("there are no parameters before the first step: expected a step, or run(0, *args).")
        return self.parameters, self._update

    def _ready(self, arguments: Arguments) -> FlatParameters:
        """The parameters: materialised at the first call, which moves neither the random state nor buffers."""
        if self.parameters is None:
            with backends.uncollected():
                parameters = FlatParameters(self._asked_for(arguments))
                self._update = flat_update(self.optim, parameters.named, self.clip)
            self.state = self._update.init(parameters.flat)
            if self._waiting is not None:
                self._put_back(parameters, self._update, self._waiting)
            self.parameters = parameters
        self.parameters.refresh()
        return self.parameters

    def _asked_for(self, arguments: Arguments) -> dict[str, Tensor]:
        """The parameters that one plain run uses; it checks the programs too, which a recorded one cannot."""
        args, kwargs = arguments.call(arguments.tensors)
        self.loss.prepare(self.model, self.guide, *args, **kwargs)
        with unchanged():
            return parameters_of(lambda: self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs))

    def _step_on(self, arguments: Arguments) -> Callable[..., tuple[Tensor, ...]]:
        """The step as a pure function ``(flat, *state, rate, *tensors) -> (flat, *state, loss)``."""
        (parameters, update), width = self._made(), 1 + len(self.state)

        def step(*inputs: Tensor) -> tuple[Tensor, ...]:
            (flat, *state), (rate, *tensors) = inputs[:width], inputs[width:]
            args, kwargs = arguments.call(tensors)
            with torch.enable_grad():
                loss = self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs)
                loss, gradient = self.exchange(loss.detach(), parameters.gradient(loss))
            with torch.no_grad():
                new, new_state = update(flat, gradient, tuple(state), rate)
            return new, *new_state, loss

        return step

    def _same(self, arguments: Arguments, num_steps: int) -> Tensor:
        """At most a chunk of steps on the same arguments."""
        if self.mode == "max":
            return self._loop(arguments, num_steps, arguments.tensors, stacks=0)
        return self._one_by_one([arguments] * num_steps)

    def _each(self, calls: Sequence[Arguments]) -> Tensor:
        """At most a chunk of steps, each on its own arguments of the same shapes."""
        self._ready(calls[0])
        if self.mode != "max":
            return self._one_by_one(calls)
        data = stacked(calls, self.chunk)
        guard = self._variant(calls[0], (len(data), data)).guard
        same = list(takewhile(lambda call: guard.holds(call.tensors), calls))
        data = stacked(same, self.chunk)
        losses = self._loop(same[0], len(same), data, stacks=len(data))
        return torch.cat([losses, self._each(calls[len(same) :])]) if len(same) < len(calls) else losses

    def _one_by_one(self, calls: Sequence[Arguments]) -> Tensor:
        with torch.no_grad():
            found = {id(call): self._variant(call, None).program for call in {id(x): x for x in calls}.values()}
            rates = self.rates(len(calls), len(calls)).unbind()
            flat = self._ready(calls[0]).flat
            steps = zip(rates, calls, strict=True)
            losses = [found[id(call)](flat, *self.state, rate, *call.tensors) for rate, call in steps]
        self.count += len(calls)
        return torch.stack(losses)

    def _loop(self, arguments: Arguments, num_steps: int, data: Sequence[Tensor], stacks: int) -> Tensor:
        with torch.no_grad():
            program = self._variant(arguments, (stacks, data)).program
            steps = torch.tensor(num_steps, device=self._ready(arguments).flat.device)
            rates = self.rates(num_steps, self.chunk)
            losses: Tensor = program(self._ready(arguments).flat, *self.state, rates, steps, *data)
        self.count += num_steps
        return losses[:num_steps]

    def rates(self, num_steps: int, length: int) -> Tensor:
        """Factors of the learning rate for the next steps, filled up to a length."""
        steps = range(self.count, self.count + num_steps)
        factors = [1.0 if self.schedule is None else float(self.schedule(t)) for t in steps]
        return torch.tensor(factors + [0.0] * (length - num_steps), dtype=torch.float64, device=self.state[0].device)

    def _variant(self, arguments: Arguments, loop: _Loop | None) -> Variant:
        def make(others: int) -> Variant:
            return cast(Variant, self.settled(lambda: self._make(arguments, loop, others)))

        return self._programs.find(arguments, (loop and loop[0], self.exchange.key), make)

    def settled(self, make: Callable[[], Any]) -> Any:
        """What this makes; in mode ``"auto"`` with the first mode that it can be made in, and a warning for another."""
        try:
            with backends.uncollected():
                return make()
        except ValueError as error:
            if self.mode != "auto":
                raise
            self.mode = False if isinstance(error, Untraceable) else "trace"
            how = "Pyro's handlers" if self.mode is False else "the graph without a compiler"
            warn(f"compile='auto' falls back to {how}: {error}")
            return self.settled(make)

    def _make(self, arguments: Arguments, loop: _Loop | None, others: int) -> Variant:
        carried = self.carried()
        if self.mode is False:
            step = without_new_parameters(self._step_on(arguments))
            return Variant(Guard(), backends.in_place(step, len(carried)))
        check_variants(others)
        traced, inputs = self.recorded(arguments), (torch.ones_like(self.state[0]), *arguments.tensors)
        program = self.backend(traced, (*carried, *traced.state), inputs, loop)
        return Variant(traced.guard, lambda *x: program(*x[: len(carried)], *traced.state, *x[len(carried) :]))

    def carried(self) -> tuple[Tensor, ...]:
        """What goes from step to step: the parameters as one vector, and the optimiser's state."""
        parameters, _ = self._made()
        parameters.refresh()
        return parameters.flat, *self.state

    def recorded(self, arguments: Arguments) -> Traced:
        """The step on such arguments as a graph.

        :raises Untraceable: with the site and the reason.
        """
        parameters, _ = self._made()
        parameters.check(self._asked_for(arguments))
        carried = self.carried()
        inputs = (*carried, torch.ones_like(self.state[0]), *arguments.tensors)
        with self._same_buffers():
            traced = record(self._step_on(arguments), inputs, parameters.places, len(carried), len(arguments.tensors))
        inside = (*carried, *traced.state, *inputs[len(carried) :])
        return stacked_alike(traced, inside, len(carried) + len(traced.state), noise=self.mode != "trace")

    def backend(
        self, traced: Traced, carried: Sequence[Tensor], inputs: Sequence[Tensor], loop: _Loop | None
    ) -> Program:
        """A graph as a program, in this mode.

        :raises ValueError: without a compiler, in modes that need one.
        """
        if self.mode == "trace":
            return backends.as_is(traced, len(carried))
        if loop is None:
            return backends.compiled(traced, len(carried), (*carried, *inputs))
        rates = self.rates(0, self.chunk)
        given = (*carried, rates, torch.tensor(1), *loop[1])
        return backends.looped(traced, len(carried), given, self.chunk, loop[0])

    @contextmanager
    def _same_buffers(self) -> Iterator[None]:
        """Refuse programs that put a new tensor in the place of a buffer: a recorded step would not see it."""
        before = self.buffers()
        yield
        if replaced := sorted(name for name, b in self.buffers().items() if before.get(name) is not b):
            raise Untraceable(
                f"the step cannot be traced: it puts new tensors in the place of the buffers {replaced}. Expected "
                "changes in place, such as buffer.copy_(value)."
            )

    def buffers(self) -> dict[str, Tensor]:
        """Buffers of the modules behind model, guide and loss, which steps may change in place."""
        return buffers_of(model=self.model, guide=self.guide, loss=self.loss)
