"""What the benchmark of the placements says: a header, a table, and the same as JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from studies.benchmark.machine import commit, processor
from studies.benchmark.measure import Ratio
from studies.benchmark.placements.options import Options


@dataclass(frozen=True)
class Row:
    """One model against the base of its comparison."""

    comparison: str
    """A norm placement, or ``attention``."""
    measured: str
    against: str
    time: Ratio
    memory: float
    """Ratio of the peaks."""
    seconds: list[float]
    """Of each step, by repetition."""
    base_seconds: list[float]
    bytes: int
    """Peak memory."""
    base_bytes: int
    alphas: list[float]
    """Of the layers, when the first step was timed; 1 where there is nothing to scale."""


def header(options: Options, argv: Sequence[str]) -> dict[str, Any]:
    """Say what was measured, on what, and how to do it again."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": f"python tools/benchmark.py {shlex.join(argv)}".strip(),
        "machine": processor(options.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": importlib.metadata.version("megatron-core"),
        "model": asdict(options.size),
        "repetitions": options.repetitions,
    }


def as_text(head: dict[str, Any], rows: list[Row]) -> str:
    """Render everything as Markdown."""
    lines = [f"- {name}: {_in_words(value)}" for name, value in head.items()]
    lines += [
        "",
        "Ratios: the median over the repetitions and, in brackets, its 95 % bootstrap interval.",
        "`itself` is the base a second time: what the ratio of two equal models looks like here.",
        "",
        "| placement | measured | against | step time | base, ms | peak memory | base, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        time = f"{row.time.median:.3f} [{row.time.low:.3f}, {row.time.high:.3f}]"
        milliseconds = f"{1000 * statistics.median(row.base_seconds):.1f}"
        mebibytes = f"{row.base_bytes / 2**20:.1f}"
        cells = [row.comparison, row.measured, row.against, time, milliseconds]
        cells += [f"{row.memory:.4f}", mebibytes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in value.items())
    return str(value)


def write_json(path: Path, head: dict[str, Any], rows: list[Row]) -> None:
    """Write everything, with the seconds of every step, to ``path``."""
    # A line for each row: the seconds would fill a screen each otherwise.
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    start = json.dumps(head, indent=1).removesuffix("\n}")
    path.write_text(f'{start},\n "rows": [\n{lines}\n]}}\n')
