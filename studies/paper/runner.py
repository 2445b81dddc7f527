"""Runs of the main program, several beside each other, each of which can be gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prores.errors import EXIT_INTERRUPTED, UserError
from megatron_prores.system.files import atomic_write
from studies.paper.results import DIVERGED, FILE, collect, read_results
from studies.paper.scales import Run, Scale, flags

REPOSITORY = Path(__file__).parents[2]
_POLL_SECONDS = 1.0
_SHOW_SECONDS = 30.0


@dataclass
class _Started:
    run: Run
    process: subprocess.Popen[bytes]
    slot: int
    since: float


class Interrupted(Exception):  # noqa: N818
    """A signal ended the study; its runs have saved."""


def train(
    runs: Sequence[Run],
    scale: Scale,
    root: Path,
    slots: int,
    show: Callable[[str], None] = print,
) -> None:
    """Train what has no result yet, ``slots`` runs at a time; a run that was cut goes on.

    Args:
        runs: In the order in which they are started.
        scale: Their size.
        root: Of the study; a directory per run in it, or a report's runs.json.
        slots: How many run beside each other: each has its share of the cores, or a GPU.
        show: Takes lines of progress.

    Raises:
        UserError: A run failed, and not because its loss diverged.
        Interrupted: SIGINT or SIGTERM came: the runs have saved, and the same command goes on.
    """
    known = {result["name"] for result in read_results(root).all}
    left = [run for run in runs if run.name not in known]
    done, shown, began = len(runs) - len(left), 0.0, time.monotonic()
    first_done = done
    active: list[_Started] = []
    previous = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    try:
        while left or active:
            free = set(range(slots)) - {each.slot for each in active}
            for slot in sorted(free)[: len(left)]:
                active.append(_start(left.pop(0), scale, root, slot, slots))
            time.sleep(_POLL_SECONDS)
            for each in [each for each in active if each.process.poll() is not None]:
                active.remove(each)
                _finish(each, root)
                done += 1
                show(_line(each, root))
            if active and time.monotonic() - shown > _SHOW_SECONDS:
                shown = time.monotonic()
                show(_progress(active, root, scale, len(runs), done, first_done, began))
    finally:
        for each in active:
            each.process.send_signal(signal.SIGTERM)
        for each in active:
            each.process.wait()
            _add_seconds(each, root)
        for number, handler in previous.items():
            signal.signal(number, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted


def _start(run: Run, scale: Scale, root: Path, slot: int, slots: int) -> _Started:
    directory = root / run.name
    directory.mkdir(parents=True, exist_ok=True)
    argv = flags(run, scale, root / "data", directory)
    (directory / "flags.json").write_text(json.dumps(argv))
    cores = sorted(os.sched_getaffinity(0))
    share = cores[slot::slots] or cores
    environment = os.environ | {
        "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": str(len(share)),
        # A job of one rank; port 0 is one that is free.
        **dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_PORT"), "0"),
        **{"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"},
    }
    command = [sys.executable, str(REPOSITORY / "pretrain_gpt_prores.py"), *argv]
    if scale.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = str(slot)
    elif shutil.which("taskset"):
        # Threads of two runs on the same cores would wait for each other.
        command = ["taskset", "--cpu-list", ",".join(map(str, share)), *command]
    with (directory / "log.txt").open("ab") as log:
        # A group of its own: the terminal's signals come through this process, once.
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    return _Started(run, process, slot, time.monotonic())


def _finish(started: _Started, root: Path) -> None:
    directory = root / started.run.name
    code = started.process.returncode
    text = (directory / "log.txt").read_text(errors="replace")
    _add_seconds(started, root)
    is_diverged = code == 1 and "NaN in the loss" in text
    if code == EXIT_INTERRUPTED:
        raise Interrupted
    if code != 0 and not is_diverged:
        errors = [line for line in text.splitlines() if line.startswith("error:")]
        reason = errors[-1].removeprefix("error: ") if errors else f"exit code {code}"
        raise UserError(f"the run {started.run.name} failed: {reason}; see {directory}/log.txt")
    result = collect(started.run, directory, is_diverged)
    with atomic_write(directory / FILE) as file:
        file.write(json.dumps(result))


def _add_seconds(started: _Started, root: Path) -> None:
    """Note how long a start of a run took."""
    with (root / started.run.name / "seconds.txt").open("a") as file:
        file.write(f"{time.monotonic() - started.since:.1f}\n")


def _line(started: _Started, root: Path) -> str:
    result = json.loads((root / started.run.name / FILE).read_text())
    loss = result["validation_loss"]
    ended = DIVERGED if loss is None else f"validation loss {loss:.4f}"
    return f"{started.run.name}: {ended}, {result['seconds'] / 60:.1f} min"


def _progress(
    active: Sequence[_Started],
    root: Path,
    scale: Scale,
    total: int,
    done: int,
    first_done: int,
    began: float,
) -> str:
    """Write where the study stands; the time left is that of the runs so far."""
    steps = {each.run.name: _iteration(root / each.run.name / "log.txt") for each in active}
    running = ", ".join(f"{name} {step}/{scale.iterations}" for name, step in steps.items())
    line = f"{done} of {total} runs done; running: {running}"
    finished = done - first_done + sum(steps.values()) / scale.iterations
    if finished > 0.05:
        minutes = (time.monotonic() - began) / 60
        line += f"; about {minutes / finished * (total - first_done - finished):.0f} min left"
    return line


def _iteration(log: Path) -> int:
    """Return the last iteration that a log names."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split(" iteration ")
    for words in reversed(lines[1:]):
        number = words.strip().split("/")[0]
        if number.isdigit():
            return int(number)
    return 0
