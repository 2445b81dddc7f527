"""A slow rank, a NaN in one rank's gradient, a bit that flips in its memory: what a run says."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from megatron_prores.checkpoint.verify import verify
from tests.distributed import faults
from tests.distributed.launch import Job, free_port, run_job
from tests.distributed.test_lifecycle import MODEL, at, tracked

# Data parallel, so that a weight has two copies; 2 micro-batches a step on each rank.
TWO_COPIES = [*MODEL[: MODEL.index("--pipeline-model-parallel-size")], "--num-workers", "0"]
FLAGS = [*TWO_COPIES, "--train-iters", "8", "--global-batch-size", "8"]
FLAGS += ["--check-weight-hash-across-dp-replicas-interval", "2"]

TO_BE_REPEATED_ELSEWHERE = 16
"""Megatron's exit code where repeating a step on the same GPU gave the same bad result."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = run_job(tmp_path_factory.mktemp("undisturbed"), FLAGS, ranks=2)
    assert job.succeeded, job.output[-3000:]
    return job


def test_the_log_names_a_slow_rank_and_the_loss_does_not_change(
    undisturbed: Job, tmp_path: Path
) -> None:
    more = ["--log-straggler", "--straggler-ctrlr-port", str(free_port())]
    slow = faults.stop_rank_1_in_every_step
    job = run_job(tmp_path, [*FLAGS, *more], ranks=2, prepare=slow)
    assert job.succeeded, job.output[-3000:]
    reports = re.findall(r"MnRtt/Rnk: ([\d.]+)ms/(\d) \| MxRtt/Rnk: ([\d.]+)ms/(\d)", job.output)
    assert len(reports) == 8
    for fastest, fast_rank, slowest, slow_rank in reports:
        assert (fast_rank, slow_rank) == ("0", "1")
        assert float(slowest) - float(fastest) > 300
    assert job.scalars("lm loss") == undisturbed.scalars("lm loss")


@pytest.mark.parametrize(
    ("times", "code", "saved", "verdict"),
    [
        (1, 17, 4, "Possible transient error"),
        (99, TO_BE_REPEATED_ELSEWHERE, 5, "First rerun: unexpected result is reproducible"),
    ],
    ids=["once", "again and again"],
)
def test_nan_in_the_gradient_of_one_rank_is_named_and_its_step_is_not_kept(
    times: int, code: int, saved: int, verdict: str, undisturbed: Job, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    nan = faults.NanInGradient(iteration=6, times=times)
    job = run_job(tmp_path / "bad", [*FLAGS, *at(save, 2)], ranks=2, prepare=nan)
    print(job.output[-5000:])
    assert code in job.exit_codes
    (line,) = job.errors
    assert line.startswith(f"error: iteration 6, rank 1 (host {os.uname()[1]}): ")
    assert verdict in job.output
    assert tracked(save) == saved
    assert verify(save / f"iter_{saved:07d}").intact
    losses = undisturbed.scalars("lm loss")
    more: list[str] = []
    if code == TO_BE_REPEATED_ELSEWHERE:
        # The next start repeats that step to look into it, and ends, now and whenever.
        judged = run_job(tmp_path / "judged", [*FLAGS, *at(save)], ranks=2)
        assert judged.exit_codes == [17, 17], judged.output[-3000:]
        assert "A checkpoint at the last iteration already exists" in judged.output
        saved, more = 4, ["--ckpt-step", "4"]
    # Started again, on a machine without the fault, the run is the undisturbed one.
    again = run_job(tmp_path / "again", [*FLAGS, *at(save), *more], ranks=2)
    assert again.succeeded, again.output[-3000:]
    assert again.scalars("lm loss") == {step: losses[step] for step in range(saved + 1, 9)}


def test_a_flipped_bit_in_a_copy_of_a_weight_is_found(tmp_path: Path) -> None:
    save = tmp_path / "save"
    flips = faults.flip_a_bit_of_a_weight
    job = run_job(tmp_path / "job", [*FLAGS, *at(save, 2)], ranks=2, prepare=flips)
    assert 1 in job.exit_codes
    assert "Traceback" not in job.output
    (line,) = job.errors
    assert "error: iteration 4: the weights of the data-parallel ranks [0, 1] differ" in line
    assert "[Rank 1] Hash not matching for module.decoder.layers.0.mlp.linear_fc1.weight" in (
        job.output
    )
    assert tracked(save) == 2
