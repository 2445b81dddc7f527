"""Whatever call of a save or of a load fails: no checkpoint claims to be whole and is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import storage_sweep


def test_no_checkpoint_claims_to_be_whole_and_is_not(tmp_path: Path) -> None:
    # In a process of its own: the library that fails calls is preloaded.
    if shutil.which("gcc") is None:
        pytest.skip("no gcc here, which compiles tests/faulty_storage.c")
    command = [sys.executable, storage_sweep.__file__, "--short", "--work", str(tmp_path / "work")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    rows = [line.rsplit(maxsplit=4) for line in result.stdout.splitlines()[1:]]
    assert {kind for kind, *_ in rows} >= {*storage_sweep.SAVING, "open at load", "read at load"}
    assert all(wrong == "0" for *_, wrong in rows)
