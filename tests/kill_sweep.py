#!/usr/bin/env python3
"""Kills a training run again and again, and compares it with one that was left in peace.

    python tests/kill_sweep.py --kills 25               # saving synchronously
    python tests/kill_sweep.py --kills 25 --async-save  # saving in the background
    python tests/kill_sweep.py --short                  # as the tests run it

A run of two pipeline ranks on the CPU device, with dropout, saves every second iteration. A random
rank gets SIGKILL at a random time, about every other time while a checkpoint is being written; the
run is started again, until it has finished; then another begins, until there were enough kills.
Prints a table. Exit code 0: every resume went on from the last completed checkpoint, and every loss
is the undisturbed run's, bit for bit; else 1.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    root = str(Path(__file__).resolve().parents[1])
    sys.path.insert(0, root)
    # The fork server that starts the ranks finds the project as well.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))

from megatron_prores.checkpoint.newest import newest
from tests.distributed.launch import start_job
from tests.distributed.recorder import RECORD, read_losses, record_losses

INTERVAL = 2
"""Iterations between saves."""

RUN = f"""
    --device cpu --num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8
    --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0.1 --hidden-dropout 0.1
    --lr 2e-3 --lr-decay-style constant --log-interval 1 --eval-interval 1000 --eval-iters 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 511 --num-workers 0
    --prores-schedule linear --prores-warmup-iters 16
    --pipeline-model-parallel-size 2 --save-interval {INTERVAL}
""".split()
ASYNC = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
RANKS = 2
PATIENCE = 120.0
"""Seconds for a start of the run to show a sign of life, or to end, before it counts as hung."""


@dataclass
class Outcome:
    """What a sweep counted; its rows are printed."""

    saving: str
    kills: int = 0
    kills_during_a_save: int = 0
    resumes: int = 0
    failed_resumes: int = 0
    resumes_from_elsewhere: int = 0
    lost: list[int] = field(default_factory=list)
    losses_compared: int = 0
    mismatches: int = 0
    finished_runs: int = 0
    bound: int = INTERVAL
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was lost."""
        wrong = self.failed_resumes + self.resumes_from_elsewhere + self.mismatches
        return not (wrong or self.problems) and max(self.lost, default=0) <= self.bound

    def table(self) -> str:
        """The rows asked of a sweep, aligned."""
        rows = {
            "kills": self.kills,
            "kills during a save": self.kills_during_a_save,
            "resumes": self.resumes,
            "resumes that failed": self.failed_resumes,
            "resumes from another than the last completed checkpoint": self.resumes_from_elsewhere,
            f"lost iterations, most by one kill (at most {self.bound})": max(self.lost, default=0),
            "lost iterations, all kills": sum(self.lost),
            "runs carried to their end": self.finished_runs,
            "losses compared with the undisturbed run": self.losses_compared,
            "mismatches": self.mismatches,
        }
        width = max(map(len, rows))
        lines = [f"{name:<{width}}  {value:>5}" for name, value in rows.items()]
        return "\n".join([f"saving {self.saving}", *lines, *self.problems])


def completed(save: Path) -> int:
    """Reads the last completed checkpoint, as a run does; 0: none."""
    found = newest(save)
    return 0 if found is None else int(found.iteration or 0)


