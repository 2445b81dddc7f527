"""Reads inputs in bounded memory: JSON lines, parquet, standard input, Hugging Face data."""

from __future__ import annotations

import gzip
import io
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from megatron_prores.data.inputs import STDIN, Chunk, Input, one_line
from megatron_prores.system.environment import THIS_MACHINE

CHUNK_BYTES = 1 << 18
"""Text read at once: large against the cost of handing it to a worker, small against its work."""

_READ_BYTES = 1 << 16
_ROWS = 256
_UTF8_BOM = b"\xef\xbb\xbf"
_TEXT_COLUMN = re.compile(r"(large_)?(string|binary)|dictionary<values=(large_)?string.*")


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
