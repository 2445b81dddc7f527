"""The table and the verdicts, from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from megatron_prores.measure.peak import peak_tflops
from studies.benchmark.cases import (
    AFTER,
    BF16,
    CASES,
    FP8,
    FP32,
    MAIN_PROGRAM,
    MEASURED,
    SIZES,
    STOCK_BF16,
    WARMUP,
    Side,
)
from studies.benchmark.measure import Ratio, ratio

Row = Mapping[str, Any]
"""A line of the file of results."""

_TABLE_HEAD = """
| case | layers | side | tokens/s | MFU | step, ms | against base | memory, MiB | against base |
|---|---|---|---|---|---|---|---|---|"""

_NOTES = """
Ratios: the median of the ratios within a round and, in brackets, its 95 % bootstrap interval; all
sides of a case take turns in one process. A side called `again` is the base timed twice: what the
ratio of equals looks like here. Peak memory: of each side alone, by torch's allocator; not counted
beside the plain loop, which trains on the main program's batches and comes to the same losses. MFU:
FLOPs of a step by Megatron's `num_floating_point_operations` over its time and the dense peak of
the GPU; in FP8 over the peak of FP8, although attention and the output head stay in bf16.
"""


class Figures(NamedTuple):
    """What one side of a case came to; ratios are against the base of the case."""

    seconds: float
    tokens_per_second: float
    mfu: float | None
    """Percent; None where the GPU's peak is not known."""
    time: Ratio
    bytes: int | None
    """None where it was not counted, as of the plain loop's cases."""
    memory: float | None


def figures(row: Row, side: Side) -> Figures:
    """Compute the figures of a side."""
    case, settings, measured = CASES[row["case"]], row["settings"], row["measured"]
    seconds, peaks, base = measured["seconds"], measured.get("bytes"), case.sides[0].name
    step = statistics.median(seconds[side.name])
    precision = BF16 if side.in_bf16 else case.precision
    peak = None
    if precision != FP32:
        peak = peak_tflops(settings["machine"], settings["peak_tflops"], fp8=precision == FP8)
    return Figures(
        seconds=step,
        tokens_per_second=measured["global_batch_size"] * measured["seq_length"] / step,
        mfu=None if peak is None else 100 * measured["flops_per_step"] / step / (peak * 1e12),
        time=ratio(seconds[side.name], seconds[base]),
        bytes=peaks and peaks[side.name],
        memory=peaks and peaks[side.name] / peaks[base],
    )


def as_text(rows: Mapping[str, Row], planned: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Render everything as Markdown.

    Args:
        rows: By the names of their cases.
        planned: Names of all cases that were asked for; those that are not there are named.
        settings: What all rows have in common.
    """
    done = [rows[name] for name in CASES if "measured" in rows.get(name, {})]
    lines = [f"# Stock Megatron and ProRes on {settings['machine']}", ""]
    for name, value in settings.items():
        if value not in (None, []):
            lines.append(f"- {name}: {' '.join(value) if isinstance(value, list) else value}")
    # What may change from start to start: every value, once.
    for name in ("date", "commit", "command"):
        lines.append(f"- {name}: {', '.join(dict.fromkeys(row[name] for row in rows.values()))}")
    lines.append(_TABLE_HEAD)
    lines += [_table_row(row, side) for row in done for side in CASES[row["case"]].sides]
    lines += [_NOTES, *map(_description, done)]
    for name, row in rows.items():
        if "measured" not in row:
            lines.append(f"- {name} FAILED: {row.get('failed') or row['refused']}")
    if missing := [name for name in planned if name not in rows]:
        lines += [
            "",
            f"Not measured yet: {', '.join(missing)}. The same command goes on with them.",
        ]
    if targets := [f"- {verdict}" for row in done for verdict in verdicts(row)]:
        lines += ["", "## Targets", "", *targets]
    return "\n".join(lines) + "\n"


def _table_row(row: Row, side: Side) -> str:
    found = figures(row, side)
    cells = [
        row["case"],
        _layers(row),
        side.name,
        f"{found.tokens_per_second:,.0f}",
        "n/a" if found.mfu is None else f"{found.mfu:.1f} %",
        f"{1000 * found.seconds:.1f}",
        "{:.3f} [{:.3f}, {:.3f}]".format(*found.time),
        "n/a" if found.bytes is None else f"{found.bytes / 2**20:,.1f}",
        "n/a" if found.memory is None else f"{found.memory:.4f}",
    ]
    return f"| {' | '.join(cells)} |"


def _layers(row: Row) -> str:
    layers, whole = row["measured"]["num_layers"], SIZES[CASES[row["case"]].size][0]
    return str(layers) if layers == whole else f"{layers} of {whole}"


def _description(row: Row) -> str:
    return (
        "- {case}: {parameters:,} parameters; blocks of {steps_per_block} steps of "
        "{global_batch_size} sequences of {seq_length} in micro-batches of {micro_batch_size}; "
        "layers: {transformer_impl}, stock attention: {attention}, gradient accumulation fusion: "
        "{gradient_accumulation_fusion}"
    ).format(case=row["case"], **row["measured"])


def verdicts(row: Row) -> Iterator[str]:
    """Compare a case with the project's targets: one line each."""
    name, case = row["case"], CASES[row["case"]]
    prores = {side: figures(row, side) for side in (WARMUP, AFTER) if side in case.sides[1:]}
    for side, found in prores.items():
        target = 1.01 if side == WARMUP else 1.00
        yield f"{name} {side.name}, step time: {_at_most(target, found.time)}"
        assert found.memory is not None
        memory = Ratio(found.memory, found.memory, found.memory)
        yield f"{name} {side.name}, peak memory: {_at_most(1.00, memory)}"
    if MEASURED in case.sides:
        yield f"{name}, step time: {_at_most(1.02, figures(row, MEASURED).time)}"
    if row["settings"]["megatron_flags"]:
        return  # the user's own model is not the one that the other targets are for
    if case.rival_target is not None:
        time = figures(row, MAIN_PROGRAM).time
        yield f"{name}, time against a plain loop: {_at_most(case.rival_target, time)}"
    # The slower side of ProRes counts.
    if case.mfu_target is not None:
        shares = [found.mfu for found in prores.values() if found.mfu is not None]
        share = _at_least(case.mfu_target, min(shares, default=None))
        yield f"{name} ({_layers(row)} layers), MFU in percent: {share}"
    if case.gain_target is not None:
        seconds = row["measured"]["seconds"]
        gains = [ratio(seconds[STOCK_BF16.name], seconds[side.name]).median for side in prores]
        gain = _at_least(case.gain_target, min(gains))
        yield f"{name} ({_layers(row)} layers), speed against bf16: {gain}"


def _at_most(target: float, found: Ratio) -> str:
    verdict = "reached" if round(found.median, 2) <= target else "MISSED"
    if verdict == "MISSED" and round(found.low, 2) <= target:
        verdict = "undecided, its interval reaches it"
    return f"{found.median:.3f} (target {target:.2f}): {verdict}"


def _at_least(target: float, found: float | None) -> str:
    if found is None:
        return f"n/a, the GPU's peak is not known (target {target:g})"
    return f"{found:.4g} (target {target:g}): {'reached' if found >= target else 'MISSED'}"
