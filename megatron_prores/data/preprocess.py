"""JSON lines to Megatron's indexed dataset (``.bin`` and ``.idx``)."""

from __future__ import annotations

import argparse
import os
import signal
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np

from megatron_prores.data.encode import EncodedTexts, Encoder, encode_in_order
from megatron_prores.data.jsonl import disk_size, expand_inputs, read_chunks
from megatron_prores.data.megatron_tokenizer import (
    add_tokenizer_arguments,
    build_megatron_tokenizer,
    check_tokenizer_arguments,
    end_of_document_id,
    silence_import_warnings,
)
from megatron_prores.data.progress import Progress
from megatron_prores.data.staging import refuse_existing, staging_directory
from megatron_prores.errors import Parser, UserError
from megatron_prores.files import publish

_SHOWN_PROBLEMS = 20
"""Broken lines reported one by one; a wholly broken input must not flood the log."""


@dataclass
class Summary:
    """What a run wrote and left out, over all keys."""

    documents: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    """By key."""
    empty: int = 0
    broken: int = 0


class DatasetWriter:
    """One indexed dataset, written in a staging folder until it is complete.

    Args:
        staging: Folder to write in.
        final: The dataset's path without ``.bin`` and ``.idx``.
        dtype: Type of the token ids.
    """

    def __init__(self, staging: Path, final: Path, dtype: type[np.generic]) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._staged = staging / final.name
        self._final = final
        self._builder = IndexedDatasetBuilder(str(_with_suffix(self._staged, ".bin")), dtype=dtype)

    def add(self, texts: EncodedTexts) -> None:
        """Appends documents.

        Args:
            texts: Their token ids.
        """
        start = 0
        for length in texts.lengths:
            self._builder.add_document(texts.tokens[start : start + length], [length])
            start += length

    def finish(self) -> None:
        """Completes both files, still in the staging folder."""
        self._builder.finalize(str(_with_suffix(self._staged, ".idx")))

    def publish(self) -> None:
        """Return both files their final names, replacing those of an older dataset.

        Megatron sees a dataset where both files are. The index goes last, and an old index goes
        first: at no moment does one dataset's index lie beside another's tokens.
        """
        _with_suffix(self._final, ".idx").unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            publish(_with_suffix(self._staged, suffix), _with_suffix(self._final, suffix))


