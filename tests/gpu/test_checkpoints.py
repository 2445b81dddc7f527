"""A checkpoint written on a GPU is read on the CPU, and back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.distributed.launch import Job, run_job
from tests.gpu.command_lines import BF16, ITERATIONS
from tests.gpu.jobs import Jobs

OPTIMIZER = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"


def on_cpu(line: str) -> list[str]:
    return [*line.replace("--transformer-impl transformer_engine", "").split(), "--device", "cpu"]


def validation_loss(job: Job) -> float:
    found = re.findall(r"on validation set \| lm loss value: ([0-9.E+-]+)", job.output)
    assert job.succeeded, job.output[-4000:]
    return float(found[-1])


@pytest.mark.parametrize("placement", ["pre", "sandwich", "post"])
def test_from_the_gpu_to_the_cpu_and_back(placement: str, jobs: Jobs, tmp_path: Path) -> None:
    line = f"{BF16} {OPTIMIZER} --norm-placement {placement}"
    gpu, cpu = tmp_path / "gpu", tmp_path / "cpu"
    whole = jobs(f"{placement}, distributed optimizer", line)
    saving = f"{line} --save {gpu} --save-interval 10 --exit-interval 10"
    jobs(f"{placement}, saved on the GPU", saving)
    words = on_cpu(f"{line} --load {gpu} --save {cpu} --save-interval 15 --exit-interval 15")
    middle = run_job(tmp_path / "job", words)
    assert middle.succeeded, middle.output[-4000:]
    last = jobs(f"{placement}, from the CPU", f"{line} --load {cpu}")
    losses = middle.scalars("lm loss") | last.scalars("lm loss")
    expected = {step: whole.scalars("lm loss")[step] for step in range(11, ITERATIONS + 1)}
    # Ten more steps of bf16 on other kernels.
    assert losses == pytest.approx(expected, abs=0.03)


def test_the_same_evaluation_on_both(jobs: Jobs, tmp_path: Path) -> None:
    line = f"{BF16} --save {tmp_path} --save-interval 10"
    jobs("saved for evaluation", line)
    evaluation = f"{BF16} --load {tmp_path} --skip-train"
    on_gpu = validation_loss(jobs("evaluated on the GPU", evaluation))
    assert validation_loss(run_job(tmp_path / "job", on_cpu(evaluation))) == pytest.approx(
        on_gpu, abs=0.01
    )
