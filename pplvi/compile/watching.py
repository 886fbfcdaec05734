"""What happens to tensors while a step is recorded: what is written to in place, what varies, what is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from pplvi.compile.reading import Tape, tensors_in

aten = torch.ops.aten

BRANCH = "a Python value taken from a tensor (a branch, .item(), float(), bool(), .tolist() or .numpy())"
SHAPE = "a shape that depends on the data (boolean indexing, nonzero, unique)"
_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}


class Refusal(BaseException):
    """Why an operation cannot be part of a graph. No ``Exception``: programs that catch one shall not hide it."""


class Writes(TorchDispatchMode):
    """Note which tensors are written to in place, and what they held before."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.fresh: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})[0]

    def run(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        """The result of an operation, and the tensors that it wrote to."""
        written = [args[i] for i in written_by(func) if i < len(args)]
        for x in written:
            self._remember(x)
        result = func(*args, **kwargs)
        given = {id(x) for x in args}
        results = [x for x in tensors_in(result) if id(x) not in given]
        self.made.update((x, True) for x in results)
        self.fresh.update(_storages(results) - _storages(tensors_in((args, kwargs))))
        return result, written

    def _remember(self, x: Any) -> None:
        """Keep the values of a tensor that is older than this; a view made meanwhile stands for what it views."""
        if not isinstance(x, Tensor) or _storages([x]) & self.fresh:  # a new parameter shares a new tensor's memory
            return
        whole = x._base if x in self.made and x._base is not None else x
        if whole not in self.made and id(whole) not in self.before:
            with _disable_current_modes():
                self.before[id(whole)] = (whole, whole.detach().clone())

    def wrote(self, tensor: Tensor) -> bool:
        """Whether a tensor has been written to."""
        return id(tensor) in self.before

    def put_back(self) -> None:
        """Undo what was done to tensors that are older."""
        with torch.no_grad():
            for tensor, value in self.before.values():
                tensor.copy_(value)


def _storages(tensors: Iterable[Tensor]) -> set[StorageWeakRef]:
    return {StorageWeakRef(x.untyped_storage()) for x in tensors}


class Varying(Writes):
    """Follow what varies from step to step, and refuse to bake it in.

    Parameters and noise vary, and so does all that is worked out from them. The rest is constant: its values may be
    read, and its masks become indices. What follows from arguments is so for arguments of which the same is read.
    """

    def __init__(self, varying: Iterable[Tensor]) -> None:
        super().__init__()
        self.varying: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.tape = Tape()
        self.mark(varying)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.index.Tensor:
            args = (args[0], [part for i in args[1] for part in self._indices(i)])
        elif torch.Tag.dynamic_output_shape in func.tags and func is not aten.index_put_.default:
            return self._constant(func, args, kwargs, SHAPE)
        elif torch.Tag.data_dependent_output in func.tags:
            return self._constant(func, args, kwargs, BRANCH)
        result, written = self.run(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags or self.varies(args, kwargs):
            self.mark(tensors_in((result, written)))
        elif self.tape.follows(args, kwargs):
            if written:  # what is written to in place cannot be worked out again
                self.mark(tensors_in((result, written)))
            else:
                self.tape.note(func, args, kwargs, result)
        return result

    def varies(self, *tree: Any) -> bool:
        """Whether any tensor in nested containers follows from parameters or noise."""
        return any(x in self.varying for x in tensors_in(tree))

    def mark(self, tensors: Iterable[Tensor]) -> None:
        """Note that these tensors vary."""
        self.varying.update((x, True) for x in tensors)

    def _constant(self, func: Any, args: Any, kwargs: Any, reason: str) -> Any:
        if self.varies(args, kwargs):
            raise Refusal(reason)
        self.tape.read(self.tape.follows(args, kwargs))
        with _disable_current_modes():
            return func(*args, **kwargs)

    def _indices(self, index: Any) -> Sequence[Any]:
        """A constant mask as indices, one for each of its dimensions."""
        if not isinstance(index, Tensor) or index.dtype not in (torch.bool, torch.uint8):
            return (index,)
        if self.varies(index):
            raise Refusal(SHAPE)
        self.tape.read(self.tape.follows(index))
        with _disable_current_modes():
            found: Sequence[Tensor] = index.nonzero().unbind(1)
        return found


class VaryingCalls(TorchFunctionMode):
    """Refuse calls that read the memory of a tensor that varies without an operation."""

    def __init__(self, watch: Varying) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS and self.watch.varies(args):
            raise Refusal(BRANCH)
        if func in _READS:
            self.watch.tape.read(self.watch.tape.follows(args))
        return func(*args, **(kwargs or {}))


def written_by(func: Any) -> Sequence[int]:
    """Positions of the arguments that an operation writes to."""
    if func is aten.native_batch_norm.default:
        return (3, 4)  # its schema keeps quiet about the running mean and variance
    arguments = func._schema.arguments if isinstance(func, torch._ops.OpOverload) else ()
    return [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
