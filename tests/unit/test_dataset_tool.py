"""Finished datasets: joined, checked, counted, split."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from megatron_prores.data import dataset_tool, preprocess, tokenizer
from megatron_prores.errors import UserError
from tests.refusals import REPOSITORY
from tests.unit.preprocess_helpers import NULL_TOKENIZER, TOOL, jsonl, read_dataset

TEXTS = [" ".join(str((n * 7 + k) % 99) for k in range(n % 40 + 1)) for n in range(300)]
TEXTS[200:210] = TEXTS[:10]
IDS = [[*map(int, text.split()), 99] for text in TEXTS]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A directory of three inputs, the second without text, in shards of 1000 tokens."""
    for name, texts in (("a", TEXTS[:120]), ("b", [""]), ("c", TEXTS[120:])):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(texts))
    preprocess.main(
        ["--input", *(str(tmp_path / f"{name}.jsonl") for name in "abc"), "--workers", "1",
         "--output-dir", str(tmp_path / "shards"), "--append-eod", *NULL_TOKENIZER]
    )  # fmt: skip
    return tmp_path / "shards"


def tool(*words: object) -> None:
    dataset_tool.main([str(word) for word in words])


def test_the_commands_of_the_page_run_in_order(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    page = (REPOSITORY / "docs" / "data.md").read_text()
    (block,) = re.findall(r"^```bash\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "data").mkdir()
    texts = [f"the {n}th document, of {n * 7919} words" for n in range(900)]
    for part in range(3):
        table = pyarrow.table({"text": texts[part::3]})
        parquet.write_table(table, tmp_path / "corpus" / f"{part}.parquet")
    (tmp_path / "data" / "tokenizer.model").write_bytes(tokenizer.train_model(texts, 300))
    result = subprocess.run(
        ["bash", "-euc", block.replace(" tools/", f" {REPOSITORY}/tools/")],
        env={**os.environ, "PYTHON": sys.executable},
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 of 3 inputs, 900 documents" in result.stdout
    train, valid = (read_dataset(tmp_path / "data" / f"all_{name}") for name in ("train", "valid"))
    assert len(train) + len(valid) == 900
    assert valid


def test_the_study_of_speed_compares_the_files_of_its_sides(tmp_path: Path) -> None:
    texts = [f"the {n}th document, of {n * 7919} words" for n in range(90)]
    (tmp_path / "in.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "t.model").write_bytes(tokenizer.train_model(texts, 300))
    (tmp_path / "other.py").write_text(
        f"import subprocess, sys\nsys.argv[1:] = [{str(TOOL)!r}, *sys.argv[1:]]\n"
        "sys.argv[1:] = [word for word in sys.argv[1:] if word != '--append-eod']\n"
        "sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))\n"
    )
    command = [sys.executable, "-m", "studies.data_speed", "--input", "in.jsonl", "--rounds", "1",
               "--tokenizer-model", "t.model", "--no-loop", "--against"]  # fmt: skip
    run = partial(
        subprocess.run, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    same = run([*command, str(TOOL)])
    assert same.returncode == 0, same.stderr
    assert f"\n{TOOL}: " in same.stdout
    assert "times the seconds of this tool" in same.stdout
    other = run([*command, "other.py"])
    assert other.returncode == 2
    assert other.stderr == "error: these wrote different files: this tool, other.py\n"


def test_shards_are_joined_to_what_one_run_writes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_prores.data.indexed._READ_BYTES", 500)
    inputs = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    preprocess.main(
        ["--input", *inputs, "--workers", "1", "--output-prefix", str(tmp_path / "whole"),
         "--append-eod", *NULL_TOKENIZER]
    )  # fmt: skip
    tool("merge", shards, "--output", tmp_path / "joined")
    for ending in (".bin", ".idx"):
        whole = tmp_path / f"whole_text_document{ending}"
        assert (tmp_path / f"joined{ending}").read_bytes() == whole.read_bytes()
    # Of datasets and shards together, up to the document with which there are enough tokens.
    tool("merge", tmp_path / "joined", shards, "--output", tmp_path / "more", "--tokens", 9000)
    found = read_dataset(tmp_path / "more")
    assert found == (IDS + IDS)[: len(found)]
    assert 9000 <= sum(map(len, found)) < 9000 + len(found[-1])
    with pytest.raises(UserError, match=r"more.bin already exists"):
        tool("merge", shards, "--output", tmp_path / "more")
    with pytest.raises(UserError, match=r"--tokens 999999: there are only \d+"):
        tool("merge", shards, "--output", tmp_path / "none", "--tokens", 999999)
    (shards / "00002-0000.json").unlink()
    with pytest.raises(UserError, match="1 of 3 inputs are missing"):
        tool("merge", shards, "--output", tmp_path / "none")
    assert not list(tmp_path.glob("*none*"))


def test_what_two_tokenizers_made_is_not_joined(shards: Path, tmp_path: Path) -> None:
    for name, size in (("alike", "101"), ("larger", "70000")):
        preprocess.main(
            ["--input", str(tmp_path / "a.jsonl"), "--workers", "1", "--output-dir",
             str(tmp_path / name), "--tokenizer-type", "NullTokenizer", "--vocab-size", size]
        )  # fmt: skip
    with pytest.raises(UserError, match="with a vocabulary of 100 and 101 do not mix"):
        tool("merge", shards, tmp_path / "alike", "--output", tmp_path / "out")
    with pytest.raises(UserError, match="datasets of int32 and uint16 ids"):
        tool(
            "merge",
            *(path / "00000-0000_text_document" for path in (shards, tmp_path / "larger")),
            *("--output", tmp_path / "out"),
        )


def damage(path: Path, at: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "at", "value", "words"),
    [
        (".bin", 0, b"\x07\x00", r"00000-0000_text_document\.bin is not what was written"),
        (".bin", 0, b"\xff\x00", "token id 255 is outside the vocabulary of 100"),
        (".bin", 2, b"\x07\x00", "document 0 does not end with the id 99"),
        # The lengths of the first two documents, 2 and 3, in an index that still adds up.
        (".idx", 34, b"\x03\x00\x00\x00\x02\x00\x00\x00", "its documents have several sequences"),
        (".idx", 0, b"x", "is not an index, or was cut short"),
    ],
)
def test_a_damaged_dataset_is_found(
    shards: Path, name: str, at: int, value: bytes, words: str
) -> None:
    tool("verify", shards)
    damage(shards / f"00000-0000_text_document{name}", at, value)
    with pytest.raises(UserError, match=words):
        tool("verify", shards)


def test_without_a_marker_the_flags_tell_what_to_check(shards: Path, tmp_path: Path) -> None:
    for ending in (".bin", ".idx"):
        shutil.copy(shards / f"00000-0000_text_document{ending}", tmp_path / f"alone{ending}")
    tool("verify", tmp_path / "alone", "--vocab-size", 100, "--eod", 99)
    with pytest.raises(UserError, match="token id 99 is outside the vocabulary of 99"):
        tool("verify", tmp_path / "alone", "--vocab-size", 99)
    with pytest.raises(UserError, match="document 0 does not end with the id 5"):
        tool("verify", tmp_path / "alone", "--eod", 5)


def test_counts(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    tool("stats", shards, "--picture", tmp_path / "lengths.png")
    report = capsys.readouterr().out
    tokens, text = sum(map(len, IDS)), sum(map(len, TEXTS))
    copies = len(IDS) - len(set(map(tuple, IDS)))
    assert copies >= 10
    parts = statistics.quantiles(map(len, IDS), n=20, method="inclusive")
    assert report.splitlines() == [
        f"300 documents, {tokens} tokens",
        f"tokens of a document: {tokens / 300:.1f} on average, 2 to 41; median {parts[9]:.0f}, "
        f"5 % below {parts[0]:.0f}, 5 % above {parts[18]:.0f}",
        f"{copies} documents are copies of others ({100 * copies / 300:.2f} %)",
        f"{text} bytes of text: {tokens / text:.4f} tokens per byte",
    ]
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_a_document_goes_to_one_side_whatever_lies_before_it(shards: Path, tmp_path: Path) -> None:
    tool("merge", shards, "--output", tmp_path / "all")
    tool("split", tmp_path / "all", "--output", tmp_path / "s", "--fraction", 0.2)
    train, valid = (read_dataset(tmp_path / f"s_{name}") for name in ("train", "valid"))
    assert sorted(train + valid) == sorted(IDS)
    assert 0.1 < len(valid) / len(IDS) < 0.3
    held_out = set(map(tuple, valid))
    assert held_out.isdisjoint(map(tuple, train))
    assert valid == [ids for ids in IDS if tuple(ids) in held_out]  # in their order
    tool(
        "split", shards / "00002-0000_text_document", "--output", tmp_path / "c", "--fraction", 0.2
    )
    assert read_dataset(tmp_path / "c_valid") == [
        ids for ids in IDS[120:] if tuple(ids) in held_out
    ]
    with pytest.raises(UserError, match="leaves valid empty"):
        tool("split", tmp_path / "all", "--output", tmp_path / "n", "--fraction", 1e-9)
    assert not list(tmp_path.glob("*n_*"))
