"""Checkpoints of parameters of which every rank holds a part, and of what optimisers keep of them.

No rank has these tensors whole, so that they are written by ``torch.distributed.checkpoint``, each rank its parts, into
a new folder beside the file. The file holds everything else, the name of the folder and the SHA-256 of what is in it:
renaming the file over the old one is what makes the new folder count, and the old one is removed afterwards. A folder
is read by any number of ranks, one included, which need no module of FSDP2 then; like the file, it runs no code.
"""

from __future__ import annotations

import hashlib
import pickle
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pplvi.programs.parts import is_part
from pplvi.programs.ranks import Processes, heard
from pplvi.programs.state import map_tree
from pplvi.training import checkpoint
from pplvi.training.checkpoint import PathLike, UnwrittenError, damaged

_METADATA = ".metadata"  # torch's name of the file that says what is where


def write_shared(path: PathLike, state: Mapping[str, Any], ranks: Processes) -> None:
    """Write a checkpoint atomically, as :func:`pplvi.training.checkpoint.write`; called by all ranks.

    :raises UnwrittenError: if it cannot be written: on all ranks for the parts, on rank 0 for the file.
    """
    path = Path(path).resolve()
    whole, parts = _apart(state)
    if not parts:
        if ranks.rank == 0:
            checkpoint.write(path, whole)
        return
    with _unwritten(path):
        folder = path.parent / ranks.first(lambda: _new_folder(path))
        try:
            _save(folder, parts, ranks)
            found = ranks.each(lambda: _own_sums(folder, ranks))
        except OSError:
            _remove(folder, ranks)
            raise
    sums = {name: value for part in found for name, value in part.items()}
    dims = {key: part.placements[0].dim for key, part in parts.items()}
    if ranks.rank == 0:
        try:
            checkpoint.write(path, {**whole, "shards": {"folder": folder.name, "sha256": sums, "dims": dims}})
        except UnwrittenError:
            _remove(folder, ranks)
            raise
        sweep(path)


def _remove(folder: Path, ranks: Processes) -> None:
    if ranks.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(path: PathLike) -> None:
    """Remove the folders of a checkpoint that its file does not name: older ones, and those of a killed process."""
    path, kept = Path(path).resolve(), None
    if path.exists():
        try:
            kept = checkpoint.read(path).get("shards", {}).get("folder")
        except ValueError:  # nobody knows
            return
    for folder in path.parent.iterdir():
        if folder.name.startswith(f"{path.name}.shards-") and folder.name != kept:
            shutil.rmtree(folder, ignore_errors=True)


def filled(path: PathLike, content: Mapping[str, Any], ranks: Processes, mesh: Any) -> Mapping[str, Any]:
    """What a checkpoint holds, with this rank's parts read from the folder; called by all ranks.

    :param mesh: the ranks that hold parts, as torch sees them; ``None`` reads whole tensors.
    :raises ValueError: for a folder that is not there, or is not what the file says.
    """
    found = dict(_meta_tensors(content))
    if not found and "shards" not in content:
        return content
    if "shards" not in content:
        raise damaged(path, "it names no folder of its tensors")
    shards = content["shards"]
    folder = Path(path).parent / Path(shards["folder"]).name
    if not folder.is_dir():
        raise ValueError(
            f"the checkpoint {str(path)!r} belongs with the folder {folder.name!r}, which is not beside it: expected "
            "both, where all ranks can read them."
        )
    if found.keys() != shards["dims"].keys():
        raise damaged(path, "its tensors are not those of its folder")
    ranks.each(lambda: _check_sums(path, folder, shards["sha256"], ranks))
    tensors = {key: _empty(like, shards["dims"][key], mesh) for key, like in found.items()}
    _load(path, folder, tensors, None if mesh is None else ranks)
    return {key: _put(value, (key,), tensors) for key, value in content.items()}


