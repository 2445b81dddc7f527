r"""Training a tokenizer that gives every text back exactly as it was: SentencePiece or byte-level.

SentencePiece by default trims and folds white space, which ruins code, and writes a space as the
sign ``▁`` (U+2581), which a text may itself contain. Here nothing is normalised, newline and tab
are symbols of their own, what the vocabulary lacks is spelled in bytes, and the model escapes ``▁``
on the way in and restores it on the way out: ``decode(encode(x)) == x`` for every ``x``. The
byte-level one is like GPT-2's, in Hugging Face's format: every text is spelled in bytes.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import random
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_prores.data.inputs import (
    BrokenLineError,
    Input,
    disk_size,
    expand_inputs,
    texts_of,
)
from megatron_prores.data.progress import Progress
from megatron_prores.data.readers import read_chunks
from megatron_prores.data.staging import refuse_existing, staging_directory
from megatron_prores.errors import Parser, UserError
from megatron_prores.system.files import atomic_write, publish

# An escape and its inverse, as SentencePiece normalisation rules (hexadecimal code points): ▁ to
# E000 E001, and E000 (private use, the escape character) to E000 E000: no text is ambiguous.
_ESCAPE_RULES = "2581\tE000 E001\nE000\tE000 E000\n"
_UNESCAPE_RULES = "E000 E001\t2581\nE000 E000\tE000\n"

# Pieces never span lines, so lines are what training sees; longer ones (minified code, prose
# without line breaks) are cut rather than dropped, which is what SentencePiece would do.
_LINE_CHARACTERS = 4096
_MOST_LINES = 1_000_000
"""Of a longer text an even sample is taken."""

_END_OF_TEXT = "<|endoftext|>"
"""The special token of the byte-level tokenizer, with GPT-2's name: the end of a document."""

_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END_OF_TEXT}

_THREADS = 16
"""Part of the result: each thread rounds its counts apart. So not the number of cores here."""


def read_texts(inputs: Sequence[Input], key: str) -> Iterator[str]:
    """Read the documents of JSONL files.

    Args:
        inputs: Files as :func:`megatron_prores.data.inputs.expand_inputs` returns them.
        key: The field that holds the text.

    Raises:
        UserError: A line is broken, or there is no text at all.
    """
    has_text = False
    with Progress("reading", disk_size(inputs)) as progress:
        for chunk in read_chunks(inputs, [key]):
            if chunk.problem is not None:
                raise UserError(f"{chunk.source}: {chunk.problem}")
            size = 0
            for line_number, line in chunk.documents([key]):
                try:
                    document = texts_of(line, [key])
                    if document is None:
                        continue
                    size += len(document[key].encode())
                except BrokenLineError as error:
                    raise UserError(f"{chunk.source}:{line_number}: {error}") from error
                has_text = has_text or bool(document[key].strip())
                yield document[key]
            progress(len(chunk), 0, size, chunk.disk_bytes)
    if not has_text:
        names = " ".join(each.name for each in inputs)
        raise UserError(f"--input {names}: no text under the key {key!r}")


