"""ProRes on Megatron's HybridModel: the same run as the GPT model's, from its own checkpoint.

Experts are in test_layouts.py, the authors' figures in test_golden.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prores.convert.export import export, open_checkpoint
from tests.distributed import faults
from tests.distributed.conftest import MODEL, OPTIMIZER, WARMUP, Text, loading, saving
from tests.distributed.hybrid_ranks import check_initial_weights_are_the_gpt_models
from tests.distributed.launch import Check, Job, check_name, run_checks, run_job
from tests.distributed.test_layouts import PP2, assert_same_curves

LAYOUTS = {
    "one rank": (1, "*-*-*-*-", ""),
    "TP2 with sequence parallelism": (
        2,
        "*-*-*-*-",
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ),
    # The second block is on both stages.
    "PP2, cut within a block": (2, "*-*|-*-*-", PP2),
    "PP2 with 2 virtual stages": (2, "*-|*-|*-|*-", PP2),
}
"""Name -> ranks, pattern and flags."""


def as_hybrid(flags: list[str], pattern: str) -> list[str]:
    """The flags of a GPT run as those of a hybrid model."""
    at = flags.index("--num-layers")
    return [*flags[:at], *flags[at + 2 :], "--hybrid-layer-pattern", pattern]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gpt_run_goes_on_as_hybrid(
    layout: str, text: Text, checkpoint: Path, on_one_rank: Job, tmp_path: Path
) -> None:
    ranks, pattern, flags = LAYOUTS[layout]
    argv = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, *loading(checkpoint), *flags.split()]
    job = run_job(tmp_path, as_hybrid(argv, pattern), ranks)
    assert_same_curves(job, on_one_rank)
    assert "4 GPT layers feed 4 attention and 4 MLP positions" in job.output


@pytest.fixture(scope="module")
def saved(text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a hybrid model; GPT's, from the same seed, has the same weights."""
    root = tmp_path_factory.mktemp("hybrid")
    argv = [*as_hybrid(MODEL, "*-*-*-*-"), *text.flags, *WARMUP, *OPTIMIZER]
    job = run_job(root / "job", [*argv, *saving(root / "saved")])
    assert job.succeeded, job.output[-3000:]
    return root / "saved"


def test_a_hybrid_run_goes_on_with_other_cuts_and_not_as_gpt(
    text: Text, saved: Path, on_one_rank: Job, tmp_path: Path
) -> None:
    argv = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, *loading(saved)]
    cut = [*as_hybrid(argv, "*|-*-|*-*|-"), *PP2.split()]
    assert_same_curves(run_job(tmp_path / "cut", cut, ranks=2), on_one_rank)
    job = run_job(tmp_path / "gpt", argv)
    assert job.exit_codes == [2]
    assert "holds a hybrid model: give --hybrid-layer-pattern *-*-*-*-" in job.output


def test_the_exports_of_both_are_the_same_bytes(
    saved: Path, checkpoint: Path, tmp_path: Path
) -> None:
    for name, root in (("gpt", checkpoint), ("hybrid", saved)):
        export(open_checkpoint(root), tmp_path / name, "fp32", "none")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "gpt" / file).read_bytes() == (tmp_path / "hybrid" / file).read_bytes()


INITS: list[Check] = [
    (check_initial_weights_are_the_gpt_models, words)
    for words in (
        ("pre", "normal"),
        ("pre", "scaled"),
        ("pre", "ds"),
        ("sandwich", "normal"),
        ("lns", "normal"),
        ("post", "normal"),
        ("deepnorm", "deepnorm"),
    )
]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(tmp_path_factory.mktemp("checks"), INITS)


@pytest.mark.parametrize("name", [*map(check_name, INITS)])
def test_initial_weights_are_the_gpt_models(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]


# Experts in one block of three, a stage that ends within a block, a prediction layer.
MIXED = "*E*|-*-/*-"
MIXED_FLAGS = (
    f"{PP2} --num-experts 2 --moe-router-topk 1 --moe-router-pre-softmax --moe-ffn-hidden-size 64 "
    "--moe-token-dispatcher-type allgather --train-iters 2"
)


def test_l_of_a_mixed_pattern_and_a_planted_miscount(text: Text, tmp_path: Path) -> None:
    argv = [*as_hybrid(MODEL, MIXED), *text.flags, *WARMUP, *MIXED_FLAGS.split()]
    job = run_job(tmp_path / "right", argv, ranks=2)
    assert job.succeeded, job.output[-3000:]
    assert {*map(tuple, job.alphas_by_step().values())} == {(1, 2, 3)}
    lines = [line.split()[2:] for line in job.output.splitlines() if "> ProRes:" in line]
    assert ["2", "0", "0", "32"] in lines
    assert ["2", "1", "0", "32"] in lines
    fault = faults.count_every_layer_of_the_pattern
    job = run_job(tmp_path / "wrong", argv, ranks=2, prepare=fault)
    assert job.exit_codes == [1, 1]
    assert "rank 0: layer 2 of the pattern counts as layer 2 of 3, not 1" in job.output
    assert "Traceback" not in job.output
