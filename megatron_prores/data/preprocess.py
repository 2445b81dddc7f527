"""Text to Megatron's indexed dataset (``.bin`` and ``.idx``): one of all inputs, or shards."""

from __future__ import annotations

import argparse
import os
import re
import signal
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType

from megatron_prores.data.encode import Encoder, encode_in_order
from megatron_prores.data.indexed import ENDINGS, with_suffix
from megatron_prores.data.inputs import Input, disk_size, expand_inputs, open_dataset
from megatron_prores.data.make_shards import Job, make_shards
from megatron_prores.data.megatron_tokenizer import (
    add_tokenizer_arguments,
    check_tokenizer_arguments,
)
from megatron_prores.data.output import Output, Problems, Summary, dataset_path
from megatron_prores.data.progress import Progress
from megatron_prores.data.readers import read_chunks
from megatron_prores.data.shards import open_shards
from megatron_prores.data.staging import refuse_existing, staging_directory
from megatron_prores.data.text_tokenizer import build_text_tokenizer
from megatron_prores.errors import Parser, UserError


def preprocess(
    inputs: Sequence[Input],
    prefix: Path,
    encoder: Encoder,
    workers: int,
    log_interval: int | None = None,
    stop_after: int | None = None,
) -> Summary:
    """Write one dataset per key, named ``{prefix}_{key}_document``.

    Args:
        inputs: As :func:`megatron_prores.data.inputs.expand_inputs` returns them.
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
    with staging_directory(prefix) as staging:
        try:
            output = Output(staging, prefix, encoder)
            summary = output.summary
            chunks = read_chunks(inputs, encoder.keys)
            with (
                Progress("tokenizing", disk_size(inputs), log_interval, workers) as progress,
                closing(encode_in_order(encoder, chunks, workers)) as results,
            ):
                problems = Problems(encoder.stop_at_problem, progress.message)
                for result in results:
                    problems.report(result.problems)
                    output.add(result)
                    progress(result.documents, result.tokens, result.text_bytes, result.disk_bytes)
                    if stop_after is not None and summary.tokens.total() >= stop_after:
                        break
            _require_tokens(inputs, encoder.keys, summary)
            if stop_after is not None and summary.tokens.total() < stop_after:
                # A download that broke off looks like the end of the input.
                raise UserError(
                    f"--stop-after-tokens {stop_after}: the input ended after "
                    f"{summary.tokens.total()} tokens; nothing is written"
                )
            output.finish()
            output.publish()
        except OSError as error:
            raise UserError(f"--output-prefix {prefix}: cannot write: {error.strerror}") from error
    print(
        f"{summary.documents} documents, {summary.tokens.total()} tokens in "
        f"{progress.seconds:.1f} s ({progress.megabytes_per_second:.1f} MB/s); "
        f"{summary.what_was_left_out()}"
    )
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command ``tools/preprocess_data.py``.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        UserError: An argument or input is not usable.
    """
    args = _parser().parse_args(argv)
    keys = list(dict.fromkeys(args.json_keys))
    for key in keys:
        if os.sep in key:
            raise UserError(f"--json-keys {key}: a key with {os.sep!r} cannot be in a file name")
    for name in ("workers", "log_interval", "stop_after_tokens", "tokens_per_shard",
                 "max_document_bytes"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    share = _share(args.shard)
    if args.output_dir is None and (args.shard or args.tokens_per_shard):
        raise UserError("--shard and --tokens-per-shard need --output-dir, not --output-prefix")
    if args.output_dir is not None and args.overwrite:
        raise UserError("--overwrite belongs to --output-prefix; choose another --output-dir")
    inputs = expand_inputs(args.input) if args.input else []
    check_tokenizer_arguments(args)
    outputs: list[Path] = []
    if args.output_prefix is not None:
        prefix = _checked_prefix(args.output_prefix)
        paths = [dataset_path(prefix, key) for key in keys]
        outputs = [with_suffix(path, ending) for path in paths for ending in ENDINGS]
        refuse_existing(outputs, args.overwrite)
    if args.dataset is not None:
        inputs = open_dataset(
            args.dataset, args.dataset_name, args.dataset_split, args.dataset_files
        )
    # A scheduler's SIGTERM ends the run as Ctrl-C does: through the clean-up, with one line.
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        encoder = _build_encoder(args, keys)
        if args.output_prefix is not None:
            preprocess(
                inputs, prefix, encoder, args.workers, args.log_interval, args.stop_after_tokens
            )
        else:
            shards = open_shards(args.output_dir, _settings(args, encoder), inputs)
            job = Job(shards, inputs, encoder, args.tokens_per_shard)
            make_shards(job, share, args.workers, args.log_interval, args.stop_after_tokens)
    finally:
        signal.signal(signal.SIGTERM, previous)
    for path in outputs:
        print(path)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Turn text into the indexed datasets that Megatron trains on.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", metavar="FILE",
        help="JSON lines (also .gz, .zst), parquet, directories, glob patterns, - for standard "
        "input",
    )  # fmt: skip
    source.add_argument("--dataset", help="Hugging Face data set to stream: a name or a directory")
    parser.add_argument("--dataset-name", help="part of the data set, as in en")
    parser.add_argument("--dataset-split", default="train", help="default: train")
    parser.add_argument("--dataset-files", help="pattern of its files to read, else all")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"],
        help="fields or columns with text (default: text)",
    )  # fmt: skip
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument(
        "--output-prefix", metavar="PREFIX",
        help="one dataset of all inputs: writes PREFIX_{key}_document.bin and .idx",
    )  # fmt: skip
    output.add_argument(
        "--output-dir", metavar="DIR", type=Path,
        help="a shard for each input; started again it makes those that are missing",
    )  # fmt: skip
    parser.add_argument(
        "--shard", metavar="I/N",
        help="with --output-dir: make every N-th input, from the I-th; I is 1 to N",
    )  # fmt: skip
    parser.add_argument(
        "--tokens-per-shard", type=int, metavar="N",
        help="with --output-dir: close a shard with so many tokens, and go on in the next",
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
        help="end the run at a broken line or file, or report, skip and count it (default: fail)",
    )  # fmt: skip
    parser.add_argument(
        "--max-document-bytes", type=int, metavar="N",
        help="a longer text is taken for a broken line (default: none is too long)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument(
        "--stop-after-tokens", type=int, metavar="N",
        help="leave the rest of the input unread; fewer than N are an error with --output-prefix",
    )  # fmt: skip
    add_tokenizer_arguments(parser)
    return parser


