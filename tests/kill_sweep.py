#!/usr/bin/env python3
"""Kills parts of training runs at chosen moments, and compares with runs left in peace.

    python tests/kill_sweep.py --kills 200      # on every layout, by turns
    python tests/kill_sweep.py --kills 20 --layout DP2-async
    python tests/kill_sweep.py --short          # as the tests run it

A run of two ranks on the CPU device, with dropout, saves every second iteration. At a point that is
drawn (in a step, between two parts of a save, ...) it is held, and SIGKILL ends a victim that is
drawn (a rank, all of a node, a data worker, ...). The run is started again, with another kill,
until it has finished; then another begins, until there were enough kills. Prints tables. Exit code
0: every start went on from the last completed checkpoint, every loss is the undisturbed run's, bit
for bit, and whatever was left alive ended by itself; else 1.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

if __name__ == "__main__":
    root = str(Path(__file__).resolve().parents[1])
    sys.path.insert(0, root)
    # The fork server that starts the ranks finds the project as well.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))

from megatron_prores.checkpoint.newest import newest
from tests.distributed import kill_points
from tests.distributed.kill_points import POINTS, StopAt
from tests.distributed.launch import MAIN_PROGRAM, start_job, start_ranks
from tests.distributed.recorder import RECORD, read_losses, record_losses

INTERVAL = 2
"""Iterations between saves."""

RUN = f"""
    --device cpu --num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8
    --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0.1 --hidden-dropout 0.1
    --lr 2e-3 --lr-decay-style constant --log-interval 1 --eval-interval 3 --eval-iters 1
    --mock-data --tokenizer-type NullTokenizer --vocab-size 511 --num-workers 1
    --prores-schedule linear --prores-warmup-iters 16 --save-interval {INTERVAL}
""".split()
ASYNC = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
LAYOUTS = {
    "PP2": "--pipeline-model-parallel-size 2".split(),
    "DP2-async": ["--use-distributed-optimizer", *ASYNC],
    "TP2": "--tensor-model-parallel-size 2 --norm-placement post".split(),
    "PP2-async": ["--pipeline-model-parallel-size", "2", *ASYNC],
    "MoE": "--num-experts 2 --expert-model-parallel-size 2 --use-distributed-optimizer "
    "--moe-token-dispatcher-type allgather --moe-router-topk 1".split(),
    "bf16": ["--use-distributed-optimizer", "--bf16", *ASYNC],
}
RANKS = 2
PATIENCE = 600.0
"""Seconds for a start of the run to come to its point, or to end, before it counts as hung."""

RANK, ALL, LOADER, WRITER, LAUNCHER = "a rank", "all", "a data worker", "the writer", "the launcher"
"""Victims. Of a node all is all ranks with what they have started."""

STEADY = ("in a step", "in an evaluation", "writing files")
"""Points at which data workers are at work, and may be missed."""


@dataclass(frozen=True)
class Kill:
    """Who is to be killed, where."""

    point: str
    victim: str
    turn: int
    """Which time that a process comes to the point."""


def cases(draw: random.Random, asynchronous: bool, launcher: bool) -> Iterator[Kill]:
    """Yield kills without end: every point with every victim, in an order that is drawn."""
    while True:
        pairs = [(point, victim) for point in POINTS for victim in (RANK, ALL)]
        pairs += [(point, LOADER) for point in STEADY]
        if asynchronous:
            pairs += [(point, WRITER) for point in (*STEADY, "before the manifest")]
        if launcher:
            pairs += [(point, LAUNCHER) for point in ("in a step", "before the manifest")]
        draw.shuffle(pairs)
        turns = {"in a step": 24, "writing files": 60, "in an evaluation": 2}
        for point, victim in pairs:
            once = point in ("start-up", "before the first step", "the end")
            turn = 1 if once else draw.randint(1, turns.get(point, 2))
            yield Kill(point, victim, turn)


@dataclass
class Outcome:
    """What a sweep counted; its rows are printed."""

    layout: str
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(point, victim) -> how often."""
    not_reached: int = 0
    resumes: int = 0
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
        wrong = self.resumes_from_elsewhere + self.mismatches
        return not (wrong or self.problems) and max(self.lost, default=0) <= self.bound

    def table(self) -> str:
        """The rows asked of a sweep, aligned."""
        rows = {
            "kills": self.kills.total(),
            "starts that did not come to their point": self.not_reached,
            "resumes": self.resumes,
            "resumes from another than the last completed checkpoint": self.resumes_from_elsewhere,
            f"lost iterations, most by one kill (at most {self.bound})": max(self.lost, default=0),
            "lost iterations, all kills": sum(self.lost),
            "runs carried to their end": self.finished_runs,
            "losses compared with the undisturbed run": self.losses_compared,
            "mismatches": self.mismatches,
        }
        width = max(map(len, rows))
        lines = [f"{name:<{width}}  {value:>5}" for name, value in rows.items()]
        return "\n".join([self.layout, *lines, *self.problems])


