"""The programs run from a clone: without an installation, and without PYTHONPATH."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("tools/[!_]*.py"))
PROGRAMS += ["pretrain_gpt_prores.py"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_finds_its_clone_and_tells_its_flags(program: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / program), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")
