"""Steps that all ranks take together: each on its share, with the mean of their losses and gradients.

What a rank does next depends on nothing that only it has seen: losses, gradients, flags and the answers of callbacks
are exchanged before any decision.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pplvi.compile.flat_optimizers import Exchange
from pplvi.losses.elbo import own_loss
from pplvi.programs.parts import is_part, local
from pplvi.programs.ranks import ProcessGroup, heard
from pplvi.programs.shard import Exchanges, Shard, mean_over
from pplvi.programs.sharding import Sharded, own_noise
from pplvi.programs.state import buffers_of, fingerprint, module_of
from pplvi.training.optimizers import Update
from pplvi.training.parallel.parts import Parts, check_whole_modules
from pplvi.training.parallel.shares import OwnData, Split
from pplvi.training.restart import Restart, is_numerical
from pplvi.training.schedules import norm_of
from pplvi.training.steps import (
    BeforeFirst,
    CompiledStepper,
    CompiledSteps,
    EagerStepper,
    Find,
    StepLoss,
    Stepper,
    Steps,
)
from pplvi.training.watch import Monitor
from pplvi.types import Call, Program


@dataclass
class Meeting:
    """Where the ranks meet: the group, their shares of the data, and what of the programs is split.

    :ivar parts: the modules that the ranks hold in parts.
    :ivar exchanges: the means that the evaluations of steps take.
    :ivar last: the handler of the last evaluation.
    """

    ranks: ProcessGroup
    share: OwnData
    split: Split
    parts: Parts = field(default_factory=Parts)
    exchanges: Exchanges = field(default_factory=Exchanges)
    last: Sharded = field(default_factory=lambda: Sharded(None))

    @contextmanager
    def active(self, exchanges: Exchanges | None = None) -> Iterator[Shard]:
        """Programs inside see this rank's part of the last batch as one that stands for all of it.

        :param exchanges: where to note what is exchanged, unless steps are taken.
        :raises KeyboardInterrupt: if any rank was interrupted.
        """
        part, state = self.share.part, zlib.crc32(torch.get_rng_state().numpy().tobytes()) % 2**20
        stop, rows, total, squares = self.ranks.sums(int(self.ranks.interrupted), part.rows, state, state**2)
        self.ranks.obey(stop > 0)
        if self.ranks.size * squares != total**2:  # programs drew as many numbers as there are elements, say
            torch.manual_seed(random.getrandbits(63))
        whole = rows if part.total is None else part.total
        noted = self.exchanges if exchanges is None else exchanges
        shard = Shard(self.ranks.group, self.split.plates, part.rows, whole, part.absent, noted)
        with Sharded(shard) as self.last, heard(), self.parts.gathered():
            yield shard

    @property
    def drawn(self) -> set[bool]:
        """Whether latents inside (``True``) and outside (``False``) the split plates were drawn last."""
        return self.last.drawn

    def finish(self) -> None:
        """Take the means that others are waiting for, after an evaluation that has failed here."""
        if self.last.shard is not None:
            self.last.shard.finish()

    def align(self, model: Program, guide: Program) -> bool:
        """Let all ranks begin where rank 0 does; whether they did so by themselves.

        :raises ValueError: if they have other parameters, parameters for other data, or parts of parameters.
        """
        store = pyro.get_param_store()
        try:
            self.parts.check(dict(store.named_parameters()))
        except ValueError:
            store.clear()  # memory of parts is freed after a gradient: nobody may look at it on the way out
            raise
        if True in self.drawn and isinstance(module_of(guide), AutoGuide) and not self.split.known:
            raise ValueError(
                f"{type(guide).__name__} draws latents of the data on this rank, and was made before it was known "
                f"which: expected what makes it, guide={type(guide).__name__}, or a function from the model to a guide."
            )
        tensors = {**dict(pyro.get_param_store().named_parameters()), **buffers_of(model=model, guide=guide)}
        common = {name: x for name, x in sorted(tensors.items()) if not (self._is_own(name) or is_part(x))}
        shapes = {name: str(tuple(x.shape)) for name, x in common.items()}
        if not self.ranks.agree(fingerprint(shapes)):
            raise ValueError(
                f"the parameters of the ranks differ in name or shape; here they are {shapes}. Expected the same "
                "programs everywhere, and no parameter whose shape is that of the data."
            )
        if self.ranks.agree(fingerprint(common)):
            return True
        self.ranks.spread([x.data for x in common.values()])
        return False

    def _is_own(self, name: str) -> bool:
        return name in self.split.local or name.rpartition(".")[2].startswith("chain_")

    def packed(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of this rank, with what the others have of their own."""
        own: dict[str, Any] = {
            "params": {n: p for n, p in state["params"].items() if self._is_own(n)},
            "buffers": {n: b for n, b in state["buffers"].items() if self._is_own(n)},
            **({} if self.share.common else {"batches": state["batches"]}),
            **({"update": state["update"]} if self.split.local else {}),
        }
        return {**state, "ranks": self.ranks.gather(own)} if any(own.values()) else state

    def unpacked(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state of this rank.

        :raises ValueError: if it cannot be had from what another number of ranks has left.
        """
        saved: list[dict[str, Any]] = state.get("ranks", [])
        rows = any(own["params"] or "batches" in own for own in saved) or self.split.local or not self.share.common
        if rows and len(saved) != self.ranks.size:
            raise ValueError(
                f"the checkpoint holds parameters or places in the data of {len(saved) or 1} ranks, got "
                f"{self.ranks.size}: expected as many. Models without parameters of single rows, on data that all "
                "ranks have in common, go on with any number."
            )
        own = saved[self.ranks.rank % len(saved)] if saved else {}
        joined = {key: {**state[key], **own.get(key, {})} for key in ("params", "buffers")}
        return {**state, **own, **joined}

    def norm(self, named: Mapping[str, Tensor]) -> Tensor | None:
        """The norm of the gradient of all ranks, where each has parameters, or parts of them, of its own."""
        if not (self.split.local or self.parts.held):
            return None
        parts: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, p in named.items():
            if p.grad is not None:
                parts[name in self.split.local or is_part(p)].append(local(p.grad))
        own, common = (norm_of(part) if part else torch.zeros(()) for part in (parts[True], parts[False]))
        return torch.sqrt(common**2 + self.ranks.size * self.ranks.mean_of(own**2))

    def watched(self, monitor: Monitor, run: Restart, call: Call) -> float:
        """The value of a monitor on the shares of all ranks, or on the data that it holds back."""
        if monitor.held_back is not None:
            return self.ranks.mean(monitor(run, call))
        with self.active(Exchanges()):
            return self.ranks.mean(monitor(run, call))

    def found(self, site: str | None) -> str | None:
        """The site at fault on the first rank that has one."""
        sites = self.ranks.gather(site)
        return next((f"{name} (rank {rank})" for rank, name in enumerate(sites) if name), None)


class _Together(Stepper):
    """What steps of several ranks have in common."""

    meeting: Meeting

    def watched(self, monitor: Monitor, run: Restart, call: Call) -> float:
        """The mean of the ranks' values, in nats."""
        return self.meeting.watched(monitor, run, call)

    def packed(self, state: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds of all ranks."""
        return self.meeting.packed(state)

    def unpacked(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """This rank's state."""
        return self.meeting.unpacked(state)

    def agreed(self, flag: Any) -> bool:
        """Whether any rank says so."""
        return self.meeting.ranks.any(flag)

    def answered(self, ask: Callable[[], Any]) -> bool:
        """Whether any rank says so; Ctrl-C meanwhile ends all of them here."""
        return self.meeting.ranks.any_answer(ask)


class EagerTogether(_Together, EagerStepper):
    """Pyro's ``SVI`` on every rank, with the mean gradient."""

    def __init__(
        self, model: Program, guide: Program, objective: Any, update: Update, first: BeforeFirst, *, meeting: Meeting
    ) -> None:
        self.loss, self.meeting = own_loss(objective), meeting
        super().__init__(model, guide, self.loss, update, first)
        self.svi.loss_and_grads, update.norm = self._loss_and_grads, meeting.norm

    def many(self, calls: Sequence[Call]) -> Sequence[StepLoss]:
        """One step."""
        with self.meeting.active():
            return super().many(calls)

    def replay(self, find: Find, calls: Sequence[Call]) -> str | None:
        """The site at fault on the first rank that has one."""
        with self.meeting.parts.gathered():
            site = super().replay(find, calls)
        return self.meeting.found(site)

    def _loss_and_grads(self, *call: Any, **kwargs: Any) -> float:
        loss = self._evaluated(*call, **kwargs)
        if self.update.count == 0 and not self.meeting.align(self.model, self.guide):
            loss = self._evaluated(*call, **kwargs)
        return self._averaged(loss)

    def _evaluated(self, *call: Any, **kwargs: Any) -> float:
        for _, p in pyro.get_param_store().named_parameters():
            p.grad = None
        self.meeting.exchanges.start()
        loss = None
        try:
            if not self.meeting.parts.modules:
                return self.loss.loss_and_grads(*call, **kwargs)
            loss = self.loss.differentiable_loss(*call, **kwargs)
        except (ValueError, LinAlgError) as error:
            if self.update.count == 0 or not is_numerical(error):
                raise
            self.meeting.finish()
            if not self.meeting.parts.modules:
                return math.nan
        # Gradients of parts are exchanged on the way back, which none goes if one cannot.
        if self.meeting.ranks.any(loss is None) or loss is None:
            return math.nan
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())

    def _averaged(self, loss: float) -> float:
        """Put the mean gradient in the place of each rank's own; the mean loss."""
        named = dict(sorted(pyro.get_param_store().named_parameters()))
        if self.meeting.parts.modules:
            self.meeting.parts.check(named)
        for gradient in (p.grad for name, p in named.items() if name in self.meeting.split.local):
            if gradient is not None:
                gradient /= self.meeting.ranks.size
        common = [p for name, p in named.items() if not (name in self.meeting.split.local or is_part(p))]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in common]
        losses = torch.tensor([loss], dtype=torch.float64, device=parts[0].device if parts else None)
        flat = self.meeting.ranks.mean_of(torch.cat([losses, *(part.reshape(-1) for part in parts)]))
        for p, mean in zip(common, flat[1:].split([p.numel() for p in common]), strict=True):
            if p.grad is not None:
                p.grad.copy_(mean.view_as(p))
        return float(flat[0])