def kill_table(outcomes: list[Outcome]) -> str:
    """Lay out how often each victim was killed at each point."""
    kills = sum((outcome.kills for outcome in outcomes), Counter[tuple[str, str]]())
    victims = [v for v in (RANK, ALL, LOADER, WRITER, LAUNCHER) if any(v == k[1] for k in kills)]
    lines = [f"{'killed':<24}" + "".join(f"{victim:>15}" for victim in victims)]
    for point in POINTS:
        counts = (kills[point, victim] for victim in victims)
        lines.append(f"{point:<24}" + "".join(f"{count or '-':>15}" for count in counts))
    return "\n".join(lines)


def completed(save: Path) -> int:
    """Reads the last completed checkpoint, as a run does; 0: none."""
    found = newest(save)
    return 0 if found is None else int(found.iteration or 0)


class Sweep:
    """One sweep: an undisturbed run, then runs that are killed."""

    def __init__(
        self, work: Path, layout: str, seed: int, iterations: int, launcher: bool = False
    ) -> None:
        """Takes where to work, which layout, what to draw from, and how long a run is."""
        self.work = work
        self.flags = [*RUN, *LAYOUTS[layout], "--train-iters", str(iterations)]
        self.iterations = iterations
        self.random = random.Random(f"{layout} {seed}")
        asynchronous = ASYNC[0] in self.flags
        self.cases = cases(self.random, asynchronous, launcher)
        # In the background, a checkpoint completes at the latest when the next one was written.
        self.outcome = Outcome(layout, bound=2 * INTERVAL if asynchronous else INTERVAL)
        self.starts = 0
        self.undisturbed: dict[int, float] = {}

    def run(self, kills: int) -> Outcome:
        """Kills ``kills`` times, lets the last run end, and counts."""
        losses, _ = self._start(self.work / "undisturbed", kill=None)
        self.undisturbed = dict(losses)
        if sorted(self.undisturbed) != list(range(1, self.iterations + 1)):
            self.outcome.problems.append("the undisturbed run did not finish")
            return self.outcome
        while self.outcome.kills.total() < kills and not self.outcome.problems:
            self._carry_to_its_end(self.work / "killed", kills)
        return self.outcome

    def _carry_to_its_end(self, save: Path, kills: int) -> None:
        shutil.rmtree(save, ignore_errors=True)
        expected = 0
        resuming = False
        while not self.outcome.problems:
            kill = next(self.cases) if self.outcome.kills.total() < kills else None
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

    def _start(self, save: Path, kill: Kill | None) -> tuple[list[tuple[int, float]], str]:
        """Starts the run, kills as ``kill`` says, and gives its losses and its log."""
        self.starts += 1
        directory = self.work / f"start-{self.starts:03}"
        stop = StopAt(str(directory / "stop"), kill and kill.point, kill.turn if kill else 1)
        argv = [*self.flags, "--save", str(save), "--load", str(save)]
        losses = directory / "losses"
        if kill is not None and kill.victim == LAUNCHER:
            words = [stop.directory, kill.point, str(kill.turn), str(losses), str(MAIN_PROGRAM)]
            launched = (["--standalone", "--nproc-per-node", str(RANKS), _POINTS, *words, *argv],)
            processes = start_ranks(directory, _launch, launched, ranks=1)
        else:
            processes = start_job(directory, argv, RANKS, _Planted(str(losses), stop))
        try:
            self._attend(processes, kill, Path(stop.directory), directory)
        finally:
            for pid in [each.pid for each in processes] + kill_points.pids(
                directory / "stop", "at"
            ):
                _end(pid)
            for process in processes:
                process.join()
        log = "".join(path.read_text() for path in sorted(directory.glob("rank*.log")))
        return read_losses(losses), log

    def _attend(self, processes: list[Any], kill: Kill | None, stop: Path, directory: Path) -> None:
        """Waits for the point, kills the victim, and sees to it that the rest ends."""
        deadline = time.monotonic() + PATIENCE
        while all(each.is_alive() for each in processes) and not kill_points.pids(stop, "at"):
            if time.monotonic() > deadline:
                self.outcome.problems.append(f"hung before {kill}, see {directory}")
                return
            time.sleep(0.005)
        ours = [each.pid for each in processes]
        if kill is None or not kill_points.pids(stop, "at"):
            self.outcome.not_reached += kill is not None
            self._wait(processes, deadline, directory)
            codes = [each.exitcode for each in processes]
            if any(codes):
                self.outcome.problems.append(f"exit codes {codes} without a kill, see {directory}")
            return
        time.sleep(self.random.choice([0, 0.02, 0.2]))  # some other rank comes to it as well
        victims = {
            RANK: [self.random.choice(ours)],
            ALL: ours,
            LAUNCHER: ours,
            LOADER: kill_points.pids(stop, "loader")[-1:],
            WRITER: kill_points.pids(stop, "writer")[-1:],
        }[kill.victim]
        descendants = _descendants(ours)
        for pid in victims:
            _end(pid, whole=kill.victim == ALL)
        self.outcome.kills[kill.point, kill.victim] += bool(victims)
        self.outcome.not_reached += not victims
        if kill.victim == RANK:
            time.sleep(self.random.uniform(0.0, 1.0))  # as a launcher gives the others
            return
        (stop / "go").touch()
        if kill.victim in (LOADER, WRITER):
            self._wait(processes, time.monotonic() + PATIENCE, directory)
            return
        ends = time.monotonic() + 20
        while left := [each for each in descendants if _lives(each)]:
            if time.monotonic() > ends:
                self.outcome.problems.append(f"{left} outlived {kill}, see {directory}")
                return
            time.sleep(0.05)

    def _wait(self, processes: list[Any], deadline: float, directory: Path) -> None:
        """Waits until all have ended; a failed rank ends the others, as under a launcher."""
        while any(each.is_alive() for each in processes):
            if time.monotonic() > deadline:
                self.outcome.problems.append(f"hung, see {directory}")
                return
            if any(each.exitcode not in (None, 0) for each in processes):
                deadline = min(deadline, time.monotonic() + 10)
                if time.monotonic() > deadline - 5:
                    return
            time.sleep(0.02)


