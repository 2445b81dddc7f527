import argparse
import gzip
import json
import os
import random
import re
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import zstandard

from megatron_prores.data import megatron_tokenizer, tokenizer
from megatron_prores.errors import UserError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train_tokenizer.py"

TEXTS = [Path(module.__file__ or "").read_text() for module in (argparse, gzip, json)]

AWKWARD = [
    "",
    " ",
    "\n",
    "  leading, trailing  ",
    "def f(x):\n    if x:\n\treturn  x\n\n\n",
    "\r\nold \r lines\r\n",
    "a▁b ▁▁ \u2581",
    "\ue000 \ue001 \ue000\ue001 \ue000\ue000▁\ue001",
    "日本語 żółw 🎉👩\u200d👧 e\u0301 é ﬁ Å",
    "<s> </s> <unk> <0x0A> <0x41>",
    "\0nul\0 \x07 \ufeff \ufffd ▅ \u2028",
    "١٢٣ 12345 ½",
]


def run_tool(
    cwd: Path, *args: object, stdin: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", str(TOOL), *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=240, env=env
    )


def jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture(scope="module")
def model() -> bytes:
    return tokenizer.train_model(TEXTS, 600)


def test_every_text_is_decoded_back_exactly(model: bytes) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in [*AWKWARD, *TEXTS, "".join(AWKWARD)]:
        ids = processor.encode(text)
        assert processor.decode(ids) == text
        # Text that looks like a special token must not become one.
        assert not {0, 1, 2} & set(ids)


def test_vocabulary_has_the_asked_size_and_the_special_tokens_megatron_needs(
    model: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "t.model"
    path.write_bytes(model)
    parser = argparse.ArgumentParser()
    megatron_tokenizer.add_tokenizer_arguments(parser)
    args = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(path)]
    built: Any = megatron_tokenizer.build_megatron_tokenizer(parser.parse_args(args))
    assert built.vocab_size == 600
    assert (built.unk, built.bos, built.eos) == (0, 1, 2)
    assert built.eod == 2
    for text in AWKWARD[1:]:
        assert built.detokenize(built.tokenize(text)) == text


def test_an_indentation_is_one_token_and_a_piece_never_spans_lines(model: bytes) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(processor.encode(" " * 8)) == 1
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    assert [piece for piece in pieces if "\n" in piece] == ["\n"]


