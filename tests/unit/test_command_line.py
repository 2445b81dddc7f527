"""Wrong invocations of the main program and of the tools, from the start, as a user starts them.

The table is tests/wrong_invocations.py; most of its rows, and all with several ranks, are left to
tests/distributed/test_wrong_invocations.py.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.refusals import (
    REPOSITORY,
    assert_refused,
    listing,
    prepare_files,
    run_alone,
    shown_difference,
)
from tests.wrong_invocations import BENCHMARK, DOCTOR, FROM_OUTSIDE, KIT, MAIN, ROWS, Row

ALONE = [row for row in ROWS if row.name in FROM_OUTSIDE and row.ranks == 1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    prepare_files(directory)
    return directory


@pytest.mark.parametrize("row", ALONE, ids=str)
def test_a_wrong_invocation_ends_with_one_line_and_writes_nothing(
    row: Row, files: Path, tmp_path: Path
) -> None:
    before = listing(files, tmp_path)
    ending = run_alone(row, files, tmp_path)
    assert_refused(row, ending)
    assert shown_difference(before, listing(files, tmp_path)) == []


def test_the_table_has_every_program_and_no_row_twice() -> None:
    programs = {
        MAIN,
        BENCHMARK,
        DOCTOR,
        KIT,
        *(f"tools/{path.name}" for path in REPOSITORY.glob("tools/[!_]*.py")),
    }
    assert {row.program for row in ROWS} == programs
    assert {row.program for row in ROWS if row.name in FROM_OUTSIDE} == programs
    names = Counter(row.name for row in ROWS)
    assert max(names.values()) == 1
    assert set(FROM_OUTSIDE) <= set(names)


def test_the_table_has_every_flag_of_ours() -> None:
    from megatron_prores.command_line.arguments import add_prores_args
    from megatron_prores.errors import Parser

    parser = add_prores_args(Parser(add_help=False))
    tried = " ".join(row.argv for row in ROWS).replace("=", " ").split()
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert flags <= set(tried)
