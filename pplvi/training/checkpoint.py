"""Checkpoint files: written whole or not at all, checked when they are read, and unable to run code.

A file is a ``torch.save`` archive that opens with ``weights_only=True``. It holds a format name, a version, and the
state as bytes with their SHA-256: torch itself does not notice a flipped bit in a tensor. Writing goes to a temporary
file in the same directory, which is flushed to the disk and then renamed over the old one, so that at every moment the
path holds one complete checkpoint, whatever happens to the process.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor

from pplvi.kinds.annotations import misfit
from pplvi.kinds.kinds import Condition
from pplvi.programs.parts import is_part

FORMAT = "pplvi-checkpoint"
VERSION = 1
PathLike = str | os.PathLike[str]

_LEAVES = (Tensor, bool, int, float, str, bytes, type(None))
_ARRAY = "__ndarray__"


def encode(value: Any, where: str = "state") -> Any:
    """Nested containers of what a file without code can hold; NumPy arrays and scalars are converted.

    :raises ValueError: with the place of anything else.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype != object:
        signed = value.astype(np.int64) if value.dtype.kind == "u" else value
        return {_ARRAY: torch.as_tensor(signed), "dtype": str(value.dtype)}
    if is_part(value):
        raise ValueError(
            f"{where} is a tensor of which every rank holds a part, which one file cannot hold: expected whole ones. "
            "Resume the checkpoint of the fit in one process, without fully_shard, and save what that returns."
        )
    if isinstance(value, Tensor):
        return value.detach() if value.is_meta else value.detach().cpu()
    if isinstance(value, Mapping):
        return {encode(k, where): encode(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        items = [encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if type(value) in _LEAVES:
        return value
    raise ValueError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: expected tensors, arrays, numbers, "
        "strings and containers of them. Return such values from state_dict()."
    )


def decode(value: Any) -> Any:
    """Undo :func:`encode`."""
    if isinstance(value, dict) and _ARRAY in value:
        return value[_ARRAY].numpy().astype(value["dtype"])
    if isinstance(value, dict):
        return {k: decode(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(decode(v) for v in value)
    return value


def _to_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class UnwrittenError(ValueError):
    """A file that could not be written: a full disk, a folder that is not writable.

    :ivar runs: the restarts that were to be in it.
    :ivar fit: the fit that ended well but for its file, where there is one.
    """

    runs: Sequence[Any] = ()
    fit: Any = None


StoredTensor: TypeAlias = Annotated[Any, Condition("a Tensor", lambda x: isinstance(x, Tensor))]
"""A tensor, without values where its parts lie in a folder."""


class RunState(TypedDict):
    """What a file holds of a restart that can go on."""

    params: dict[str, StoredTensor]
    buffers: dict[str, StoredTensor]
    update: dict[str, Any]
    rng: dict[str, Any]
    start: dict[str, Any]
    step: int
    watched: int
    losses: list[float]
    monitored: list[float]
    reason: str
    seconds: float
    rollbacks: int
    batches: dict[str, Any]
    batch_size: NotRequired[int | None]


class FitState(TypedDict):
    """What a file holds of a restart of a fit that was saved."""

    index: int
    seed: int | None
    losses: list[float]
    monitored: list[float]
    reason: str
    seconds: float
    rollbacks: int
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    start: dict[str, Any] | None


class FitContent(TypedDict):
    """What a file holds of a fit."""

    best: int
    guide_name: str
    guide: dict[str, Any] | None
    form: dict[str, Any] | None
    objective: str | None
    seed: int | None
    is_bound: bool
    notes: dict[str, str]
    seconds: float
    whole: bool
    dtype: str
    data: Any
    runs: list[FitState]
    mcmc: dict[str, Any] | None


class ShardsState(TypedDict):
    """What a file says of the folder that holds what no rank has whole (:mod:`pplvi.training.shards`)."""

    folder: str
    sha256: dict[str, str]
    dims: dict[str, int]


class Content(TypedDict):
    """What a checkpoint holds, and a fit that was saved."""

    model: dict[str, str]
    settings: dict[str, Any]
    initial: dict[str, StoredTensor]
    runs: list[RunState]
    priors: NotRequired[dict[str, str]]
    fit: NotRequired[FitContent]
    shards: NotRequired[ShardsState]


def read_content(path: PathLike) -> dict[str, Any]:
    """Read a file of a training or of a fit, and check that it holds what such a file has to.

    :raises ValueError: as :func:`read`, and for one that lacks something or has it of another type.
    """
    content = read(path)
    if (fault := misfit(Content, content, "")) is not None:
        raise damaged(path, fault)
    return content


def write(path: PathLike, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically: afterwards the path holds either the old file or the new one, complete.

    :param state: nested containers of tensors, arrays, numbers and strings.
    :raises ValueError: if the state holds anything else, or the directory does not exist.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/run.pt", {"loc": torch.ones(2)})
    ...     read(f"{folder}/run.pt")
    {'loc': tensor([1., 1.])}
    """
    payload = _to_bytes(encode(state))
    content = _to_bytes(
        {
            "format": FORMAT,
            "version": VERSION,
            "sha256": hashlib.sha256(payload).hexdigest(),
            "payload": torch.frombuffer(bytearray(payload), dtype=torch.uint8),
        }
    )
    replace_file(Path(path).resolve(), content)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file by new content in one step that a crash cannot split."""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        raise UnwrittenError(
            f"cannot write a checkpoint to {str(path)!r}: {error}. Make room there, or give a writable directory."
        ) from error


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold a file for one fit, in this process or another, and sweep what killed ones have left half written.

    The claim is a lock that the system takes back from a process that dies.

    :raises ValueError: if another fit is writing it, or there is no such folder.
    """
    if not path.parent.is_dir():
        raise ValueError(f"checkpoint={str(path)!r}: expected an existing directory, {str(path.parent)!r} is none.")
    lock = path.parent / f".{path.name}.lock"
    with ExitStack() as stack:
        if os.name == "posix":
            stack.enter_context(_locked(lock, path))
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            left.unlink(missing_ok=True)
        yield


@contextmanager
def _locked(lock: Path, path: Path) -> Iterator[None]:
    import fcntl

    try:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise UnwrittenError(f"cannot write into the folder of {str(path)!r}: {error}.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = lock.exists() and os.path.samestat(os.fstat(handle), os.stat(lock))
        except BlockingIOError:
            mine = False
        if not mine:
            raise ValueError(f"checkpoint={str(path)!r} is being written by another fit: expected a path of its own.")
        yield
        lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _sync_directory(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened, and the rename is durable by itself
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: PathLike) -> dict[str, Any]:
    """Read a checkpoint; runs no code from the file and never changes it.

    :returns: the state that :func:`write` was given, on the CPU.
    :raises ValueError: if there is no such file, or it is truncated, corrupt, not a checkpoint, or of a newer format.
    """
    content = _open(Path(path))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} is not a checkpoint of pplvi: expected one that fit(checkpoint=...) or Fit.save wrote."
        )
    if content.get("version") != VERSION:
        raise ValueError(
            f"{str(path)!r} has checkpoint format {content.get('version')!r}, expected {VERSION}: "
            "read it with the version of pplvi that wrote it."
        )
    return dict(decode(_payload(path, content)))


def damaged(path: PathLike, reason: object) -> ValueError:
    """An error that says that a file is no complete checkpoint."""
    return ValueError(
        f"the checkpoint {str(path)!r} is corrupt or truncated ({reason}): expected a complete file written by "
        "fit(checkpoint=...) or Fit.save. It was left as it is; take another copy or start anew."
    )


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(
            f"there is no checkpoint {str(path)!r}: expected a file written by fit(checkpoint=...) or Fit.save."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise damaged(path, type(error).__name__) from error


def _payload(path: PathLike, content: dict[str, Any]) -> Any:
    try:
        payload = content["payload"].numpy().tobytes()
        intact = hashlib.sha256(payload).hexdigest() == content["sha256"]
    except Exception as error:  # the outer archive can be damaged in ways that still open
        raise damaged(path, type(error).__name__) from error
    if not intact:
        raise damaged(path, "its content does not match its checksum")
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # a file by a stranger, with a matching checksum
        raise damaged(path, type(error).__name__) from error