def _build_encoder(args: argparse.Namespace, keys: Sequence[str]) -> Encoder:
    tokenizer = build_text_tokenizer(args)
    return Encoder(
        tokenizer,
        keys,
        eod=tokenizer.end_of_document_id() if args.append_eod else None,
        stop_at_problem=args.on_error == "fail",
        max_bytes=args.max_document_bytes,
    )


def _settings(args: argparse.Namespace, encoder: Encoder) -> dict[str, object]:
    """Collect what decides the bytes of a shard."""
    return {
        "--tokenizer-type": args.tokenizer_type,
        "a tokenizer of sha256": encoder.tokenizer.digest,
        "a vocabulary of": encoder.tokenizer.vocab_size,
        "end-of-document id": encoder.eod,
        "special tokens": not args.tokenizer_hf_no_include_special_tokens,
        "--json-keys": list(encoder.keys),
        "--tokens-per-shard": args.tokens_per_shard,
        "--max-document-bytes": args.max_document_bytes,
    }


def _share(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {text}: give I/N with I from 1 to N, as in 3/8")
    return int(match[1]), int(match[2])


def _checked_prefix(value: str) -> Path:
    if not value or value.endswith(os.sep):
        raise UserError(f"--output-prefix {value!r} needs a name too, as in data/train")
    return Path(value)


def _require_tokens(inputs: Sequence[Input], keys: Sequence[str], summary: Summary) -> None:
    # Per key: Megatron cannot map an empty .bin file.
    for key in keys:
        if not summary.tokens[key]:
            names = [each.name for each in inputs]
            shown = " ".join(names[:5] + ["..."] * (len(names) > 5))
            raise UserError(
                f"--input {shown}: no document with text under the key {key!r} "
                f"({summary.broken} broken lines, {summary.empty} empty texts)"
            )


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
