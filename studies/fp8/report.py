"""The figures of the study as tables, and their place in a document.

    python -m studies.fp8.report docs/fp8.md docs/fp8

A document asks with a line ``<!-- figures: NAME KIND ARGUMENTS -->`` for a table of NAME.json; what
is between it and the next ``<!-- end of figures -->`` is replaced.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_prores.config.prores_config import OFF
from megatron_prores.errors import UserError, run_program
from studies.fp8.recipes import BF16
from studies.fp8.record import LINEARS

LAST_STEPS = 20
"""Steps over whose losses a run's final loss is the mean."""

Document = dict[str, Any]
"""A ``header``, and the ``runs``."""
Run = dict[str, Any]
"""What ``run.train`` returns."""
Recipes = dict[str, list[Run]]
"""By recipe, one run per seed."""


def write_json(path: Path, document: Document) -> None:
    """Write the document with a line for each run."""
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in document["runs"])
    start = json.dumps({"header": document["header"]}, indent=1).removesuffix("\n}")
    path.write_text(f'{start},\n "runs": [\n{lines}\n]}}\n')


def groups(document: Document) -> dict[tuple[str, str], Recipes]:
    """Sort the runs by placement and schedule."""
    sorted_runs: dict[tuple[str, str], Recipes] = {}
    for run in document["runs"]:
        group = sorted_runs.setdefault((run["placement"], run["schedule"]), {})
        group.setdefault(run["recipe"], []).append(run)
    return sorted_runs


def title(placement: str, schedule: str) -> str:
    """Name a group of runs."""
    return f"{placement}, {'no ProRes' if schedule == OFF else Path(schedule).stem}"


def figures(runs: Iterable[Run], column: str, **where: int | str) -> list[Any]:
    """Return a column of the runs' gradients, without None.

    ``where`` chooses the rows: other columns and their values.
    """
    rows = (dict(zip(run["columns"], row, strict=True)) for run in runs for row in run["gradients"])
    chosen = (row[column] for row in rows if where.items() <= row.items())
    return [value for value in chosen if value is not None]


def mean(runs: Iterable[Run], column: str, **where: int | str) -> float | None:
    """Return the mean of a column; of "lost" it is the part of the micro-batches."""
    values = figures(runs, column, **where)
    if column == "lost":
        return sum(values) / sum(figures(runs, "micro_batches", **where))
    return statistics.fmean(values) if values else None


def steps_of(runs: Iterable[Run]) -> list[int]:
    """List the steps whose gradients were kept."""
    return sorted(set(figures(runs, "step")))


def recipe_table(document: Document, placement: str, schedule: str) -> list[str]:
    """Tabulate what each recipe did to the gradients in the first steps and in the last one."""
    recipes = groups(document)[placement, schedule]
    steps = steps_of(recipes[BF16])
    early, last = [step for step in steps if step <= 3], steps[-1]
    cells = [("lost", "lost", step) for step in early]
    cells += [("saturated", "first_saturated", step) for step in early if step > 1]
    cells += [("flushed", "flushed", last)]
    cells += [("error", "error", step) for step in (*early, last) if step > 0]
    return _percent_table(recipes, [(f"{name}, t = {t}", column, t) for name, column, t in cells])


def step_table(document: Document, placement: str, schedule: str, column: str) -> list[str]:
    """Tabulate one column of the gradients by recipe and step."""
    recipes = groups(document)[placement, schedule]
    cells = [(f"t = {step}", column, step) for step in steps_of(recipes[BF16])]
    return _percent_table(recipes, cells)


def _percent_table(recipes: Recipes, cells: list[tuple[str, str, int]]) -> list[str]:
    """Tabulate (title, column, step), of all layers, by recipe."""
    lines = [["recipe", *(name for name, _, _ in cells)]]
    for recipe, runs in recipes.items():
        if recipe != BF16:
            means = (mean(runs, column, step=step) for _, column, step in cells)
            lines.append([recipe, *map(_percent, means)])
    return _table(lines)


