"""The scripts of examples/data, on local files in place of the Hub, and without a Hub."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prores.data import tokenizer
from tests.examples.clone import REPOSITORY, environment
from tests.unit.preprocess_helpers import read_dataset

TOKENS = {"TRAIN_TOKENS": "20000", "VALID_TOKENS": "1000"}


def run(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(REPOSITORY / "examples/data" / script), *words],
        env=environment(PYTHON=sys.executable, HF_HUB_OFFLINE="1", WORKERS="1", **variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


def documents(seed: int, characters: int) -> list[str]:
    """Makes texts of words, together of that length."""
    rng = random.Random(seed)
    texts: list[str] = []
    while sum(map(len, texts)) < characters:
        texts.append(
            f"{seed}.{len(texts)} " + " ".join(rng.choices(["sky", "grass", "snow"], k=900))
        )
    return texts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the scripts find a corpus, as C4 lies on a disk, and a tokenizer."""
    root = tmp_path_factory.mktemp("corpus")
    # More than one chunk of reading: the rest of the training text is to be left.
    for name, seed, size in (
        ("train.0", 0, 900_000),
        ("train.1", 1, 900_000),
        ("valid.0", 2, 9000),
    ):
        with gzip.open(root / f"{name}.json.gz", "wt") as file:
            for text in documents(seed, size):
                file.write(json.dumps({"text": text, "url": "https://example.org"}) + "\n")
    (root / "words.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents(3, 50_000))
    )
    model = root / "words.model"
    arguments = ["--input", str(root / "words.jsonl"), "--output", str(model)]
    tokenizer.main([*arguments, "--vocab-size", "290"])
    patterns = {
        f"{split.upper()}_FILES": str(root / f"{split}.*.json.gz") for split in ("train", "valid")
    }
    return {**patterns, "TOKENIZER": str(model)}


def test_a_corpus_is_prepared_in_as_many_starts_as_it_takes(
    files: dict[str, str], tmp_path: Path
) -> None:
    import sentencepiece

    settings = {**files, **TOKENS, "DATA_DIR": str(tmp_path)}
    # Text that ends too early, as where the network fails, is no data set.
    result = run("c4.sh", **{**settings, "TRAIN_TOKENS": "1000000000"})
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --stop-after-tokens 1000000000: the input ended after ")
    first = written(tmp_path)
    assert len(first) == 3  # the tokenizer and the validation set

    result = run("c4.sh", **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("there already: ") == 2
    second = written(tmp_path)
    assert len(second) == 5
    assert first.items() <= second.items()

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for split, seed, size in (("train", 0, 900_000), ("valid", 2, 9000)):
        found = read_dataset(tmp_path / f"{split}_text_document")
        least = int(TOKENS[f"{split.upper()}_TOKENS"])
        assert least <= sum(map(len, found)) <= least + 100_000
        texts = documents(seed, size)
        assert [pieces.decode(each[:-1]) for each in found[:3]] == texts[:3]
        assert {each[-1] for each in found} == {pieces.eos_id()}
        if split == "train":
            assert len(found) < len(texts)

    result = run("c4.sh", **settings)
    assert result.returncode == 0
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["there already"] * 3
    assert written(tmp_path) == second


def written(directory: Path) -> dict[str, int]:
    """Files, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "error: meta-llama/Llama-2-7b-hf: no tokenizer.model from the Hub: "),
        ({"TOKENIZER": "here"}, "error: --dataset allenai/c4 cannot be read: "),
    ],
)
def test_without_the_hub_one_line_says_so(
    given: dict[str, str], words: str, files: dict[str, str], tmp_path: Path
) -> None:
    local = {"TOKENIZER": files["TOKENIZER"]} if given else {}
    home = {"HF_HOME": str(tmp_path / "empty"), "DATA_DIR": str(tmp_path / "data")}
    result = run("c4.sh", **local, **home)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(words)


def test_a_dry_run_prints_the_commands(tmp_path: Path) -> None:
    expected = {
        "c4.sh": ("--dataset allenai/c4 --name en --split train ", "--split validation "),
        "climbmix.sh": ("--dataset karpathy/climbmix-400b-shuffle ", "shard_06542.parquet "),
    }
    for script, words in expected.items():
        result = run(script, "--dry-run", DATA_DIR=str(tmp_path / "data"))
        assert result.returncode == 0, result.stderr
        assert all(word in result.stdout for word in words)
        assert "hub.py tokenizer meta-llama/Llama-2-7b-hf " in result.stdout
        assert "--stop-after-tokens 50000000000 " in result.stdout
        assert "--stop-after-tokens 10000000 " in result.stdout
        assert not (tmp_path / "data").exists()
    assert run("c4.sh", "--fast").stderr == "error: --fast: unknown; the only option is --dry-run\n"
