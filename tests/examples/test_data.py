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

C4 = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""
"""The head of the README that names the parts of C4 on the Hub."""


def run(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(REPOSITORY / "examples/data" / script), *words],
        env=environment(PYTHON=sys.executable, HF_HUB_OFFLINE="1", WORKERS="1", **variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


def documents(seed: str, characters: int) -> list[str]:
    """Makes texts of words, together of that length."""
    rng = random.Random(seed)
    texts: list[str] = []
    while sum(map(len, texts)) < characters:
        texts.append(
            f"{seed}.{len(texts)} " + " ".join(rng.choices(["sky", "grass", "snow"], k=900))
        )
    return texts


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the two repositories in small, and a tokenizer."""
    import pyarrow
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("corpora")
    (root / "c4" / "en").mkdir(parents=True)
    (root / "c4" / "README.md").write_text(C4)
    (root / "climbmix").mkdir()
    # More files than it takes: the rest is to be left.
    sizes = {"train": [90_000] * 9, "validation": [9000]}
    for split, of_files in sizes.items():
        for number, size in enumerate(of_files):
            name = f"c4-{split}.{number:05}-of-{len(of_files):05}.json.gz"
            with gzip.open(root / "c4" / "en" / name, "wt") as file:
                for text in documents(f"{split}.{number}", size):
                    file.write(json.dumps({"text": text, "url": "https://example.org"}) + "\n")
    for name, size in {"shard_00000": 90_000, "shard_00001": 90_000, "shard_06542": 9000}.items():
        table = pyarrow.table({"text": documents(name, size)})
        parquet.write_table(table, root / "climbmix" / f"{name}.parquet", row_group_size=7)
    lines = [json.dumps({"text": text}) + "\n" for text in documents("words", 50_000)]
    (root / "words.jsonl").write_text("".join(lines))
    arguments = ["--input", str(root / "words.jsonl"), "--output", str(root / "words.model")]
    tokenizer.main([*arguments, "--vocab-size", "290"])
    return root


def check(data: Path, split: str, texts: list[str]) -> None:
    """Checks that a dataset is the texts, up to the first with which there are enough tokens."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(data / "tokenizer.model"))
    found = read_dataset(data / f"{split}_text_document")
    assert [pieces.decode(each[:-1]) for each in found] == texts[: len(found)]
    assert {each[-1] for each in found} == {pieces.eos_id()}
    least = int(TOKENS[f"{split.upper()}_TOKENS"])
    assert least <= sum(map(len, found)) < least + len(found[-1])


def test_c4_is_prepared_in_as_many_starts_as_it_takes(corpora: Path, tmp_path: Path) -> None:
    given = {"CORPUS": str(corpora / "c4"), "TOKENIZER": str(corpora / "words.model")}
    settings = {**given, **TOKENS, "DATA_DIR": str(tmp_path)}
    # Text that ends too early is no data set.
    result = run("c4.sh", **{**settings, "VALID_TOKENS": "1000000000"})
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --tokens 1000000000: there are only ")
    assert written(tmp_path).keys() == {"tokenizer.model", "valid.shards"}

    result = run("c4.sh", **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "there already: " in result.stdout
    # What was made before was not made again.
    assert "\n0 documents, 0 tokens in " in result.stdout
    check(tmp_path, "valid", documents("validation.0", 9000))
    check(tmp_path, "train", [text for n in range(9) for text in documents(f"train.{n}", 90_000)])
    assert "train.shards: 2 of 9 inputs" in result.stdout
    assert len(written(tmp_path)) == 5

    before = written(tmp_path)
    result = run("c4.sh", **settings)
    assert result.returncode == 0
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["there already"] * 3
    assert written(tmp_path) == before


def test_jobs_share_climbmix(corpora: Path, tmp_path: Path) -> None:
    given = {"CORPUS": str(corpora / "climbmix"), "TOKENIZER": str(corpora / "words.model")}
    settings = {**given, **TOKENS, "DATA_DIR": str(tmp_path)}
    for share in ("2/2", ""):  # the second makes what is missing, and joins
        result = run("climbmix.sh", **settings, SHARD=share)
        assert result.returncode == 0, result.stdout + result.stderr
    check(tmp_path, "valid", documents("shard_06542", 9000))
    check(tmp_path, "train", documents("shard_00000", 90_000) + documents("shard_00001", 90_000))
    assert len(written(tmp_path)) == 5


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
    given: dict[str, str], words: str, corpora: Path, tmp_path: Path
) -> None:
    local = {"TOKENIZER": str(corpora / "words.model")} if given else {}
    home = {"HF_HOME": str(tmp_path / "empty"), "DATA_DIR": str(tmp_path / "data")}
    result = run("c4.sh", **local, **home)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(words)


def test_a_dry_run_prints_the_commands(tmp_path: Path) -> None:
    expected = {
        "c4.sh": (
            "--dataset allenai/c4 --dataset-name en --dataset-split train ",
            "--dataset-split validation ",
        ),
        "climbmix.sh": ("--dataset karpathy/climbmix-400b-shuffle ", "shard_06542.parquet "),
    }
    for script, words in expected.items():
        result = run(script, "--dry-run", DATA_DIR=str(tmp_path / "data"))
        assert result.returncode == 0, result.stderr
        assert all(word in result.stdout for word in words)
        assert "hub.py tokenizer meta-llama/Llama-2-7b-hf " in result.stdout
        for tokens in ("50000000000", "10000000"):
            assert f"--stop-after-tokens {tokens} " in result.stdout
            assert f" --tokens {tokens} --output " in result.stdout
        assert not (tmp_path / "data").exists()
    assert run("c4.sh", "--fast").stderr == "error: --fast: unknown; the only option is --dry-run\n"
