"""Reading documents in bounded memory: JSON lines, parquet, standard input, Hugging Face data."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from megatron_prores.environment import THIS_MACHINE
from megatron_prores.errors import UserError

STDIN = "-"
"""The ``--input`` that stands for standard input."""

CHUNK_BYTES = 1 << 18
"""Text read at once: large against the cost of handing it to a worker, small against its work."""

_READ_BYTES = 1 << 16
_ROWS = 256
_UTF8_BOM = b"\xef\xbb\xbf"
_SUFFIXES = (
    ".parquet",
    *(name + packed for name in (".jsonl", ".json", ".ndjson") for packed in ("", ".gz", ".zst")),
)
"""What is taken from a directory."""
_TEXT_COLUMN = re.compile(r"(large_)?(string|binary)|dictionary<values=(large_)?string.*")


class BrokenLineError(ValueError):
    """A line that holds no document; the message says why, in the user's words.

    Args:
        message: What is wrong with this line.
        reason: The kind of fault, under which it is counted.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Input:
    """A file, standard input, or a file of a Hugging Face data set."""

    name: str
    """As shown to the user."""
    size: int | None = None
    """Bytes on the disk, where that is known."""
    dataset: Any = None
    """An iterable data set of the package datasets, of which this input is a part."""
    part: int = 0


@dataclass(frozen=True)
class Chunk:
    """Consecutive lines, or rows, of one input."""

    source: str
    """The input they come from, as shown to the user."""
    first_line: int
    """Number of the first line (row) in that input, from 1."""
    text: bytes = b""
    """Whole lines of JSON."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """Instead of lines: the values of each key, str or UTF-8, a row after the other."""
    disk_bytes: int = 0
    """Bytes read from the disk for this chunk: compressed size, for a compressed file."""
    problem: str | None = None
    """Why the input cannot be read from here on."""

    def documents(self, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | bytes]]:
        """List the lines or rows with their numbers."""
        if self.columns:
            rows = zip(*(self.columns[key] for key in keys), strict=True)
            return enumerate((dict(zip(keys, row, strict=True)) for row in rows), self.first_line)
        return enumerate(io.BytesIO(self.text), self.first_line)

    def __len__(self) -> int:
        if self.columns:
            return len(next(iter(self.columns.values())))
        return self.text.count(b"\n") + (not self.text.endswith(b"\n") if self.text else 0)


def expand_inputs(patterns: Sequence[str]) -> list[Input]:
    """Resolve the ``--input`` values to files.

    Args:
        patterns: File names, directories, glob patterns (``**`` descends) or ``-`` for standard
            input. Of a directory all JSON lines and parquet files are taken, at any depth.

    Returns:
        The files, pattern by pattern as given, those of one pattern sorted by name.

    Raises:
        UserError: A file is missing, or a pattern or directory has none.
    """
    names: list[str] = []
    for pattern in patterns:
        if pattern == STDIN or os.path.isfile(pattern):
            names.append(pattern)
        elif os.path.isdir(pattern):
            found = sorted(str(path) for path in Path(pattern).rglob("*") if _is_data(path))
            if not found:
                raise UserError(
                    f"--input {pattern}: no file in this directory ends with .jsonl, .json, "
                    ".ndjson (also .gz or .zst) or .parquet"
                )
            names.extend(found)
        elif os.path.exists(pattern):  # A named pipe, or a shell's <(command).
            names.append(pattern)
        else:
            matches = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
            if not matches:
                raise UserError(f"--input {pattern}: no such file")
            names.extend(matches)
    if names.count(STDIN) > 1:
        raise UserError("--input - can be given only once")
    for name in names:
        if name != STDIN and not os.access(name, os.R_OK):
            raise UserError(f"--input {name}: no permission to read it")
    return [Input(name, os.path.getsize(name) if os.path.isfile(name) else None) for name in names]


def _is_data(path: Path) -> bool:
    return path.name.endswith(_SUFFIXES) and not path.name.startswith(".") and path.is_file()


def open_dataset(name: str, config: str | None, split: str, files: str | None) -> list[Input]:
    """Open a Hugging Face data set, to be streamed: an input for each of its files.

    Args:
        name: On the Hub, or a local directory, or a format such as ``json`` with ``files``.
        config: Part of the data set, None for the only one.
        split: As in ``train``.
        files: Pattern of the files to read; None: all of the split.

    Raises:
        UserError: The package is missing, or the data set cannot be reached.
    """
    if not THIS_MACHINE.is_installed("datasets"):
        raise UserError("the package datasets is not installed: pip install 'datasets>=4'")
    # Else it imports torch, for seconds, to make its data sets a class of torch's as well.
    os.environ.setdefault("USE_TORCH", "NO")
    from datasets import load_dataset
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it retries for a while, and says so each time
    try:
        dataset = load_dataset(name, config, data_files=files, split=split, streaming=True)
        count = dataset.num_shards
    except Exception as error:  # Each layer below raises its own kinds.
        raise UserError(f"--dataset {name} cannot be read: {one_line(error)}") from error
    title = " ".join(filter(None, (name, config, split, files)))
    return [Input(f"{title} {n + 1}/{count}", None, dataset, n) for n in range(count)]


def disk_size(inputs: Sequence[Input]) -> int | None:
    """Bytes on disk of all inputs together, or None when some input's size is not known."""
    sizes = [each.size for each in inputs]
    return None if None in sizes else sum(cast(list[int], sizes))


