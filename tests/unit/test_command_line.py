"""A wrong input to the main program ends at once, with one clear line and no traceback.

Real processes, as a user starts them. Each case is one row: what is wrong, the flags, and words
that the line must have.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

MAIN_PROGRAM = Path(__file__).resolve().parents[2] / "pretrain_gpt_prores.py"
SECONDS = 20.0

MODEL = """
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --micro-batch-size 1 --train-iters 2 --lr 1e-3
    --tokenizer-type NullTokenizer --vocab-size 100 --eval-iters 0 --eval-interval 1
""".split()
CPU = ["--device", "cpu", *MODEL]
MOCK = [*CPU, "--mock-data"]

WRONG: dict[str, tuple[list[str], list[str]]] = {
    "no GPU and no --device cpu": ([*MODEL, "--mock-data"], ["no CUDA GPU", "--device cpu"]),
    "unknown device": (["--device", "tpu"], ["--device tpu", "cuda, cpu"]),
    "unknown schedule": (
        [*MOCK, "--prores-schedule", "cosine"],
        ["--prores-schedule cosine", "linear"],
    ),
    "a schedule's file that is not there": (
        [*MOCK, "--prores-schedule", "file:/nowhere/alpha.csv"],
        ["--prores-schedule file:/nowhere/alpha.csv", "No such file"],
    ),
    "a schedule's file and a warmup": (
        [*MOCK, "--prores-schedule", "file:/nowhere/alpha.csv", "--prores-warmup-iters", "9"],
        ["--prores-warmup-iters 9", "--prores-schedule file:/nowhere/alpha.csv"],
    ),
    "a schedule's module that is not there": (
        [*MOCK, "--prores-schedule", "no_such_module:alphas"],
        ["--prores-schedule no_such_module:alphas", "cannot import", "PYTHONPATH"],
    ),
    "a schedule's function with another signature": (
        [*MOCK, "--prores-schedule", "math:sqrt"],
        ["--prores-schedule math:sqrt", "at step 0, for 4 layers", "TypeError"],
    ),
    "the same, where Megatron alone knows the number of layers": (
        [
            *(word.replace("--num-layers", "--encoder-num-layers") for word in MOCK),
            *("--save-interval", "1", "--prores-schedule", "math:sqrt"),
        ],
        ["--prores-schedule math:sqrt", "at step 0, for 4 layers", "TypeError"],
    ),
    "negative warmup": ([*MOCK, "--prores-warmup-iters", "-1"], ["--prores-warmup-iters -1"]),
    "both warmup flags": (
        [*MOCK, "--prores-warmup-iters", "9", "--prores-warmup-iters-per-layer", "3"],
        ["--prores-warmup-iters", "--prores-warmup-iters-per-layer"],
    ),
    "context parallelism on the CPU": (
        [*MOCK, "--context-parallel-size", "2"],
        ["--context-parallel-size", "--device cpu"],
    ),
    "MLA on the CPU": (
        [*MOCK, "--multi-latent-attention"],
        ["--multi-latent-attention", "--device cpu"],
    ),
    "missing data path": (
        [*CPU, "--data-path", "/nowhere/text_document"],
        ["--data-path /nowhere/text_document", ".bin"],
    ),
    "no data at all": (CPU, ["no data", "--data-path"]),
    "no evaluation interval": (
        ["--device", "cpu", *MODEL[: MODEL.index("--eval-interval")], "--mock-data"],
        ["--eval-interval is missing"],
    ),
    "unknown flag": ([*MOCK, "--prores-shedule", "linear"], ["--prores-shedule"]),
    "a flag that Megatron refuses": (
        [*MOCK, "--tensor-model-parallel-size", "2"],
        ["Megatron refuses", "world size"],
    ),
    "an assertion of Megatron without words": (
        [*MOCK, "--min-lr", "1"],
        ["Megatron refuses", "min_lr <= lr"],
    ),
    "inference kernels that add the residual themselves": (
        [*MOCK, "--transformer-impl", "inference_optimized"],
        ["--transformer-impl inference_optimized", "alpha"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_with_one_clear_line(case: str, tmp_path: Path) -> None:
    argv, words = WRONG[case]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(MAIN_PROGRAM), *argv, "--save", str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=120,
    )
    assert time.monotonic() - start < SECONDS
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert all(word in errors[0] for word in words), errors[0]
    assert "Traceback" not in result.stderr + result.stdout
    assert list(tmp_path.iterdir()) == []