def train_model(texts: Iterable[str], vocab_size: int, most_lines: int = _MOST_LINES) -> bytes:
    """Train a SentencePiece BPE model.

    Args:
        texts: The training texts.
        vocab_size: Number of token ids, with the special ones: 0 unknown, 1 beginning of sentence,
            2 end of sentence, which Megatron takes for the end of a document.
        most_lines: Where the texts have more, as many are sampled evenly.

    Returns:
        The model file's content, the same for the same arguments.

    Raises:
        UserError: The vocabulary is too large or too small for the text.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    lines = _sample(_lines(texts), most_lines)
    proto = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        escape_path, unescape_path = Path(folder, "escape.tsv"), Path(folder, "unescape.tsv")
        escape_path.write_text(_ESCAPE_RULES)
        unescape_path.write_text(_UNESCAPE_RULES)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=proto,
                vocab_size=vocab_size,
                model_type="bpe",
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,  # Megatron then pads outside the vocabulary and masks nothing real.
                normalization_rule_tsv=str(escape_path),
                denormalization_rule_tsv=str(unescape_path),
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,  # An indentation is one token.
                user_defined_symbols=["\n", "\t"],
                byte_fallback=True,
                split_digits=True,
                character_coverage=0.9995,
                max_sentence_length=4 * _LINE_CHARACTERS,  # in bytes
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


def train_byte_level(texts: Iterable[str], vocab_size: int) -> str:
    """Train a byte-level BPE tokenizer.

    Args:
        texts: The training texts; counted as they come, so that they may be of any size.
        vocab_size: Number of token ids, with 0 for the end of a document, and the 256 bytes.

    Returns:
        The content of ``tokenizer.json``, the same for the same arguments.

    Raises:
        UserError: The vocabulary is too large or too small for the text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(
            f"--vocab-size {vocab_size} is too small: the end of a document and 256 bytes come "
            f"first; use at least {len(alphabet) + 1}"
        )
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    built.train_from_iterator(texts, trainer)
    if (most := built.get_vocab_size()) < vocab_size:
        raise UserError(_too_large(vocab_size, most))
    content: str = built.to_str(pretty=True)
    return content


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command ``tools/train_tokenizer.py``.

    Raises:
        UserError: An argument or input is not usable.
    """
    parser = Parser(
        description="Train a tokenizer: SentencePiece BPE, or byte-level BPE in the format of "
        "Hugging Face. The run takes it with the same --tokenizer-type.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    inputs_help = "JSONL files (.jsonl, .gz, .zst), glob patterns, or - for standard input"
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=inputs_help)
    parser.add_argument("--json-key", default="text", help="field that holds the text")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of token ids")
    parser.add_argument(
        "--tokenizer-type",
        choices=("SentencePieceTokenizer", "HuggingFaceTokenizer"),
        default="SentencePieceTokenizer",
        help="the latter is byte-level",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="the model file to write; of HuggingFaceTokenizer the directory",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    args = parser.parse_args(argv)
    if args.vocab_size < 1:
        raise UserError(f"--vocab-size {args.vocab_size} must be positive")
    texts = read_texts(expand_inputs(args.input), args.json_key)
    is_directory = args.tokenizer_type == "HuggingFaceTokenizer"
    output = args.output / "tokenizer.json" if is_directory else args.output
    refuse_existing([output], args.overwrite)
    with staging_directory(args.output) as staging:
        staged = staging / output.name
        if is_directory:
            staged.write_text(train_byte_level(texts, args.vocab_size))
            _make_directory(args.output)
        else:
            staged.write_bytes(train_model(texts, args.vocab_size))
        publish(staged, output)
    print(f"{args.output}: {args.vocab_size} pieces")


def _make_directory(output: Path) -> None:
    try:
        output.mkdir(exist_ok=True)
        with atomic_write(output / "tokenizer_config.json") as file:
            json.dump(_CONFIG, file, indent=1)
    except OSError as error:
        raise UserError(f"--output {output}: cannot write: {error.strerror}") from error


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _LINE_CHARACTERS):
                yield line[start : start + _LINE_CHARACTERS]


def _sample(lines: Iterator[str], most: int) -> list[str]:
    """Return at most so many lines, each as likely as the others, the same in every run.

    SentencePiece samples too (input_sentence_size), but in 0.2.3 otherwise in every process.
    """
    kept = list(itertools.islice(lines, most))
    draw = random.Random(0)
    for number, line in enumerate(lines, most):
        place = draw.randrange(number + 1)
        if place < most:
            kept[place] = line
    return kept


def _too_large(vocab_size: int, most: int) -> str:
    return f"--vocab-size {vocab_size} is too large for this text; use at most {most}"


def _explain(error: Exception, vocab_size: int) -> str:
    """Put a training failure of the library in the user's words."""
    reason = str(error)
    too_large = re.search(r"set it to a value <= (\d+)", reason)
    if too_large:
        return _too_large(vocab_size, int(too_large[1]))
    too_small = re.search(rf"{vocab_size} vs (\d+)", reason)
    if too_small:
        return (
            f"--vocab-size {vocab_size} is too small: special tokens, 256 bytes and the text's "
            f"characters come first; use at least {too_small[1]}"
        )
    return f"--vocab-size {vocab_size}: the tokenizer cannot be trained on this text ({reason})"
