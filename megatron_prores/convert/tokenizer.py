"""The tokenizer of a run as one of transformers, with the same ids."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prores.errors import UserError

NONE = "none"
"""In the place of a tokenizer's path: export without one."""

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")

SAMPLE_TEXT = (
    "def first(x):\n\treturn x[0]  # twice  spaced\n",
    "  Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.  ",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "色は匂へど散りぬるを 我が世誰ぞ常ならむ",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "1234567890 3.14159 1e-5 0x7f\r\n\r\n",
    "\U0001f600\U0001f468‍\U0001f469‍\U0001f467 e\u0301 \u00e9 \ufb01 \u2126 \u00a0 \u3000 \u200b",
    "\x00\x01\x7f\ufffd▁ ▁▁ <s> </s> <unk> <0x0A>",
    " ",
)
"""What a converted tokenizer is compared on: other scripts, white space, emoji, broken bytes."""


@dataclass(frozen=True)
class Words:
    """A tokenizer to export."""

    vocab_size: int
    """Ids that it has."""
    special_ids: dict[str, int | None]
    """``bos_token_id``, ``eos_token_id``, ``pad_token_id``."""
    save: Callable[[Path], None]
    """Write it into a directory."""


def find(args: Namespace, path: str | None = None) -> Words:
    """Find the tokenizer of a run.

    Args:
        args: The run's arguments, as its checkpoint has them.
        path: Where the tokenizer is now; None: where the run had it; :data:`NONE`: without one.

    Raises:
        UserError: It is not there, or has no counterpart.
    """
    kind = args.tokenizer_type
    if kind == "NullTokenizer" or path == NONE:
        size = int(args.vocab_size or args.padded_vocab_size)
        return Words(size, _special(), lambda directory: None)
    if kind in SENTENCEPIECE_TYPES:
        return _sentencepiece(args, path or args.tokenizer_model)
    if kind == "HuggingFaceTokenizer":
        return _hugging_face(path or args.tokenizer_model)
    if kind == "GPT2BPETokenizer":
        return _gpt2(args)
    raise UserError(
        f"--tokenizer-type {kind} has no counterpart in transformers: give --tokenizer {NONE} to "
        "export the model without a tokenizer"
    )


def _special(
    bos: int | None = None, eos: int | None = None, pad: int | None = None
) -> dict[str, int | None]:
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    return {name: None if value is None or value < 0 else value for name, value in ids.items()}


def _check_there(path: str | None) -> str:
    if not path or not os.path.exists(path):
        raise UserError(
            f"the run's tokenizer, {path}, is not here: give --tokenizer PATH, or --tokenizer "
            f"{NONE} to export the model without one"
        )
    return path


def _sentencepiece(args: Namespace, path: str | None) -> Words:
    import sentencepiece

    path = _check_there(path)
    if getattr(args, "tokenizer_sentencepiece_legacy", False):
        raise UserError(
            "--tokenizer-sentencepiece-legacy has no counterpart in transformers: give --tokenizer "
            f"{NONE} to export the model without a tokenizer"
        )
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--tokenizer {path}: cannot be read: {error}") from error
    special = _special(model.bos_id(), model.eos_id(), model.pad_id())

    def save(directory: Path) -> None:
        fast = fast_sentencepiece(path)
        if line := next((t for t in SAMPLE_TEXT if _ids(fast, t) != model.encode(t)), None):
            raise UserError(
                f"--tokenizer {path}: transformers' fast tokenizer gives other ids than "
                f"SentencePiece for {line!r}: give --tokenizer {NONE} to export without it"
            )
        fast.save_pretrained(directory)

    return Words(model.vocab_size(), special, save)


def _ids(fast: Any, text: str) -> Sequence[int]:
    ids: Sequence[int] = fast(text, add_special_tokens=False)["input_ids"]
    return ids


def fast_sentencepiece(path: str) -> Any:
    """Build transformers' fast tokenizer of a SentencePiece model, with the same ids.

    It adds no token of its own accord, as Megatron does not when it makes a dataset.

    Args:
        path: Of the model file.
    """
    from sentencepiece import sentencepiece_model_pb2
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SpmConverter

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(Path(path).read_bytes())
    unigram = proto.trainer_spec.model_type == 1
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    vocab = pieces if unigram else {piece: number for number, (piece, _) in enumerate(pieces)}
    tokenizer = SpmConverter.build_tokenizer_from_spm_proto(proto, vocab, legacy=True)
    if unigram:
        _hide_control_pieces(tokenizer, proto)
    names = {"unk_token": proto.trainer_spec.unk_id, "bos_token": proto.trainer_spec.bos_id}
    names |= {"eos_token": proto.trainer_spec.eos_id, "pad_token": proto.trainer_spec.pad_id}
    special = {name: pieces[at][0] for name, at in names.items() if at >= 0}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        # "<s>" in a text is text, as it is for Megatron.
        split_special_tokens=True,
        **special,
    )


def _hide_control_pieces(tokenizer: Any, proto: Any) -> None:
    """Keep a unigram model from finding "<s>" and the like in a text that has these letters."""
    from tokenizers import Regex, pre_tokenizers

    in_text = (1, 4)  # SentencePiece's types of normal and user-defined pieces
    rest = "|".join(re.escape(p.piece[1:]) for p in proto.pieces if p.type not in in_text)
    apart = pre_tokenizers.Split(Regex(f"▁?<(?={rest})"), behavior="isolated")
    before = [tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer is not None else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, apart])


def _hugging_face(path: str | None) -> Words:
    from transformers import AutoTokenizer

    path = _check_there(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {path}: cannot be read: {error}") from error
    return _transformers(tokenizer)


def _gpt2(args: Namespace) -> Words:
    from transformers import GPT2TokenizerFast

    files = {"vocab_file": args.vocab_file, "merges_file": args.merge_file}
    for path in files.values():
        _check_there(path)
    return _transformers(GPT2TokenizerFast(**files))


def _transformers(tokenizer: Any) -> Words:
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return Words(len(tokenizer), _special(*ids), tokenizer.save_pretrained)
