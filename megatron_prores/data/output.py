"""What preprocessing writes: the dataset of each key, and what was left out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_prores.data.encode import EncodedChunk, Encoder
from megatron_prores.data.indexed import DatasetWriter
from megatron_prores.errors import UserError

_SHOWN_PROBLEMS = 20
"""Broken lines reported one by one; a wholly broken input must not flood the log."""


@dataclass
class Summary:
    """What a run wrote and left out, over all keys."""

    documents: int = 0
    text_bytes: int = 0
    """UTF-8 of the documents' texts."""
    tokens: Counter[str] = field(default_factory=Counter)
    """By key."""
    left_out: Counter[str] = field(default_factory=Counter)
    """By reason."""

    @property
    def empty(self) -> int:
        """Return the number of texts without a token."""
        return self.left_out["empty"]

    @property
    def broken(self) -> int:
        """Return the number of lines that could not be used."""
        return self.left_out.total() - self.empty

    def what_was_left_out(self) -> str:
        """Return the counts in words."""
        reasons = ", ".join(
            f"{count} {reason}" for reason, count in sorted(self.left_out.items()) if count
        )
        broken = reasons and f" ({reasons})"
        return f"left out {self.broken} broken lines and {self.empty} empty texts{broken}"


class Output:
    """The datasets of all keys, written together into a staging folder.

    Args:
        staging: The folder.
        prefix: Final path of the datasets without ``_{key}_document``.
        encoder: Where the token ids come from.
    """

    def __init__(self, staging: Path, prefix: Path, encoder: Encoder) -> None:
        self.summary = Summary()
        self._writers = {
            key: DatasetWriter(staging, dataset_path(prefix, key), encoder.tokenizer.dtype)
            for key in encoder.keys
        }

    def add(self, result: EncodedChunk) -> None:
        """Append the documents of a chunk."""
        for key, texts in result.texts.items():
            self._writers[key].add(texts.tokens, texts.lengths)
            self.summary.tokens[key] += texts.count
        self.summary.documents += result.documents
        self.summary.text_bytes += result.text_bytes
        self.summary.left_out += result.left_out

    def finish(self) -> dict[str, dict[str, str]]:
        """Complete all files; return their sha256 by key and ending."""
        return {key: writer.finish() for key, writer in self._writers.items()}

    def publish(self) -> None:
        """Give the datasets that have tokens their final names; Megatron cannot map empty ones."""
        for key, writer in self._writers.items():
            if self.summary.tokens[key]:
                writer.publish()


class Problems:
    """Reports broken lines: ends the run at the first, or shows some of them.

    Args:
        fatal: End the run.
        show: Prints a line.
    """

    def __init__(self, fatal: bool, show: Callable[[str], None]) -> None:
        self._fatal = fatal
        self._show = show
        self._count = 0

    def report(self, problems: Iterable[str]) -> None:
        """Report what a chunk had.

        Raises:
            UserError: The first of them, where it is to end the run.
        """
        for problem in problems:
            if self._fatal:
                raise UserError(f"{problem} (--on-error skip leaves such lines out)")
            self._count += 1
            if self._count <= _SHOWN_PROBLEMS:
                self._show(f"skipped {problem}")
            elif self._count == _SHOWN_PROBLEMS + 1:
                self._show("skipped more broken lines; from here on they are only counted")


def dataset_path(prefix: Path, key: str) -> Path:
    """Return the path of a key's dataset, without ending."""
    return prefix.with_name(f"{prefix.name}_{key}_document")