def _apart(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state in which tensors that ranks hold in parts have no memory, and these tensors by their place."""
    parts = {".".join(map(str, where)): x for where, x in _tensors(state, ()) if is_part(x)}
    whole = map_tree(lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta") if is_part(x) else x, state)
    return whole, parts


def _tensors(tree: Any, where: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(tree, Tensor):
        yield where, tree
    elif isinstance(tree, Mapping | tuple | list):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _tensors(value, (*where, key))


def _meta_tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    return ((".".join(map(str, where)), x) for where, x in _tensors(content, ()) if x.is_meta)


def _put(tree: Any, where: tuple[Any, ...], tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return tensors[".".join(map(str, where))] if tree.is_meta else tree
    if isinstance(tree, Mapping):
        return {key: _put(value, (*where, key), tensors) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_put(value, (*where, i), tensors) for i, value in enumerate(tree))
    return tree


def _new_folder(path: Path) -> str:
    folder = path.parent / f"{path.name}.shards-{secrets.token_hex(4)}"
    folder.mkdir()
    return folder.name


def _own_sums(folder: Path, ranks: Processes) -> dict[str, str]:
    """Hashes of the files that this rank has written; rank 0 has written the list of all, too."""
    mine = [*folder.glob(f"__{ranks.rank}_*"), *([folder / _METADATA] if ranks.rank == 0 else [])]
    return {file.name: _sum(file) for file in mine}


def _sum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check_sums(path: PathLike, folder: Path, sums: Mapping[str, str], ranks: Processes) -> None:
    """Look at this rank's share of the files."""
    for name in sorted(sums)[ranks.rank :: ranks.size]:
        file = folder / Path(name).name
        if not file.is_file() or _sum(file) != sums[name]:
            raise damaged(path, f"{folder.name}/{name} does not match its checksum")


def _empty(like: Tensor, dim: int, mesh: Any) -> Tensor:
    """Where this rank's part of a tensor is read to, or the whole."""
    if mesh is None:
        return torch.empty(like.shape, dtype=like.dtype)
    from torch.distributed.tensor import Shard, zeros

    return zeros(like.shape, dtype=like.dtype, device_mesh=mesh, placements=[Shard(dim)])


def _save(folder: Path, parts: Mapping[str, Any], ranks: Any) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    with heard():
        _plainly(lambda: save(dict(parts), storage_writer=writer, process_group=ranks.group))


def _load(path: PathLike, folder: Path, tensors: dict[str, Any], ranks: Any) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    group = {"no_dist": True} if ranks is None else {"process_group": ranks.group}
    try:
        with heard():
            _plainly(lambda: load(tensors, storage_reader=_reader(folder), **group))
    except (KeyError, TypeError, AttributeError, AssertionError, pickle.UnpicklingError) as error:
        raise damaged(path, error) from error


def _plainly(act: Callable[[], Any]) -> None:
    """Raise the first of what the ranks have met, in the place of what torch makes of them, which is no Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a process reads the whole by itself
            act()
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _reader(folder: Path) -> Any:
    """What reads a folder as torch does, but unpickles nothing else than the list of what is where."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with (folder / _METADATA).open("rb") as file:
                metadata: Metadata = _Listed(file).load()
            if not all(isinstance(x, TensorStorageMetadata) for x in metadata.state_dict_metadata.values()):
                raise pickle.UnpicklingError("it holds something else than tensors")
            return metadata

    return Reader(folder)


_LISTED = [
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
]


class _Listed(pickle.Unpickler):
    """Unpickles the classes that torch's list of a folder is made of, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        place = "torch.distributed.checkpoint."
        allowed = {
            f"{place}metadata": (*_LISTED, "_MEM_FORMAT_ENCODING"),
            f"{place}filesystem": ("_StorageInfo",),
            "torch.serialization": ("_get_layout",),
            "torch": ("Size", *(n for n in vars(torch) if isinstance(getattr(torch, n), torch.dtype))),
            "pathlib": ("PosixPath", "WindowsPath"),
            "pathlib._local": ("PosixPath", "WindowsPath"),
        }
        if name not in allowed.get(module, ()):
            raise pickle.UnpicklingError(f"its list names {module}.{name}")
        return super().find_class(module, name)


@contextmanager
def _unwritten(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnwrittenError(
            f"cannot write the parts of a checkpoint beside {str(path)!r}: {error}. Make room there, or give a "
            "directory that all ranks can write to."
        ) from error
