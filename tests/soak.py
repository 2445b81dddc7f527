#!/usr/bin/env python3
"""Trains a small model for long and looks for what grows: memory, open files, threads, seconds.

    python tests/soak.py --work soak                   # 20,000 iterations in 5 starts, about 20 min
    python tests/soak.py --work soak --picture soak.png

One rank behind the launcher, with a data worker, an evaluation and a checkpoint every 500
iterations, in every other start with ``--async-save``. Each start ends by SIGTERM, with code 75,
and the next one goes on. Prints a row per start. Exit code 0: every start ended as it should, each
went on where the one before had saved, and nothing grew; else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]

RUN = """
    --device cpu --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 2
    --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4
    --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --lr 1e-3 --lr-decay-style constant --use-checkpoint-opt_param-scheduler
    --mock-data --tokenizer-type NullTokenizer --vocab-size 255 --num-workers 1
    --prores-schedule linear --prores-warmup-iters 4000 --log-spikes
    --log-interval 50 --save-interval 500 --eval-interval 500 --eval-iters 2
""".split()
ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore".split()
INTERRUPTED = 75
SAMPLE_SECONDS = 1.0

LINE = re.compile(r"iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+)")


@dataclass
class Sample:
    """What the processes of a run hold at one moment."""

    iteration: int
    seconds: float
    """Since the soak began."""
    rank_megabytes: float
    """Resident memory of the rank."""
    other_megabytes: float
    """Of the launcher, the data worker, the writer of checkpoints."""
    files: int
    """Open in all of them."""
    threads: int
    processes: int


@dataclass
class Start:
    """One start of the run, until its signal or its end."""

    number: int
    first: int
    """Its first iteration, less one: what the start before had saved."""
    asynchronous: bool
    code: int | None = None
    last: int = 0
    samples: list[Sample] = field(default_factory=list)
    step_ms: dict[int, float] = field(default_factory=dict)
    """Iteration -> mean milliseconds of the 50 iterations to it."""

    def rows(self, value: str) -> list[tuple[int, float]]:
        """Return (iteration, value), from the first iteration that was logged on."""
        if value == "step_ms":
            return list(self.step_ms.items())
        later = (each for each in self.samples if each.iteration > self.first)
        return [(each.iteration, getattr(each, value)) for each in later]

    def parts(self, value: str) -> tuple[float, float]:
        """Return a median of the second fifth and of the last fifth, both in steady training."""
        rows = self.rows(value)
        fifth = (self.last - self.first) / 5
        early = [v for i, v in rows if self.first + fifth < i <= self.first + 2 * fifth]
        late = [v for i, v in rows if i > self.last - fifth]
        return median(early), median(late)

    def row(self) -> str:
        """Return a row of the table."""
        cells = [f"{early:.4g} > {late:.4g}" for early, late in map(self.parts, VALUES)]
        how = "async" if self.asynchronous else "sync"
        head = f"{self.number:>5}  {self.first + 1:>6}-{self.last:<6}  {how:<5}  {self.code!s:>4}"
        return head + "".join(f"  {cell:>15}" for cell in cells)

    def growth(self) -> list[str]:
        """Say what has grown: memory by more than 3%, files or threads at all."""
        found = []
        for value in ("rank_megabytes", "other_megabytes", "files", "threads"):
            early, late = self.parts(value)
            if late > early * (1.03 if value.endswith("megabytes") else 1):
                found.append(f"start {self.number}: {value} grew from {early:.4g} to {late:.4g}")
        return found


VALUES = ("rank_megabytes", "other_megabytes", "files", "threads", "step_ms")


def sample(launcher: psutil.Process, iteration: int, began: float) -> Sample | None:
    """Look at the launcher and all that it has started; None while any of them is ending."""
    try:
        children = launcher.children(recursive=True)
        ranks = [each for each in children if each.ppid() == launcher.pid]
        if len(ranks) != 1:
            return None
        everyone = [launcher, *children]
        memory = {each.pid: each.memory_info().rss / 2**20 for each in everyone}
        rank = memory.pop(ranks[0].pid)
        return Sample(
            iteration,
            round(time.monotonic() - began, 1),
            round(rank, 1),
            round(sum(memory.values()), 1),
            sum(each.num_fds() for each in everyone),
            sum(each.num_threads() for each in everyone),
            len(everyone),
        )
    except psutil.Error:
        return None


def run_start(start: Start, work: Path, iterations: int, until: int, began: float) -> None:
    """Run the program until an iteration, send SIGTERM, and note what it used meanwhile."""
    log = work / f"start{start.number}.log"
    flags = [*RUN, *(ASYNC if start.asynchronous else []), "--train-iters", str(iterations)]
    flags += ["--save", str(work / "save"), "--load", str(work / "save")]
    flags += ["--tensorboard-dir", str(work / "tensorboard")]
    command = [sys.executable, "-W", "ignore", "-m", "megatron_prores.launch", "--standalone"]
    command += ["--nproc-per-node", "1", str(REPOSITORY / "pretrain_gpt_prores.py"), *flags]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    launcher = psutil.Process(process.pid)
    told = False
    while process.poll() is None:
        time.sleep(SAMPLE_SECONDS)
        start.step_ms = {int(i): float(ms) for i, ms in LINE.findall(log.read_text())}
        reached = max(start.step_ms, default=start.first)
        if reached >= until and until < iterations and not told:
            launcher.send_signal(signal.SIGTERM)
            told = True
        if not told and (seen := sample(launcher, reached, began)):
            start.samples.append(seen)
    start.code = process.returncode
    start.last = int((work / "save" / "latest_checkpointed_iteration.txt").read_text())


def draw(starts: list[Start], path: Path) -> None:
    """Draw the samples of all starts over the iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained", facecolor="white")
    titles = {
        "rank_megabytes": "rank, resident MB",
        "files": "open files",
        "threads": "threads",
        "step_ms": "ms per step",
    }
    for axes, (value, title) in zip(
        figure.subplots(4, 1, sharex=True), titles.items(), strict=True
    ):
        for start in starts:
            axes.plot(*zip(*start.rows(value), strict=True), lw=1, color="#2a6f97")
            axes.axvline(start.last, color="#d1495b", lw=0.6)
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("iteration (red: SIGTERM, and a new start)")
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run the soak that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=20_000)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--work", type=Path, required=True, help="a new directory")
    parser.add_argument("--picture", type=Path, help="PNG with the figures of all samples")
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    began = time.monotonic()
    starts: list[Start] = []
    problems: list[str] = []
    print("start  iterations     saves  code" + "".join(f"  {value:>15}" for value in VALUES))
    for number in range(1, args.starts + 1):
        start = Start(number, starts[-1].last if starts else 0, asynchronous=number % 2 == 0)
        starts.append(start)
        until = args.iterations * number // args.starts
        run_start(start, args.work, args.iterations, until, began)
        with (args.work / "samples.json").open("w") as file:
            json.dump([asdict(each) for each in starts], file)
        log = (args.work / f"start{number}.log").read_text()
        if start.code != (0 if number == args.starts else INTERRUPTED):
            problems.append(f"start {number} ended with code {start.code}")
            break
        loaded = re.findall(r"successfully loaded checkpoint from .* at iteration (\d+)", log)
        if loaded != ([str(start.first)] if number > 1 else []):
            problems.append(f"start {number} went on from {loaded}, not from {start.first}")
        problems += start.growth()
        print(start.row(), flush=True)
    if not problems and starts[-1].last != args.iterations:
        problems.append(f"the last checkpoint is of iteration {starts[-1].last}")
    if args.picture:
        draw(starts, args.picture)
    print("\n".join(problems or ["nothing grew"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
