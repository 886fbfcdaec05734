"""Global state that a run borrows and gives back: random numbers, the default dtype and the default device."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pplvi.programs.parts import is_part, sharded_in


def rng_state() -> dict[str, Any]:
    """State of torch's (all devices), NumPy's and Python's global random generators."""
    return {**pyro.util.get_rng_state(), **torch_rng_state()}


def torch_rng_state() -> dict[str, Any]:
    """The part of :func:`rng_state` that is torch's own."""
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`rng_state` returned."""
    pyro.util.set_rng_state(dict(state))
    set_torch_rng_state(state)


def set_torch_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the part of it that is torch's own."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


_recording: ContextVar[bool] = ContextVar("recording", default=False)


@contextmanager
def recording() -> Iterator[None]:
    """Say that operations are being written down in the block."""
    before = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(before)


def is_recording() -> bool:
    """Whether operations are being written down (or ``make_fx`` does so): values cannot be looked at then."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return _recording.get() or get_proxy_mode() is not None


@contextmanager
def preserved_rng(active: bool = True) -> Iterator[None]:
    """Leave the global random state as it was, unless ``active`` is false."""
    state = rng_state()
    try:
        yield
    finally:
        if active:
            set_rng_state(state)


@contextmanager
def preserved_parameters() -> Iterator[None]:
    """Leave Pyro's parameter store as it was: what is in it is seen, what is made inside the block is forgotten."""
    store = pyro.get_param_store()
    before = dict(store._params), dict(store._param_to_name), dict(store._constraints)
    try:
        yield
    finally:
        store._params, store._param_to_name, store._constraints = before


