"""A run with a table in a file as its schedule: the layers hold what the file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.conftest import MODEL, Text
from tests.distributed.launch import run_job

ITERATIONS = 6

# Each layer goes its own way: one stays open, one shut, one opens, one closes again.
STEPS = [1, 3, 5]
TABLE = [[1.0, 0.0, 0.2, 0.5], [1.0, 0.0, 0.6, 1.0], [1.0, 0.0, 1.0, 0.25]]

# Worked out by hand: before the first row, between the rows, after the last.
EXPECTED = {
    0: [1.0, 0.0, 0.2, 0.5],
    1: [1.0, 0.0, 0.2, 0.5],
    2: [1.0, 0.0, 0.4, 0.75],
    3: [1.0, 0.0, 0.6, 1.0],
    4: [1.0, 0.0, 0.8, 0.625],
    5: [1.0, 0.0, 1.0, 0.25],
    6: [1.0, 0.0, 1.0, 0.25],
}


def test_every_stage_holds_the_alphas_of_the_file(text: Text, tmp_path: Path) -> None:
    path = tmp_path / "alpha.json"
    path.write_text(json.dumps({"steps": STEPS, "alpha": TABLE}))
    schedule = ["--prores-schedule", f"file:{path}", "--train-iters", str(ITERATIONS)]
    layout = ["--pipeline-model-parallel-size", "2"]
    job = run_job(tmp_path / "job", [*MODEL, *text.flags, *schedule, *layout], ranks=2)
    assert job.succeeded, job.output[-3000:]

    held = job.alphas_by_step()
    assert {step: list(layers) for step, layers in held.items()} == {
        step: [1, 2, 3, 4] for step in EXPECTED
    }
    for step, expected in EXPECTED.items():
        assert list(held[step].values()) == pytest.approx(expected, rel=1e-6), step
    assert len(job.scalars("lm loss")) == ITERATIONS

    # The layer map: what opens for good, when, and what never does.
    lines = [line.split() for line in job.output.splitlines()]
    for layer, opens in enumerate(["0", "never", "5", "never"], 1):
        assert [">", "ProRes:", str(layer), str((layer - 1) // 2), "0", opens] in lines
    assert f"schedule file:{path}, warmup of 5 iterations over 4 layers" in job.output
