"""The table and the verdicts, from the file of results alone."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from studies.benchmark.model import PUBLISHED
from studies.benchmark.sizes.flops import FORMULA, peak_tflops
from studies.benchmark.sizes.options import BF16, FP8, PRECISIONS
from studies.benchmark.sizes.plan import AFTER, AGAIN, STOCK, STOCK_BF16, WARMUP, Side
from studies.benchmark.sizes.row import DONE


@dataclass(frozen=True)
class Figures:
    """What one side of a row came to."""

    side: Side
    seconds: float
    """Of a step, the median over the rounds."""
    tokens_per_second: float
    mfu: float | None
    """None where the GPU's peak is not known."""
    time: Any
    """Step time against stock in the same row: a ``measure.Ratio``."""
    bytes: int
    memory: float
    """Peak memory against stock's."""


def figures(row: dict[str, Any], identity: dict[str, Any], side: Side) -> Figures | None:
    """Compute the figures of a side from what was measured; None where the row has no such side.

    Args:
        row: As the file has it, done.
        identity: The file's.
        side: The side.
    """
    from studies.benchmark.measure import ratio

    measured = row["measured"]
    if side.name not in measured["seconds"]:
        return None
    seconds = measured["seconds"][side.name]
    step = statistics.median(seconds)
    # FP8 rows have a side in bf16, which has bf16's peak.
    precision = BF16 if side == STOCK_BF16 else row["plan"]["precision"]
    peak = peak_tflops(identity["machine"], precision, identity["peak_tflops"])
    return Figures(
        side=side,
        seconds=step,
        tokens_per_second=measured["sequences"] * measured["sequence_length"] / step,
        mfu=None if peak is None else measured["flops_per_step"] / step / (peak * 1e12),
        time=ratio(seconds, measured["seconds"][STOCK.name]),
        bytes=measured["bytes"][side.name],
        memory=measured["bytes"][side.name] / measured["bytes"][STOCK.name],
    )


_SIDES = (STOCK, AGAIN, WARMUP, AFTER, STOCK_BF16)

NOT_MEASURED = "not measured"


def as_text(document: dict[str, Any], planned: list[str] | None = None) -> str:
    """Render everything as Markdown.

    Args:
        document: What the file of results holds.
        planned: Names of all rows that were asked for; those that are not there are named.
    """
    rows, identity = document["rows"], document["identity"]
    done = {name: rows[name] for name in _in_order(rows) if rows[name]["status"] == DONE}
    lines = [f"# Training on {identity['machine']}", "", *_header(identity, rows), ""]
    lines += _table(done, identity)
    lines += ["", *_notes(done, identity)]
    missing = [name for name in planned or [] if name not in rows]
    if missing:
        lines += [
            "",
            f"Not measured yet: {', '.join(missing)}. The same command goes on with them.",
        ]
    failed = {name: row for name, row in rows.items() if name not in done}
    if failed:
        lines += ["", *(f"- {name} FAILED: {row['reason']}" for name, row in failed.items())]
    lines += ["", "## Targets", "", *(f"- {verdict}" for verdict in verdicts(document))]
    return "\n".join(lines)


def _in_order(rows: dict[str, Any]) -> list[str]:
    """Sort the names of rows by size and precision; they were measured in another order."""
    order = [f"{size} {precision}" for size in PUBLISHED for precision in PRECISIONS]
    return sorted(rows, key=order.index)


def _header(identity: dict[str, Any], rows: dict[str, Any]) -> Iterator[str]:
    for name, value in identity.items():
        if value is not None and name != "machine":
            words = " ".join(value) or "none" if isinstance(value, list) else value
            yield f"- {name.replace('_', ' ')}: {words}"
    # What may change from start to start: every value, once.
    for name in ("date", "commit", "source", "python", "driver", "command"):
        values = [row["environment"][name] for row in rows.values() if name in row["environment"]]
        if values:
            yield f"- {name}: {', '.join(dict.fromkeys(values))}"


