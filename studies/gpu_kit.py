"""The first hour on a GPU: what has never run on one, in order of importance. docs/gpu_kit.md.

    python -m studies.gpu_kit A|B [--device cpu] [--output DIR] [--minutes M] [--steps NAMES]

scripts/gpu_kit.sh installs what is missing, and starts it. Each step is a command of the project in
a process of its own. Its row is written when it has ended, and the same command started again goes
on with what has not passed. On the CPU every step is rehearsed at a small size.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_prores.errors import Parser, UserError, run_program
from megatron_prores.system.files import atomic_write
from studies.benchmark.machine import commit

REPOSITORY = Path(__file__).parents[1]
PASSED, FAILED, SKIPPED, CUT = "passed", "failed", "skipped", "cut"
LEAST_SECONDS = 20.0
"""A step is not started where less is left: imports take about so long."""

_TESTS = "-m pytest -q -rs -p no:cacheprovider"
_TINY = """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 16
    --micro-batch-size 2 --global-batch-size 4 --vocab-size 128
"""
_TRY = "-m studies.benchmark --device cpu --cases laptop-pre --rounds 2 --output {out} -- " + _TINY


@dataclass(frozen=True)
class Step:
    """A command, after the name of the Python; {out} and {work} are its folders."""

    command: str
    seconds: int
    """When it is ended, at the latest."""
    on_cpu: str | None = None
    """Its rehearsal; None: the same command, whose tests say why they cannot run."""


_MACHINE = "-m megatron_prores.doctor --save {out} --need"
_COMPARISON = "-m studies.paper short --output {work} --report-dir {out}"
_BENCHMARK = "-m studies.benchmark --rounds 10 --output {out}"

STAGES: dict[str, dict[str, Step]] = {
    "A": {
        "machine": Step(f"{_MACHINE} gpu", 60, f"{_MACHINE} cpu"),
        "golden": Step(f"{_TESTS} tests/gpu/test_golden_gpu.py", 120),
        "training": Step(f"{_TESTS} tests/gpu/test_training.py -m without_te", 180),
        "benchmark": Step(f"{_BENCHMARK} --cases 130M-bf16,130M-attention", 120, _TRY),
        "comparison": Step(
            f"{_COMPARISON} --scale kit", 240, f"{_COMPARISON} --scale minutes --iterations 20"
        ),
    },
    "B": {
        "machine": Step(f"{_MACHINE} fp8", 60, f"{_MACHINE} cpu"),
        "golden": Step(f"{_TESTS} tests/gpu/test_golden_gpu.py", 300),
        "benchmark-bf16": Step(f"{_BENCHMARK} --cases 1.3B-bf16,7B-bf16,130M-bf16", 480, _TRY),
        "benchmark-fp8": Step(f"{_BENCHMARK} --cases 7B-fp8,1.3B-fp8", 480, _TRY),
        "fp8": Step(f"{_TESTS} tests/gpu/test_training.py -k fp8", 600),
        "graphs": Step(f"{_TESTS} tests/gpu/test_training.py -k captured", 600),
        "training": Step(f"{_TESTS} tests/gpu/test_training.py -k 'not fp8 and not captured'", 900),
        "checkpoints": Step(f"{_TESTS} tests/gpu/test_checkpoints.py", 600),
    },
}
MINUTES = {"A": 8.0, "B": 60.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what of a stage has not passed yet, as long as there is time.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        The exit code: 1 where a step has failed, else 0, also where the time was not enough.

    Raises:
        UserError: An argument is wrong.
    """
    args = _parse(argv)
    deadline = time.monotonic() + 60 * args.minutes
    known = {"stage": args.stage, "device": args.device, "commit": commit()}
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "kit.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {row["step"]: row for row in rows if known.items() <= row.items()}
    for name in args.steps:
        if done.get(name, {}).get("outcome") in (PASSED, SKIPPED):
            continue
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            break
        print(f"[{args.stage}] {name}", file=sys.stderr, flush=True)
        done[name] = known | {"step": name} | _run(STAGES[args.stage][name], name, args, left)
        rows.append(done[name])
        with atomic_write(path) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    text = _report(args, done)
    with atomic_write(args.output / f"kit-{args.stage}.md") as file:
        file.write(text)
    print(text, end="")
    return int(any(row["outcome"] == FAILED for row in done.values()))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="bash scripts/gpu_kit.sh",
        description="Prove on a GPU what has never run on one: without Transformer Engine (A), "
        "with it (B). It goes on where it was stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("stage", choices=tuple(STAGES))
    devices = "cpu: a rehearsal at a small size; default: cuda"
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=devices)
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: gpu-kit")
    parser.add_argument("--minutes", type=float, metavar="M", help="end by then; default: 8, 60")
    parser.add_argument("--steps", metavar="NAMES", help="with commas between; default: all")
    args = parser.parse_args(argv)
    args.output = (args.output or Path("gpu-kit")).absolute()
    args.minutes = MINUTES[args.stage] if args.minutes is None else args.minutes
    if not 0 < args.minutes < float("inf"):
        raise UserError(f"--minutes {args.minutes:g}: must be above 0")
    steps = STAGES[args.stage]
    args.steps = list(steps) if args.steps is None else args.steps.split(",")
    for name in args.steps:
        if name not in steps:
            raise UserError(f"--steps {name or "''"}: choose some of {', '.join(steps)}")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output}: not a directory")
    return args


def _run(step: Step, name: str, args: argparse.Namespace, left: float) -> dict[str, Any]:
    """Run a step, and say how it ended."""
    command = step.command if args.device == "cuda" else step.on_cpu or step.command
    folders = {
        "out": args.output / f"{args.stage}-{name}",
        # Checkpoints and data: nothing to take home.
        "work": args.output.with_name(f"{args.output.name}-work") / args.device,
    }
    words = [word.format(**folders) for word in shlex.split(command)]
    log = args.output / f"{args.stage}-{name}.txt"
    environment = os.environ | {
        "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}",
        "PYTHONWARNINGS": "ignore",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    started = time.monotonic()
    limit = min(left, step.seconds)
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=REPOSITORY,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    text = log.read_text(errors="replace").rstrip()
    said = text.splitlines()[-1] if text else ""
    outcome = CUT if code is None else FAILED if code else PASSED
    reasons = sorted(set(re.findall(r"^SKIPPED \[\d+\] \S+: (.+)$", text, re.M)))
    if outcome == PASSED and reasons and " passed" not in said:
        outcome = SKIPPED
    return {
        "outcome": outcome,
        "seconds": round(time.monotonic() - started, 1),
        "said": f"ended after {limit:.0f} s" if code is None else said,
        "skipped": reasons,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step and what it has started; runs of the study save first."""
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


def _report(args: argparse.Namespace, done: dict[str, dict[str, Any]]) -> str:
    lines = [f"# Stage {args.stage} on {args.device}", ""]
    lines += ["| step | outcome | seconds | what it said |", "|---|---|---|---|"]
    for name in STAGES[args.stage]:
        row = done.get(name)
        if row is None:
            lines.append(f"| {name} | not run | | |")
            continue
        said = "; ".join([row["said"], *(f"skipped: {reason}" for reason in row["skipped"])])
        lines.append(f"| {name} | {row['outcome']} | {row['seconds']} | {said} |")
    lines += ["", "docs/gpu_kit.md says what each line proves; the same command goes on."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    # As an exception, so that the step that is running ends as well.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    run_program(main)
