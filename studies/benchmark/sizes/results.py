"""The file of results: written row by row, found again by a later start of the same benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_prores.errors import UserError
from megatron_prores.files import atomic_write

FORMAT = 1


class Results:
    """What is measured so far.

    ``document`` is what the file holds: ``format``; ``identity``, which all rows have in common;
    and ``rows``, name -> the row's ``plan``, ``status``, ``measured`` or ``reason``,
    ``environment`` and ``wall_seconds``.
    """

    def __init__(self, path: Path, identity: dict[str, Any], fresh: bool = False) -> None:
        """Take up what an earlier start has left.

        Args:
            path: The file; written with the first row.
            identity: What figures must have in common to stand in one table: machine, versions,
                settings.
            fresh: Forget what the file has.

        Raises:
            UserError: The file is none of ours, or of another benchmark.
        """
        self.path = path
        # As it looks when it is read back: lists for tuples.
        identity = json.loads(json.dumps(identity))
        self.document: dict[str, Any] = {"format": FORMAT, "identity": identity, "rows": {}}
        if fresh or not path.exists():
            return
        found = _read(path)
        if different := _differences(found["identity"], identity):
            raise UserError(
                f"--output {path.parent}: its results are of another benchmark: "
                f"{'; '.join(different)}; give another directory, or --fresh to forget them"
            )
        self.document = found

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Rows by name, failed ones among them."""
        return self.document["rows"]

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Add a row, or take it instead of the one of an earlier try, and write the file."""
        self.rows[name] = row
        write(self.path, json.dumps(self.document, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """Write a file as a whole: whoever reads it sees what was there before, or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if found["format"] == FORMAT and isinstance(found["identity"], dict):
            found["rows"].items()
            return found
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    raise UserError(
        f"{path} cannot be read as results of this benchmark: give another --output, or --fresh"
    )


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return [
        f"{name.replace('_', ' ')} {_words(there.get(name))} there, {_words(here.get(name))} here"
        for name in dict.fromkeys([*here, *there])
        if there.get(name) != here.get(name)
    ]


def _words(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