def _table(done: dict[str, Any], identity: dict[str, Any]) -> Iterator[str]:
    yield (
        "| size | layers | precision | micro-batch | model | tokens/s | MFU | step, ms "
        "| step time against stock | peak memory, GiB | against stock |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in done.values():
        plan = row["plan"]
        for side in _SIDES:
            found = figures(row, identity, side)
            if found is None:
                continue
            cells = [
                plan["size_name"],
                _layers(plan),
                plan["precision"],
                f"{plan['size']['micro_batch_size']} x {plan['size']['seq_length']}",
                side.name,
                f"{found.tokens_per_second:,.0f}",
                "n/a" if found.mfu is None else f"{100 * found.mfu:.1f} %",
                f"{1000 * found.seconds:.1f}",
                f"{found.time.median:.3f} [{found.time.low:.3f}, {found.time.high:.3f}]",
                f"{found.bytes / 2**30:.4g}",
                f"{found.memory:.4f}",
            ]
            yield f"| {' | '.join(cells)} |"


def _layers(plan: dict[str, Any]) -> str:
    layers, whole = plan["size"]["num_layers"], plan["published"]["num_layers"]
    return str(layers) if layers == whole else f"{layers} of {whole}"


def _notes(done: dict[str, Any], identity: dict[str, Any]) -> Iterator[str]:
    if not done:
        return
    yield FORMULA
    yield ""
    machine, given = identity["machine"], identity["peak_tflops"]
    peaks = [(precision, peak_tflops(machine, precision, given)) for precision in (BF16, FP8)]
    known = [f"{precision} {peak:g}" for precision, peak in peaks if peak is not None]
    if known:
        yield (
            f"Dense peaks, TFLOP/s: {', '.join(known)}. The MFU of FP8 is of FP8's peak, although "
            "attention and the output head stay in bf16."
        )
    else:
        yield "MFU n/a: the peak of this machine is not known; give --peak-tflops."
    fewer = [name for name, row in done.items() if "of" in _layers(row["plan"])]
    if fewer:
        yield ""
        yield (
            f"Fewer layers than the published model: {', '.join(fewer)}. All models of a row are "
            "in memory at once, so that they can take turns; embedding and head, which have their "
            "full size, so weigh more than in the whole model."
        )
    yield ""
    yield (
        "Times: the median over the rounds; ratios: the median of the ratios within a round and, "
        "in brackets, its 95 % bootstrap interval. All models of a row take turns in one process. "
        f"`{AGAIN.name}` is the same model timed twice: what the ratio of equals looks like here. "
        "Peak memory: of each model alone, by torch's allocator."
    )
    for name, row in done.items():
        measured = row["measured"]
        yield ""
        yield (
            f"{name}: {measured['parameters'] / 1e9:.3f}B parameters on the GPU, "
            f"{len(measured['seconds'][STOCK.name])} rounds of {measured['steps_per_block']} "
            f"step(s), {measured['sequences']} sequences a step; layers: "
            f"{measured['implementation']}, attention: {measured['attention']}, gradient "
            f"accumulation fusion: {_on(measured['gradient_accumulation_fusion'])}, cross "
            f"entropy fusion: {_on(measured['cross_entropy_fusion'])}."
        )


def _on(value: bool) -> str:
    return "on" if value else "off"


def verdicts(document: dict[str, Any]) -> list[str]:
    """Compare what was measured with the project's targets: one sentence each.

    A ratio of 1.00 is reached by what rounds to it. Where ProRes has two sides, the worse counts.
    """
    rows, identity = document["rows"], document["identity"]
    found: list[str] = []
    for name in _in_order(rows):
        if rows[name]["status"] == DONE:
            found += _verdicts_of_row(name, rows[name], identity)
    # A model that the user has changed is not the one that has the target.
    published = {} if identity["changed_sizes"] else rows
    for size, target in (("1.3B", 45.0), ("7B", 50.0)):
        row = published.get(f"{size} {BF16}")
        what = f"{size} {BF16}{_fewer_layers(row)} MFU"
        found.append(_verdict(what, _worst_mfu(row, identity), target, operator.ge, " %"))
    row = published.get(f"7B {FP8}")
    what = f"7B {FP8}{_fewer_layers(row)} tokens/s against {BF16}"
    found.append(_verdict(what, _fp8_gain(row), 1.3, operator.ge))
    return found


def _fewer_layers(row: dict[str, Any] | None) -> str:
    layers = "" if row is None else _layers(row["plan"])
    return f" ({layers} layers)" if "of" in layers else ""


def _verdicts_of_row(name: str, row: dict[str, Any], identity: dict[str, Any]) -> Iterator[str]:
    warmup, after = (figures(row, identity, side) for side in (WARMUP, AFTER))
    assert warmup is not None
    assert after is not None

    def rounds_to(value: float, target: float) -> bool:
        return value < target + 0.005

    yield _verdict(f"{name} {WARMUP.name}, step time", warmup.time.median, 1.01, operator.le)
    yield _verdict(f"{name} {AFTER.name}, step time", after.time.median, 1.00, rounds_to)
    memory = max(warmup.memory, after.memory)
    yield _verdict(f"{name} ProRes, peak memory", memory, 1.00, rounds_to)


def _verdict(what: str, value: float | None, target: float, is_reached: Any, unit: str = "") -> str:
    shown = f"(target {target:g}{unit})" if unit else f"(target {target:.2f})"
    if value is None:
        return f"{what}: {NOT_MEASURED} {shown}"
    figure = f"{value:.1f}{unit}" if unit else f"{value:.3f}"
    return f"{what}: {figure} {shown}: {'reached' if is_reached(value, target) else 'MISSED'}"


def _worst_mfu(row: dict[str, Any] | None, identity: dict[str, Any]) -> float | None:
    if row is None or row["status"] != DONE:
        return None
    found = [figures(row, identity, side) for side in (WARMUP, AFTER)]
    shares = [side.mfu for side in found if side is not None and side.mfu is not None]
    return 100 * min(shares) if shares else None


def _fp8_gain(row: dict[str, Any] | None) -> float | None:
    if row is None or row["status"] != DONE:
        return None
    from studies.benchmark.measure import ratio

    seconds = row["measured"]["seconds"]
    sides = (seconds[WARMUP.name], seconds[AFTER.name])
    return min(ratio(seconds[STOCK_BF16.name], side).median for side in sides)
