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

# Starts each as Python does, from a process that has torch already.
START_EACH = """
import os, pathlib, runpy, sys
import torch.distributed.checkpoint
for program in sys.argv[1:]:
    name = pathlib.Path(program).name
    if not os.fork():
        for stream, file in enumerate((f"{name}.out", f"{name}.err"), start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), stream)
        sys.argv, sys.path[0] = [program, "--help"], str(pathlib.Path(program).parent)
        runpy.run_path(program, run_name="__main__")
        sys.exit("has not ended")
    pathlib.Path(f"{name}.code").write_text(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each program was started with --help: its output, its errors, its exit code."""
    directory = tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    programs = [str(REPOSITORY / program) for program in PROGRAMS]
    command = [sys.executable, "-c", START_EACH, *programs]
    subprocess.run(command, cwd=directory, env=environment, check=True, timeout=600)
    return directory


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_finds_its_clone_and_tells_its_flags(program: str, started: Path) -> None:
    name = Path(program).name
    assert (started / f"{name}.code").read_text() == "0", (started / f"{name}.err").read_text()
    assert (started / f"{name}.out").read_text().startswith("usage: ")