def map_tree(function: Any, tree: Any) -> Any:
    """Apply ``function`` to every tensor in nested tuples, lists and dictionaries; other leaves stay as they are."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tree(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tree(function, value) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tree(function, value) for value in tree)
    return tree


def clone(tree: Any) -> Any:
    """A copy of nested containers whose tensors are detached clones."""
    return map_tree(lambda x: x.detach().clone(), tree)


def _feed(digest: Any, tree: Any) -> None:
    if isinstance(tree, (Tensor, np.ndarray)):
        array = np.asarray(tree.detach().cpu() if isinstance(tree, Tensor) else tree)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    elif isinstance(tree, Mapping):
        for key in sorted(tree, key=str):
            digest.update(str(key).encode())
            _feed(digest, tree[key])
    elif isinstance(tree, (tuple, list)):
        digest.update(f"[{len(tree)}]".encode())
        for value in tree:
            _feed(digest, value)
    else:  # the address in the repr of an object is no part of the data
        digest.update(repr(tree).encode() if isinstance(tree, (int, float, str, bool, type(None))) else b"object")


def fingerprint(tree: Any) -> str:
    """A hash of the tensors, arrays, numbers and strings in nested containers, equal in every process.

    >>> fingerprint((torch.zeros(2), {"n": 3})) == fingerprint((torch.zeros(2), {"n": 3}))
    True
    """
    digest = hashlib.sha256()
    _feed(digest, tree)
    return digest.hexdigest()


@dataclass(frozen=True)
class Environment:
    """Default dtype and device of a run; ``None`` leaves them alone.

    :raises ValueError: if ``dtype`` is not a floating point dtype, or ``device`` none.
    """

    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise ValueError(f"dtype={self.dtype!r}: expected a floating point dtype such as torch.float64, or None.")
        try:
            torch.device("cpu" if self.device is None else self.device)
        except (RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"device={self.device!r}: expected a device such as 'cpu' or 'cuda:0' ({reason})."
            ) from error

    @contextmanager
    def active(self) -> Iterator[None]:
        """Set the defaults inside the block and put the old ones back."""
        old = torch.get_default_dtype()
        try:
            with ExitStack() as stack:
                if self.device is not None:
                    stack.enter_context(torch.device(self.device))
                if self.dtype is not None:
                    torch.set_default_dtype(self.dtype)
                yield
        finally:
            torch.set_default_dtype(old)

    def move(self, tree: Any) -> Any:
        """Tensors on the device, floating point ones in the dtype; data, which get no gradient of their own."""
        live: list[Tensor] = []
        map_tree(lambda x: live.append(x) if x.requires_grad else None, tree)
        return map_tree(self._move, tree) if live or (self.dtype, self.device) != (None, None) else tree

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(device=self.device, dtype=self.dtype if tensor.is_floating_point() else None)

    def move_module(self, program: Any) -> None:
        """Move the parameters and buffers of a program that is, or is a method of, a module (in place).

        :raises ValueError: for parameters of which every rank has a part, and which are elsewhere.
        """
        if (module := module_of(program)) is None or (self.dtype, self.device) == (None, None):
            return
        parts = [p for p in module.parameters() if is_part(p)]
        if not parts:
            module.to(device=self.device, dtype=self.dtype)
            return
        device = parts[0].device if self.device is None else torch.device(self.device)
        if any((p.dtype, p.device.type) != (self.dtype or p.dtype, device.type) for p in parts):
            raise ValueError(
                f"{type(module).__name__} has parameters in {parts[0].dtype} on {parts[0].device.type}, of which every "
                f"rank has a part: expected {self.dtype or parts[0].dtype} on {device.type}. Move the module there "
                "before fully_shard."
            )
        for tensor in (*module.parameters(), *module.buffers()):
            if not is_part(tensor):
                tensor.data = self._move(tensor.data)


def module_of(program: Any) -> torch.nn.Module | None:
    """The module that a program is, or is a bound method of, seen through handlers around it."""
    program = inspect.unwrap(program, stop=inspect.ismethod) if callable(program) else program
    owner = getattr(program, "__self__", program)
    return owner if isinstance(owner, torch.nn.Module) else None


def modules_of(program: Any) -> dict[str, torch.nn.Module]:
    """The module that a program is or is a method of; else those among its owner's attributes, or in its closure.

    >>> encoder = torch.nn.Linear(2, 1)
    >>> list(modules_of(lambda x: encoder(x))), list(modules_of(encoder.forward))
    (['encoder'], [''])
    >>> list(modules_of(functools.partial(encoder, torch.nn.ReLU())))
    ['', '0']
    """
    program = inspect.unwrap(program, stop=inspect.ismethod)
    given: dict[str, Any] = {}
    while isinstance(program, functools.partial):
        given |= {**dict(zip(map(str, itertools.count(len(given))), program.args, strict=False)), **program.keywords}
        program = inspect.unwrap(program.func, stop=inspect.ismethod)
    given = {name: value for name, value in given.items() if isinstance(value, torch.nn.Module)}
    if (module := module_of(program)) is not None:
        return {"": module, **given}
    if (owner := getattr(program, "__self__", None)) is not None or not inspect.isfunction(program):
        found: Mapping[str, Any] = getattr(program if owner is None else owner, "__dict__", {})
    else:
        cells = program.__closure__ or ()
        inside = {n: c.cell_contents for n, c in zip(program.__code__.co_freevars, cells, strict=True) if _is_full(c)}
        names = program.__code__.co_names
        found = {**{n: program.__globals__[n] for n in names if n in program.__globals__}, **inside}
    return {**{name: value for name, value in found.items() if isinstance(value, torch.nn.Module)}, **given}


def sharded_of(*programs: Any) -> list[Any]:
    """The modules behind programs that FSDP2's ``fully_shard`` has sharded, each once.

    >>> encoder = torch.nn.Linear(2, 1)
    >>> sharded_of(lambda x: encoder(x))
    []
    """
    return sharded_in(module for program in programs for module in modules_of(program).values())


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # what it will refer to is not defined yet
        return False


@contextmanager
def preserved_buffers(**programs: Any) -> Iterator[None]:
    """Leave the buffers of the modules behind programs as they were, such as the statistics of batch normalisation.

    >>> norm = torch.nn.BatchNorm1d(2)
    >>> with preserved_buffers(model=norm):
    ...     _ = norm(torch.randn(4, 2))
    >>> norm.num_batches_tracked
    tensor(0)
    """
    before = [(buffer, buffer.clone()) for buffer in buffers_of(**programs).values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):  # a write, even of the same value, would spoil gradients under way
                    buffer.copy_(value)


def buffers_of(**programs: Any) -> dict[str, Tensor]:
    """Buffers of the modules behind programs: what a training step may change beside the parameters.

    >>> sorted(buffers_of(model=torch.nn.BatchNorm1d(2)))
    ['model.num_batches_tracked', 'model.running_mean', 'model.running_var']
    """
    found = {f"{role}.{name}".rstrip("."): m for role, p in programs.items() for name, m in modules_of(p).items()}
    return {f"{role}.{name}": buffer for role, module in found.items() for name, buffer in module.named_buffers()}


def reseed(seed: int) -> None:
    """What ``pyro.set_rng_seed`` does, at a tenth of its time where there is no accelerator: for a device that has not
    begun yet, torch notes the stack of calls.

    >>> pyro.set_rng_seed(7)
    >>> expected = torch.rand(()), np.random.rand(), random.random()
    >>> reseed(7)
    >>> expected == (torch.rand(()), np.random.rand(), random.random())
    True
    """
    if torch.accelerator.is_available():
        pyro.set_rng_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@contextmanager
def random_state(seed: int | None) -> Iterator[None]:
    """Seed torch (all devices), NumPy and Python within, and put their states back afterwards.

    :param seed: the seed; ``None`` draws from the global state as usual.
    :raises ValueError: if the seed is negative or does not fit in 32 bits.

    >>> import torch
    >>> before = torch.get_rng_state()
    >>> with random_state(0):
    ...     first = torch.rand(3)
    >>> with random_state(0):
    ...     second = torch.rand(3)
    >>> torch.equal(first, second), torch.equal(before, torch.get_rng_state())
    (True, True)
    """
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"got seed={seed}; expected an integer from 0 to 2**32 - 1, which NumPy takes.")
    with preserved_rng(active=seed is not None):
        if seed is not None:
            reseed(seed)
        yield