def test_the_same_texts_give_the_same_file_whatever_their_packing(tmp_path: Path) -> None:
    lines = jsonl(TEXTS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    half = len(lines) // 2
    frames = [zstandard.compress(part) for part in (lines[:half], lines[half:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    models, outputs = [], tmp_path / "outputs"
    scratch, cwd = tmp_path / "scratch", tmp_path / "cwd"
    scratch.mkdir()
    cwd.mkdir()
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        output = outputs / f"{name}.model"
        args = ["--input", tmp_path / name, "--vocab-size", 600, "--output", output]
        result = run_tool(cwd, *args, env={**os.environ, "TMPDIR": str(scratch)})
        assert result.returncode == 0, result.stderr
        models.append(output.read_bytes())
    assert models[0] == models[1] == models[2]
    # Nothing but the three models is left anywhere.
    assert len(list(outputs.iterdir())) == 3
    assert not [*cwd.iterdir(), *scratch.iterdir()]


def test_a_byte_level_tokenizer_gives_every_text_back_and_is_megatrons(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl(TEXTS))
    kind = ["--tokenizer-type", "HuggingFaceTokenizer"]
    command = ["--input", "a.jsonl", "--vocab-size", 600, *kind, "--output"]
    for name in ("first", "second"):
        result = run_tool(tmp_path, *command, tmp_path / name)
        assert result.returncode == 0, result.stderr
    made = [sorted((tmp_path / name).iterdir()) for name in ("first", "second")]
    assert [path.name for path in made[0]] == ["tokenizer.json", "tokenizer_config.json"]
    assert [path.read_bytes() for path in made[0]] == [path.read_bytes() for path in made[1]]
    again = run_tool(tmp_path, *command, tmp_path / "first")
    assert again.returncode == 2
    assert "tokenizer.json already exists" in again.stderr
    script = f"import {__name__} as tests; tests.check_bytes({str(tmp_path / 'first')!r})"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=TOOL.parents[1], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for size, word in ((256, "use at least 257"), (600, "use at most ")):
        with pytest.raises(UserError, match=word):
            tokenizer.train_byte_level(["few words"], size)


def check_bytes(directory: str) -> None:
    """Checks Megatron's, in a process of its own: for SentencePiece it is imported without it."""
    parser = argparse.ArgumentParser()
    megatron_tokenizer.add_tokenizer_arguments(parser)
    args = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", directory]
    built: Any = megatron_tokenizer.build_megatron_tokenizer(parser.parse_args(args))
    assert built.vocab_size == 600
    assert built.eod == 0
    for text in [*AWKWARD, *TEXTS]:
        ids = built.tokenize(text)
        assert 0 not in ids
        assert built.detokenize(ids) == text
    assert len(built.tokenize(TEXTS[0])) < len(TEXTS[0]) / 2


def test_of_many_lines_an_even_and_fixed_sample_is_taken() -> None:
    letters = string.ascii_lowercase
    text = "\n".join(f"{a}{b}" for a in letters for b in letters for _ in range(10))

    def pairs(most_lines: int) -> list[str]:
        model = tokenizer.train_model([text], 320, most_lines)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces = map(processor.id_to_piece, range(len(processor)))
        return sorted(piece for piece in pieces if re.fullmatch("[a-z]{2}", piece))

    # All pairs are as frequent: the first make the vocabulary. In a sample, those drawn most often.
    assert {pair[0] for pair in pairs(10_000)} == {"a", "b"}
    sample = pairs(1000)
    positions = [letters.index(pair[0]) for pair in sample]
    assert 8 < sum(positions) / len(positions) < 17
    random.seed()
    assert pairs(1000) == sample


@pytest.mark.parametrize(
    ("stdin", "args", "words"),
    [
        (jsonl(["few words"]), ["--vocab-size", "4000"], ["--vocab-size 4000", "too large"]),
        (jsonl(["few words"]), ["--vocab-size", "100"], ["--vocab-size 100", "too small"]),
        (jsonl(["few words"]), ["--vocab-size", "0"], ["--vocab-size 0"]),
        ("", ["--vocab-size", "300"], ["no text", "'text'"]),
        ('{"body": "x"}\n', ["--vocab-size", "300"], ["standard input:1", "'text'", "'body'"]),
        ('{"text": "\\ud800"}\n', ["--vocab-size", "300"], ["standard input:1"]),
        ("", ["--vocab-size", "300", "--input", "missing.jsonl"], ["--input missing.jsonl"]),
        ("", ["--vocab-size", "300", "--input", "cut.gz"], ["cut.gz", "incomplete"]),
        ("", ["--vocab-size", "300", "--input", "cut.zst"], ["cut.zst", "incomplete"]),
    ],
)
def test_a_wrong_input_ends_with_one_line_and_the_old_model_stays(
    tmp_path: Path, stdin: str, args: list[str], words: list[str]
) -> None:
    whole = jsonl(TEXTS).encode()
    (tmp_path / "cut.gz").write_bytes(gzip.compress(whole)[:-100])
    (tmp_path / "cut.zst").write_bytes(zstandard.compress(whole)[:-100])
    old = tmp_path / "old.model"
    old.write_text("old")
    result = run_tool(tmp_path, "--input", "-", "--output", old, "--overwrite", *args, stdin=stdin)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert old.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"cut.gz", "cut.zst", "old.model"}


def test_an_existing_model_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "old.model").write_text("old")
    (tmp_path / "a.jsonl").write_text(jsonl(TEXTS))
    args = ["--input", str(tmp_path / "a.jsonl"), "--vocab-size", "500"]
    args += ["--output", str(tmp_path / "old.model")]
    with pytest.raises(UserError, match="--overwrite"):
        tokenizer.main(args)
    assert (tmp_path / "old.model").read_text() == "old"
    tokenizer.main([*args, "--overwrite"])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "old.model"))
    assert len(processor) == 500
