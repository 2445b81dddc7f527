"""A run that is stopped and resumed is the run that was not: bit for bit on the same layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_prores.runs.logged import load_run
from megatron_prores.runs.numbers import compare, settings_that_differ
from megatron_prores.runs.picture import draw_runs
from megatron_prores.schedule.formulas import opening_steps
from tests.distributed.conftest import MODEL, OPTIMIZER, Text
from tests.distributed.launch import Job, run_job

LAST, STOPPED = 12, 5

# Over 4 layers, to stop while layers are closed, when the second of them has just reached 1, and
# when all are open.
WARMUPS = {"during the warmup": 24, "as layer 2 reaches 1": 10, "after the warmup": 4}

PP2 = ["--pipeline-model-parallel-size", "2"]
TP2 = ["--tensor-model-parallel-size", "2"]
FP32_DP2 = ["--use-distributed-optimizer", "--global-batch-size", "8"]
BF16_DP2 = ["--bf16", *FP32_DP2]
SAME_LAYOUT = {
    "one rank, fp32": (1, [], 24),
    "one rank, fp32, sgd": (1, ["--optimizer", "sgd"], 24),
    "one rank, bf16, sgd": (1, ["--bf16", "--optimizer", "sgd"], 24),
    "two data-parallel ranks, bf16, distributed optimizer": (2, BF16_DP2, 10),
    "two data-parallel ranks, fp32, distributed optimizer": (2, FP32_DP2, 10),
    "PP2, during the warmup": (2, PP2, 24),
    "PP2, as layer 2 reaches 1": (2, PP2, 10),
    "PP2, after the warmup": (2, PP2, 4),
}

# Dropout is on: going on bit for bit takes the random state of the checkpoint.
DROPOUT = ["--attention-dropout", "0.1", "--hidden-dropout", "0.1"]


def flags_of(text: Text, warmup: int, *more: str) -> list[str]:
    # Among MODEL's flags, --no-load-rng is for other tests.
    model = [flag for flag in MODEL if flag != "--no-load-rng"]
    schedule = ["--prores-schedule", "linear", "--prores-warmup-iters", str(warmup)]
    return [*model, *text.flags, *schedule, "--train-iters", str(LAST), *more]


def saving(path: Path, every: int) -> list[str]:
    return ["--save", str(path), "--save-interval", str(every)]


def stopped_and_resumed(
    root: Path, flags: list[str], ranks: int, resumed_flags: list[str] | None = None
) -> tuple[Job, Job]:
    """Runs to STOPPED, and from its checkpoint to the end."""
    saved = saving(root / "parts", STOPPED)
    first = run_job(root / "first", [*flags, *saved, "--exit-interval", str(STOPPED)], ranks)
    assert first.succeeded, first.output[-3000:]
    load = ["--load", str(root / "parts")]
    second = run_job(root / "second", [*(resumed_flags or flags), *saved, *load], ranks)
    assert second.succeeded, second.output[-3000:]
    return first, second


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Reads every tensor of a checkpoint, weights and optimizer state."""
    reader = dcp.FileSystemReader(str(directory))
    metadata = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def merged(first: Job, second: Job, tag: str) -> dict[int, float]:
    return {**first.scalars(tag), **second.scalars(tag)}


@pytest.mark.parametrize("case", SAME_LAYOUT)
def test_stopped_and_resumed_is_straight_through_bit_for_bit(
    case: str, text: Text, tmp_path: Path
) -> None:
    ranks, layout, warmup = SAME_LAYOUT[case]
    flags = flags_of(text, warmup, *layout, *DROPOUT)
    straight = run_job(tmp_path / "straight", [*flags, *saving(tmp_path / "whole", LAST)], ranks)
    assert straight.succeeded, straight.output[-3000:]
    first, second = stopped_and_resumed(tmp_path, flags, ranks)
    assert min(second.scalars("lm loss")) == STOPPED + 1
    for tag in ("lm loss", "grad-norm", *(f"prores/alpha/layer_{layer}" for layer in range(1, 5))):
        assert merged(first, second, tag) == straight.scalars(tag), tag
    assert len(straight.scalars("lm loss")) == LAST
    held = {**first.alphas_by_step(), **second.alphas_by_step()}
    assert held == straight.alphas_by_step()

    whole, parts = (tensors(tmp_path / name / f"iter_{LAST:07}") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert any("exp_avg" in name or "momentum_buffer" in name for name in whole)
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_the_stops_are_where_they_are_said_to_be() -> None:
    opens = {when: opening_steps("linear", 4, warmup) for when, warmup in WARMUPS.items()}
    assert min(opens["during the warmup"]) > STOPPED
    assert opens["as layer 2 reaches 1"][1] == STOPPED
    assert max(opens["after the warmup"]) < STOPPED


def test_resumed_on_another_layout_it_is_the_same_run(text: Text, tmp_path: Path) -> None:
    optimizer = [*OPTIMIZER, "--no-load-rng"]
    flags = flags_of(text, 10, *optimizer)
    straight = run_job(tmp_path / "straight", [*flags, *PP2], ranks=2)
    assert straight.succeeded, straight.output[-3000:]
    first, second = stopped_and_resumed(tmp_path, [*flags, *PP2], 2, [*flags, *TP2])
    for tag in ("lm loss", "grad-norm"):
        assert merged(first, second, tag) == pytest.approx(straight.scalars(tag), rel=1e-5)
    assert {**first.alphas_by_step(), **second.alphas_by_step()} == straight.alphas_by_step()

    # And so it looks beside the other, with what both starts have logged in one directory.
    shutil.copytree(second.directory / "tensorboard", tmp_path / "logs")
    shutil.copytree(first.directory / "tensorboard", tmp_path / "logs", dirs_exist_ok=True)
    whole, parts = (load_run(path) for path in (straight.directory, tmp_path / "logs"))
    assert parts.tokens.steps.tolist() == list(range(1, LAST + 1))
    assert parts.tokens.values.tolist() == whole.tokens.values.tolist()
    batch, length = (int(whole.settings[name]) for name in ("global_batch_size", "seq_length"))
    assert whole.tokens.values[-1] == LAST * batch * length
    numbers = compare([whole, parts])
    for number in ("train_loss", "grad_norm_max", "skipped_iterations"):
        assert numbers["logs"][number] == pytest.approx(numbers["straight"][number], rel=1e-5)
    assert abs(numbers["logs"]["train_gap"]) < 1e-4
    assert numbers["logs"]["tokens_per_second"] > 0
    differing = settings_that_differ([whole, parts])
    assert differing["tensor_model_parallel_size"] == {"straight": "1", "logs": "2"}
    assert not {"tensorboard_dir", "load", "save"} & set(differing)
    assert {"seed", "lr", "prores_warmup_iters"} <= set(whole.settings)
    draw_runs([whole, parts])


def test_the_comparison_sees_a_random_state_that_was_not_restored(
    text: Text, tmp_path: Path
) -> None:
    flags = flags_of(text, 24, *DROPOUT)
    straight = run_job(tmp_path / "straight", flags)
    _, second = stopped_and_resumed(tmp_path, flags, 1, [*flags, "--no-load-rng"])
    losses = straight.scalars("lm loss")
    assert all(losses[step] != loss for step, loss in second.scalars("lm loss").items())
