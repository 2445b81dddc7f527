"""Reading JSON lines: plain, gzip or Zstandard files and standard input, in bounded memory."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

import zstandard

from megatron_prores.errors import UserError

STDIN = "-"
"""The ``--input`` that stands for standard input."""

CHUNK_BYTES = 1 << 18
"""Text read at once: large against the cost of handing it to a worker, small against its work."""

_READ_BYTES = 1 << 20
_UTF8_BOM = b"\xef\xbb\xbf"


class BrokenLineError(ValueError):
    """A line that holds no document; the message says why, in the user's words."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive lines of one input."""

    source: str
    """The file they come from, as shown to the user."""
    first_line: int
    """Number of the first line in that file, from 1."""
    lines: list[bytes]
    disk_bytes: int
    """Bytes read from the disk for this chunk: compressed size, for a compressed file."""


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Resolve the ``--input`` values to files.

    Args:
        patterns: File names, glob patterns (``**`` descends) or ``-`` for standard input.

    Returns:
        The files, pattern by pattern as given, those of one pattern sorted by name.

    Raises:
        UserError: A file is missing, a pattern matches nothing, or a name is a folder.
    """
    inputs: list[str] = []
    for pattern in patterns:
        if pattern == STDIN or os.path.isfile(pattern):
            inputs.append(pattern)
        elif os.path.isdir(pattern):
            raise UserError(f"--input {pattern} is a folder; name its files, as in {pattern}/*")
        elif os.path.exists(pattern):  # A named pipe, or a shell's <(command).
            inputs.append(pattern)
        else:
            matches = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
            if not matches:
                raise UserError(f"--input {pattern}: no such file")
            inputs.extend(matches)
    if inputs.count(STDIN) > 1:
        raise UserError("--input - can be given only once")
    for name in inputs:
        if name != STDIN and not os.access(name, os.R_OK):
            raise UserError(f"--input {name}: no permission to read it")
    return inputs


def disk_size(inputs: Sequence[str]) -> int | None:
    """Bytes on disk of all inputs together, or None when some input's size is not known."""
    if all(os.path.isfile(name) for name in inputs):
        return sum(os.path.getsize(name) for name in inputs)
    return None


def read_chunks(inputs: Sequence[str], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Read the inputs one after the other.

    Args:
        inputs: Files as :func:`expand_inputs` returns them; ``.gz`` and ``.zst`` are decompressed.
        chunk_bytes: Text after which a chunk is closed; a longer line is a chunk of its own.

    Yields:
        Chunks in input order. No chunk spans two files.

    Raises:
        UserError: A file cannot be read, or its compressed data is damaged or cut short.
    """
    for name in inputs:
        source = "standard input" if name == STDIN else name
        try:
            if name == STDIN:
                yield from _chunks(source, sys.stdin.buffer, None, chunk_bytes)
            else:
                with open(name, "rb") as raw, _decompressed(name, raw) as text:
                    yield from _chunks(source, text, raw, chunk_bytes)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise UserError(f"{source}: damaged or incomplete compressed file ({error})") from error
        except OSError as error:
            raise UserError(f"{source}: cannot be read: {error.strerror or error}") from error


def parse_document(line: bytes, keys: Sequence[str]) -> dict[str, str] | None:
    """Take a document's texts out of its line.

    Args:
        line: One line of an input.
        keys: The fields that hold text.

    Returns:
        The text of every key, or None for a blank line.

    Raises:
        BrokenLineError: The line is not UTF-8, not a JSON object, or lacks the text of a key; or
            that is no text: half of a surrogate pair, which each tokenizer trips over in its way.
    """
    try:
        content = line.decode("utf-8").strip()
        document = json.loads(content) if content else None
    except UnicodeDecodeError as error:
        raise BrokenLineError(f"not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise BrokenLineError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise BrokenLineError("JSON nested too deep") from error
    except ValueError as error:  # Python reads no whole number of more than 4300 digits.
        raise BrokenLineError("a number with too many digits") from error
    if not content:
        return None
    if not isinstance(document, dict):
        raise BrokenLineError("not a JSON object")
    for key in keys:
        if key not in document:
            found = ", ".join(map(repr, document)) or "none"
            raise BrokenLineError(f"no key {key!r} (keys of this line: {found})")
        if not isinstance(document[key], str):
            raise BrokenLineError(f"key {key!r} is {type(document[key]).__name__}, not a string")
        if b"\\u" in line:  # UTF-8 itself has no surrogates, but the escapes of JSON do
            try:
                document[key].encode()
            except UnicodeEncodeError as error:
                raise BrokenLineError(f"key {key!r} holds half of a surrogate pair") from error
    return {key: document[key] for key in keys}


def _chunks(source: str, text: IO[bytes], raw: BinaryIO | None, limit: int) -> Iterator[Chunk]:
    seekable = raw is not None and raw.seekable()
    lines: list[bytes] = []
    size = disk_position = 0
    number = first = 1

    def close_chunk() -> Chunk:
        nonlocal lines, size, disk_position, first
        position = cast(BinaryIO, raw).tell() if seekable else disk_position + size
        chunk = Chunk(source, first, lines, position - disk_position)
        lines, size, disk_position, first = [], 0, position, number
        return chunk

    for line in text:
        if number == 1:
            line = line.removeprefix(_UTF8_BOM)
        lines.append(line)
        size += len(line)
        number += 1
        if size >= limit:
            yield close_chunk()
    if lines:
        yield close_chunk()


def _decompressed(name: str, raw: BinaryIO) -> IO[bytes]:
    match Path(name).suffix:
        case ".gz":
            return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        case ".zst":
            return io.BufferedReader(_ZstdReader(raw), _READ_BYTES)
        case _:
            return raw


class _ZstdReader(io.RawIOBase):
    """Decompresses consecutive frames; unlike the library's reader, notices a cut-off file."""

    def __init__(self, raw: BinaryIO) -> None:
        super().__init__()
        self._raw = raw
        self._pending = b""
        self._frame: zstandard.ZstdDecompressionObj | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer))
        while not self._pending:
            block = self._raw.read(_READ_BYTES // 8)
            if not block:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._pending = self._decompress(block)
        count = min(len(view), len(self._pending))
        view[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _decompress(self, block: bytes) -> bytes:
        parts = []
        while block:
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            parts.append(self._frame.decompress(block))
            block = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        return b"".join(parts)
