"""The programs in tools/ run from a clone: without an installation, and without PYTHONPATH."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = sorted(path.name for path in REPOSITORY.glob("tools/[!_]*.py"))


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_finds_its_clone(tool: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / tool), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")
