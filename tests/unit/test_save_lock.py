"""One run writes a directory at a time; what a dead one leaves behind stops nobody."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_prores.errors import UserError
from megatron_prores.training.save_lock import LOCK_NAME, STALE_SECONDS, Holder, SaveLock


def holder(**changes: object) -> Holder:
    return dataclasses.replace(Holder.this_process({}), token="other", **changes)


def leave_lock(directory: Path, left: Holder, age: float = 0.0) -> None:
    file = directory / LOCK_NAME
    file.write_text(json.dumps(dataclasses.asdict(left)))
    os.utime(file, (time.time() - age, time.time() - age))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_second_run_is_refused_by_name_and_goes_on_after_the_first(tmp_path: Path) -> None:
    first = SaveLock(tmp_path / "new", Holder.this_process({"SLURM_JOB_ID": "77"}))
    assert first.acquire() is None
    second = SaveLock(tmp_path / "new")
    with pytest.raises(UserError) as refusal:
        second.acquire()
    message = refusal.value.message()
    for part in (f"pid {os.getpid()}", "job 77", os.uname()[1], str(first.path)):
        assert part in message
    first.release()
    assert second.acquire() is None
    second.release()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    left = holder(pid=dead_pid())
    leave_lock(tmp_path, left)
    lock = SaveLock(tmp_path)
    message = lock.acquire()
    assert message is not None
    assert f"pid {left.pid}" in message
    assert "ended" in message
    lock.check()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_pid_that_was_given_to_another_process_is_dead(tmp_path: Path) -> None:
    leave_lock(tmp_path, holder(process_start="1"))
    assert "ended" in (SaveLock(tmp_path).acquire() or "")


@pytest.mark.parametrize("elsewhere", [{"host": "node7"}, {"namespace": "pid:[1]"}])
def test_a_holder_that_cannot_be_probed_is_believed_while_it_is_heard(
    elsewhere: dict[str, str], tmp_path: Path
) -> None:
    left = holder(pid=dead_pid(), **elsewhere)
    leave_lock(tmp_path, left, age=STALE_SECONDS - 60)
    with pytest.raises(UserError, match="another run is writing there"):
        SaveLock(tmp_path).acquire()
    leave_lock(tmp_path, left, age=STALE_SECONDS + 60)
    assert "silent" in (SaveLock(tmp_path).acquire() or "")


def test_a_requeued_job_takes_its_own_lock_over_at_once(tmp_path: Path) -> None:
    leave_lock(tmp_path, holder(host="node7", job="77"))
    again = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}
    # A second step of the same job is no requeue.
    with pytest.raises(UserError):
        SaveLock(tmp_path, Holder.this_process({"SLURM_JOB_ID": "77"})).acquire()
    with pytest.raises(UserError):
        SaveLock(tmp_path, Holder.this_process({**again, "SLURM_JOB_ID": "78"})).acquire()
    assert "requeued" in (SaveLock(tmp_path, Holder.this_process(again)).acquire() or "")


def test_a_lost_lock_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    lock = SaveLock(tmp_path)
    lock.acquire()
    lock.path.unlink()
    lock.check()  # a user removed it, and nobody else took it
    assert lock.path.exists()
    leave_lock(tmp_path, holder(host="node7"))
    with pytest.raises(UserError, match="lost its lock"):
        lock.check()
    lock.release()
    assert lock.path.exists(), "the lock of another run is not ours to remove"


def test_a_directory_that_has_vanished_is_named_at_the_next_save(tmp_path: Path) -> None:
    lock = SaveLock(tmp_path / "save")
    lock.acquire()
    lock.path.unlink()
    lock.path.parent.rmdir()
    with pytest.raises(UserError, match="cannot be written"):
        lock.check()


def test_only_one_of_many_gets_a_stale_lock(tmp_path: Path) -> None:
    leave_lock(tmp_path, holder(pid=dead_pid()))
    program = (
        "import sys, time\n"
        "from megatron_prores.training.save_lock import SaveLock\n"
        "from megatron_prores.errors import UserError\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "try:\n    SaveLock(sys.argv[1]).acquire()\n"
        "except UserError:\n    print('refused')\n"
        "else:\n    print('taken')\n    time.sleep(2)\n"
    )
    start = str(time.time() + 2)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), start], stdout=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    words = [run.communicate(timeout=240)[0].strip() for run in runs]
    assert sorted(words) == ["refused"] * 5 + ["taken"]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        SaveLock(tmp_path / "file" / "checkpoints").acquire()
