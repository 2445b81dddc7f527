"""Training on a GPU is the training of the local float32 model, to the precision of the numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_prores.schedule.formulas import alphas
from megatron_prores.system.environment import is_installed
from tests.distributed.launch import Job
from tests.gpu.command_lines import (
    BF16,
    FP8,
    GRAPHS,
    ITERATIONS,
    LOCAL_BF16,
    NEEDS,
    PLACEMENTS,
    command_lines,
)
from tests.gpu.jobs import Jobs

LINES = command_lines()

# Largest difference of a loss to the local float32 run's. test_other_methods_differ_by_more shows
# that a run without the warmup is further away than the first.
BF16_TOLERANCE, FP8_TOLERANCE = 0.03, 0.08


def worst(job: Job, reference: Job, tag: str = "lm loss") -> float:
    losses, expected = job.scalars(tag), reference.scalars(tag)
    assert expected
    assert losses.keys() == expected.keys()
    return max(abs(losses[step] - expected[step]) for step in expected)


def run(jobs: Jobs, name: str) -> Job:
    """Gives a run, and has all that may be asked for next started meanwhile."""
    capability = torch.cuda.get_device_capability()
    for each, line in LINES.items():
        if "--transformer-impl local" not in line and not is_installed("transformer_engine"):
            continue
        if capability >= NEEDS.get(each.rpartition(", ")[2], (0, 0)):
            jobs.start(each, line)
    return jobs(name, LINES[name])


@pytest.mark.without_te
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_local_bf16_follows_float32(placement: str, jobs: Jobs) -> None:
    job, reference = run(jobs, f"{placement}, local bf16"), run(jobs, f"{placement}, float32")
    assert worst(job, reference) <= BF16_TOLERANCE
    assert worst(job, reference, "lm loss validation") <= BF16_TOLERANCE


@pytest.mark.without_te
def test_a_mask_does_not_change_the_kernel(jobs: Jobs) -> None:
    """The fused attention is causal by itself, and reads no mask of the data loader's."""
    line = LINES["pre, local bf16"]
    masked = jobs("a mask", line.replace("--no-create-attention-mask-in-dataloader", ""))
    assert worst(masked, run(jobs, "pre, local bf16")) == 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_bf16_follows_float32(placement: str, jobs: Jobs) -> None:
    job, reference = run(jobs, f"{placement}, bf16"), run(jobs, f"{placement}, float32")
    assert worst(job, reference) <= BF16_TOLERANCE
    assert worst(job, reference, "lm loss validation") <= BF16_TOLERANCE


def test_other_methods_differ_by_more(jobs: Jobs) -> None:
    assert worst(run(jobs, "none, bf16"), run(jobs, "pre, float32")) > 2 * BF16_TOLERANCE


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_fp8_follows_float32_at_every_placement(placement: str, jobs: Jobs) -> None:
    job, reference = run(jobs, f"{placement}, tensorwise"), run(jobs, f"{placement}, float32")
    assert worst(job, reference) <= FP8_TOLERANCE


@pytest.mark.parametrize("recipe", FP8)
def test_every_fp8_recipe(recipe: str, jobs: Jobs) -> None:
    if torch.cuda.get_device_capability() < (needed := NEEDS.get(recipe, (0, 0))):
        pytest.skip(f"{recipe} needs compute capability {needed}")
    job = run(jobs, f"pre, {recipe}")
    assert worst(job, run(jobs, "pre, float32")) <= FP8_TOLERANCE
    # It was FP8: no loss but the first is bf16's to the last digit.
    assert worst(job, run(jobs, "pre, bf16")) > 0


@pytest.mark.parametrize(
    "name",
    ["FP8 weights", "first and last layer in bf16", "FP8, full recompute", "FP8, norms recomputed"],
)
def test_variants_of_fp8(name: str, jobs: Jobs) -> None:
    assert worst(run(jobs, name), run(jobs, "pre, float32")) <= FP8_TOLERANCE


def test_recompute_changes_nothing(jobs: Jobs) -> None:
    assert worst(run(jobs, "sandwich, full recompute"), run(jobs, "sandwich, bf16")) <= 1e-3


def test_alphas_are_the_schedules(jobs: Jobs) -> None:
    held = run(jobs, "pre, tensorwise").alphas_by_step()
    assert sorted(held) == list(range(ITERATIONS + 1))
    for step, layers in held.items():
        assert list(layers.values()) == pytest.approx(alphas("linear", step, 4, 24), rel=1e-6)


# A layer whose alpha is 1 when the graph is captured and falls, and three that rise.
TABLE = {
    "steps": [0, 3, 20],
    "alpha": [[1.0, 0.0, 0.5, 0.2], [1.0, 0.3, 0.6, 0.3], [0.1, 1.0, 1.0, 0.9]],
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("schedule") / "table.json"
    path.write_text(json.dumps(TABLE))
    line = BF16.replace("--prores-warmup-iters 24", "")
    return f"{line} --prores-schedule file:{path}"


@pytest.mark.parametrize("mode", GRAPHS)
def test_captured_graph_reads_alpha_at_every_replay(mode: str, table: str, jobs: Jobs) -> None:
    for each, flags in GRAPHS.items():
        jobs.start(f"graph, {each}", f"{table} {flags}")
    eager = jobs("no graph", table)
    job = jobs(f"graph, {mode}", f"{table} {GRAPHS[mode]}")
    # The same kernels on the same numbers; a sum of gradients may be taken in another order.
    assert worst(job, eager) <= 3e-3
    assert worst(job, eager, "lm loss validation") <= 3e-3
    assert job.alphas_by_step() == eager.alphas_by_step()
    frozen = jobs(
        "frozen", f"{BF16.replace('--prores-warmup-iters 24', '')} --prores-schedule fix_L"
    )
    assert worst(frozen, eager) > 10 * 3e-3


def peak_memory(job: Job) -> float:
    found = re.findall(r"\(after \d+ iterations\) memory.*max allocated: ([0-9.]+)", job.output)
    assert found
    return float(found[-1])


def test_memory_is_stock_megatrons(jobs: Jobs) -> None:
    stock, prores = (peak_memory(run(jobs, name)) for name in ("none, bf16", "pre, bf16"))
    assert prores <= 1.01 * stock


@pytest.mark.without_te
def test_nothing_is_compiled_again_when_alpha_changes(jobs: Jobs) -> None:
    # All layers open within the run, and take Megatron's own addition from then on.
    line = f"{LOCAL_BF16} --prores-warmup-iters 12"
    job = jobs("recompiles", line, {"TORCH_LOGS": "recompiles"})
    assert "Recompiling function _scaled_bias_dropout_add" not in job.output
    after = job.output[job.output.index("iteration        2/") :]
    assert "Recompiling function bias_dropout_add" not in after


def test_fp8_run_that_is_resumed(jobs: Jobs, tmp_path: Path) -> None:
    """Delayed scaling goes on with the scales of the checkpoint."""
    line = f"{BF16} {FP8['delayed']} --save {tmp_path} --save-interval 10 --load {tmp_path}"
    jobs("first half", f"{line} --exit-interval 10")
    job = jobs("second half", line)
    expected = run(jobs, "pre, delayed").scalars("lm loss")
    losses = job.scalars("lm loss")
    assert list(losses) == list(range(11, ITERATIONS + 1))
    assert losses == pytest.approx({step: expected[step] for step in losses}, abs=3e-3)
