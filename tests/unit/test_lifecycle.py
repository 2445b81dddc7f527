"""The tracker file is never half written; a process that dies beside a rank is named."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.core.msc_utils import maybe_msc
from torch.utils.data import DataLoader

from megatron_prores.training.lifecycle import installed
from megatron_prores.upstream.registry import undone_afterwards
from megatron_prores.upstream.tracker_file import FilesWithAtomicTracker

TRACKER = "latest_checkpointed_iteration.txt"


def test_the_tracker_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    files = FilesWithAtomicTracker(maybe_msc)
    path = tmp_path / TRACKER
    path.write_text("2")
    with files.open(str(path), "w") as file:
        file.write("4")
        assert path.read_text() == "2"
    assert path.read_text() == "4"

    def killed_while_writing() -> None:
        with files.open(str(path), "w") as file:
            file.write("6")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed_while_writing()
    assert path.read_text() == "4"


def test_other_files_are_opened_as_ever(tmp_path: Path) -> None:
    files = FilesWithAtomicTracker(maybe_msc)
    with files.open(tmp_path / "other", "w") as file:
        file.write("text")
    with files.open(str(tmp_path / "other"), "r") as file:
        assert file.read() == "text"
    assert files.os.path.isfile(tmp_path / "other")


def test_a_data_worker_that_is_killed_ends_the_run_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train() -> None:
        before = multiprocessing.active_children()
        batches = iter(DataLoader([0] * 100_000, num_workers=1, multiprocessing_context="fork"))
        (worker,) = set(multiprocessing.active_children()) - set(before)
        worker.kill()
        for _ in batches:
            pass

    args = SimpleNamespace(save=None, skip_train=False)
    with undone_afterwards(), pytest.raises(SystemExit) as end, installed(args):
        train()
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: rank 0 \(host .*\): a process that loads its data: DataLoader ", line)
