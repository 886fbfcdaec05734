"""Checkpoint files: written whole or not at all, checked when they are read, and unable to run code.

A file is a ``torch.save`` archive that opens with ``weights_only=True``. It holds a format name, a version, and the
state as bytes with their SHA-256: torch itself does not notice a flipped bit in a tensor. Writing goes to a temporary
file in the same directory, which is flushed to the disk and then renamed over the old one, so that at every moment the
path holds one complete checkpoint, whatever happens to the process.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    if isinstance(value, Tensor):
        return value.detach().cpu()
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
    replace_file(Path(path), content)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file by new content in one step that a crash cannot split."""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise ValueError(f"cannot write a checkpoint to {str(path)!r}: {error}. Give a writable directory.") from error
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


def _damaged(path: PathLike, reason: object) -> ValueError:
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
        raise _damaged(path, type(error).__name__) from error


def _payload(path: PathLike, content: dict[str, Any]) -> Any:
    try:
        payload = content["payload"].numpy().tobytes()
        intact = hashlib.sha256(payload).hexdigest() == content["sha256"]
    except Exception as error:  # the outer archive can be damaged in ways that still open
        raise _damaged(path, type(error).__name__) from error
    if not intact:
        raise _damaged(path, "its content does not match its checksum")
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # a file by a stranger, with a matching checksum
        raise _damaged(path, type(error).__name__) from error
