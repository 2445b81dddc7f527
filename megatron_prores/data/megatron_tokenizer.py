"""Megatron's own tokenizers, chosen with the flags that training takes.

The token ids in a dataset mean what training's tokenizer says they mean: preprocessing takes the
same flags, see ``text_tokenizer``.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from contextlib import nullcontext
from typing import Any

from megatron_prores.errors import UserError
from megatron_prores.system.environment import THIS_MACHINE, TargetEnvironment
from megatron_prores.upstream.start_up import hidden

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_BERT_TYPES = ("BertWordPieceLowerCase", "BertWordPieceCase")

TOKENIZER_TYPES = (
    *SENTENCEPIECE_TYPES,
    "HuggingFaceTokenizer",
    "TikTokenizer",
    "GPT2BPETokenizer",
    *_BERT_TYPES,
    "NullTokenizer",
)
"""Megatron's tokenizers of plain text (the others read conversations or images)."""

TRANSFORMERS_TYPES = ("HuggingFaceTokenizer", "GPT2BPETokenizer", *_BERT_TYPES)
"""Those that need the library transformers."""

_MODEL_FILE_TYPES = (*SENTENCEPIECE_TYPES, "TikTokenizer")


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add Megatron's tokenizer flags, under Megatron's names and with its defaults.

    Args:
        parser: The command's parser.
    """
    group = parser.add_argument_group("tokenizer", "the same values as in training")
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, required=True)
    group.add_argument("--tokenizer-model", help="model file, or a Hugging Face name or folder")
    group.add_argument("--tokenizer-metadata", dest="metadata_path", help="metadata file, JSON")
    group.add_argument("--vocab-size", type=int, help="for NullTokenizer and TikTokenizer")
    group.add_argument("--vocab-file", help="for GPT2BPETokenizer and BertWordPiece")
    group.add_argument("--merge-file", help="for GPT2BPETokenizer")
    group.add_argument("--tokenizer-special-tokens", dest="special_tokens", nargs="+")
    group.add_argument("--tokenizer-sentencepiece-legacy", action="store_true")
    group.add_argument("--tokenizer-hf-no-use-fast", action="store_true")
    group.add_argument("--tokenizer-hf-no-include-special-tokens", action="store_true")
    group.add_argument("--trust-remote-code", action="store_true")
    group.add_argument("--tiktoken-pattern", choices=("v1", "v2"))
    group.add_argument("--tiktoken-num-special-tokens", type=int, default=1000)
    group.add_argument("--null-tokenizer-eod-id", type=int)


def check_tokenizer_arguments(
    args: argparse.Namespace, target: TargetEnvironment = THIS_MACHINE
) -> None:
    """Check what can be checked before the seconds that importing Megatron takes.

    Args:
        args: Values of the flags of :func:`add_tokenizer_arguments`.
        target: The machine that the tokenizer is for.

    Raises:
        UserError: The type lacks a flag, or a file is missing.
    """
    kind = args.tokenizer_type
    if kind == "NullTokenizer" and not (args.vocab_size and args.vocab_size > 0):
        raise UserError("--tokenizer-type NullTokenizer needs a positive --vocab-size")
    if kind in (*_MODEL_FILE_TYPES, "HuggingFaceTokenizer") and not args.tokenizer_model:
        raise UserError(f"--tokenizer-type {kind} needs --tokenizer-model")
    if kind in TRANSFORMERS_TYPES and not target.is_installed("transformers"):
        raise UserError(
            f"--tokenizer-type {kind} needs the library transformers, which is not installed"
        )
    if kind == "GPT2BPETokenizer" and not (args.vocab_file and args.merge_file):
        raise UserError("--tokenizer-type GPT2BPETokenizer needs --vocab-file and --merge-file")
    if kind in _BERT_TYPES and not args.vocab_file:
        raise UserError(f"--tokenizer-type {kind} needs --vocab-file")
    files = {"--vocab-file": args.vocab_file, "--merge-file": args.merge_file}
    files["--tokenizer-metadata"] = args.metadata_path
    if kind in _MODEL_FILE_TYPES:
        files["--tokenizer-model"] = args.tokenizer_model
    for flag, path in files.items():
        if path is not None and not (os.path.isfile(path) or target.is_elsewhere(path)):
            raise UserError(f"{flag} {path}: no such file")


def silence_import_warnings() -> None:
    """Keep what Megatron and PyTorch say about absent GPU libraries out of a text tool's output.

    To be called before the first import of ``megatron.core``.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def import_tokenizers(args: argparse.Namespace) -> None:
    """Import Megatron's tokenizers, without the library transformers where none asks for it.

    Megatron imports the library wherever it finds it, which takes a quarter of a start.

    Args:
        args: Values of the flags of :func:`add_tokenizer_arguments`.
    """
    kind = args.tokenizer_type
    can_do_without = kind in TOKENIZER_TYPES and kind not in TRANSFORMERS_TYPES
    # A file of metadata may name another library.
    with hidden("transformers") if can_do_without and not args.metadata_path else nullcontext():
        import megatron.core.tokenizers.text.libraries  # noqa: F401


def build_megatron_tokenizer(args: argparse.Namespace) -> Any:
    """Build the tokenizer that training would build from the same flags.

    Args:
        args: Values of the flags of :func:`add_tokenizer_arguments`.

    Returns:
        A ``megatron.core.tokenizers`` text tokenizer.

    Raises:
        UserError: Megatron cannot build it.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.config import TokenizerConfig

    settings = vars(TokenizerConfig()).copy()
    settings.update((name, value) for name, value in vars(args).items() if name in settings)
    # The padded size belongs to a model and its tensor parallelism; a dataset has neither.
    settings["pad_vocab_size"] = False
    import_tokenizers(args)
    try:
        return build_tokenizer(argparse.Namespace(**settings))
    except Exception as error:  # Each library raises its own kinds.
        shown = args.tokenizer_model or args.vocab_file or f"--vocab-size {args.vocab_size}"
        reason = str(error) or type(error).__name__
        raise UserError(
            f"--tokenizer-type {args.tokenizer_type} cannot be made from {shown}: {reason}"
        ) from error
