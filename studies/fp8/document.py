"""Puts the figures of a JSON file where a document asks for them, so that none is typed in.

    python -m studies.fp8.document docs/fp8.md docs/fp8

A document asks with a line ``<!-- figures: NAME KIND ARGUMENTS -->`` for a table of NAME.json; what
is between it and the next ``<!-- end of figures -->`` is replaced.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from megatron_prores.errors import UserError, run_program
from studies.fp8 import report

_PLACE = re.compile(
    r"(<!-- figures: (?P<request>[^>]*) -->\n).*?(<!-- end of figures -->)", re.DOTALL
)


def render(text: str, folder: Path) -> str:
    """Return the document with every table made anew.

    Args:
        text: The document.
        folder: Where the JSON files are.

    Raises:
        UserError: A table is asked for that the figures do not have.
    """

    def fill(place: re.Match[str]) -> str:
        table = "\n".join(_table(place["request"].split(), folder))
        return f"{place[1]}\n{table}\n\n{place[3]}"

    return _PLACE.sub(fill, text)


def _table(request: list[str], folder: Path) -> list[str]:
    try:
        name, kind, *arguments = request
        document = report.read_json(folder / f"{name}.json")
        if kind == "losses":
            return report.loss_table(document)
        placement, schedule, *rest = arguments
        recipes = report.groups(document)[placement, schedule]
        if kind == "recipes":
            return report.recipe_table(recipes)
        if kind == "growth":
            return report.growth_table(recipes)
        if kind == "steps":
            return report.step_table(recipes, rest[0])
        if kind == "layers":
            recipe, *steps = rest
            return report.layer_table(recipes[recipe], map(int, steps))
    except (KeyError, IndexError, ValueError, OSError) as error:
        raise UserError(f"figures: {' '.join(request)}: {error!r}") from error
    raise UserError(f"figures: {' '.join(request)}: no such kind of table")


def main() -> None:
    """Render the document of the command line in place."""
    if len(sys.argv) != 3:
        raise UserError("give the document and the folder of its figures")
    document, folder = map(Path, sys.argv[1:])
    document.write_text(render(document.read_text(), folder))


if __name__ == "__main__":
    run_program(main)
