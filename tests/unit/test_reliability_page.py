"""The commands of docs/reliability.md: long runs, which nobody waits for here, are understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests import kill_sweep, soak, storage_sweep
from tests.distributed.launch import REPOSITORY

PAGE = (REPOSITORY / "docs" / "reliability.md").read_text()
COMMANDS = re.findall(r"^```bash\n(.*?)\n```", PAGE, flags=re.MULTILINE | re.DOTALL)
PROGRAMS = {Path(each.__file__).name: each for each in (kill_sweep, soak, storage_sweep)}


def test_every_program_has_its_command() -> None:
    assert PROGRAMS.keys() == {Path(each).name for each in re.findall(r"N (tests/\w+\.py)", PAGE)}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command: str, pytestconfig: pytest.Config) -> None:
    first, program, *words = shlex.split(command)
    flags = [word for word in words if word.startswith("--")]
    if first == "$PYTHON":
        known = PROGRAMS[Path(program).name].parser().format_help()
        assert all(flag in known for flag in flags)
    else:
        assert (first, program) == ("bash", "tests/run.sh")
        assert (REPOSITORY / words[0]).exists()
        for flag in flags:
            pytestconfig.getoption(flag.removeprefix("--"))


def test_every_test_of_the_page_exists() -> None:
    for name in re.findall(r"`(tests/[\w/]+\.py)`", PAGE):
        assert (REPOSITORY / name).exists()
