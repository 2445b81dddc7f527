"""Text lines to token ids, in parallel and in order."""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_prores.data.inputs import BrokenLineError, Chunk, texts_of
from megatron_prores.data.text_tokenizer import TextTokenizer
from megatron_prores.errors import UserError
from megatron_prores.system.processes import end_with_parent

_CHUNKS_PER_WORKER = 4
"""Chunks read ahead: enough that no worker waits, few enough that memory stays small."""


@dataclass
class EncodedTexts:
    """The texts of one key in one chunk, as one run of token ids."""

    tokens: bytes
    """In the bytes of the tokenizer's dtype."""
    lengths: npt.NDArray[np.int32]
    """Token ids per document; those of the documents that have none are left out."""
    count: int
    """Token ids of all."""


@dataclass
class EncodedChunk:
    """What became of a chunk."""

    texts: dict[str, EncodedTexts]
    """By key."""
    documents: int
    text_bytes: int
    """UTF-8 of the documents' texts."""
    disk_bytes: int
    next_line: int
    """The line of the input that follows."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Lines and texts that made no document, by reason."""
    problems: list[str] = field(default_factory=list)
    """Broken lines, each with its file, line number and reason."""

    @property
    def tokens(self) -> int:
        """Tokens over all keys."""
        return sum(texts.count for texts in self.texts.values())


@dataclass(frozen=True)
class Encoder:
    """Tokenizes chunks of lines.

    Args:
        tokenizer: The tokenizer.
        keys: The fields that hold text.
        eod: Token id appended to every document that has tokens, or None.
        stop_at_problem: Leave the rest of a chunk after its first broken line.
        max_bytes: Longer texts are broken; None: no text is too long.
    """

    tokenizer: TextTokenizer
    keys: Sequence[str]
    eod: int | None = None
    stop_at_problem: bool = True
    max_bytes: int | None = None

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Tokenize one chunk.

        Args:
            chunk: Lines of JSON, or rows.

        Returns:
            Token ids in the order of the lines, and the lines that could not be used.
        """
        ids: dict[str, list[bytes]] = {key: [] for key in self.keys}
        done = EncodedChunk({}, 0, 0, chunk.disk_bytes, chunk.first_line + len(chunk))
        for number, line in chunk.documents(self.keys):
            try:
                texts = texts_of(line, self.keys)
                if texts is None:
                    continue
                # All keys before any is stored: a line counts whole or not at all.
                size = sum(self._checked_size(key, text) for key, text in texts.items())
                encoded = {key: self._token_ids(text) for key, text in texts.items()}
            except BrokenLineError as error:
                done.left_out[error.reason] += 1
                done.problems.append(f"{chunk.source}:{number}: {error}")
                if self.stop_at_problem:
                    break
                continue
            done.documents += 1
            done.text_bytes += size
            for key, document_ids in encoded.items():
                if document_ids:
                    ids[key].append(document_ids)
                else:
                    done.left_out["empty"] += 1
        if chunk.problem is not None:
            done.left_out["unreadable file"] += 1
            done.problems.append(f"{chunk.source}:{chunk.first_line}: {chunk.problem}")
        done.texts = {key: self._join(ids[key]) for key in self.keys}
        return done

    def _checked_size(self, key: str, text: str) -> int:
        """Return a text's bytes of UTF-8."""
        size = len(text) if text.isascii() else len(text.encode())
        if self.max_bytes is not None and size > self.max_bytes:
            raise BrokenLineError(
                f"key {key!r} has {size} bytes, above --max-document-bytes {self.max_bytes}",
                "too long",
            )
        return size

    def _token_ids(self, text: str) -> bytes:
        ids = self.tokenizer.encode(text) if text else b""
        if ids and self.eod is not None:
            ids += np.array(self.eod, self.tokenizer.dtype).tobytes()
        return ids

    def _join(self, documents: list[bytes]) -> EncodedTexts:
        size = np.dtype(self.tokenizer.dtype).itemsize
        lengths = np.array([len(ids) // size for ids in documents], np.int32)
        return EncodedTexts(b"".join(documents), lengths, int(lengths.sum()))


def encode_in_order(
    encoder: Encoder, chunks: Iterable[Chunk], workers: int
) -> Generator[EncodedChunk]:
    """Encode chunks in several processes; results come in the order of the chunks.

    Args:
        encoder: What to do with a chunk.
        chunks: The input, read only a few chunks ahead of the results.
        workers: Processes; with 1, everything happens in this one.

    Yields:
        One result per chunk.

    Raises:
        UserError: A worker died (the system ends the largest process when memory runs out).
    """
    if workers == 1:
        yield from map(encoder.encode, chunks)
        return
    # Fork, not spawn: workers share the tokenizer that is already built instead of importing
    # Megatron for seconds and holding it in memory each. The pool forks before it starts threads.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=start_worker,
        initargs=(encoder,),
    )
    pending: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode, chunk))
            if len(pending) >= _CHUNKS_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise lost_worker(workers) from error
    finally:
        pool.shutdown(cancel_futures=True)


def lost_worker(workers: int) -> UserError:
    """Return what to raise where one of so many worker processes has died."""
    return UserError(
        f"a worker process died, most likely for lack of memory; try fewer than --workers {workers}"
    )


_worker_encoder: Encoder


def start_worker(encoder: Encoder) -> None:
    """Make a forked process a worker: it leaves signals to its parent, and ends with it."""
    global _worker_encoder
    _worker_encoder = encoder
    # A terminal's Ctrl-C reaches every process; the parent alone decides how to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()


def _encode(chunk: Chunk) -> EncodedChunk:
    return _worker_encoder.encode(chunk)
