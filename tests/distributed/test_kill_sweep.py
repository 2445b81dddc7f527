"""A run that is killed loses at most the iterations since its last save, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kill_sweep import INTERVAL, Outcome, sweep


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_nothing_is_lost_by_kills(asynchronous: bool, tmp_path: Path) -> None:
    outcome = sweep(tmp_path, kills=3, asynchronous=asynchronous, seed=3, iterations=10)
    print(outcome.table())
    assert outcome.ok, outcome.table()
    assert outcome.kills == 3
    assert outcome.losses_compared >= 10


def test_a_sweep_is_not_ok_when_anything_was_lost() -> None:
    assert Outcome("so").ok
    assert not Outcome("so", mismatches=1).ok
    assert not Outcome("so", failed_resumes=1).ok
    assert not Outcome("so", resumes_from_elsewhere=1).ok
    assert not Outcome("so", lost=[INTERVAL + 1]).ok
    assert not Outcome("so", problems=["hung"]).ok
