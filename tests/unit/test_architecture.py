"""The floors of docs/architecture.md: what may import what."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_prores"
PROGRAMS = ("pretrain_gpt_prores", "tools", "studies")

PAGE = (REPOSITORY / "docs/architecture.md").read_text()
FLOORS = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)


def floors() -> dict[str, int]:
    """Reads the drawing: room -> its floor, from the top down; rooms on one line share a floor."""
    assert FLOORS is not None, "docs/architecture.md has no drawing of the floors"
    rooms: dict[str, int] = {}
    for number, line in enumerate(FLOORS[1].splitlines()):
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            rooms[name.removesuffix("/").removesuffix(".py")] = number
    return rooms


def sources() -> dict[str, Path]:
    """Finds every module of the package and of the programs over it."""
    found = {}
    for top in (PACKAGE, *PROGRAMS):
        place = REPOSITORY / top
        paths = [place.with_suffix(".py")] if not place.is_dir() else sorted(place.rglob("*.py"))
        for path in paths:
            name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Lists the modules of this repository that a module names in an import, wherever it stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            module = node.module or ""
            found |= {
                full if (full := f"{module}.{alias.name}") in known else module
                for alias in node.names
            }
    return {module for module in found if module in known and module != name}


SOURCES = sources()
ARROWS = {name: imports(name, path, SOURCES) for name, path in SOURCES.items()}


def room_of(name: str) -> str:
    """Names the room of a module: a folder or a file at the top of the package, or a program."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return parts[0]
    return parts[1] if len(parts) > 1 else "__init__"


def test_every_room_is_in_the_drawing() -> None:
    assert {room_of(name) for name in SOURCES} == set(floors())


def test_no_arrow_runs_up() -> None:
    floor = floors()
    wrong = [
        f"{name} -> {other}"
        for name, others in ARROWS.items()
        for other in others
        if room_of(name) != room_of(other) and floor[room_of(name)] >= floor[room_of(other)]
    ]
    assert not wrong


def test_there_is_no_circle() -> None:
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> None:
        if name in path:
            pytest.fail(" -> ".join([*path[path.index(name) :], name]))
        if name in done:
            return
        path.append(name)
        for other in sorted(ARROWS[name]):
            visit(other)
        done.add(path.pop())

    for name in ARROWS:
        visit(name)


def test_every_file_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(megatron_prores/[\w/.]+)`", PAGE)
    assert named
    assert [name for name in named if not (REPOSITORY / name).exists()] == []