def read_chunks(
    inputs: Sequence[Input], keys: Sequence[str], chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Chunk]:
    """Read the inputs one after the other.

    Args:
        inputs: As :func:`expand_inputs` or :func:`open_dataset` return them.
        keys: Fields or columns that hold text.
        chunk_bytes: Text after which a chunk is closed; a longer line is a chunk of its own.

    Yields:
        Chunks in input order, the same for the same content. No chunk spans two inputs. What an
        input holds before a fault comes first, then a chunk with the ``problem``.
    """
    for each in inputs:
        source = "standard input" if each.name == STDIN else each.name
        chunks = _read(each, source, keys, chunk_bytes)
        line = 1
        try:
            for chunk in chunks:
                yield chunk
                line = chunk.first_line + len(chunk)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            problem = f"damaged or incomplete compressed file ({error})"
            yield Chunk(source, line, problem=problem)
        except OSError as error:
            yield Chunk(
                source, line, problem=f"cannot be read: {error.strerror or one_line(error)}"
            )
        except ValueError as error:
            yield Chunk(source, line, problem=str(error))


def texts_of(line: dict[str, Any] | bytes, keys: Sequence[str]) -> dict[str, str] | None:
    """Take a document's texts out of its line or row.

    Args:
        line: As :meth:`Chunk.documents` lists them.
        keys: The fields that hold text.

    Returns:
        The text of every key, or None for a blank line.

    Raises:
        BrokenLineError: The line is not UTF-8, not a JSON object, or lacks the text of a key.
    """
    document = line if isinstance(line, dict) else _parse(line)
    if document is None:
        return None
    texts: dict[str, str] = {}
    for key in keys:
        if key not in document:
            found = ", ".join(map(repr, list(document)[:20])) or "none"
            raise BrokenLineError(f"no key {key!r} (keys of this line: {found})", "no such key")
        text = document[key]
        try:
            if isinstance(text, bytes):
                text = text.decode()
        except UnicodeDecodeError as error:
            raise BrokenLineError(f"key {key!r} is not UTF-8", "not UTF-8") from error
        if not isinstance(text, str):
            raise BrokenLineError(
                f"key {key!r} is {type(text).__name__}, not a string", "not a string"
            )
        texts[key] = text
    return texts


