"""The kit for the first hour on a GPU: rehearsed on the CPU, cut and gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from studies import gpu_kit
from studies.gpu_kit import CUT, FAILED, PASSED, SKIPPED, STAGES, Step
from tests.examples.clone import REPOSITORY, environment

PAGE = (REPOSITORY / "docs/gpu_kit.md").read_text()


def rows(output: Path) -> dict[str, dict[str, Any]]:
    lines = (output / "kit.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def test_a_rehearsal_without_a_gpu(tmp_path: Path) -> None:
    words = "A --device cpu --steps machine,golden,benchmark --output kit"
    result = subprocess.run(
        ["bash", str(REPOSITORY / "scripts/gpu_kit.sh"), *words.split()],
        cwd=tmp_path,
        env=environment(PYTHON=sys.executable, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = rows(tmp_path / "kit")
    outcomes = {name: row["outcome"] for name, row in found.items()}
    # A machine that has a GPU after all hides it from nobody.
    assert outcomes == {"machine": PASSED, "golden": SKIPPED, "benchmark": PASSED}, found
    assert found["golden"]["skipped"] == ["no GPU on this machine"]
    assert "laptop-pre" in (tmp_path / "kit/A-benchmark/report.md").read_text()
    assert "| comparison | not run |" in (tmp_path / "kit/kit-A.md").read_text()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, Step]:
    """Steps of a stage that a test makes up."""
    made_up: dict[str, Step] = {}
    monkeypatch.setitem(STAGES, "A", made_up)
    monkeypatch.setattr(gpu_kit, "LEAST_SECONDS", 0.0)
    return made_up


def test_a_cut_is_noted_and_gone_on_with(steps: dict[str, Step], tmp_path: Path) -> None:
    (tmp_path / "forever.py").write_text(f"""
import subprocess, time
child = subprocess.Popen(["sleep", "1000"])
open("{tmp_path}/pid", "w").write(str(child.pid))
time.sleep(1000)
""")
    (tmp_path / "once.py").write_text(f"open('{tmp_path}/times', 'a').write('x')")
    steps["first"] = Step(f"{tmp_path}/once.py", 60)
    steps["second"] = Step(f"{tmp_path}/forever.py", 3)
    steps["third"] = Step("-c raise(SystemExit(3))", 60)
    argv = ["A", "--output", str(tmp_path / "kit")]
    assert gpu_kit.main(argv) == 1
    found = {name: row["outcome"] for name, row in rows(tmp_path / "kit").items()}
    assert found == {"first": PASSED, "second": CUT, "third": FAILED}
    # What it had started is gone.
    status = Path("/proc", (tmp_path / "pid").read_text(), "status")
    assert not status.exists() or "zombie" in status.read_text()
    steps["second"] = steps["third"] = Step("-c print(7)", 60)
    assert gpu_kit.main(argv) == 0
    found = {name: row["outcome"] for name, row in rows(tmp_path / "kit").items()}
    assert found == {"first": PASSED, "second": PASSED, "third": PASSED}
    assert (tmp_path / "times").read_text() == "x"
    assert rows(tmp_path / "kit")["third"]["said"] == "7"


def test_it_ends_when_its_time_is_over(
    steps: dict[str, Step], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps["long"] = Step(f"{tmp_path}/sleep.py", 60)
    steps["never"] = Step("-c print(1)", 60)
    (tmp_path / "sleep.py").write_text("import time\ntime.sleep(1000)\n")
    assert gpu_kit.main(["A", "--output", str(tmp_path / "kit"), "--minutes", "0.03"]) == 0
    assert rows(tmp_path / "kit").keys() == {"long"}
    assert "| never | not run |" in capsys.readouterr().out


@pytest.mark.parametrize("stage", STAGES)
def test_the_page_says_what_each_step_proves(stage: str) -> None:
    section = PAGE.partition(f"## Stage {stage}\n")[2].partition("\n## ")[0]
    named = [line.split("|")[1].strip(" `") for line in section.splitlines() if line[:3] == "| `"]
    assert named == [*STAGES[stage]]
