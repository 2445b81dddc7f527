"""Two runs on one directory, signals, and bad numbers, in the real program on two ranks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_prores.errors import EXIT_INTERRUPTED
from megatron_prores.training.save_lock import LOCK_NAME
from tests.distributed import faults
from tests.distributed.launch import MAIN_PROGRAM, REPOSITORY, run_job, start_job

MODEL = """
    --device cpu --num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 2
    --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4
    --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --lr 2e-3 --lr-decay-style constant --log-interval 1
    --use-checkpoint-opt_param-scheduler
    --eval-interval 100000 --eval-iters 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127
    --prores-schedule linear --prores-warmup-iters 24 --pipeline-model-parallel-size 2
""".split()
ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore".split()
ENDLESS = ["--train-iters", "100000"]

HUNG = 300.0
"""Seconds until what does not come counts as hung, on a crowded machine too."""


def at(path: Path, interval: int = 100000) -> list[str]:
    return ["--save", str(path), "--load", str(path), "--save-interval", str(interval)]


def tracked(path: Path) -> int:
    return int((path / "latest_checkpointed_iteration.txt").read_text())


def wait_for(log: Path, text: str, seconds: float = HUNG) -> None:
    deadline = time.monotonic() + seconds
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-3000:] if log.exists() else "no log"
        time.sleep(0.05)


def contents(directory: Path) -> dict[str, str]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def kill_queue_server(rank: int) -> None:
    """Kills the child of a rank that collects what a save has written: the one that listens."""
    (server,) = (
        child
        for child in psutil.Process(rank).children()
        if any("/listener-" in each.laddr for each in child.net_connections("unix"))
    )
    server.kill()


@pytest.mark.parametrize(
    ("number", "more"),
    [(signal.SIGTERM, ["--num-workers", "1"]), (signal.SIGUSR1, ["--num-workers", "0", *ASYNC])],
)
def test_a_signal_to_one_rank_saves_at_the_next_step_and_the_run_goes_on(
    number: signal.Signals, more: list[str], tmp_path: Path
) -> None:
    save = tmp_path / "save"
    processes = start_job(tmp_path / "job", [*MODEL, *more, *ENDLESS, *at(save)], ranks=2)
    log = tmp_path / "job" / "rank0.log"
    wait_for(log, "(after 2 iterations)")
    before = len(re.findall(r"^ \[.*iteration +\d+/", log.read_text(), flags=re.MULTILINE))
    if ASYNC[0] in more:
        kill_queue_server(processes[1].pid)
    # A launcher signals the whole group of a rank, its data loaders and writers as well; here the
    # rank and its children, as ranks of these tests share a group.
    children = Path(f"/proc/{processes[1].pid}/task/{processes[1].pid}/children").read_text()
    for pid in (processes[1].pid, *map(int, children.split())):
        os.kill(pid, number)
    for process in processes:
        process.join(HUNG)
    assert [process.exitcode for process in processes] == [EXIT_INTERRUPTED] * 2
    saved = tracked(save)
    assert saved >= before
    words = log.read_text()
    assert f"interrupted by {number.name}: iteration {saved} is saved in {save}" in words
    assert not (save / LOCK_NAME).exists()

    argv = [*MODEL, *more, "--train-iters", str(saved + 2), *at(save)]
    again = run_job(tmp_path / "again", argv, ranks=2)
    assert again.succeeded, again.output[-3000:]
    assert sorted(again.scalars("lm loss")) == [saved + 1, saved + 2]


def test_a_writer_that_is_killed_is_replaced_or_ends_the_run(tmp_path: Path) -> None:
    flags = [*MODEL, "--num-workers", "0", *at(tmp_path / "save", 30), *ASYNC, *ENDLESS]
    job = run_job(tmp_path / "job", flags, ranks=2, prepare=faults.kill_writers)
    assert job.exit_codes[1] == 1
    assert "the process that writes checkpoints was killed: here is another" in job.output
    (line,) = job.errors
    assert f"rank 1 (host {os.uname()[1]}): the process that writes checkpoints died" in line
    assert tracked(tmp_path / "save") >= 30


def launch(launcher: str, ranks: int, flags: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts ranks with a launcher, a module that takes torchrun's flags."""
    command = [sys.executable, "-W", "ignore", "-m", launcher, "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(MAIN_PROGRAM), *flags]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


@pytest.mark.parametrize(
    ("launcher", "code"),
    [("megatron_prores.launch", EXIT_INTERRUPTED), ("torch.distributed.run", 1)],
)
def test_launchers_hand_a_signal_on(launcher: str, code: int, tmp_path: Path) -> None:
    save = tmp_path / "save"
    more = ["--num-workers", "1", *ENDLESS, *at(save)]
    log = tmp_path / "log"
    job = launch(launcher, 2, [*MODEL, *more], log)
    try:
        wait_for(log, "(after 2 iterations)")
        # torchrun itself knows nothing of SIGUSR1, and would die of it.
        number = signal.SIGUSR1 if launcher.startswith("megatron") else signal.SIGTERM
        ranks = psutil.Process(job.pid).children()
        job.send_signal(number)
        # More of them change nothing, to the last instant; only torchrun itself dies of a second.
        deadline = time.monotonic() + HUNG
        while job.poll() is None and time.monotonic() < deadline:
            for process in ranks if code == 1 else [*ranks, psutil.Process(job.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            time.sleep(0.05)
        assert job.returncode == code, log.read_text()[-3000:]
    finally:
        job.terminate()
        job.wait(HUNG)
    assert f"interrupted by {number.name}: iteration {tracked(save)} is saved" in log.read_text()


@pytest.mark.parametrize("launcher", ["megatron_prores.launch", "torch.distributed.run"])
def test_ranks_end_with_a_launcher_that_is_killed(launcher: str, tmp_path: Path) -> None:
    flags = [flag for flag in MODEL if not flag.startswith("--pipeline")][:-1]
    more = ["--num-workers", "1", *ENDLESS, *at(tmp_path / "save"), *ASYNC]
    log = tmp_path / "log"
    job = launch(launcher, 1, [*flags, *more], log)
    here = psutil.Process(job.pid)
    wait_for(log, "(after 2 iterations)")
    started = here.children(recursive=True)  # the rank, its data worker, its queue's server
    assert len(started) >= 3
    job.kill()
    job.wait()
    try:
        assert not psutil.wait_procs(started, HUNG)[1], log.read_text()[-3000:]
    finally:
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_a_second_run_on_the_same_directory_stops_on_all_ranks(tmp_path: Path) -> None:
    save = tmp_path / "save"
    flags = [*MODEL, "--num-workers", "0", *at(save)]
    first = start_job(tmp_path / "first", [*flags, *ENDLESS], ranks=2)
    try:
        wait_for(tmp_path / "first" / "rank0.log", "(after 2 iterations)")
        second = run_job(tmp_path / "second", [*flags, "--train-iters", "4"], ranks=2)
        assert second.exit_codes == [2, 2]
        (line,) = second.errors
        for part in (str(save), f"pid {first[0].pid}", os.uname()[1], LOCK_NAME):
            assert part in line
        assert "Traceback" not in second.output
        assert first[0].is_alive()
    finally:
        for process in first:
            process.kill()
            process.join()
    # Killed, it has left its lock.
    assert (save / LOCK_NAME).exists()
    third = run_job(tmp_path / "third", [*flags, "--train-iters", "2"], ranks=2)
    assert third.succeeded, third.output[-3000:]
    assert f"took over the lock of host {os.uname()[1]}, pid {first[0].pid}" in third.output


def test_without_megatrons_checks_the_gradient_norm_stops_a_run(tmp_path: Path) -> None:
    flags = [*MODEL, "--num-workers", "0", *at(tmp_path / "save", 2), "--rerun-mode", "disabled"]
    flags += ["--no-check-for-nan-in-loss-and-grad", "--train-iters", "9"]
    job = run_job(tmp_path / "bad", flags, ranks=2, prepare=faults.nan_in_iteration_5)
    assert job.exit_codes == [1, 1]
    said = "error: NaN in the loss or the gradients of iteration 5: the gradient norm is nan"
    assert said in job.output
    assert tracked(tmp_path / "save") == 4


@pytest.mark.parametrize("mode", ["validate_results", "disabled", "first iteration"])
def test_nan_in_the_loss_stops_the_run_and_the_last_checkpoint_is_intact(
    mode: str, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    flags = [*MODEL, "--num-workers", "0", *at(save, 2)]
    if mode == "first iteration":
        assert run_job(tmp_path / "good", [*flags, "--train-iters", "4"], ranks=2).succeeded
    else:
        flags += ["--rerun-mode", mode]
    intact: dict[str, str] = {}
    if mode == "first iteration":
        intact = contents(save / "iter_0000004")
    job = run_job(
        tmp_path / "bad", [*flags, "--train-iters", "9"], ranks=2, prepare=faults.nan_in_iteration_5
    )
    assert not job.succeeded
    assert None not in job.exit_codes
    said = f"error: iteration 5, rank 1 (host {os.uname()[1]}): NaN in the loss of this rank"
    assert len([each for each in job.output.splitlines() if each.startswith(said)]) == 1
    assert job.exit_codes[1] == (16 if mode == "validate_results" else 1)
    assert tracked(save) == 4
    if mode == "validate_results":
        assert "the checkpoint of iteration 4 is there: kept" in job.output
    if intact:
        assert contents(save / "iter_0000004") == intact
    assert not (save / "iter_0000005").exists()

    retry = flags[: flags.index("--rerun-mode")] if "--rerun-mode" in flags else flags
    again = run_job(tmp_path / "again", [*retry, "--train-iters", "6"], ranks=2)
    assert again.succeeded, again.output[-3000:]
    assert sorted(again.scalars("lm loss")) == [5, 6]