def one_line(error: Exception) -> str:
    """Return an error's kind and its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        content = line.decode("utf-8").strip()
        document = json.loads(content) if content else None
    except UnicodeDecodeError as error:
        raise BrokenLineError(
            f"not UTF-8 (byte {error.start + 1} of the line)", "not UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise BrokenLineError(
            f"not JSON: {error.msg} at character {error.pos + 1}", "not JSON"
        ) from error
    except RecursionError as error:
        raise BrokenLineError("JSON nested too deep", "not JSON") from error
    except ValueError as error:  # Python reads no whole number of more than 4300 digits.
        raise BrokenLineError("a number with too many digits", "not JSON") from error
    if not content:
        return None
    if not isinstance(document, dict):
        raise BrokenLineError("not a JSON object", "not JSON")
    return document


def _read(each: Input, source: str, keys: Sequence[str], limit: int) -> Iterator[Chunk]:
    if each.dataset is not None:
        yield from _dataset_chunks(each, keys)
    elif each.name == STDIN:
        yield from _lines(source, cast(io.BufferedReader, sys.stdin.buffer), None, limit)
    elif each.name.endswith(".parquet"):
        yield from _parquet_chunks(each, keys)
    else:
        with open(each.name, "rb") as raw, _decompressed(each.name, raw) as text:
            yield from _lines(source, text, raw, limit)


def _lines(
    source: str, text: io.BufferedReader, raw: BinaryIO | None, limit: int
) -> Iterator[Chunk]:
    seekable = raw is not None and raw.seekable()
    parts: list[bytes] = []
    size = position = 0
    first = 1

    def close(block: bytes) -> Chunk:
        nonlocal position, first
        end = cast(BinaryIO, raw).tell() if seekable else position + len(block)
        chunk = Chunk(
            source,
            first,
            block.removeprefix(_UTF8_BOM) if first == 1 else block,
            disk_bytes=end - position,
        )
        first, position = first + len(chunk), end
        return chunk

    try:
        while piece := text.read1(_READ_BYTES):
            # The first line end behind the limit, wherever the pieces end: always the same chunks.
            while (end := piece.find(b"\n", max(0, limit - size - 1))) >= 0:
                yield close(b"".join([*parts, piece[: end + 1]]))
                parts, size, piece = [], 0, piece[end + 1 :]
            parts.append(piece)
            size += len(piece)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError):
        # The lines before the fault count; the last one may be cut.
        whole = b"".join(parts)
        if whole := whole[: whole.rfind(b"\n") + 1]:
            yield close(whole)
        raise
    if rest := b"".join(parts):
        yield close(rest)


def _parquet_chunks(each: Input, keys: Sequence[str]) -> Iterator[Chunk]:
    if not THIS_MACHINE.is_installed("pyarrow"):
        raise ValueError("parquet needs the package pyarrow: pip install pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(each.name, pre_buffer=False) as file:
            schema = file.schema_arrow
            for key in keys:
                if key not in schema.names:
                    raise ValueError(f"no column {key!r} (columns: {', '.join(schema.names)})")
                kind = schema.field(key).type
                if not _TEXT_COLUMN.fullmatch(str(kind)):
                    raise ValueError(f"column {key!r} is {kind}, not a string")
            total, first = file.metadata.num_rows, 1
            for batch in file.iter_batches(_ROWS, columns=list(keys), use_threads=False):
                columns = {
                    key: batch.column(key).cast(pyarrow.large_binary()).to_pylist() for key in keys
                }
                share = (each.size or 0) * batch.num_rows // max(1, total)
                yield Chunk(each.name, first, columns=columns, disk_bytes=share)
                first += batch.num_rows
    except (pyarrow.ArrowException, EOFError) as error:
        raise ValueError(f"damaged or incomplete parquet file ({one_line(error)})") from error


def _dataset_chunks(each: Input, keys: Sequence[str]) -> Iterator[Chunk]:
    first = 1
    try:
        rows = each.dataset.shard(num_shards=each.dataset.num_shards, index=each.part)
        for batch in rows.iter(batch_size=_ROWS):
            for key in keys:
                if key not in batch:
                    raise ValueError(f"its rows have no column {key!r} ({', '.join(batch)})")
            columns = {key: batch[key] for key in keys}
            yield Chunk(each.name, first, columns=columns)
            first += len(columns[keys[0]])
    except (ValueError, OSError):
        raise
    except Exception as error:  # Each layer below raises its own kinds.
        raise ValueError(f"cannot be read: {one_line(error)}") from error


def _decompressed(name: str, raw: io.BufferedReader) -> Any:
    match Path(name).suffix:
        case ".gz":
            return gzip.GzipFile(fileobj=raw)
        case ".zst":
            return io.BufferedReader(_ZstdReader(raw), 16 * _READ_BYTES)
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
            block = self._raw.read(2 * _READ_BYTES)
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
