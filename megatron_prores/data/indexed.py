"""Megatron's indexed dataset (``.bin`` and ``.idx``), written and read without Megatron's imports.

The format is that of ``megatron.core.datasets.indexed_dataset``; the tests read with its classes.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_prores.system.files import publish

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_BLOCK = 1 << 20
"""Index entries written at once."""
_READ_BYTES = 1 << 22
"""Token ids read at once; a longer document is read by itself."""

ENDINGS = (".bin", ".idx")


def with_suffix(path: Path, suffix: str) -> Path:
    """Append a suffix. Not ``Path.with_suffix``: in a prefix like "v1.5" the dot is the user's."""
    return path.with_name(path.name + suffix)


class DatasetWriter:
    """One indexed dataset, written in a staging folder until it is complete.

    Args:
        staging: Folder to write in.
        final: The dataset's path without ``.bin`` and ``.idx``.
        dtype: Type of the token ids.
    """

    def __init__(self, staging: Path, final: Path, dtype: type[np.generic]) -> None:
        self._staged = staging / final.name
        self._final = final
        self._dtype = np.dtype(dtype)
        self._tokens = with_suffix(self._staged, ".bin").open("wb")
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._digests = {ending: hashlib.sha256() for ending in ENDINGS}

    def add(self, tokens: bytes | memoryview, lengths: npt.NDArray[np.int32]) -> None:
        """Append documents.

        Args:
            tokens: Their ids, in the dtype's bytes.
            lengths: Ids of each document.
        """
        self._tokens.write(tokens)
        self._digests[".bin"].update(tokens)
        self._lengths.append(np.asarray(lengths, np.int32))

    def finish(self) -> dict[str, str]:
        """Complete both files, still in the staging folder; return their sha256 by ending."""
        self._tokens.close()
        with with_suffix(self._staged, ".idx").open("wb") as file:
            for block in self._index():
                file.write(block)
                self._digests[".idx"].update(block)
        return {ending: digest.hexdigest() for ending, digest in self._digests.items()}

    def publish(self) -> None:
        """Give both files their final names, replacing those of an older dataset.

        Megatron sees a dataset where both files are. The index goes last, and an old index goes
        first: at no moment does one dataset's index lie beside another's tokens.
        """
        with_suffix(self._final, ".idx").unlink(missing_ok=True)
        for ending in ENDINGS:
            publish(with_suffix(self._staged, ending), with_suffix(self._final, ending))

    def _index(self) -> Iterator[bytes]:
        count = sum(map(len, self._lengths))
        code = next(code for code, each in _DTYPES.items() if each == self._dtype.type)
        # Megatron counts one document more: the list of their ends begins with 0.
        yield _HEADER.pack(_MAGIC, _VERSION, code, count, count + 1)
        for lengths in self._lengths:
            yield lengths.tobytes()
        position = 0
        for lengths in self._lengths:
            ends = position + np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
            yield (ends - lengths.astype(np.int64) * self._dtype.itemsize).tobytes()
            position = int(ends[-1]) if ends.size else position
        for start in range(0, count + 1, _BLOCK):
            yield np.arange(start, min(start + _BLOCK, count + 1), dtype=np.int64).tobytes()


@dataclass(frozen=True)
class Index:
    """An index, mapped into memory."""

    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    """Tokens of each sequence; a document of pretraining data is one sequence."""
    pointers: npt.NDArray[np.int64]
    """Where each begins in the ``.bin``, in bytes."""
    documents: npt.NDArray[np.int64]
    """Sequences before each document, from 0, and all at the end."""

    @property
    def tokens(self) -> int:
        """Return the number of all tokens."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def is_packed(self) -> bool:
        """Return whether each document is one sequence, and each follows the one before."""
        size = self.lengths.astype(np.int64) * self.dtype.itemsize
        ends = np.cumsum(size)
        return bool(
            np.array_equal(self.documents, np.arange(len(self.lengths) + 1))
            and np.array_equal(self.pointers, ends - size)
        )


def read_index(path: str | Path) -> Index:
    """Read an ``.idx`` file.

    Raises:
        ValueError: It is not an index, or was cut short.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise ValueError("too short")
    magic, version, code, sequences, documents = _HEADER.unpack(head)
    if magic != _MAGIC or version != _VERSION or code not in _DTYPES:
        raise ValueError("another format")
    if os.path.getsize(path) < _HEADER.size + 12 * sequences + 8 * documents:
        raise ValueError("cut short")
    content = np.memmap(path, mode="r", dtype=np.uint8)
    at = _HEADER.size
    arrays: list[Any] = []
    for dtype, count in ((np.int32, sequences), (np.int64, sequences), (np.int64, documents)):
        arrays.append(np.frombuffer(content, dtype, count, at))
        at += arrays[-1].nbytes
    return Index(np.dtype(_DTYPES[code]), *arrays)


def read_documents(
    prefix: str | Path, index: Index
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int32]]]:
    """Read whole documents, a few megabytes at once.

    Args:
        prefix: The dataset's path without ending.
        index: Its index; it must be packed.

    Yields:
        Token ids of consecutive documents, and the length of each.
    """
    first = 0
    with open(f"{prefix}.bin", "rb") as file:
        while first < len(index.lengths):
            limit = index.pointers[first] + _READ_BYTES
            end = max(first + 1, int(np.searchsorted(index.pointers, limit)))
            lengths = np.array(index.lengths[first:end])
            yield np.fromfile(file, index.dtype, int(lengths.sum(dtype=np.int64))), lengths
            first = end
