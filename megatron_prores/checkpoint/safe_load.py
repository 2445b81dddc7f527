"""Reads what a checkpoint holds without executing anything of it.

Three formats of a checkpoint are pickles, which can name any function and have it called:

- ``.metadata``, the index of torch's distributed checkpoints: torch 2.15 reads it by a plain
  ``pickle.load`` (``FileSystemReader.read_metadata``);
- the objects among the tensors (arguments, random states): torch reads them by ``torch.load`` with
  ``weights_only=False`` (``DefaultLoadPlanner.load_bytes``);
- the tensors themselves: ``weights_only=True``, safe as they are.

:func:`install` makes the first two safe in this process, for Megatron's loading as well.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import types
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_prores.upstream.registry import replace

_METADATA = "torch.distributed.checkpoint.metadata"
_OLD_METADATA = "torch.distributed._shard.sharded_tensor.metadata"  # before torch 2.3
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_PLANNER = "torch.distributed.checkpoint.planner"

# All that an index is made of: data classes, enumerations, shapes. None of them acts when called.
_INDEX_GLOBALS = frozenset(
    {(_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")}
    | {(_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")}
    | {(_METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties")}
    | {(_METADATA, "_MEM_FORMAT_ENCODING")}
    | {(_FILESYSTEM, name) for name in ("_StorageInfo", "_StoragePrefix")}
    | {(_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")}
    | {(_PLANNER, "BytesIOWriteData")}
    | {(_OLD_METADATA, name) for name in ("TensorProperties", "MEM_FORMAT_ENCODING")}
    | {("torch", "Size"), ("torch.serialization", "_get_layout")}
    | {("collections", "OrderedDict"), ("builtins", "set"), ("builtins", "frozenset")}
    | {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}
)

# What Megatron's own safe globals allow outside of Megatron, for the objects among the tensors.
_OBJECT_GLOBALS = (
    *(
        "argparse.Namespace",
        "types.SimpleNamespace",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
    ),
    *("signal.Signals", "_io.BytesIO", "numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType"),
    *("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"),
)

# The types of numpy's dtypes, whose instances torch wants to know as well.
_DTYPES = (np.dtypes.UInt32DType, np.dtypes.Int64DType, np.dtypes.Float64DType)

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class RefusedError(pickle.UnpicklingError):
    """A file asks for something to be called that its format has no use for."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # By its attribute, never by the dotted paths of newer protocols: these reach everywhere.
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _INDEX_GLOBALS:
            raise RefusedError(f"refused: it asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def load_index(file: IO[bytes]) -> Any:
    """Unpickle a checkpoint's index, ``.metadata``.

    Raises:
        RefusedError: It asks for anything but the plain data that an index is made of.
    """
    return _IndexUnpickler(file).load()


def read_index(path: os.PathLike[str]) -> Metadata:
    """Read a checkpoint's index from its file, ``.metadata``.

    Raises:
        RefusedError: It asks for anything but plain data, or is none.
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            index = load_index(file)
        except (RefusedError, OSError):
            raise
        except Exception as error:  # a damaged pickle fails in any way
            raise RefusedError(f"unreadable: {describe(error)}") from error
    if not isinstance(index, Metadata) or not _is_complete(index):
        raise RefusedError("unreadable: not the index of a checkpoint")
    return index


def _is_complete(index: Metadata) -> bool:
    """Whether an index has what its readers take for granted."""
    try:
        places = index.storage_data.items()
        return all(
            type(kind) is BytesStorageMetadata
            or (type(kind) is TensorStorageMetadata and _has_fields(kind))
            for kind in index.state_dict_metadata.values()
        ) and all(
            (type(key), type(place)) == (MetadataIndex, _StorageInfo)
            and key.fqn in index.state_dict_metadata
            and isinstance(place.relative_path, str)
            and "\0" not in place.relative_path
            and isinstance(place.offset, int)
            and isinstance(place.length, int)
            and min(place.offset, place.length) >= 0
            for key, place in places
        )
    except (AttributeError, TypeError):  # also of what is no dictionary
        return False


def _has_fields(tensor: TensorStorageMetadata) -> bool:
    """Whether a tensor has its dtype and its size, and pieces that lie within."""
    shapes = [
        tensor.size,
        *(each for piece in tensor.chunks for each in (piece.offsets, piece.sizes)),
    ]
    return (
        isinstance(tensor.properties.dtype, torch.dtype)
        and all(isinstance(shape, torch.Size) for shape in shapes)
        and all(
            len(piece.offsets) == len(piece.sizes) == len(tensor.size)
            and all(map(_lies_within, piece.offsets, piece.sizes, tensor.size))
            for piece in tensor.chunks
        )
    )


def _lies_within(start: int, length: int, size: int) -> bool:
    return start >= 0 and length >= 0 and start + length <= size


class _StandIn:
    """Takes the place of an object of Megatron's, so that reading needs no Megatron."""

    def __new__(cls, *args: Any) -> _StandIn:
        made = super().__new__(cls)
        made.__dict__["args"] = args
        return made

    def __init__(self, *args: Any) -> None:
        """Take whatever the object was made from."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def __repr__(self) -> str:
        inner = ", ".join(map(repr, self.__dict__.get("args", ())))
        return f"{type(self).__name__}({inner})"

    def __eq__(self, other: object) -> bool:
        return repr(type(self)) == repr(type(other)) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def load_object(data: bytes) -> Any:
    """Read an object that was saved among the tensors, with stand-ins for Megatron's classes.

    Args:
        data: As ``torch.save`` wrote it.

    Raises:
        RefusedError: It asks for anything but plain data, or cannot be read.
    """
    try:
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        # Without those of Megatron, which safe_globals() would forget when it is left.
        known = torch.serialization.get_safe_globals()
        allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
            each for each in _DTYPES if each not in known
        ]
        for name in needed:
            if name.startswith("megatron."):
                allowed.append((type(name.rpartition(".")[2], (_StandIn,), {}), name))
            elif name in _OBJECT_GLOBALS:
                allowed.append((_resolve(name), name))
            else:
                raise RefusedError(f"refused: it asks for {name}, which no checkpoint needs")
        with torch.serialization.safe_globals(allowed):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(f"unreadable: {describe(error)}") from error


def _resolve(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    resolved: Callable[..., Any] = getattr(__import__(module, fromlist=[attribute]), attribute)
    return resolved


def describe(error: BaseException) -> str:
    """Say in a few words why something could not be read.

    torch's own message is a page of advice, which begins with how to switch the safety off.
    """
    text = str(error)
    if isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in text:
        if found := re.search(r"GLOBAL ([\w.]+)", text):
            return f"refused: it asks for {found[1]}, which no checkpoint needs"
        return "refused: not the plain data that a checkpoint holds"
    return (text.splitlines() or [type(error).__name__])[0].strip() or type(error).__name__


def install() -> None:
    """Make this process, and what it starts, load checkpoints without executing anything of them.

    Every ``torch.load`` reads plain data only, whatever its caller asks for: by torch's own
    environment variable. The index is read by :func:`load_index`.

    Raises:
        RuntimeError: The installed torch reads its files in another way than 2.15 does.
    """
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ[_FORCE] = "1"
    probe = io.BytesIO()
    torch.save(_resolve("os.getpid"), probe)
    probe.seek(0)
    try:
        torch.load(probe, weights_only=False)
    except pickle.UnpicklingError:
        pass
    else:
        raise RuntimeError(_moved("torch.load", f"does not heed {_FORCE}"))
    reader = filesystem.FileSystemReader.read_metadata
    if not {"pickle", "load"} <= set(reader.__code__.co_names):
        raise RuntimeError(_moved("FileSystemReader.read_metadata", "has no pickle.load"))
    replace(filesystem, install, pickle=pickle_with(load=load_index))


def pickle_with(**functions: Callable[..., Any]) -> types.SimpleNamespace:
    """Return what can take the place of a module's name ``pickle``, with other functions in it."""
    return types.SimpleNamespace(**{**vars(pickle), **functions})


def _moved(what: str, how: str) -> str:
    return (
        f"torch {torch.__version__} has moved: {what} {how}. "
        "megatron_prores/checkpoint/safe_load.py was written against 2.15."
    )
