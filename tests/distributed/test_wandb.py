"""W&B, offline: what is measured, and the note of a checkpoint, which never costs the run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_job
from tests.distributed.test_lifecycle import MODEL, at, tracked
from tests.distributed.test_measurements import FIGURES

ITERATIONS = 4
BLOCK, WHOLE, LAST = 32768, 1, 4


def write_the_tracker_late() -> None:
    """Rank 0 of two writes the tracker file long after the last rank would read it."""
    stock = os.replace

    def slow_replace(source: Any, target: Any) -> None:
        if Path(target).name == "latest_checkpointed_iteration.txt":
            time.sleep(1.5)
        stock(source, target)

    os.replace = slow_replace


def tell_what_is_noted() -> None:
    """The last rank prints what the tracker file holds when it is added to an artifact."""
    import wandb

    stock = wandb.Artifact.add_file

    def add_file(artifact: Any, local_path: str, *args: Any, **kwargs: Any) -> Any:
        entry = stock(artifact, local_path, *args, **kwargs)
        print(f"NOTED {artifact.metadata['iteration']}: {Path(local_path).read_text()}")
        return entry

    wandb.Artifact.add_file = add_file


def late_and_told() -> None:
    write_the_tracker_late()
    tell_what_is_noted()


def refuse_artifacts() -> None:
    """A fault: W&B's service does not answer."""
    import wandb

    def add_reference(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no route to host")

    wandb.Artifact.add_reference = add_reference


def flags(directory: Path) -> list[str]:
    return [
        *MODEL,
        *("--train-iters", str(ITERATIONS), *at(directory / "saved", 2)),
        *("--wandb-project", "test", "--wandb-exp-name", "test"),
        *("--log-layer-norms-interval", "2", "--log-spikes", "--skip-step-above-sigmas", "7"),
        *("--log-throughput", "--peak-tflops", "1"),
    ]


def history(directory: Path) -> dict[tuple[str, int], float]:
    """Reads what an offline run holds: (tag, iteration) -> value.

    Its file is a log of LevelDB behind 7 bytes: blocks of 32 KiB with pieces of records, each piece
    behind a checksum (4 bytes), its length (2) and its kind (1): whole, first, middle or last.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    content, at, piece, found = path.read_bytes(), 7, b"", {}
    while at < len(content):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        piece += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (WHOLE, LAST):
            continue
        record, piece = Record.FromString(piece), b""
        row = {"/".join(each.nested_key) or each.key: each for each in record.history.item}
        for tag, item in row.items():
            found[tag, json.loads(row["_step"].value_json)] = json.loads(item.value_json)
    return found


@pytest.mark.parametrize("mode", ["", "--async-save --use-persistent-ckpt-worker "
                                      "--async-strategy mcore"])  # fmt: skip
def test_a_note_names_the_checkpoint_that_was_just_saved(mode: str, tmp_path: Path) -> None:
    argv = [*flags(tmp_path), *mode.split()]
    job = run_job(tmp_path, argv, ranks=2, prepare=late_and_told)
    assert job.succeeded, job.output[-3000:]
    noted = [line for line in job.output.splitlines() if line.startswith("NOTED")]
    assert noted == ["NOTED 2: 2", "NOTED 4: 4"]
    assert "warning: W&B" not in job.output
    assert tracked(tmp_path / "saved") == ITERATIONS
    # What is measured goes to W&B as it does to TensorBoard.
    kept = history(tmp_path / "saved/wandb")
    measured = [tag for tag in job.tags() if tag.startswith(("prores/", "throughput_per_gpu/"))]
    assert {tag.split("/")[1] for tag in measured} == {
        *("alpha", "spike_score", "skipped_steps"),
        *("tokens_per_second", "tflops", "mfu_percent"),
        *FIGURES,
    }
    for tag in measured:
        for iteration, value in job.scalars(tag).items():
            assert kept[tag, iteration] == pytest.approx(value, rel=1e-6), tag


def test_a_note_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    job = run_job(tmp_path, flags(tmp_path), ranks=2, prepare=refuse_artifacts)
    assert job.succeeded, job.output[-3000:]
    for iteration in (2, 4):
        words = f"W&B has not taken note of the checkpoint of iteration {iteration}, which is saved"
        assert f"warning: {words}: " in job.output
    assert "no route to host" in job.output
    assert tracked(tmp_path / "saved") == ITERATIONS
