from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.launch import Job, run_job, run_ranks

# A Llama-like model like the paper's, small. Dropout is off: its random numbers differ by layout.
MODEL = """
    --device cpu --num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8
    --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --lr 2e-3 --lr-decay-style constant --log-interval 1 --eval-interval 4 --eval-iters 1
    --no-load-rng
""".split()

SAVED_AT = 2
LAST = 6

# 48 iterations over 4 layers: at each of the steps 2 to 6 the alphas of all layers differ.
WARMUP = "--prores-schedule linear --prores-warmup-iters 48".split()

# At two of the four iterations after the checkpoint.
MEASURED = "--log-layer-norms-interval 3".split()

# The one optimizer checkpoint that every layout can load.
OPTIMIZER = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable".split()


@dataclass(frozen=True)
class Text:
    """A small tokenized corpus."""

    flags: list[str]
    short: list[str]
    """Flags of the same text to train on, in documents that end within a sequence."""


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Real text through the project's own tools: corpus, tokenizer, indexed dataset."""
    root = tmp_path_factory.mktemp("text")
    job = run_ranks(root / "job", write_text, (str(root),))
    assert job.succeeded, job.output[-3000:]
    flags = [*tokenizer_flags(root), "--num-workers", "0"]
    for split in ("train", "valid"):
        flags += [f"--{split}-data-path", str(root / f"{split}_text_document")]
    at = flags.index("--train-data-path") + 1
    short = [*flags[:at], str(root / "short_text_document"), *flags[at + 1 :]]
    return Text(flags, short)


def tokenizer_flags(root: Path) -> list[str]:
    model = str(root / "tokenizer.model")
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]


def write_text(directory: str) -> None:
    """Calls the tools where Megatron is imported already."""
    from megatron_prores.data import corpus, preprocess, tokenizer

    root = Path(directory)
    corpus.main(["--output-dir", directory, "--min-megabytes", "0.5", "--max-megabytes", "1"])
    tokenizer.main(
        [
            *("--input", str(root / "train.jsonl"), "--vocab-size", "512"),
            *("--output", str(root / "tokenizer.model")),
        ]
    )
    with (root / "train.jsonl").open() as whole, (root / "short.jsonl").open("w") as short:
        for line in whole:
            short.write(json.dumps({"text": json.loads(line)["text"][:60]}) + "\n")
    for split in ("train", "valid", "short"):
        preprocess.main(
            [
                *("--input", str(root / f"{split}.jsonl"), "--append-eod", "--workers", "1"),
                *("--output-prefix", str(root / split), *tokenizer_flags(root)),
            ]
        )


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
    flags = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, *MEASURED, *loading(checkpoint)]
    job = run_job(tmp_path_factory.mktemp("one_rank"), flags)
    assert job.succeeded, job.output[-3000:]
    return job
