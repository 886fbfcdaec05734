"""What some arguments of ``fit`` are when one value does not say it all; the short forms stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pplvi.compile.svi import CompileMode
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.programs.calls import LastBatch, check_last_batch
from pplvi.training.checkpoint import PathLike
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
