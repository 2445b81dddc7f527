"""The tracker file is never half written, whenever a run is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron.core.msc_utils import maybe_msc

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
