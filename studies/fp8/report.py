"""The figures of the study as tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_prores.config import OFF
from studies.fp8.recipes import BF16
from studies.fp8.record import LINEARS

LAST_STEPS = 20
"""Steps over whose losses a run's final loss is the mean."""

Document = dict[str, Any]
Run = dict[str, Any]


def write_json(path: Path, document: Document) -> None:
    """Write the document with a line for each run."""
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in document["runs"])
    start = json.dumps({"header": document["header"]}, indent=1).removesuffix("\n}")
    path.write_text(f'{start},\n "runs": [\n{lines}\n]}}\n')


def read_json(path: Path) -> Document:
    """Read what :func:`write_json` wrote."""
    return dict(json.loads(path.read_text()))


def figures(
    runs: Iterable[Run],
    column: str,
    step: int,
    layer: int | None = None,
    linears: tuple[str, ...] = LINEARS,
) -> list[float]:
    """Return one column of the runs' gradients at one step, of all layers or one, without None."""
    found = []
    for run in runs:
        at = {name: place for place, name in enumerate(run["columns"])}
        for row in run["gradients"]:
            if row[at["step"]] != step or (layer is not None and row[at["layer"]] != layer):
                continue
            if row[at["linear"]] in linears and row[at[column]] is not None:
                found.append(row[at[column]])
    return found


def steps_of(runs: Iterable[Run]) -> list[int]:
    """List the steps whose gradients were kept."""
    return sorted({row[0] for run in runs for row in run["gradients"]})


def groups(document: Document) -> dict[tuple[str, str], dict[str, list[Run]]]:
    """Sort the runs: (placement, schedule) -> recipe -> one run per seed."""
    sorted_runs: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for run in document["runs"]:
        group = sorted_runs.setdefault((run["placement"], run["schedule"]), {})
        group.setdefault(run["recipe"], []).append(run)
    return sorted_runs


def lost_part(runs: list[Run], step: int) -> float | None:
    """Return the part of the micro-batches of which nothing was left, over layers and linears."""
    whole = sum(figures(runs, "micro_batches", step))
    return sum(figures(runs, "lost", step)) / whole if whole else None


def final_loss(run: Run) -> float:
    """Return the mean loss of the last steps."""
    return statistics.fmean(run["loss"][-LAST_STEPS:])


def recipe_table(recipes: dict[str, list[Run]]) -> list[str]:
    """Tabulate what each recipe did to the gradients, step by step, over all layers."""
    every = [run for runs in recipes.values() for run in runs]
    steps = steps_of(every)
    early, last = [step for step in steps if 0 <= step <= 3], steps[-1]
    columns = {
        "lost": [(f"lost, t = {step}", step, "lost") for step in early],
        "saturated": [(f"saturated, t = {s}", s, "first_saturated") for s in early[2:]],
        "flushed": [(f"flushed, t = {last}", last, "flushed")],
        "error": [(f"error, t = {s}", s, "error") for s in (*early[1:], last)],
    }
    cells = [cell for kind in columns.values() for cell in kind]
    lines = _head(["recipe", *(name for name, _, _ in cells)])
    for recipe, runs in recipes.items():
        if recipe == BF16:
            continue
        row = [recipe]
        for _, step, column in cells:
            if column == "lost":
                row.append(_percent(lost_part(runs, step)))
            else:
                values = figures(runs, column, step)
                row.append(_percent(statistics.fmean(values) if values else None))
        lines.append(_row(row))
    return lines


def layer_table(runs: list[Run], steps: Iterable[int] = (1, 2, 3)) -> list[str]:
    """Tabulate one recipe by layer and step: the first micro-batch of each step."""
    layers = sorted({row[1] for run in runs for row in run["gradients"]})
    kept = [step for step in steps if step in steps_of(runs)]
    names = ["lost", "flushed", "saturated"]
    lines = _head(["layer", *(f"{name}, t = {step}" for step in kept for name in names)])
    for layer in layers:
        row = [str(layer)]
        for step in kept:
            whole = sum(figures(runs, "micro_batches", step, layer))
            lost = sum(figures(runs, "lost", step, layer))
            row.append(f"{lost} of {whole}")
            for column in ("first_flushed", "first_saturated"):
                values = figures(runs, column, step, layer)
                row.append(_percent(max(values) if values else None))
        lines.append(_row(row))
    return lines


def growth_table(recipes: dict[str, list[Run]], steps: Iterable[int] = (2, 3, 4, 5)) -> list[str]:
    """Tabulate by how much the gradients' largest element grew, without any FP8."""
    runs = recipes[BF16]
    kept = [step for step in steps if {step - 1, step} <= set(steps_of(runs))]
    lines = _head(["linear", *(f"t = {step - 1} to {step}" for step in kept)])
    for linear in LINEARS:
        row = [linear]
        for step in kept:
            before = figures(runs, "amax", step - 1, linears=(linear,))
            after = figures(runs, "amax", step, linears=(linear,))
            ratios = [new / old for old, new in zip(before, after, strict=True) if old]
            row.append(
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                if ratios
                else "-"
            )
        lines.append(_row(row))
    return lines


def step_table(recipes: dict[str, list[Run]], column: str) -> list[str]:
    """Tabulate one column of the gradients by recipe and step: the mean over all layers."""
    every = [run for runs in recipes.values() for run in runs]
    steps = steps_of(every)
    lines = _head(["recipe", *(f"t = {step}" for step in steps)])
    for recipe, runs in recipes.items():
        if recipe != BF16:
            found = [figures(runs, column, step) for step in steps]
            means = [statistics.fmean(values) if values else None for values in found]
            lines.append(_row([recipe, *map(_percent, means)]))
    return lines


def loss_table(document: Document) -> list[str]:
    """Tabulate the final losses, and the differences from bf16 on the same seeds."""
    found = groups(document)
    names = [
        f"{placement}, {'no ProRes' if schedule == OFF else schedule}"
        for placement, schedule in found
    ]
    lines = _head(["recipe", *names])
    for recipe in dict.fromkeys(name for group in found.values() for name in group):
        row = [recipe]
        for group in found.values():
            row.append(_difference(group.get(recipe), group.get(BF16), recipe == BF16))
        lines.append(_row(row))
    return lines


def _difference(runs: list[Run] | None, base: list[Run] | None, is_base: bool) -> str:
    if not runs or not base:
        return "-"
    losses = [final_loss(run) for run in runs]
    if is_base:
        return ", ".join(f"{loss:.3f}" for loss in losses)
    return ", ".join(
        f"{loss - final_loss(other):+.3f}" for loss, other in zip(losses, base, strict=True)
    )


def as_text(document: Document) -> str:
    """Render everything as Markdown."""
    lines = [f"- {name}: {value}" for name, value in document["header"].items()]
    for (placement, schedule), recipes in groups(document).items():
        name = f"{placement}, {'no ProRes' if schedule == OFF else schedule}"
        lines += ["", f"### {name}", "", *recipe_table(recipes)]
        if BF16 in recipes and schedule != OFF:
            lines += ["", "Growth of the largest element, bf16:", "", *growth_table(recipes)]
        if "delayed" in recipes:
            lines += ["", "delayed, by layer:", "", *layer_table(recipes["delayed"])]
    lines += ["", f"### Loss, mean of the last {LAST_STEPS} steps", "", *loss_table(document)]
    return "\n".join(lines) + "\n"


def _head(names: list[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(part: float | None) -> str:
    if part is None:
        return "-"
    percent = 100 * part
    if percent == 0:
        return "0"
    return f"{percent:.3g} %" if percent >= 0.001 else "< 0.001 %"
