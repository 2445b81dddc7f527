"""Atomic writes: a file is the old one or the new, and nothing else is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prores.system.files import atomic_write, publish


@pytest.mark.parametrize(("mode", "old", "new"), [("w", "old", "new"), ("wb", b"old", b"new")])
def test_file_is_the_old_one_until_the_new_one_is_whole(
    mode: str, old: str | bytes, new: str | bytes, tmp_path: Path
) -> None:
    path = tmp_path / "file"

    def content() -> str | bytes:
        return path.read_text() if mode == "w" else path.read_bytes()

    with atomic_write(path, mode) as file:
        file.write(old)
        assert not path.exists()
    with atomic_write(path, mode) as file:
        file.write(new)
        file.flush()
        assert content() == old
    assert content() == new
    assert list(tmp_path.iterdir()) == [path]


def test_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_write(path) as file:
            file.write("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_finished_file_and_its_directory_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(
        "os.fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").stat().st_ino)
    )
    (tmp_path / "staged").write_text("new")
    finished = (tmp_path / "staged").stat().st_ino
    publish(tmp_path / "staged", tmp_path / "file")
    assert synced == [finished, tmp_path.stat().st_ino]
    assert (tmp_path / "file").read_text() == "new"
