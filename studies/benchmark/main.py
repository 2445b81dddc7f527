"""The program: runs one case after the other, as long as there is time."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_prores.command_line import device
from megatron_prores.command_line.arguments import check_device
from megatron_prores.command_line.values import flag_of
from megatron_prores.errors import Parser, UserError, split_at_dashes
from megatron_prores.system.files import atomic_write
from studies.benchmark.cases import CASES, default_cases
from studies.benchmark.worker import measure

CONTEXT: Any = multiprocessing.get_context("spawn")
LEAST_SECONDS = 45.0
"""A case is not started where less is left: imports, models and compiling take about so long."""


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check the command line, without torch and Megatron.

    Args:
        argv: Without the program's name.

    Returns:
        The flags; ``cases`` is a list of names, ``megatron_flags`` what stands behind ``--``.

    Raises:
        UserError: A value is wrong.
    """
    parser = Parser(
        prog="python -m studies.benchmark",
        description="Times training steps of stock Megatron and of ProRes, in turn in one process, "
        "and counts their memory. Each case is written when it is done, and the same command "
        "started again goes on. What follows -- goes to Megatron, after the flags of the case.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", default="cuda", help="cuda or cpu; default: cuda")
    cases = f"with commas between, of {', '.join(CASES)}; default: on the CPU the small ones, on a "
    add("--cases", metavar="NAMES", help=f"{cases} GPU the others that can run there")
    rounds = "how often each side of a case takes its turn; default: 24"
    add("--rounds", type=int, default=24, metavar="N", help=rounds)
    budget = "end by then, with the cases that are done; default: no limit"
    add("--time-budget-minutes", type=float, metavar="M", help=budget)
    peak = "dense bf16 peak of the GPU, for MFU; default: known for H100, H200, B200, A100"
    add("--peak-tflops", type=float, metavar="TFLOPS", help=peak)
    output = "for results.jsonl, report.md and log.txt; default: benchmark-results"
    add("--output", type=Path, default="benchmark-results", metavar="DIR", help=output)

    own, megatron_flags = split_at_dashes(argv)
    options = parser.parse_args(own, argparse.Namespace(megatron_flags=megatron_flags))
    check_device(options.device)
    if options.cases is None:
        options.cases = default_cases(options.device)
    else:
        options.cases = _named_cases(options.cases.split(","), options.device)
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds}: must be at least 1")
    for name in ("time_budget_minutes", "peak_tflops"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):  # also true of nan
            raise UserError(f"{flag_of(name)} {value}: must be a number above 0")
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"--output {options.output}: not a directory")
    return options


def _named_cases(names: list[str], on: str) -> list[str]:
    for name in names:
        if name not in CASES:
            raise UserError(f"--cases {name or "''"}: choose some of {', '.join(CASES)}")
        if CASES[name].only_on not in (None, on):
            raise UserError(f"--cases {name}: needs --device {CASES[name].only_on}")
    return [name for name in CASES if name in names]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cases that the command line asks for and the output does not have yet.

    Args:
        argv: The command line, without the program's name; None: this program's.

    Returns:
        The exit code: 1 if a case failed, else 0, also where the time was not enough for all.

    Raises:
        UserError: A flag is wrong, or Megatron refuses the flags of the first case.
    """
    argv = sys.argv[1:] if argv is None else argv
    started = time.monotonic()
    options = read_options(argv)
    if options.device == "cuda":
        device.prepare("cuda")

    from studies.benchmark import machine, report

    names = ("device", "rounds", "peak_tflops", "megatron_flags")
    settings = machine.describe(options.device) | {name: getattr(options, name) for name in names}
    results = options.output / "results.jsonl"
    # A table has figures of the same settings only. Of several tries of a case the last counts.
    records = _read(results)
    rows = {row["case"]: row for row in records if row["settings"] == settings}
    todo = [name for name in options.cases if "measured" not in rows.get(name, {})]
    # What failed before comes last.
    for number, name in enumerate(sorted(todo, key=lambda name: name in rows), start=1):
        left = None
        if options.time_budget_minutes is not None:
            left = 60 * options.time_budget_minutes - (time.monotonic() - started)
        if left is not None and left < LEAST_SECONDS:
            break
        print(f"[{number}/{len(todo)}] {name}", file=sys.stderr, flush=True)
        outcome, output = run_apart(measure, (name, settings), left)
        if "no time" in outcome:
            break
        if "refused" in outcome and not rows:
            raise UserError(outcome["refused"])
        rows[name] = {
            "case": name,
            "settings": settings,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": machine.commit(),
            "command": shlex.join(["python", "-m", "studies.benchmark", *argv]),
            **outcome,
        }
        options.output.mkdir(parents=True, exist_ok=True)
        with (options.output / "log.txt").open("a") as log:
            log.write(f"==== {name}\n{output}\n")
        records.append(rows[name])
        with atomic_write(results) as file:
            file.writelines(json.dumps(row) + "\n" for row in records)
    text = report.as_text(rows, options.cases, settings)
    if rows:
        with atomic_write(options.output / "report.md") as report_file:
            report_file.write(text)
    print(text, end="")
    return int(any("measured" not in rows.get(name, {"measured"}) for name in options.cases))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if row["case"] in CASES and row["settings"] is not None]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not results of this benchmark; use another --output") from error


def run_apart(
    function: Callable[..., Any], args: tuple[Any, ...], seconds: float | None
) -> tuple[dict[str, Any], str]:
    """Call a function in a process of its own: one that runs out of memory takes no other with it.

    Args:
        function: Of the top level of a module.
        args: Its arguments.
        seconds: When to end it; None: never.

    Returns:
        What the function has returned, as ``measured``, or why it has not, as ``refused`` (a flag
        is wrong), ``failed`` or ``no time``; and what the process has printed.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", prefix="benchmark-", errors="replace") as log:
        process = CONTEXT.Process(target=_apart, args=(sender, log.name, function, args))
        process.start()
        sender.close()
        try:
            outcome = receiver.recv() if receiver.poll(seconds) else {"no time": ""}
        except EOFError:
            process.join()
            outcome = {"failed": f"its process ended with exit code {process.exitcode}"}
        finally:
            process.kill()
            process.join()
        return outcome, log.read()


def _apart(sender: Any, log: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        outcome = {"measured": function(*args)}
    except UserError as error:
        outcome = {"refused": error.message()}
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or ["no message"]
        outcome = {"failed": f"{type(error).__name__}: {lines[0]}"}
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send(outcome)