def layer_table(
    document: Document, placement: str, schedule: str, recipe: str, *steps: str
) -> list[str]:
    """Tabulate one recipe by layer and step: the first micro-batch of each step."""
    runs = groups(document)[placement, schedule][recipe]
    names = ("lost", "flushed", "saturated")
    lines = [["layer", *(f"{name}, t = {step}" for step in steps for name in names)]]
    for layer in sorted(set(figures(runs, "layer"))):
        line = [str(layer)]
        for step in map(int, steps):
            lost = sum(figures(runs, "lost", step=step, layer=layer))
            whole = sum(figures(runs, "micro_batches", step=step, layer=layer))
            line.append(f"{lost} of {whole}")
            for column in ("first_flushed", "first_saturated"):
                values = figures(runs, column, step=step, layer=layer)
                line.append(_percent(max(values, default=None)))
        lines.append(line)
    return _table(lines)


def growth_table(document: Document, placement: str, schedule: str) -> list[str]:
    """Tabulate by how much the gradients' largest element grew: median and range over layers."""
    runs = groups(document)[placement, schedule][BF16]
    steps = range(2, 6)
    lines = [["linear", *(f"t = {step - 1} to {step}" for step in steps)]]
    for linear in LINEARS:
        line = [linear]
        for step in steps:
            before = figures(runs, "amax", step=step - 1, linear=linear)
            after = figures(runs, "amax", step=step, linear=linear)
            ratios = sorted(new / old for old, new in zip(before, after, strict=True))
            line.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        lines.append(line)
    return _table(lines)


def loss_table(document: Document) -> list[str]:
    """Tabulate the final losses, and the differences from bf16 on the same seeds."""
    found = groups(document)
    lines = [["recipe", *(title(*group) for group in found)]]
    for recipe in dict.fromkeys(run["recipe"] for run in document["runs"]):
        line = [recipe]
        for recipes in found.values():
            losses, base = map(_final_losses, (recipes[recipe], recipes[BF16]))
            pairs = zip(losses, base, strict=True)
            shown = (f"{a:.3f}" if recipe == BF16 else f"{a - b:+.3f}" for a, b in pairs)
            line.append(", ".join(shown))
        lines.append(line)
    return _table(lines)


def _final_losses(runs: list[Run]) -> list[float]:
    return [statistics.fmean(run["loss"][-LAST_STEPS:]) for run in runs]


TABLES: dict[str, Callable[..., list[str]]] = {
    "recipes": recipe_table,
    "steps": step_table,
    "layers": layer_table,
    "growth": growth_table,
    "losses": loss_table,
}
"""By the names that a document asks for them with."""


def as_text(document: Document) -> str:
    """Render what every study has in common as Markdown."""
    lines = [f"- {name}: {value}" for name, value in document["header"].items()]
    for group in groups(document):
        lines += ["", f"### {title(*group)}", "", *recipe_table(document, *group)]
    lines += ["", f"### Loss, mean of the last {LAST_STEPS} steps", "", *loss_table(document)]
    return "\n".join(lines) + "\n"


def _table(lines: list[list[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return [head, "|" + "---|" * len(lines[0]), *body]


def _percent(part: float | None) -> str:
    if part is None:
        return "-"
    if part == 0:
        return "0"
    return f"{100 * part:.3g} %" if part >= 1e-5 else "< 0.001 %"


_PLACE = re.compile(
    r"(<!-- figures: (?P<request>[^>]*) -->\n).*?(<!-- end of figures -->)", re.DOTALL
)


def render(text: str, folder: Path) -> str:
    """Return the document with every table made anew from the JSON files of a folder."""

    def fill(place: re.Match[str]) -> str:
        name, kind, *arguments = place["request"].split()
        try:
            document = json.loads((folder / f"{name}.json").read_text())
            table = "\n".join(TABLES[kind](document, *arguments))
        except (KeyError, TypeError, OSError) as error:
            raise UserError(f"figures: {place['request']}: {error!r}") from error
        return f"{place[1]}\n{table}\n\n{place[3]}"

    return _PLACE.sub(fill, text)


def main() -> None:
    """Render the document of the command line in place."""
    if len(sys.argv) != 3:
        raise UserError("give the document and the folder of its figures")
    document, folder = map(Path, sys.argv[1:])
    document.write_text(render(document.read_text(), folder))


if __name__ == "__main__":
    run_program(main)
