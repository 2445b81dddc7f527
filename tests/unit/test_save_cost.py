"""The study of what a checkpoint for any layout costs: one side of it, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from studies import save_cost
from tests.distributed.launch import REPOSITORY


def test_a_side_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    *_, (side, flags) = save_cost.SIDES.items()
    monkeypatch.setattr(save_cost, "SIDES", {side: flags})
    monkeypatch.setattr(save_cost, "_SAVES", 2)
    save_cost.main(["--ranks", "1", "--num-layers", "1", "--hidden-size", "64", "--rounds", "1"])
    printed = capsys.readouterr().out
    (line,) = re.findall(rf"^{side}: (.*) s a save .*, 1.00 times; (\d+) MB", printed, re.M)
    assert float(line[0]) > 0
    assert int(line[1]) > 100
