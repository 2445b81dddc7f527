"""Compiled functions and captured graphs see every new alpha, and cost nothing to keep.

On the CPU: torch.compile as it is, and a stand-in for CUDA graphs (tests/distributed/capture.py)
under Megatron's real training loop. tests/gpu does the same with CUDA's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_prores.plan.memory import loss_bytes
from tests.distributed import capture
from tests.distributed.compiled_layer import CHANGES, LOSSES
from tests.distributed.conftest import MODEL, Text
from tests.distributed.launch import REPOSITORY, Job, free_port, run_job


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """What a process has counted that really compiles."""
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    environment = os.environ | {
        "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.distributed.compiled_layer"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


def test_nothing_is_compiled_again_when_alpha_changes(counted: dict[str, Any]) -> None:
    # One function for training, one for evaluation, shared by all layers.
    assert counted["compiled"] == 2
    assert counted["compiled again"] == 0
    # Megatron's own addition, for training and for evaluation, before a layer opens and not then.
    assert counted["compiled by the warm-up"] == 2
    assert counted["compiled when a layer opens"] == 0
    # Every alpha was used, though.
    assert counted["distinct outputs"] == CHANGES + 2
    assert counted["kernels"] == 1


def test_the_loss_needs_what_the_planner_counts(counted: dict[str, Any]) -> None:
    planned = [loss_bytes(dtype, fused) for dtype, fused in LOSSES]
    assert counted["bytes of the loss"] == pytest.approx(planned, rel=0.05)


ITERATIONS = 10
# Rising alphas, and one that is 1 when the graph is captured, after 3 iterations, and falls: an
# open layer whose stock path was captured would not see it.
TABLE = {
    "steps": [0, 3, 10],
    "alpha": [[1.0, 0.0, 0.5, 0.2], [1.0, 0.3, 0.6, 0.3], [0.1, 1.0, 1.0, 0.9]],
}
# The generators that the local graphs' usual tracker has are CUDA's; the tests draw nothing.
GRAPHS = {
    "full_iteration": "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad",
    "local": "--cuda-graph-impl local --inference-rng-tracker",
}


def flags_of(text: Text, directory: Path) -> list[str]:
    table = directory / "schedule.json"
    table.write_text(json.dumps(TABLE))
    schedule = ["--prores-schedule", f"file:{table}"]
    more = ["--train-iters", str(ITERATIONS), "--eval-interval", "2", "--eval-iters", "2"]
    return [*MODEL, *text.flags, *schedule, *more]


def curves(job: Job) -> dict[str, dict[int, float]]:
    assert job.succeeded, job.output[-3000:]
    return {tag: job.scalars(tag) for tag in ("lm loss", "lm loss validation", "grad-norm")}


@pytest.fixture(scope="module", params=GRAPHS)
def mode_and_eager(
    request: pytest.FixtureRequest, text: Text, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[str], Job]:
    """A kind of graph, and a run without graphs on the same generators, with its flags."""
    root = tmp_path_factory.mktemp(request.param)
    more = ["--inference-rng-tracker"] if request.param == "local" else []
    flags = [*flags_of(text, root), *more]
    return request.param, flags, run_job(root / "eager", flags)


def test_captured_graph_reads_alpha_at_every_replay(
    mode_and_eager: tuple[str, list[str], Job], tmp_path: Path
) -> None:
    mode, flags, eager = mode_and_eager
    argv = [*flags, *GRAPHS[mode].split()]
    job = run_job(tmp_path, argv, prepare=capture.PREPARE[mode])
    assert curves(job) == curves(eager)
    # full_iteration: three steps of warmup each for training and evaluation, then the capture.
    assert job.output.count("replayed") >= 2 * (ITERATIONS - 4)
    assert job.alphas_by_step() == eager.alphas_by_step()


@pytest.mark.parametrize("fault", [capture.exchange_alphas, capture.let_layers_open])
def test_planted_faults_are_seen(
    fault: Callable[[], None], mode_and_eager: tuple[str, list[str], Job], tmp_path: Path
) -> None:
    mode, flags, eager = mode_and_eager
    prepare = partial(capture.plant, fault, capture.PREPARE[mode])
    job = run_job(tmp_path, [*flags, *GRAPHS[mode].split()], prepare=prepare)
    assert curves(job) != curves(eager)