def preprocess(
    inputs: Sequence[str],
    prefix: Path,
    encoder: Encoder,
    workers: int,
    log_interval: int | None = None,
    stop_after: int | None = None,
) -> Summary:
    """Write one dataset per key, named ``{prefix}_{key}_document``.

    Args:
        inputs: JSONL files as :func:`megatron_prores.data.jsonl.expand_inputs` returns them.
        prefix: Start of the datasets' paths; the folder is made if missing.
        encoder: Tokenizer and its settings; ``stop_at_problem`` makes a broken line end the run.
        workers: Processes that tokenize. The result does not depend on it.
        log_interval: See :class:`megatron_prores.data.progress.Progress`.
        stop_after: Tokens, over all keys, after which the rest of the input is left unread; they
            are reached within one chunk of it. None: all of it is read.

    Returns:
        Counts over all keys.

    Raises:
        UserError: An input is unusable, no document has text, there are fewer tokens than
            ``stop_after``, or the output cannot be written. Nothing then changes under the final
            names.
    """
    summary = Summary()
    with staging_directory(prefix) as staging:
        try:
            writers = {
                key: DatasetWriter(staging, _dataset_path(prefix, key), encoder.dtype)
                for key in encoder.keys
            }
            with (
                Progress("tokenizing", disk_size(inputs), log_interval) as progress,
                closing(encode_in_order(encoder, read_chunks(inputs), workers)) as results,
            ):
                for result in results:
                    for problem in result.problems:
                        _report(problem, summary, progress, fatal=encoder.stop_at_problem)
                    for key, texts in result.texts.items():
                        writers[key].add(texts)
                        summary.tokens[key] += texts.tokens.size
                        summary.empty += texts.empty
                    summary.documents += result.documents
                    progress.update(result.documents, result.text_bytes, result.disk_bytes)
                    if stop_after is not None and summary.tokens.total() >= stop_after:
                        break
            _require_tokens(inputs, encoder.keys, summary)
            if stop_after is not None and summary.tokens.total() < stop_after:
                # A download that broke off looks like the end of the input.
                raise UserError(
                    f"--stop-after-tokens {stop_after}: the input ended after "
                    f"{summary.tokens.total()} tokens; nothing is written"
                )
            for writer in writers.values():
                writer.finish()
            for writer in writers.values():
                writer.publish()
        except OSError as error:
            raise UserError(f"--output-prefix {prefix}: cannot write: {error.strerror}") from error
    seconds = max(progress.seconds, 1e-9)
    print(
        f"{summary.documents} documents, {summary.tokens.total()} tokens in {seconds:.1f} s "
        f"({progress.megabytes_per_second:.1f} MB/s); left out {summary.broken} broken lines "
        f"and {summary.empty} empty texts"
    )
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``tools/preprocess_data.py``.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        UserError: An argument or input is not usable.
    """
    args = _parser().parse_args(argv)
    inputs = expand_inputs(args.input)
    prefix = _checked_prefix(args.output_prefix)
    keys = list(dict.fromkeys(args.json_keys))
    for key in keys:
        if os.sep in key:
            raise UserError(f"--json-keys {key}: a key with {os.sep!r} cannot be in a file name")
    outputs = [
        _with_suffix(_dataset_path(prefix, key), suffix)
        for key in keys
        for suffix in (".bin", ".idx")
    ]
    refuse_existing(outputs, args.overwrite)
    for flag, value in (
        ("--workers", args.workers),
        ("--log-interval", args.log_interval),
        ("--stop-after-tokens", args.stop_after_tokens),
    ):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    check_tokenizer_arguments(args)
    # A scheduler's SIGTERM ends the run as Ctrl-C does: through the clean-up, with one line.
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        encoder = _build_encoder(args, keys)
        preprocess(inputs, prefix, encoder, args.workers, args.log_interval, args.stop_after_tokens)
    finally:
        signal.signal(signal.SIGTERM, previous)
    for path in outputs:
        print(path)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Turn JSON lines into the indexed dataset that Megatron trains on.")
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE",
        help="JSONL files (.jsonl, .gz, .zst), glob patterns, or - for standard input",
    )  # fmt: skip
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], help="fields with text (default: text)"
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="PREFIX",
        help="writes PREFIX_{key}_document.bin and .idx",
    )  # fmt: skip
    parser.add_argument(
        "--append-eod", action="store_true", help="end every document with the end-of-document id"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1,
        help="processes that tokenize (default: all cores, %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--log-interval", type=int, metavar="DOCUMENTS",
        help="in a log file, documents between two lines of progress (default: ten seconds)",
    )  # fmt: skip
    parser.add_argument(
        "--on-error", choices=("fail", "skip"), default="fail",
        help="end the run at a broken line, or report, skip and count it (default: fail)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument(
        "--stop-after-tokens", type=int, metavar="N",
        help="leave the rest of the input unread; fewer tokens than N are an error",
    )  # fmt: skip
    add_tokenizer_arguments(parser)
    return parser


def _build_encoder(args: argparse.Namespace, keys: Sequence[str]) -> Encoder:
    silence_import_warnings()
    from megatron.core.datasets.indexed_dataset import DType

    tokenizer = build_megatron_tokenizer(args)
    return Encoder(
        tokenizer,
        keys,
        dtype=DType.optimal_dtype(tokenizer.vocab_size),
        eod=end_of_document_id(tokenizer) if args.append_eod else None,
        stop_at_problem=args.on_error == "fail",
    )


def _checked_prefix(value: str) -> Path:
    if not value or value.endswith(os.sep):
        raise UserError(f"--output-prefix {value!r} needs a name too, as in data/train")
    return Path(value)


def _dataset_path(prefix: Path, key: str) -> Path:
    return prefix.with_name(f"{prefix.name}_{key}_document")


def _with_suffix(path: Path, suffix: str) -> Path:
    # Not Path.with_suffix: in a prefix like "v1.5" the dot is the user's.
    return path.with_name(path.name + suffix)


def _report(problem: str, summary: Summary, progress: Progress, fatal: bool) -> None:
    if fatal:
        raise UserError(f"{problem} (--on-error skip leaves such lines out)")
    summary.broken += 1
    if summary.broken <= _SHOWN_PROBLEMS:
        progress.message(f"skipped {problem}")
    elif summary.broken == _SHOWN_PROBLEMS + 1:
        progress.message("skipped more broken lines; from here on they are only counted")


def _require_tokens(inputs: Sequence[str], keys: Sequence[str], summary: Summary) -> None:
    # Per key: Megatron cannot map an empty .bin file.
    for key in keys:
        if not summary.tokens[key]:
            raise UserError(
                f"--input {' '.join(inputs)}: no document with text under the key {key!r} "
                f"({summary.broken} broken lines, {summary.empty} empty texts)"
            )


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
