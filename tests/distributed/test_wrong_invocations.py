"""Every wrong invocation ends at once on all ranks, with one clear line.

The table is tests/wrong_invocations.py.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.launch import MAIN_PROGRAM, run_job
from tests.refusals import (
    SECONDS,
    OneProcess,
    assert_refused,
    clean_environment,
    listing,
    prepare_checkpoints,
    prepare_files,
    run_launched,
    shown_difference,
)
from tests.wrong_invocations import FROM_OUTSIDE, MOCK, ROWS, Row

LAUNCHED = [row for row in ROWS if row.name in FROM_OUTSIDE and row.ranks > 1]
IN_ONE_PROCESS = [row for row in ROWS if row.name not in FROM_OUTSIDE]


@dataclass
class Files:
    """The files that rows name, and what was in them after the last row."""

    directory: Path
    content: dict[str, str]

    def changes(self, cwd: Path) -> list[str]:
        """Names what the last row has written, changed or removed: here, and where it ran."""
        before, self.content = self.content, listing(self.directory)
        return shown_difference(before, self.content | listing(cwd))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("files")
    prepare_files(directory)
    prepare_checkpoints(directory, tmp_path_factory.mktemp("saving"))
    return Files(directory, listing(directory))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneProcess]:
    process = OneProcess(tmp_path_factory.mktemp("one_process") / "log")
    yield process
    process.close()


@pytest.mark.parametrize("row", IN_ONE_PROCESS, ids=str)
def test_a_wrong_invocation_ends_with_one_line_and_writes_nothing(
    row: Row, files: Files, one_process: OneProcess, tmp_path: Path
) -> None:
    ending = one_process.run(row, files.directory, tmp_path)
    changes = files.changes(tmp_path)
    assert_refused(row, ending)
    assert changes == []


@pytest.mark.parametrize("row", LAUNCHED, ids=str)
def test_a_wrong_invocation_ends_all_ranks(row: Row, files: Files, tmp_path: Path) -> None:
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    ending = run_launched(row, files.directory, cwd, tmp_path / "logs")
    changes = files.changes(cwd)
    assert_refused(row, ending)
    assert changes == []


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
    result = subprocess.run(
        [*launcher, "--master-port", "0", str(MAIN_PROGRAM), *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**clean_environment(), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=SECONDS,
    )
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
