"""The run's tokenizer for preprocessing: the ids of Megatron's, where possible without its imports.

SentencePiece models, Hugging Face's fast tokenizers and numbers as text need neither torch nor
Megatron, which take seconds to import and most of a gigabyte. All others are Megatron's own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prores.data.inputs import BrokenLineError
from megatron_prores.data.megatron_tokenizer import (
    SENTENCEPIECE_TYPES,
    build_megatron_tokenizer,
    silence_import_warnings,
)
from megatron_prores.data.words import WordTokenizer
from megatron_prores.errors import UserError

_LAST_OF_TWO_BYTES = 65500
"""Megatron takes two bytes a token for vocabularies below this size."""

_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Those of transformers that are their tokenizer.json and nothing more."""


@dataclass(frozen=True)
class TextTokenizer:
    """What preprocessing asks of a tokenizer."""

    encode: Callable[[str], bytes]
    """The ids of a text that is valid UTF-8, in the dtype's bytes; raises BrokenLineError."""
    vocab_size: int
    eod: int | None
    digest: str = ""
    """sha256 of the files that it is made from."""

    @property
    def dtype(self) -> type[np.generic]:
        """Return the type of the ids in a dataset, as Megatron chooses it."""
        return dtype_of(self.vocab_size)

    def end_of_document_id(self) -> int:
        """Return the id that ``--append-eod`` appends.

        Raises:
            UserError: The tokenizer has no such token.
        """
        if self.eod is None or self.eod < 0:
            raise UserError(
                "--append-eod: this tokenizer has no end-of-document (or end-of-sentence) token; "
                "use one that has, or leave the flag out"
            )
        return self.eod


def dtype_of(vocab_size: int) -> type[np.generic]:
    """Return the type that Megatron chooses for the ids of a vocabulary."""
    return np.uint16 if vocab_size < _LAST_OF_TWO_BYTES else np.int32


def build_text_tokenizer(args: argparse.Namespace) -> TextTokenizer:
    """Build the tokenizer of Megatron's flags.

    Args:
        args: Values of the flags of ``megatron_tokenizer.add_tokenizer_arguments``, checked.

    Raises:
        UserError: It cannot be built.
    """
    plain = not (args.metadata_path or args.special_tokens or args.tokenizer_sentencepiece_legacy)
    if args.tokenizer_type == "NullTokenizer":
        return _numbers(args)
    if args.tokenizer_type in SENTENCEPIECE_TYPES and plain:
        return _sentencepiece(args)
    if args.tokenizer_type == "HuggingFaceTokenizer" and plain:
        found = _hugging_face(args)
        if found is not None:
            return found
    silence_import_warnings()
    built = build_megatron_tokenizer(args)
    try:
        eod = built.eod
    except (AttributeError, NotImplementedError):
        eod = None
    encode = _checked(built.tokenize, built.vocab_size)
    return TextTokenizer(encode, built.vocab_size, eod, _digest(args))


def _sentencepiece(args: argparse.Namespace) -> TextTokenizer:
    content = Path(args.tokenizer_model).read_bytes()
    try:
        import sentencepiece

        size = sentencepiece.SentencePieceProcessor(model_proto=content).vocab_size()
        built = WordTokenizer(content, dtype_of(size))
    except Exception as error:  # The library's own kinds.
        raise UserError(
            f"--tokenizer-type {args.tokenizer_type} cannot be made from {args.tokenizer_model}: "
            f"{error or type(error).__name__}"
        ) from error
    return TextTokenizer(built.encode, size, built.model.eos_id(), _digest(args))


def _hugging_face(args: argparse.Namespace) -> TextTokenizer | None:
    """Build the tokenizer of a local directory; None where only transformers knows how."""
    directory = Path(args.tokenizer_model)
    unusual = args.vocab_file or args.merge_file or args.tokenizer_hf_no_use_fast
    if unusual or args.trust_remote_code or not (directory / "tokenizer.json").is_file():
        return None
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return None
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if config.get("tokenizer_class") not in _PLAIN_CLASSES or not eos:
        return None
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Its threads do not outlive a fork.
    built = Tokenizer.from_file(str(directory / "tokenizer.json"))
    special = not args.tokenizer_hf_no_include_special_tokens
    size = built.get_vocab_size()
    eod = built.token_to_id(eos)
    if eod is None:
        return None

    def encode(text: str) -> bytes:
        (found,) = built.encode_batch_fast([text], add_special_tokens=special)
        return np.array(found.ids, dtype_of(size)).tobytes()

    return TextTokenizer(encode, size, eod, _digest(args))


def _numbers(args: argparse.Namespace) -> TextTokenizer:
    """Build Megatron's NullTokenizer, whose texts are ids."""
    eod = args.null_tokenizer_eod_id
    size = args.vocab_size
    encode = _checked(lambda text: [int(word) for word in text.split(" ")], size)
    return TextTokenizer(encode, size, size - 1 if eod is None else eod)


def _checked(tokenize: Callable[[str], Any], vocab_size: int) -> Callable[[str], bytes]:
    """Refuse ids outside the vocabulary: they would wrap around, or crash training's embedding."""

    def encode(text: str) -> bytes:
        try:
            ids = np.asarray(tokenize(text), dtype=np.int64)
        except (ValueError, OverflowError) as error:
            raise BrokenLineError(f"cannot be tokenized: {error}", "not tokenized") from error
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise BrokenLineError(
                f"token id {wrong} is outside the tokenizer's vocabulary of {vocab_size}; check "
                "--tokenizer-model or --vocab-size",
                "not tokenized",
            )
        return ids.astype(dtype_of(vocab_size)).tobytes()

    return encode


def _digest(args: argparse.Namespace) -> str:
    """Return the sha256 of all files of the tokenizer; of a name on the Hub that of the name."""
    digest = hashlib.sha256()
    for name in (args.tokenizer_model, args.vocab_file, args.merge_file, args.metadata_path):
        place = Path(name or "")
        files = sorted(place.glob("*token*")) if name and place.is_dir() else [place] * bool(name)
        for file in files:
            digest.update(file.read_bytes() if file.is_file() else str(name).encode())
    return digest.hexdigest()