def _descendants(pids: list[int]) -> list[psutil.Process]:
    found = []
    for pid in pids:
        with suppress(psutil.Error):
            found += psutil.Process(pid).children(recursive=True)
    return found


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _end(pid: int, whole: bool = False) -> None:
    for process in [*(_descendants([pid]) if whole else [])]:
        with suppress(psutil.Error):
            process.kill()
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


_POINTS = kill_points.__file__


def _launch(argv: list[str]) -> None:
    """As ``python -m megatron_prores.launch``, in a process that has imported torch already."""
    from megatron_prores.errors import run_program
    from megatron_prores.launch import main as launch

    run_program(lambda: launch.main(argv))


@dataclass(frozen=True)
class _Planted:
    """Makes a rank record its losses and wait at a point; the fork server's environment is old."""

    losses: str
    stop: StopAt

    def __call__(self) -> None:
        os.environ[RECORD] = self.losses
        record_losses()
        self.stop()


def sweep(
    work: Path, layout: str, kills: int, seed: int, iterations: int, launcher: bool = False
) -> Outcome:
    """Runs one sweep in the directory ``work``."""
    return Sweep(work, layout, seed, iterations, launcher).run(kills)


SHORT = {"layouts": ("PP2", "DP2-async"), "kills": 12, "iterations": 10}
"""What the tests run: half of the kills on each."""


def main() -> int:
    """Runs the sweep that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="how many SIGKILLs in all")
    parser.add_argument("--layout", choices=LAYOUTS, help="only this one")
    parser.add_argument("--seed", type=int, default=1, help="of the points and the victims")
    parser.add_argument("--iterations", type=int, default=12, help="of one run; even")
    parser.add_argument("--short", action="store_true", help="12 kills on two layouts")
    parser.add_argument("--work", type=Path, help="keep everything in this directory")
    args = parser.parse_args()
    layouts = [args.layout] if args.layout else [*LAYOUTS]
    if args.short:
        layouts, args.kills, args.iterations = [*SHORT["layouts"]], SHORT["kills"], 10
    work = args.work or Path(tempfile.mkdtemp(prefix="kill-sweep-"))
    outcomes = []
    for number, layout in enumerate(layouts):
        kills = args.kills * (number + 1) // len(layouts) - args.kills * number // len(layouts)
        launcher = not args.short
        outcomes.append(sweep(work / layout, layout, kills, args.seed, args.iterations, launcher))
        print(outcomes[-1].table(), flush=True)
    print(kill_table(outcomes))
    ok = all(outcome.ok for outcome in outcomes)
    if ok and args.work is None:
        shutil.rmtree(work)
    elif not ok:
        print(f"SOMETHING WAS LOST; logs and checkpoints are in {work}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
