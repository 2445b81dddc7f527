"""The inputs of preprocessing, and the documents in what is read of them."""

from __future__ import annotations

import glob
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from megatron_prores.errors import UserError
from megatron_prores.system.environment import THIS_MACHINE

STDIN = "-"
"""The ``--input`` that stands for standard input."""

_SUFFIXES = (
    ".parquet",
    *(name + packed for name in (".jsonl", ".json", ".ndjson") for packed in ("", ".gz", ".zst")),
)
"""What is taken from a directory."""


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


def texts_of(line: dict[str, Any] | bytes, keys: Sequence[str]) -> dict[str, str] | None:
    """Take a document's texts out of its line or row.

    Args:
        line: As :meth:`Chunk.documents` lists them.
        keys: The fields that hold text.

    Returns:
        The text of every key, or None for a blank line.

    Raises:
        BrokenLineError: The line is not UTF-8, not a JSON object, or lacks the text of a key; or
            that is no text: half of a surrogate pair, which each tokenizer trips over in its way.
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
        if isinstance(line, bytes) and b"\\u" in line:  # UTF-8 has none, but JSON's escapes do
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise BrokenLineError(
                    f"key {key!r} holds half of a surrogate pair", "half of a surrogate pair"
                ) from error
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
