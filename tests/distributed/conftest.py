from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.launch import REPOSITORY, Job, run_job

# A Llama-like model like the paper's, small. Dropout is off: its random numbers differ by layout.
MODEL = """
    --device cpu --num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8
    --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --lr 2e-3 --lr-decay-style constant --log-interval 1 --eval-interval 4 --eval-iters 2
    --no-load-rng
""".split()

SAVED_AT = 2
LAST = 10

# 48 iterations over 4 layers: at each of the steps 2 to 10 the alphas of all layers differ.
WARMUP = "--prores-schedule linear --prores-warmup-iters 48".split()

# The one optimizer checkpoint that every layout can load.
OPTIMIZER = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable".split()


@dataclass(frozen=True)
class Text:
    """A small tokenized corpus."""

    flags: list[str]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Real text through the project's own tools: corpus, tokenizer, indexed dataset."""
    root = tmp_path_factory.mktemp("text")

    def tool(name: str, *args: object) -> None:
        command = [sys.executable, str(REPOSITORY / "tools" / name), *map(str, args)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    tool("build_corpus.py", "--output-dir", root, "--min-megabytes", 0.5, "--max-megabytes", 1)
    tool(
        *("train_tokenizer.py", "--input", root / "train.jsonl", "--vocab-size", 512),
        *("--output", root / "tokenizer.model"),
    )
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer"]
    tokenizer += ["--tokenizer-model", str(root / "tokenizer.model")]
    flags = [*tokenizer, "--num-workers", "0"]
    for split in ("train", "valid"):
        tool(
            *("preprocess_data.py", "--input", root / f"{split}.jsonl", "--append-eod"),
            *("--output-prefix", root / split, *tokenizer),
        )
        flags += [f"--{split}-data-path", str(root / f"{split}_text_document")]
    return Text(flags)


def saving(path: Path, *more: str) -> list[str]:
    """Flags of a run that is stopped after SAVED_AT of LAST iterations and leaves a checkpoint."""
    return [
        *("--train-iters", str(LAST), "--exit-interval", str(SAVED_AT)),
        *("--save", str(path), "--save-interval", str(SAVED_AT), *more),
    ]


def loading(path: Path, *more: str) -> list[str]:
    """Flags of a run that goes on from such a checkpoint to the end."""
    return ["--train-iters", str(LAST), "--load", str(path), *more]


@pytest.fixture(scope="session")
def checkpoint(text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the dense model, saved by one rank."""
    root = tmp_path_factory.mktemp("checkpoint")
    job = run_job(root / "job", [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, *saving(root / "saved")])
    assert job.succeeded, job.output[-3000:]
    return root / "saved"


@pytest.fixture(scope="session")
def on_one_rank(text: Text, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The run that every layout is compared with."""
    flags = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, *loading(checkpoint)]
    job = run_job(tmp_path_factory.mktemp("one_rank"), flags)
    assert job.succeeded, job.output[-3000:]
    return job
