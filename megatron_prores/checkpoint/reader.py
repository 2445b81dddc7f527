"""Reads a checkpoint directory: which iterations there are, and what one of them holds."""

from __future__ import annotations

import io
import json
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_prores.checkpoint import safe_load
from megatron_prores.checkpoint.manifest import DamagedError
from megatron_prores.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
INDEX = ".metadata"
FORMAT = "metadata.json"
"""Names the format; Megatron writes it when all else of a ``torch_dist`` checkpoint is there."""

RELEASE = "release"
_MOST_DIGITS = 18
"""Of an iteration; what is longer is damage, and Python refuses to read thousands of them."""
COMMON = "common_state/shard_0_1"
OLD_COMMON = "common.pt"


def iteration_name(iteration: int | str) -> str:
    """Return the name of the directory that Megatron keeps an iteration in."""
    return iteration if isinstance(iteration, str) else f"iter_{iteration:07d}"


def iterations(root: Path) -> dict[int, Path]:
    """Find the checkpoints below a directory: iteration -> directory, oldest first.

    Raises:
        UserError: There is no such directory.
    """
    try:
        found = {
            int(match[1]): entry
            for entry in root.iterdir()
            if (match := re.fullmatch(r"iter_(\d{7,})", entry.name)) and entry.is_dir()
        }
    except OSError as error:
        raise UserError(f"{root}: cannot be read: {error.strerror}") from error
    return dict(sorted(found.items()))


