"""Every wrong invocation of the main program ends at once on all ranks, with one clear line.

The table is tests/wrong_invocations.py.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.launch import MAIN_PROGRAM, run_job
from tests.refusals import (
    SECONDS,
    assert_refused,
    clean_environment,
    listing,
    prepare_checkpoints,
    prepare_files,
    run_forked,
    shown_difference,
)
from tests.wrong_invocations import MOCK, ROWS, Row

FORKED = [row for row in ROWS if not row.starts_alone]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    prepare_files(directory)
    prepare_checkpoints(directory, tmp_path_factory.mktemp("saving"))
    return directory


@pytest.mark.parametrize("row", FORKED, ids=str)
def test_a_wrong_invocation_ends_all_ranks_with_one_line_and_writes_nothing(
    row: Row, files: Path, tmp_path: Path
) -> None:
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    before = listing(files, cwd)
    ending = run_forked(row, files, cwd, tmp_path / "logs")
    assert_refused(row, ending)
    assert shown_difference(before, listing(files, cwd)) == []


def test_under_torchrun_the_line_is_told_although_the_silent_rank_ends_first(
    tmp_path: Path,
) -> None:
    # The rank that tells is the slower one: it has a schedule of the user's to import.
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "time.sleep(1.5 if os.environ['LOCAL_RANK'] == '0' else 0)\n"
        "def alphas(step, layers, warmup):\n    return [2.0] * layers\n"
    )
    argv = [*shlex.split(MOCK), "--prores-schedule", "slow:alphas"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    start = time.monotonic()
    result = subprocess.run(
        [*launcher, "--master-port", "0", str(MAIN_PROGRAM), *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**clean_environment(), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=120,
    )
    assert time.monotonic() - start < SECONDS
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "alpha of layer 1 is 2.0" in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["slow.py"]


def ask_for_the_traceback() -> None:
    os.environ["PRORES_TRACEBACK"] = "1"


@pytest.mark.parametrize("wanted", [None, ask_for_the_traceback])
def test_a_line_can_be_traced_back(wanted: Callable[[], None] | None, tmp_path: Path) -> None:
    """What Megatron refuses is one line, which names the variable that shows where."""
    argv = [*shlex.split(MOCK), "--pipeline-model-parallel-size", "3"]
    job = run_job(tmp_path, argv, prepare=wanted)
    assert job.exit_codes == [2]
    last = job.output.splitlines()[-1]
    assert last.startswith("error: Megatron refuses these flags: ")
    assert last.endswith("(PRORES_TRACEBACK=1 shows where)")
    for words in ("Traceback", "megatron/training/arguments.py"):
        assert (words in job.output) == (wanted is not None)
