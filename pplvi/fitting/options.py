"""What some arguments of ``fit`` are when one value does not say it all; the short forms stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed

from pplvi.compile.svi import CompileMode
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.programs.calls import LastBatch, check_last_batch
from pplvi.programs.ranks import ProcessGroup, join
from pplvi.programs.state import sharded_of
from pplvi.training.checkpoint import PathLike
from pplvi.training.parallel.distributing import distributed
from pplvi.training.plan import TrainingPlan
from pplvi.training.steps import CompiledSteps, EagerSteps, Steps


@checked
@dataclass(frozen=True)
class Minibatches:
    """Data of ``fit`` whose last batch may be shorter; the iterable itself for short.

    :param data: a ``DataLoader`` or another iterable, each item what the model is called with.
    :param last_batch: what to do with minibatches that are shorter than the first: ``"compile"`` uses them as they are
        (which records and compiles a second step for them), ``"drop"`` leaves them out, ``"pad"`` fills them up with
        their own first elements, which count twice in that step.
    :raises ValueError: for another word.

    >>> Minibatches([1.0, 2.0], last_batch="drop").last_batch
    'drop'
    """

    data: Iterable[Any] | None
    last_batch: LastBatch = "compile"

    def __post_init__(self) -> None:
        check_last_batch(self.last_batch)

    @classmethod
    def of(cls, data: Any) -> Minibatches:
        """The iterable alone, or the whole."""
        return data if isinstance(data, cls) else cls(data)


@checked
@dataclass(frozen=True)
class Compile:
    """How ``fit`` compiles its steps; the mode for short.

    :param mode: ``True``: a step that is traced once and compiled by inductor; ``"trace"``: traced, run without a
        compiler; ``"max"``: compiled with a loop of steps inside; ``"auto"``: compiled where that is possible, and
        otherwise as ``False``, Pyro's handlers at every step. See :class:`pplvi.CompiledSVI`.
    :param chunk: the most steps in one call of the program, at most 50.
    :raises ValueError: for another mode or number.

    >>> Compile("max", chunk=20)
    Compile(mode='max', chunk=20)
    """

    mode: CompileMode = True
    chunk: Count = 50

    def __post_init__(self) -> None:
        if self.chunk > 50:
            raise ValueError(f"chunk={self.chunk}: expected at most 50, after which the loop looks at the losses.")

    @classmethod
    def of(cls, compile: Any) -> Compile:
        """The mode alone, or the whole.

        >>> Compile.of("trace")
        Compile(mode='trace', chunk=50)
        """
        return compile if isinstance(compile, cls) else cls(compile)

    def steps(self, *options: Any) -> Steps:
        """What makes the steps of each restart.

        :param options: of :class:`pplvi.training.Update`.
        """
        if self.mode is False:
            return EagerSteps(*options)
        return CompiledSteps(*options, mode=self.mode, chunk=self.chunk)


@checked
@dataclass(frozen=True)
class Checkpoint:
    """A file that ``fit`` writes now and then, and at the end of every restart; its path for short.

    :param path: of the file.
    :param every: steps between two checkpoints.
    :raises ValueError: for a number below 1.

    >>> Checkpoint("run.pt", every=100)
    Checkpoint(path='run.pt', every=100)
    """

    path: PathLike
    every: Count = 500

    @classmethod
    def of(cls, checkpoint: Any) -> Checkpoint | None:
        """The path alone, or the whole; ``None`` for none."""
        return checkpoint if checkpoint is None or isinstance(checkpoint, cls) else cls(checkpoint)


@dataclass(frozen=True)
class DataParallel:
    r"""How ``fit`` splits a plate over the ranks of a ``torch.distributed`` group.

    Rank :math:`r` of :math:`R` has :math:`n_r` of the :math:`n` rows of a batch, and all ranks move the same parameters
    by the mean :math:`\tfrac1R \sum_r g_r` of gradients whose plates are scaled by :math:`R`: the gradient of one
    process with all rows, whatever the sizes of the shards. Where latents are outside of the plate, the densities of
    the sites inside are averaged before the objective, so that bounds of joint weights are exact too.

    :param shard: every rank is given the full data as ``args=`` and keeps a slice. Otherwise batches that all ranks
        have in common are sliced, and others, such as those of a ``DistributedSampler``, are the shards.
    :param timeout: seconds after which a rank that does not answer counts as lost, where ``fit`` makes the group; those
        of ``torch.distributed`` unless given.
    :raises ValueError: for a time that is no positive number.

    Source: Li et al. (2020), "PyTorch distributed: experiences on accelerating data parallel training".

    >>> DataParallel(shard=True)
    DataParallel(shard=True, timeout=None)
    """

    shard: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.shard, bool):
            raise ValueError(f"shard={self.shard!r}: expected True or False.")
        number = isinstance(self.timeout, (int, float)) and not isinstance(self.timeout, bool)
        if self.timeout is not None and not (number and self.timeout > 0):
            raise ValueError(f"timeout={self.timeout!r}: expected a positive number of seconds, or None.")

    @classmethod
    def of(cls, parallel: Any) -> DataParallel | None:
        """The options; ``None`` for ``"none"``, one process, and for ``"restarts"``, which keep the data whole.

        :raises ValueError: for anything else.
        """
        if parallel is None or isinstance(parallel, cls):
            return parallel or cls()
        if isinstance(parallel, str) and parallel in ("none", "restarts"):
            return None
        raise ValueError(f"parallel={parallel!r}: expected None, 'none', 'restarts', or pplvi.fitting.DataParallel().")

    def applied(self, plan: TrainingPlan) -> TrainingPlan:
        """The plan for all ranks of the group that there is or that torchrun describes; the same one without.

        A single rank counts where modules are sharded, over itself.
        """
        ranks = join(self.timeout)
        if not isinstance(ranks, ProcessGroup) and sharded_of(plan.recipe.model, plan.recipe.guide):
            ranks = ProcessGroup(torch.distributed.group.WORLD)
        return distributed(plan, ranks, self.shard) if isinstance(ranks, ProcessGroup) else plan
