"""Text lines to token ids, in parallel and in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_prores.data.jsonl import BrokenLineError, Chunk, parse_document
from megatron_prores.errors import UserError

_CHUNKS_PER_WORKER = 4
"""Chunks read ahead: enough that no worker waits, few enough that memory stays small."""


@dataclass
class EncodedTexts:
    """The texts of one key in one chunk, as one run of token ids."""

    tokens: npt.NDArray[np.generic]
    lengths: list[int]
    """Token ids per document; those of the documents that have none are left out."""
    empty: int = 0
    """Documents without a token."""


@dataclass
class EncodedChunk:
    """What became of a chunk."""

    texts: dict[str, EncodedTexts]
    """By key."""
    documents: int
    text_bytes: int
    disk_bytes: int
    problems: list[str] = field(default_factory=list)
    """Broken lines, each with its file, line number and reason."""


@dataclass(frozen=True)
class Encoder:
    """Tokenizes chunks of lines.

    Args:
        tokenizer: A Megatron text tokenizer.
        keys: The fields that hold text.
        dtype: Type of the token ids.
        eod: Token id appended to every document that has tokens, or None.
        stop_at_problem: Leave the rest of a chunk after its first broken line.
    """

    tokenizer: Any
    keys: Sequence[str]
    dtype: type[np.generic]
    eod: int | None = None
    stop_at_problem: bool = True

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Tokenize one chunk.

        Args:
            chunk: Lines of JSON.

        Returns:
            Token ids in the order of the lines, and the lines that could not be used.
        """
        ids: dict[str, list[npt.NDArray[np.generic]]] = {key: [] for key in self.keys}
        documents = 0
        problems: list[str] = []
        for number, line in enumerate(chunk.lines, chunk.first_line):
            try:
                document = parse_document(line, self.keys)
                if document is None:
                    continue
                # All keys before any is stored: a line counts whole or not at all.
                encoded = {key: self._token_ids(key, text) for key, text in document.items()}
            except BrokenLineError as error:
                problems.append(f"{chunk.source}:{number}: {error}")
                if self.stop_at_problem:
                    break
                continue
            documents += 1
            for key, document_ids in encoded.items():
                ids[key].append(document_ids)
        return EncodedChunk(
            texts={key: self._join(ids[key]) for key in self.keys},
            documents=documents,
            text_bytes=sum(map(len, chunk.lines)),
            disk_bytes=chunk.disk_bytes,
            problems=problems,
        )

    def _token_ids(self, key: str, text: str) -> npt.NDArray[np.generic]:
        try:
            ids = np.asarray(self.tokenizer.tokenize(text) if text else [], dtype=np.int64)
        except (ValueError, OverflowError) as error:
            raise BrokenLineError(f"key {key!r} cannot be tokenized: {error}") from error
        # An id past the vocabulary would wrap around in the dtype, or crash training's embedding.
        if ids.size and not 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise BrokenLineError(
                f"token id {wrong} is outside the tokenizer's vocabulary of "
                f"{self.tokenizer.vocab_size}; check --tokenizer-model or --vocab-size"
            )
        if ids.size and self.eod is not None:
            ids = np.append(ids, self.eod)
        return ids.astype(self.dtype)

    def _join(self, documents: list[npt.NDArray[np.generic]]) -> EncodedTexts:
        lengths = [ids.size for ids in documents if ids.size]
        tokens = np.concatenate([np.empty(0, self.dtype), *documents])
        return EncodedTexts(tokens, lengths, empty=len(documents) - len(lengths))


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
        initializer=_start_worker,
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
        raise UserError(
            "a worker process died, most likely for lack of memory; "
            f"try fewer than --workers {workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    # A terminal's Ctrl-C reaches every process; the parent alone decides how to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """End a worker whose parent was killed outright; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(chunk: Chunk) -> EncodedChunk:
    return _worker_encoder.encode(chunk)
