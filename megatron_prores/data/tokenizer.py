r"""Training a SentencePiece tokenizer that gives every text back exactly as it was.

SentencePiece by default trims and folds white space, which ruins code, and writes a space as the
sign ``▁`` (U+2581), which a text may itself contain. Here nothing is normalised, newline and tab
are symbols of their own, what the vocabulary lacks is spelled in bytes, and the model escapes ``▁``
on the way in and restores it on the way out: ``decode(encode(x)) == x`` for every ``x``.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import io
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_prores.data.jsonl import (
    BrokenLineError,
    disk_size,
    expand_inputs,
    parse_document,
    read_chunks,
)
from megatron_prores.data.progress import Progress
from megatron_prores.data.staging import refuse_existing, staging_directory
from megatron_prores.errors import Parser, UserError
from megatron_prores.files import publish

MODEL_TYPES = ("bpe", "unigram")

# An escape and its inverse, as SentencePiece normalisation rules (hexadecimal code points): ▁ to
# E000 E001, and E000 (private use, the escape character) to E000 E000: no text is ambiguous.
_ESCAPE_RULES = "2581\tE000 E001\nE000\tE000 E000\n"
_UNESCAPE_RULES = "E000 E001\t2581\nE000 E000\tE000\n"

_WHITESPACE_SYMBOLS = ["\n", "\t"]
# Pieces never span lines, so lines are what training sees; longer ones (minified code, prose
# without line breaks) are cut rather than dropped, which is what SentencePiece would do.
_SENTENCE_CHARACTERS = 4096
_SENTENCE_BYTES = 4 * _SENTENCE_CHARACTERS
# Part of the result: each thread's counts are rounded apart. Fixed, so that it is the same result
# on a machine with other cores.
_THREADS = 16
_HEARTBEAT_SECONDS = 10.0


def sample_documents(
    inputs: Sequence[str], key: str, max_bytes: int, progress: Progress
) -> list[str]:
    """Read the texts, and of more than ``max_bytes`` keeps an even sample.

    The sample is the same in every run: the documents whose number has the smallest hashes.

    Args:
        inputs: JSONL files as :func:`megatron_prores.data.jsonl.expand_inputs` returns them.
        key: The field that holds the text.
        max_bytes: Most text to hold, in bytes of UTF-8.
        progress: Told about what is read.

    Returns:
        The texts, in input order.

    Raises:
        UserError: A line is broken, or there is no text at all.
    """
    # A heap with the largest hash on top, the first to go when the text outgrows the limit.
    heap: list[tuple[int, int, str, int]] = []
    held = number = 0
    for chunk in read_chunks(inputs):
        for line_number, line in enumerate(chunk.lines, chunk.first_line):
            try:
                document = parse_document(line, [key])
                if document is None:
                    continue
                text = document[key]
                size = len(text.encode("utf-8"))
            except (BrokenLineError, UnicodeEncodeError) as error:
                raise UserError(f"{chunk.source}:{line_number}: {error}") from error
            digest = hashlib.sha256(number.to_bytes(8)).digest()
            heapq.heappush(heap, (-int.from_bytes(digest[:8]), number, text, size))
            held += size
            number += 1
            while held > max_bytes and len(heap) > 1:
                held -= heapq.heappop(heap)[3]
        progress.update(len(chunk.lines), sum(map(len, chunk.lines)), chunk.disk_bytes)
    texts = [text for _, _, text, _ in sorted(heap, key=lambda item: item[1])]
    if not any(text.strip() for text in texts):
        raise UserError(f"--input {' '.join(inputs)}: no text under the key {key!r}")
    return texts


def train_model(texts: Sequence[str], vocab_size: int, model_type: str = "bpe") -> bytes:
    """Train a SentencePiece model.

    Args:
        texts: The training texts.
        vocab_size: Number of token ids, with the special ones: 0 unknown, 1 beginning of sentence,
            2 end of sentence, which Megatron takes for the end of a document.
        model_type: ``bpe`` or ``unigram``.

    Returns:
        The model file's content, the same for the same arguments.

    Raises:
        UserError: The vocabulary is too large or too small for the text.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        escape_path, unescape_path = Path(folder, "escape.tsv"), Path(folder, "unescape.tsv")
        escape_path.write_text(_ESCAPE_RULES)
        unescape_path.write_text(_UNESCAPE_RULES)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts),
                model_writer=proto,
                vocab_size=vocab_size,
                model_type=model_type,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,  # Megatron then pads outside the vocabulary and masks nothing real.
                normalization_rule_tsv=str(escape_path),
                denormalization_rule_tsv=str(unescape_path),
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,  # An indentation is one token.
                user_defined_symbols=_WHITESPACE_SYMBOLS,
                byte_fallback=True,
                split_digits=True,
                character_coverage=0.9995,
                max_sentence_length=_SENTENCE_BYTES,
                num_threads=_THREADS,
                minloglevel=2,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(_explain(error, vocab_size)) from error
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(proto.getvalue())
    # The rules themselves are in the model, compiled; the paths would only make it differ.
    model.normalizer_spec.ClearField("normalization_rule_tsv")
    model.denormalizer_spec.ClearField("normalization_rule_tsv")
    return model.SerializeToString(deterministic=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``tools/train_tokenizer.py``.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        UserError: An argument or input is not usable.
    """
    args = _parser().parse_args(argv)
    output = args.output or Path(f"{args.output_prefix}.model")
    if args.vocab_size < 1:
        raise UserError(f"--vocab-size {args.vocab_size} must be positive")
    if args.input_megabytes <= 0:
        raise UserError(f"--input-megabytes {args.input_megabytes:g} must be positive")
    inputs = expand_inputs(args.input)
    refuse_existing([output], args.overwrite)
    with staging_directory(output) as staging:
        with Progress("reading", disk_size(inputs)) as progress:
            texts = sample_documents(
                inputs, args.json_key, round(args.input_megabytes * 1e6), progress
            )
        size = sum(len(text.encode("utf-8")) for text in texts)
        print(f"training on {len(texts)} documents, {size / 1e6:.1f} MB", flush=True)
        start = time.monotonic()
        with _heartbeat(f"training {args.model_type}, {args.vocab_size} pieces"):
            model = train_model(texts, args.vocab_size, args.model_type)
        staged = staging / output.name
        staged.write_bytes(model)
        publish(staged, output)
    digest = hashlib.sha256(model).hexdigest()
    seconds = time.monotonic() - start
    print(f"{output}: {args.vocab_size} pieces in {seconds:.1f} s, sha256 {digest}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Train a SentencePiece tokenizer (--tokenizer-type SentencePieceTokenizer).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE",
        help="JSONL files (.jsonl, .gz, .zst), glob patterns, or - for standard input",
    )  # fmt: skip
    parser.add_argument("--json-key", default="text", help="field that holds the text")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of token ids")
    parser.add_argument(
        "--model-type", choices=MODEL_TYPES, default="bpe",
        help="bpe trains faster and makes fewer tokens of code; unigram encodes faster",
    )  # fmt: skip
    parser.add_argument(
        "--input-megabytes", type=float, default=100.0,
        help="train on an even sample of at most this much text (10^6 bytes)",
    )  # fmt: skip
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--output-prefix", metavar="PREFIX", help="writes PREFIX.model")
    output.add_argument("--output", type=Path, metavar="FILE", help="writes FILE")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    return parser


def _sentences(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _SENTENCE_CHARACTERS):
                yield line[start : start + _SENTENCE_CHARACTERS]


def _explain(error: Exception, vocab_size: int) -> str:
    """Put a training failure of the library in the user's words."""
    reason = str(error)
    too_large = re.search(r"set it to a value <= (\d+)", reason)
    if too_large:
        limit = too_large[1]
        return f"--vocab-size {vocab_size} is too large for this text; use at most {limit}"
    too_small = re.search(rf"{vocab_size} vs (\d+)", reason)
    if too_small:
        return (
            f"--vocab-size {vocab_size} is too small: special tokens, 256 bytes and the text's "
            f"characters come first; use at least {too_small[1]}"
        )
    return f"--vocab-size {vocab_size}: the tokenizer cannot be trained on this text ({reason})"


@contextmanager
def _heartbeat(title: str) -> Iterator[None]:
    """Show now and then how long a call into a library has been at work."""
    terminal = sys.stderr.isatty()
    done = threading.Event()
    start = time.monotonic()

    def beat() -> None:
        while not done.wait(1.0 if terminal else _HEARTBEAT_SECONDS):
            line = f"{title}: {time.monotonic() - start:.0f} s"
            print(line, end="\r" if terminal else os.linesep, file=sys.stderr, flush=True)
        if terminal:
            print(file=sys.stderr)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