class Sweep:
    """One sweep: an undisturbed run, then runs that are killed."""

    def __init__(self, work: Path, asynchronous: bool, seed: int, iterations: int) -> None:
        """Takes where to work, how to save, what to draw from, and how long a run is."""
        self.work = work
        self.flags = [*RUN, "--train-iters", str(iterations), *(ASYNC if asynchronous else [])]
        self.iterations = iterations
        self.random = random.Random(seed)
        # In the background, a checkpoint completes at the latest when the next one was written.
        self.outcome = Outcome(
            "in the background" if asynchronous else "synchronously",
            bound=2 * INTERVAL if asynchronous else INTERVAL,
        )
        self.starts = 0
        self.startup = 0.0
        self.undisturbed: dict[int, float] = {}

    def run(self, kills: int) -> Outcome:
        """Kills ``kills`` times, lets the last run end, and counts."""
        started = time.monotonic()
        losses, _ = self._start(self.work / "undisturbed", kill=None)
        self.startup = 0.7 * (time.monotonic() - started)
        self.undisturbed = dict(losses)
        if sorted(self.undisturbed) != list(range(1, self.iterations + 1)):
            self.outcome.problems.append("the undisturbed run did not finish")
            return self.outcome
        while self.outcome.kills < kills and not self.outcome.problems:
            self._carry_to_its_end(self.work / "killed", kills)
        return self.outcome

    def _carry_to_its_end(self, save: Path, kills: int) -> None:
        shutil.rmtree(save, ignore_errors=True)
        expected = 0
        resuming = False
        while not self.outcome.problems:
            kill = None
            if self.outcome.kills < kills:
                kill = self.random.choice(["while saving", "any time"])
            losses, log = self._start(save, kill)
            self._compare(losses)
            resumed_from = re.findall(
                r"successfully loaded checkpoint from .* at iteration (\d+)", log
            )
            if expected and resumed_from and int(resumed_from[0]) != expected:
                self.outcome.resumes_from_elsewhere += 1
            if losses and losses[0][0] != expected + 1:
                self.outcome.resumes_from_elsewhere += 1
            if resuming and (losses or resumed_from):
                self.outcome.resumes += 1
            printed = re.findall(r"successfully saved checkpoint from iteration +(\d+)", log)
            at_end, expected = max([expected, *(i for i, _ in losses)]), completed(save)
            if expected < max(map(int, printed), default=0):
                self.outcome.problems.append(f"a checkpoint went missing, see {save}")
            self.outcome.lost.append(at_end - expected)
            if expected == self.iterations:
                self.outcome.finished_runs += 1
                return
            resuming = expected > 0

    def _compare(self, losses: list[tuple[int, float]]) -> None:
        self.outcome.losses_compared += len(losses)
        for iteration, loss in losses:
            if self.undisturbed[iteration] != loss:
                self.outcome.mismatches += 1

    def _start(self, save: Path, kill: str | None) -> tuple[list[tuple[int, float]], str]:
        """Starts the run, kills it where ``kill`` says so, and gives its losses and its log."""
        self.starts += 1
        directory = self.work / f"start-{self.starts:03}"
        os.environ[RECORD] = str(directory / "losses")
        before = completed(save)
        processes = start_job(
            directory,
            [*self.flags, "--save", str(save), "--load", str(save)],
            RANKS,
            _Recorded(str(directory / "losses")),
        )
        moment = time.monotonic() + self.random.uniform(0.2, 1.3) * self.startup
        # The first save of a run opens a process for its results, and takes longest.
        delay = self.random.uniform(0, 0.15)
        # Not always the first save: progress is what a resume is about.
        above = before + INTERVAL * self.random.randrange(3)
        deadline = time.monotonic() + PATIENCE
        victim = None
        while all(process.is_alive() for process in processes) and time.monotonic() < deadline:
            if kill == "while saving":
                due = self._being_saved(save, above)
                if due:
                    time.sleep(delay)
            else:
                due = kill is not None and time.monotonic() > moment
            if due:
                victim = self.random.choice(processes)
                saving = self._being_saved(save, 0)
                if victim.is_alive():
                    victim.kill()
                    self.outcome.kills += 1
                    self.outcome.kills_during_a_save += saving
                break
            time.sleep(0.005)
        if victim is None:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in processes]
            if codes != [0] * RANKS:
                self.outcome.failed_resumes += before > 0
                self.outcome.problems.append(f"exit codes {codes} without a kill, see {directory}")
        else:
            # As a launcher does: the others have a moment to end by themselves.
            time.sleep(self.random.uniform(0.0, 1.0))
        for process in processes:
            process.kill()
            process.join()
        log = "".join((directory / f"rank{rank}.log").read_text() for rank in range(RANKS))
        return read_losses(directory / "losses"), log

    @staticmethod
    def _being_saved(save: Path, above: int) -> bool:
        """Whether a checkpoint that is not the last completed one is being written."""
        last = max(above, completed(save))
        return any(int(each.name[5:]) > last for each in save.glob("iter_*"))


@dataclass(frozen=True)
class _Recorded:
    """Makes a rank record its losses; the fork server has an environment of its own."""

    path: str

    def __call__(self) -> None:
        os.environ[RECORD] = self.path
        record_losses()


def sweep(work: Path, kills: int, asynchronous: bool, seed: int, iterations: int) -> Outcome:
    """Runs one sweep in the directory ``work``."""
    return Sweep(work, asynchronous, seed, iterations).run(kills)


def main() -> int:
    """Runs the sweep that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=25, help="how many SIGKILLs")
    parser.add_argument("--async-save", action="store_true", help="save in the background")
    parser.add_argument("--seed", type=int, default=1, help="of the times and the ranks")
    parser.add_argument("--iterations", type=int, default=24, help="of one run; even")
    parser.add_argument("--short", action="store_true", help="3 kills of a run of 10 iterations")
    parser.add_argument("--work", type=Path, help="keep everything in this directory")
    args = parser.parse_args()
    kills, iterations = (3, 10) if args.short else (args.kills, args.iterations)
    work = args.work or Path(tempfile.mkdtemp(prefix="kill-sweep-"))
    outcome = sweep(work, kills, args.async_save, args.seed, iterations)
    print(outcome.table())
    if outcome.ok and args.work is None:
        shutil.rmtree(work)
    elif not outcome.ok:
        print(f"SOMETHING WAS LOST; logs and checkpoints are in {work}")
    return 0 if outcome.ok else 1


if __name__ == "__main__":
    sys.exit(main())
