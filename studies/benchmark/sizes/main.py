"""The benchmark of the published sizes: one row after the other, as long as there is time."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prores.errors import UserError
from studies.benchmark.sizes.flops import peak_tflops
from studies.benchmark.sizes.options import (
    BF16,
    FP8,
    FP8_FORMATS,
    PRECISIONS,
    Options,
    read_options,
)
from studies.benchmark.sizes.plan import Row, expected_seconds, megatron_argv, plan
from studies.benchmark.sizes.results import Results, write
from studies.benchmark.sizes.row import DONE, FAILED, NO_TIME, REFUSED

RunRow = Callable[[dict[str, Any], float | None], tuple[dict[str, Any], str]]
"""(request, seconds that it may take) -> the outcome as ``row.main`` writes it, and the output."""

_MARGIN_SECONDS = 8.0
"""Kept free at the end of the budget: a row stops this long before it would be killed."""


def main(argv: Sequence[str], run_row: RunRow | None = None) -> int:
    """Measure the rows that the command line asks for and the output does not have yet.

    Args:
        argv: The command line, without the program's name.
        run_row: How a row is run; default: :func:`run_in_process`.

    Returns:
        The exit code: 1 if a row failed, else 0, also where the time was not enough for all.

    Raises:
        UserError: A flag is wrong, or does not fit what the output directory has.
    """
    started = time.time()
    options = read_options(argv)
    machine = _probe(options)
    rows = plan(options, machine.memory, machine.precisions)
    results = Results(options.output / "results.json", machine.identity, options.fresh)
    deadline = None if options.budget_seconds is None else started + options.budget_seconds
    command = f"python tools/benchmark.py {shlex.join(argv)}".strip()
    with _ended_by_sigterm():
        _measure_all(rows, options, machine, results, deadline, command, run_row or run_in_process)
    text = _write_table(rows, results)
    print(text)
    wanted = {row.name for row in rows}
    return int(any(row["status"] != DONE for name, row in results.rows.items() if name in wanted))


@dataclass(frozen=True)
class _Machine:
    memory: int
    precisions: tuple[str, ...]
    identity: dict[str, Any]
    bf16_peak: float | None


def _probe(options: Options) -> _Machine:
    from studies.benchmark import machine

    if options.device == "cuda":
        from megatron_prores.command_line import device

        device.prepare("cuda")
    elif options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)  # for the words on the machine
    name = machine.processor(options.device)
    precisions = options.precisions
    capability = machine.capability(options.device)
    if capability is not None and FP8 in precisions:
        lacking = _why_no_fp8(capability, options.fp8_recipe, machine.versions("cuda"))
        if lacking and options.precisions_given:
            raise UserError(f"--precisions {','.join(precisions)}: {name}: {lacking}")
        if lacking:
            _say(f"no FP8 rows: {lacking}")
            precisions = (BF16,)
    return _Machine(
        memory=machine.memory_bytes(options.device),
        precisions=tuple(p for p in PRECISIONS if p in precisions),
        identity={"machine": name, **machine.versions(options.device), **options.measured},
        bf16_peak=peak_tflops(name, BF16, options.peak_tflops),
    )


def _why_no_fp8(capability: tuple[int, int], recipe: str, versions: dict[str, str]) -> str | None:
    if versions["transformer-engine"] == "not installed":
        return "FP8 needs Transformer Engine, which is not installed"
    needed = {"mxfp8": (10, 0), "blockwise": (9, 0)}.get(recipe, (8, 9))
    if capability < needed:
        return (
            f"--fp8-recipe {recipe} needs compute capability {needed[0]}.{needed[1]}, "
            f"this GPU has {capability[0]}.{capability[1]}"
        )
    return None


def _measure_all(
    rows: list[Row],
    options: Options,
    machine: _Machine,
    results: Results,
    deadline: float | None,
    command: str,
    run_row: RunRow,
) -> None:
    from studies.benchmark.machine import environment

    # Those that failed in an earlier start come last.
    open_rows = [row for row in rows if row.name not in results.rows]
    open_rows += [row for row in rows if results.rows.get(row.name, {}).get("status") == FAILED]
    if len(open_rows) < len(rows):
        _say(f"{len(rows) - len(open_rows)} of {len(rows)} rows are in {results.path} already")
    for number, row in enumerate(open_rows, start=1):
        title = f"[{number}/{len(open_rows)}] {row.name}"
        left = None if deadline is None else deadline - time.time()
        expected = expected_seconds(row, options, machine.bf16_peak)
        if left is not None and left < expected:
            # A later row may be shorter.
            _say(f"{title}: left out, {left:.0f} s left, it takes at least {expected:.0f} s")
            continue
        _say(f"{title}: {row.size.num_layers} of {row.published.num_layers} layers")
        request = _request(row, options, deadline)
        at, now = environment(options.device), time.time()
        outcome, output = run_row(request, left)
        wall = time.time() - now
        if outcome["status"] == REFUSED:
            if not results.rows:
                raise UserError(outcome["reason"])
            outcome["status"] = FAILED  # the flags that this row has and others have not
        _append(options.output / "log.txt", f"==== {row.name}\n{output}\n")
        _say(f"{title}: {outcome['status']} in {wall:.0f} s {outcome.get('reason', '')}")
        if outcome["status"] != NO_TIME:
            at["command"] = command
            entry = {"plan": row.as_json(), "environment": at, "wall_seconds": round(wall, 1)}
            results.add(row.name, {**outcome, **entry})
            _write_table(rows, results)


def _request(row: Row, options: Options, deadline: float | None) -> dict[str, Any]:
    return {
        "device": options.device,
        "precision": row.precision,
        "argv": megatron_argv(row, options),
        "fp8_format": FP8_FORMATS[options.fp8_recipe] if row.precision == FP8 else None,
        "rounds": options.rounds,
        "block_seconds": options.block_seconds,
        "deadline": None if deadline is None else deadline - _MARGIN_SECONDS,
        "threads": options.threads,
    }


def run_in_process(request: dict[str, Any], seconds: float | None) -> tuple[dict[str, Any], str]:
    """Run ``row.main`` in a process of its own, and end it when its time is up.

    Args:
        request: As ``row.measure`` takes it.
        seconds: How long it may take; None without a limit.

    Returns:
        The outcome, and what the process has printed.
    """
    root = Path(__file__).resolve().parents[3]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        answer, log = Path(scratch, "answer.json"), Path(scratch, "log.txt")
        module = "studies.benchmark.sizes.row"
        command = [sys.executable, "-m", module, json.dumps(request), str(answer)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                process.kill()
                process.wait()
        return read_outcome(answer, code), log.read_text(errors="replace")


def read_outcome(answer: Path, code: int | None) -> dict[str, Any]:
    """Read what a row's process has written, or say how it ended without.

    Args:
        answer: The file.
        code: The exit code; None where the process was ended because its time was up.
    """
    with contextlib.suppress(FileNotFoundError):
        return json.loads(answer.read_text())
    if code is None:
        return {"status": NO_TIME, "reason": "the time budget was used up"}
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return {"status": FAILED, "reason": f"its process ended with {ended}, see log.txt"}


@contextlib.contextmanager
def _ended_by_sigterm() -> Any:
    """Let SIGTERM end the program like an exception: the row that is running ends with it."""

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_table(rows: list[Row], results: Results) -> str:
    from studies.benchmark.sizes.report import as_text

    text = as_text(results.document, [row.name for row in rows])
    if results.rows:
        write(results.path.with_name("table.md"), text + "\n")
    return text


def _append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
