"""A run that is killed loses at most the iterations since its last save, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kill_sweep import INTERVAL, SHORT, Outcome, sweep


@pytest.mark.parametrize("layout", SHORT["layouts"])
def test_nothing_is_lost_by_kills(layout: str, tmp_path: Path) -> None:
    kills = SHORT["kills"] // len(SHORT["layouts"])
    outcome = sweep(tmp_path, layout, kills, seed=3, iterations=SHORT["iterations"])
    print(outcome.table())
    assert outcome.ok, outcome.table()
    assert outcome.kills.total() == kills
    assert outcome.losses_compared >= 10


def test_a_sweep_is_not_ok_when_anything_was_lost() -> None:
    assert Outcome("so").ok
    assert not Outcome("so", mismatches=1).ok
    assert not Outcome("so", resumes_from_elsewhere=1).ok
    assert not Outcome("so", lost=[INTERVAL + 1]).ok
    assert not Outcome("so", problems=["hung"]).ok
