"""Runs of the examples in a small Slurm cluster, and what is done to them while they train.

They are the commands of docs/slurm.md, shrunk by variables to what two cores can do.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_prores.runs.logged import read_scalars
from tests.examples.clone import environment
from tests.examples.slurm_cluster import GOES_ON, Cluster, eventually

LAST = 60
"""Iterations of a whole run."""

TINY = {
    "DEVICE": "cpu",
    "DATA": "mock",
    "GPUS_PER_NODE": "1",
    "TP": "1",
    "PP": "2",
    "LAYERS": "4",
    "HIDDEN_SIZE": "32",
    "FFN_HIDDEN_SIZE": "64",
    "HEADS": "4",
    "SEQ_LENGTH": "32",
    "VOCAB_SIZE": "256",
    "MICRO_BATCH_SIZE": "1",
    "GLOBAL_BATCH_SIZE": "4",
    "TRAIN_ITERS": str(LAST),
    "WARMUP_ITERS_PER_LAYER": "10",
    "SAVE_INTERVAL": "10",
    "EVAL_INTERVAL": "30",
    "EVAL_ITERS": "1",
    "LOG_INTERVAL": "1",
    "OMP_NUM_THREADS": "1",
    "WANDB_PROJECT": "",
    "PYTHON": sys.executable,
}

# Megatron's imports take 10 s of a core for each of twenty ranks, and others may use the machine.
PATIENCE = 420.0


@dataclass
class Job:
    """A job of the cluster."""

    cluster: Cluster
    number: str
    log: Path
    run: Path
    """RUN_DIR."""

    @staticmethod
    def submit(cluster: Cluster, clone: Path, command: str, name: str, **variables: str) -> Job:
        """Submits a job by a command line of the documentation; ``name``: its folder in runs/."""
        run = clone / "runs" / name
        settings = environment(**{**TINY, "RUN_DIR": str(run), **variables})
        answer = cluster.command("bash", "-c", command, cwd=clone, environment=settings)
        (number,) = re.findall(r"^Submitted batch job (\d+)$", answer, flags=re.MULTILINE)
        return Job(cluster, number, clone / f"prores-{number}.log", run)

    def task(self, number: int) -> Job:
        """Gives one task of a job array."""
        name = f"{self.number}_{number}"
        log = self.log.with_name(f"prores-sweep-{name}.log")
        return Job(self.cluster, name, log, self.run / str(number))

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def finish(self) -> dict[str, str]:
        """Waits for the end of the job, and gives what Slurm knows of it."""
        return self.cluster.wait_for(self.number, PATIENCE)

    def wait_for(self, pattern: str, start: int | None = None) -> None:
        """Waits until the output holds a regular expression, in a start or in any."""

        def found() -> bool:
            output = self.output()
            if start is not None:
                _, *starts = re.split(r"^slurm: start ", output, flags=re.MULTILINE)
                output = "".join(each for each in starts if int(each.split()[0]) == start)
            if re.search(pattern, output, flags=re.MULTILINE):
                return True
            state = self.cluster.job(self.number)["JobState"]
            assert state in GOES_ON, f"{state}: {self.output()[-5000:]}"
            return False

        try:
            eventually(pattern, found, PATIENCE)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.output()[-5000:]}") from error

    def wait_for_iteration(self, number: int, start: int) -> None:
        """Waits until a start is past an iteration; each logs all of its own."""
        tens, ones = divmod(number, 10)
        self.wait_for(rf"iteration +({tens}[{ones}-9]|[{tens + 1}-9]\d)/", start)

    def set_time_limit(self, minutes: int) -> None:
        update = ("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")
        self.cluster.command(*update)

    def losses(self) -> dict[str, dict[int, float]]:
        return losses(self.run)


def losses(run: Path) -> dict[str, dict[int, float]]:
    """Reads the losses of a run, training and validation, as Megatron wrote them."""
    scalars = read_scalars(run / "tensorboard")
    return {
        tag: {int(step): float(value) for step, value in zip(each.steps, each.values, strict=True)}
        for tag, each in scalars.items()
        if tag in ("lm loss", "lm loss validation")
    }


def undisturbed(cluster: Cluster, clone: Path, script: str) -> dict[str, dict[int, float]]:
    """Runs a script of examples/ to its end on the same two ranks, without Slurm.

    The cluster has no part in it, but ends it when it goes.
    """
    run = clone / "runs/undisturbed"
    settings: Mapping[str, str] = {**TINY, "GPUS_PER_NODE": "2", "RUN_DIR": str(run)}
    result = subprocess.run(
        ["bash", *script.split()],
        cwd=clone,
        env={**environment(**settings), **cluster.environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return losses(run)


def reach_the_time_limit(job: Job) -> None:
    """Holds a run still in its middle, and lowers its time limit until Slurm warns it.

    So that the limit comes in its middle on any machine. The signal waits for the held processes.
    """
    job.wait_for_iteration(10, start=0)
    held = [pid for rank in (0, 1) for pid in job.cluster.ranks_of(job.number, rank)]
    _send(signal.SIGSTOP, held)
    try:
        hours, minutes, _ = map(int, job.cluster.job(job.number)["RunTime"].split(":"))
        # The warning is due 300 s before the limit: within a minute from now.
        job.set_time_limit(hours * 60 + minutes + 6)
        job.wait_for(r"^slurm: SIGUSR1")
    finally:
        job.set_time_limit(60)
        _send(signal.SIGCONT, held)


def _send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_a_rank(job: Job) -> float:
    """Kills rank 1 of a run; gives the seconds until the job has ended on all nodes."""
    job.wait_for_iteration(15, start=0)
    (rank,) = job.cluster.first_of(job.cluster.ranks_of(job.number, 1))
    os.kill(rank, signal.SIGKILL)
    return _seconds_to_the_end(job)


def lose_a_node(job: Job, lose: Callable[[str], None]) -> tuple[str, float]:
    """Loses the second node of a run; gives its name, and the seconds until the job has ended."""
    node = job.cluster.nodes_of(job.number)[1]
    lose(node)
    return node, _seconds_to_the_end(job)


def _seconds_to_the_end(job: Job) -> float:
    start = time.monotonic()
    eventually(
        "end of this start",
        lambda: job.cluster.job(job.number)["JobState"] not in ("RUNNING", "SIGNALING"),
        PATIENCE,
    )
    return time.monotonic() - start
