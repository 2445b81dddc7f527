"""The benchmark tool, run as a program on a tiny model. What it measures is not judged here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prores.placement import PLACEMENTS
from studies.benchmark.measure import interleave, ratio

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"

TINY = """
    --device cpu --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4
    --seq-length 16 --micro-batch-size 1 --vocab-size 64 --repetitions 2 --threads 1
""".split()


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_every_row_is_measured_and_written(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    result = run(*TINY, "--output", output)
    assert result.returncode == 0, result.stderr
    document = json.loads(output.read_text())
    expected = {
        (placement, measured)
        for placement in PLACEMENTS
        for measured in ("itself", "ProRes during warmup", "ProRes after warmup")
    } | {("attention", "itself"), ("attention", "fused attention")}
    rows = {(row["comparison"], row["measured"]): row for row in document["rows"]}
    assert rows.keys() == expected
    for (placement, measured), row in rows.items():
        if measured == "ProRes during warmup":
            assert len(row["alphas"]) == 2
            assert all(0 < alpha < 1 for alpha in row["alphas"])
        else:
            assert set(row["alphas"]) == {1.0}
        time = row["time"]
        assert 0 < time["low"] <= time["median"] <= time["high"] < math.inf
        assert len(row["seconds"]) == len(row["base_seconds"]) == document["repetitions"] == 2
        assert (row["against"] == "stock Megatron") == (placement == "pre")
        # Weights, gradients and Adam's two moments, in float32, of the smallest of these models.
        assert row["bytes"] > 4 * 4 * (2 * (4 * 32 * 32 + 3 * 32 * 64) + 2 * 32 * 64)
        assert row["memory"] == row["bytes"] / row["base_bytes"]
    # Memory is counted, not sampled: the same model takes the same, to some hundred bytes.
    assert rows["pre", "itself"]["memory"] == pytest.approx(1, abs=1e-3)

    table = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(rows)
    for word in ("commit", "torch", "megatron-core", "command: python tools/benchmark.py --device"):
        assert f"- {word}" in result.stdout
    assert "iteration" not in result.stdout


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--device", "tpu"], "--device tpu: choose one of cuda, cpu"),
        (["--device", "cpu", "--size", "70M"], "--size 70M: choose one of"),
        (["--device", "cpu", "--placements", "pre,middle"], "--placements middle: choose some of"),
        (["--device", "cpu", "--repetitions", "0"], "--repetitions 0: must be at least 1"),
        (["--suite", "placements", "--hidden-size", "-3"], "--hidden-size -3: must be at least 1"),
        (
            ["--device", "cpu", "--output", "/nowhere/figures.json"],
            "--output /nowhere/figures.json: no such direct",
        ),
        (["--colour"], "unrecognized arguments: --colour"),
        ([*TINY, "--num-attention-heads", "5"], "Megatron refuses these flags"),
        ([*TINY, "--", "--fp8-format", "hybrid"], "FP8 needs Transformer Engine and a GPU"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags: list[str], complaint: str) -> None:
    result = run(*flags)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert complaint in errors[0]
    assert "Traceback" not in result.stderr


def test_the_median_of_ratios_within_repetitions_and_its_interval() -> None:
    base = [1.0, 10.0, 2.0, 4.0, 1.0]
    result = ratio([1.1, 12.0, 2.6, 4.4, 1.1], base)
    assert result.median == pytest.approx(1.1)
    assert result.low == pytest.approx(1.1)
    assert 1.1 < result.high <= 1.3 + 1e-9
    assert ratio(base, base).median == 1.0


def test_steps_are_taken_in_turn_and_in_changing_order() -> None:
    calls: list[str] = []

    def step_of(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    names = ["a", "b", "c"]
    seconds = interleave({name: lambda name=name: step_of(name) for name in names}, 20)  # type: ignore[misc]
    rounds = [calls[start : start + 3] for start in range(0, 60, 3)]
    assert all(sorted(one) == names for one in rounds)
    assert {one[0] for one in rounds} == set(names)
    assert [len(seconds[name]) for name in names] == [20, 20, 20]
