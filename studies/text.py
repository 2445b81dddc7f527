"""The text of a study: this machine's Python library, by the project's own tools."""

from __future__ import annotations

from pathlib import Path

from megatron_prores.data import corpus, preprocess, tokenizer


def make_text(folder: Path, megabytes: int, vocabulary: int, validation: float = 0.02) -> None:
    """Make a corpus, its tokenizer and its tokens, where they are missing.

    Args:
        folder: For tokenizer.model, train_text_document and valid_text_document.
        megabytes: Of text, at most; at least half of it.
        vocabulary: Pieces of the tokenizer.
        validation: Share of the files that is held out.
    """
    if (folder / "valid_text_document.idx").is_file():
        return
    model, text = str(folder / "tokenizer.model"), str(folder / "train.jsonl")
    size = f"--min-megabytes {megabytes / 2} --max-megabytes {megabytes}".split()
    corpus.main(["--output-dir", str(folder), *size, "--validation-fraction", str(validation)])
    tokenizer.main(
        ["--input", text, "--output", model, "--vocab-size", str(vocabulary), "--overwrite"]
    )
    flags = "--append-eod --workers 1 --overwrite --tokenizer-type SentencePieceTokenizer".split()
    for split in ("train", "valid"):
        source, prefix = str(folder / f"{split}.jsonl"), str(folder / split)
        preprocess.main(
            ["--input", source, "--output-prefix", prefix, *flags, "--tokenizer-model", model]
        )