def tracked(root: Path) -> int | str | None:
    """Read which iteration Megatron saved last: its number, "release", or None without a tracker.

    Raises:
        DamagedError: The tracker file names no iteration.
    """
    try:
        text = (root / TRACKER).read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedError(f"{TRACKER} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        text = ""
    if text == RELEASE:
        return RELEASE
    if not (text.isascii() and text.isdigit()) or len(text) > _MOST_DIGITS:
        raise DamagedError(f"{TRACKER} does not name an iteration")
    return int(text)


def is_iteration(directory: Path) -> bool:
    """Whether a directory is that of one iteration, by its name."""
    return directory.name == RELEASE or directory.name.removeprefix("iter_").isdigit()


def is_distributed(directory: Path) -> bool:
    """Whether a checkpoint is of a distributed format, not of Megatron's old one."""
    return not any(directory.glob("mp_rank_*"))


def _check_crc(where: str, data: bytes) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unchanged = archive.testzip() is None
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DamagedError(f"{where} is unreadable: {error}") from error
    if not unchanged:
        raise DamagedError(f"{where} has changed (CRC-32)")


class StoredCheckpoint:
    """The checkpoint of one iteration, read without Megatron, its flags, or a GPU."""

    def __init__(self, directory: Path) -> None:
        """Take the directory of one iteration; reads nothing yet."""
        self.directory = directory

    @cached_property
    def index(self) -> Metadata:
        """The index of all tensors and objects.

        Raises:
            DamagedError: It is missing, damaged, or asks for something to be executed.
        """
        try:
            return safe_load.read_index(self.directory / INDEX)
        except FileNotFoundError as error:
            raise DamagedError(f"{INDEX} is missing") from error
        except OSError as error:
            raise DamagedError(f"{INDEX} cannot be read: {error.strerror}") from error
        except safe_load.RefusedError as error:
            raise DamagedError(f"{INDEX} is {error}") from error

    @property
    def has_common(self) -> bool:
        """Whether it is a ``torch_dist`` checkpoint; others have no state common to all ranks."""
        return COMMON in self.index.state_dict_metadata or (self.directory / OLD_COMMON).exists()

    @cached_property
    def common(self) -> dict[str, Any]:
        """What is no tensor and the same on all ranks: the arguments, the iteration, and so on.

        Raises:
            DamagedError: It cannot be read, or asks for something to be executed.
        """
        if (old := self.directory / OLD_COMMON).exists():
            name, state = OLD_COMMON, self._object(OLD_COMMON, old.read_bytes())
        else:
            keys = [key for key in self.index.storage_data if key.fqn == COMMON]
            if not keys:
                raise DamagedError("it holds no arguments")
            name, state = COMMON, self.object(keys[0])
            state = state[0] if isinstance(state, list) and state else state
        if not isinstance(state, dict):
            raise DamagedError(f"{name} is not what Megatron saves")
        return state

    @property
    def args(self) -> Namespace:
        """The arguments of the run that saved it; empty where it holds none."""
        args = self.common.get("args")
        return args if isinstance(args, Namespace) else Namespace()

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Name -> shape, type and chunks of every tensor."""
        found = self.index.state_dict_metadata.items()
        return {name: kind for name, kind in found if isinstance(kind, TensorStorageMetadata)}

    @property
    def objects(self) -> list[MetadataIndex]:
        """The keys of all that is no tensor."""
        return [key for key in self.index.storage_data if key.fqn not in self.tensors]

    def chunks(self, name: str) -> Iterator[tuple[MetadataIndex, ChunkStorageMetadata]]:
        """Yield where each chunk of a tensor is stored.

        Raises:
            DamagedError: The index does not say.
        """
        for chunk in self.tensors[name].chunks:
            key = MetadataIndex(name, chunk.offsets)
            if key not in self.index.storage_data:
                raise DamagedError(f"{INDEX} does not say where {name} at {list(chunk.offsets)} is")
            yield key, chunk

    def object(self, key: MetadataIndex, check_crc: bool = False) -> Any:
        """Read what is no tensor.

        Args:
            key: Which.
            check_crc: Also compares its checksums, which torch writes and never reads.

        Raises:
            DamagedError: It cannot be read, or asks for something to be executed.
        """
        where, data = f"{self._file(key).name}: {key.fqn}", self._bytes(key)
        if check_crc:
            _check_crc(where, data)
        return self._object(where, data)

    def chunk(self, key: MetadataIndex, shape: torch.Size, check_crc: bool = False) -> Tensor:
        """Read one chunk of a tensor.

        Args:
            key: Which.
            shape: The one that it must have.
            check_crc: Also compares its checksums, which torch writes and never reads.

        Raises:
            DamagedError: It cannot be read, or has another shape or type than the index says.
        """
        where = f"{self._file(key).name}: {key.fqn}"
        data = self._bytes(key)
        expected = self.tensors[key.fqn].properties.dtype
        try:
            if check_crc:
                _check_crc(where, data)
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except DamagedError:
            raise
        except Exception as error:  # damaged bytes fail in any way
            raise DamagedError(f"{where} is unreadable: {safe_load.describe(error)}") from error
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (shape, expected):
            raise DamagedError(f"{where} is not the {expected} of {list(shape)} that it should be")
        return tensor

    def tensor(self, name: str) -> Tensor:
        """Put a whole tensor together from its chunks.

        Raises:
            DamagedError: A chunk cannot be read.
        """
        kind = self.tensors[name]
        whole = torch.zeros(kind.size, dtype=kind.properties.dtype)
        for key, chunk in self.chunks(name):
            place = tuple(
                slice(start, start + length)
                for start, length in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            whole[place] = self.chunk(key, chunk.sizes)
        return whole

    def check_format(self) -> None:
        """Look into the file that names the format.

        Raises:
            DamagedError: It is missing where Megatron has written it, or cannot be read.
        """
        try:
            content = json.loads((self.directory / FORMAT).read_bytes())
        except FileNotFoundError as error:
            if self.has_common:
                raise DamagedError(f"{FORMAT} is missing: its saving was not finished") from error
            return
        except (OSError, ValueError) as error:
            raise DamagedError(f"{FORMAT} is unreadable: {safe_load.describe(error)}") from error
        if not isinstance(content, dict) or "sharded_backend" not in content:
            raise DamagedError(f"{FORMAT} does not name the format")

    def check_extents(self) -> list[str]:
        """Find files that the index needs and that are missing or too short; reads none."""
        ends: dict[str, int] = {}
        for info in self.index.storage_data.values():
            end = info.offset + info.length
            ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
        found = []
        for name, end in sorted(ends.items()):
            if Path(name).name != name:
                found.append(f"{INDEX} points to {name}, outside of the checkpoint")
            elif not (self.directory / name).is_file():
                found.append(f"{name} is missing")
            elif (size := (self.directory / name).stat().st_size) < end:
                found.append(f"{name} has {size} bytes, fewer than the {end} that {INDEX} says")
        return found

    def _file(self, key: MetadataIndex) -> Path:
        name = self.index.storage_data[key].relative_path
        if Path(name).name != name:
            raise DamagedError(f"{INDEX} points to {name}, outside of the checkpoint")
        return self.directory / name

    def _bytes(self, key: MetadataIndex) -> bytes:
        info = self.index.storage_data[key]
        path = self._file(key)
        try:
            with path.open("rb") as file:
                file.seek(info.offset)
                data = file.read(info.length)
        except FileNotFoundError as error:
            raise DamagedError(f"{path.name} is missing") from error
        except OSError as error:
            raise DamagedError(f"{path.name} cannot be read: {error.strerror}") from error
        if len(data) < info.length:
            raise DamagedError(f"{path.name} ends within {key.fqn}")
        return data

    def _object(self, where: str, data: bytes) -> Any:
        try:
            return safe_load.load_object(data)
        except safe_load.RefusedError as error:
            raise DamagedError(f"{where} is {error}") from error