class CompiledTogether(_Together, CompiledStepper):
    """Recorded steps on every rank, which hold the exchange of loss and gradient."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: Any,
        update: Update,
        before_first: BeforeFirst,
        meeting: Meeting,
        **options: Any,
    ) -> None:
        self.meeting = meeting

        def first() -> None:
            meeting.align(model, guide)
            before_first()

        super().__init__(model, guide, objective, update, first, exchange=_Mean(meeting), **options)

    def many(self, calls: Sequence[Call]) -> Sequence[Tensor]:
        """Steps in one call; the losses stay on the device."""
        with self.meeting.active():
            if self.update.count == 0:
                self.prepare(calls[0])
            try:
                with own_noise() if self._draws_apart() else nullcontext():
                    return super().many(calls)
            except LinAlgError as error:  # the others are inside their step: it cannot be taken back together
                raise RuntimeError(
                    f"a recorded step has failed on rank {self.meeting.ranks.rank}, while others go on: {error}. "
                    "Expected matrices that can be factorised; with compile=False all ranks go back together."
                ) from error

    def _draws_apart(self) -> bool:
        """Whether all random numbers of a step are this rank's own.

        :raises ValueError: if some are and others are common: a recording has one stream of them.
        """
        if self.meeting.split.local:
            raise ValueError(
                f"the parameters {sorted(self.meeting.split.local)} have rows for the data of this rank: expected "
                "compile=False, or a guide whose parameters are the same for all data."
            )
        drawn = self.meeting.drawn
        if len(drawn) == 2:
            raise ValueError(
                "recorded steps of several ranks draw either latents of their own data or latents that all share: "
                "expected one of them, got both. Use compile=False."
            )
        return True in drawn

    def replay(self, find: Find, calls: Sequence[Call]) -> str | None:
        """The site at fault on the first rank that has one, found step by step."""
        return super().replay(lambda *call: self.meeting.found(find(*call)), calls)


class _Mean(Exchange):
    """The mean of loss and gradient over the ranks, as an operation of a recorded step."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting

    @property
    def key(self) -> Hashable:  # type: ignore[override]
        """Recorded steps know how many elements are here and on all ranks."""
        shard = self.meeting.last.shard
        return None if shard is None else (shard.rows, shard.total, shard.absent)

    def __call__(self, loss: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Both, averaged as one vector."""
        ranks = self.meeting.ranks
        mean = mean_over(torch.cat([loss.reshape(1).to(gradient.dtype), gradient]), ranks.group, ranks.size)
        return mean[0], mean[1:]


def together(steps: Steps, meeting: Meeting) -> Steps:
    """The same steps, taken by all ranks.

    :raises ValueError: for loops of steps inside one program, in which the ranks cannot meet.
    """
    base = (steps.optim, steps.num_steps, steps.schedule, steps.clip)
    if not isinstance(steps, CompiledSteps):
        return _EagerTogether(*base, meeting=meeting)
    check_whole_modules(meeting.parts.modules, f"compile={steps.mode!r}")
    if steps.mode == "max":
        raise ValueError("compile='max' with several ranks: expected True, 'trace' or 'auto'.")
    return _CompiledTogether(*base, mode=steps.mode, chunk=steps.chunk, meeting=meeting)


@dataclass
class _EagerTogether(Steps):
    meeting: Meeting = field(kw_only=True)

    def __call__(self, model: Program, guide: Program, objective: Any, before_first: BeforeFirst) -> Stepper:
        return EagerTogether(model, guide, objective, self.update(), before_first, meeting=self.meeting)


@dataclass
class _CompiledTogether(CompiledSteps):
    meeting: Meeting = field(kw_only=True)

    def stepper(self, *programs: Any, **options: Any) -> CompiledStepper:
        """One that all ranks take."""
        model, guide, objective, update, before_first = programs
        return CompiledTogether(model, guide, objective, update, before_first, self.meeting, **options)
