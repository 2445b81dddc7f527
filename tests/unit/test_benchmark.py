"""The benchmark, on tiny models. What it measures is not judged here.

Cases are the real ones, measured in a process of a fork server that has Megatron imported already;
the commands of docs/benchmarks/README.md are run as a user runs them.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prores.config.placement import PLACEMENTS
from megatron_prores.errors import UserError
from megatron_prores.measure.peak import peak_tflops
from studies.benchmark import cases, main, report, worker
from studies.benchmark.cases import AFTER, CASES, STOCK, WARMUP
from studies.benchmark.measure import interleave, ratio
from tests.distributed import launch
from tests.distributed.launch import REPOSITORY

TINY = """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 16
    --micro-batch-size 2 --global-batch-size 4 --vocab-size 128
""".split()
WEIGHTS = 2 * (4 * 32**2 + 3 * 32 * 64 + 2 * 32) + 2 * 128 * 32 + 32
FLOPS_PER_TOKEN = 6 * (2 * (4 * 32**2 + 3 * 32 * 64) + 32 * 128) + 6 * 2 * 32 * 16


def measure_at_once(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Measures with blocks of one step."""
    import torch

    torch.set_num_threads(1)
    worker.BLOCK_SECONDS = 0.0
    return worker.measure(name, settings)


def with_flags(settings: dict[str, Any], *flags: str) -> dict[str, Any]:
    return settings | {"megatron_flags": [*settings["megatron_flags"], *flags]}


def measure_without_memory(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Measures a case that wants 5 GB for a matrix, where there are 3 GB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 3 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return measure_at_once(name, with_flags(settings, "--ffn-hidden-size", "40000000"))


def measure_and_die(name: str, settings: dict[str, Any]) -> None:
    os.abort()


def measure_and_print(name: str, settings: dict[str, Any]) -> None:
    print("measured", name)
    raise AssertionError("called for nothing")


def measure_fp8_in_bf16(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Measures the sides of an FP8 case, in bf16 all of them."""
    cases.CASES[name] = replace(CASES[name], sides=CASES["7B-fp8"].sides)
    return measure_at_once(name, settings)


def measure_another_plain_loop(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Measures with a plain loop whose learning rate is another."""
    from studies.benchmark import plain

    stock = plain.PlainLoop.__init__

    def init(loop: plain.PlainLoop, recipe: plain.Recipe, weights: Any) -> None:
        stock(loop, replace(recipe, lr=0.1), weights)

    plain.PlainLoop.__init__ = init  # type: ignore[method-assign]
    return measure_at_once(name, settings)


def measure_with_warmup_for_open(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Measures a case whose ProRes model is never open."""
    cases.CASES[name] = replace(CASES[name], sides=(STOCK, WARMUP))
    # Weights that are large enough for the branches to matter in the first step.
    return measure_at_once(name, with_flags(settings, "--init-method-std", "0.5"))


Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the benchmark with tiny models, and another function that measures."""
    monkeypatch.setattr(main, "CONTEXT", launch._context)

    def run(named: str, *flags: str, by: Callable[..., Any] = measure_at_once) -> int:
        monkeypatch.setattr(main, "measure", by)
        argv = ["--device", "cpu", "--cases", named, "--rounds", "2", *flags]
        return main.main([*argv, "--output", str(tmp_path / "out"), "--", *TINY])

    return run


def rows(output: Path) -> dict[str, Any]:
    lines = (output / "results.jsonl").read_text().splitlines()
    return {row["case"]: row for row in map(json.loads, lines)}


def test_a_case_is_measured_and_written(run: Run, tmp_path: Path) -> None:
    assert run("1.3B-bf16") == 0
    row = rows(tmp_path / "out")["1.3B-bf16"]
    measured = row["measured"]
    names = {side.name for side in CASES["1.3B-bf16"].sides}
    assert measured["seconds"].keys() == measured["bytes"].keys() == names
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in measured["seconds"].values())
    assert measured["alphas"][STOCK.name] == []
    assert measured["alphas"][WARMUP.name] == pytest.approx([0.502, 0.251], abs=0.01)
    assert measured["alphas"][AFTER.name] == [1.0, 1.0]
    assert measured["parameters"] == WEIGHTS
    assert measured["flops_per_step"] == 4 * 16 * FLOPS_PER_TOKEN
    # Weights in bf16, gradients, master weights and Adam's moments in float32.
    assert min(measured["bytes"].values()) > 18 * WEIGHTS
    # Memory is counted, not sampled: the same model takes the same, to some hundred bytes.
    assert max(measured["bytes"].values()) < 1.01 * min(measured["bytes"].values())
    assert row["command"].startswith("python -m studies.benchmark --device cpu")
    text = (tmp_path / "out/report.md").read_text()
    assert text.count("\n| 1.3B-bf16 | 2 of 24 | ") == 4


def test_every_placement_and_the_attentions_are_measured(run: Run, tmp_path: Path) -> None:
    laptop = cases.default_cases("cpu")
    others = ["laptop-layer-norms", "laptop-attention"]
    assert laptop[:-2] == [*(f"laptop-{name}" for name in PLACEMENTS), *others]
    del laptop[-2:]
    assert run(",".join(laptop[1:])) == 0
    found = rows(tmp_path / "out")
    assert list(found) == laptop[1:]
    for name, row in found.items():
        alphas = row["measured"]["alphas"]
        assert set(alphas) == {side.name for side in CASES[name].sides}
        for side in CASES[name].sides:
            opened = side.opened or side.schedule == "none"
            assert (alphas[side.name] == [1.0, 1.0]) == opened
    peaks = found["laptop-attention"]["measured"]["bytes"]
    assert peaks["fused attention"] < peaks["unfused attention"]


def test_the_main_program_and_a_plain_loop_come_to_the_same_losses(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="give two equal batch sizes"):
        run("24x32-plain")
    monkeypatch.setattr(sys.modules[__name__], "TINY", [*TINY, "--micro-batch-size", "4"])
    assert run("24x32-plain") == 0
    row = rows(tmp_path / "out")["24x32-plain"]
    assert all(len(seconds) == 2 for seconds in row["measured"]["seconds"].values())
    assert row["measured"]["parameters"] == WEIGHTS
    row["measured"]["seconds"] = {"plain PyTorch loop": [2.0] * 2, "the main program": [3.0] * 2}
    row["settings"]["megatron_flags"] = []
    assert [*report.verdicts(row)] == [
        "24x32-plain, time against a plain loop: 1.500 (target 1.30): MISSED"
    ]
    assert run("8x256-plain", by=measure_another_plain_loop) == 1
    reason = rows(tmp_path / "out")["8x256-plain"]["failed"]
    assert "the plain loop has another loss" in reason


def test_a_case_fails_alone_and_is_measured_again(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("1.3B-bf16", by=measure_and_die) == 1
    assert "exit code -6" in rows(out)["1.3B-bf16"]["failed"]
    assert run("7B-bf16", by=measure_without_memory) == 1
    reason = rows(out)["7B-bf16"]["failed"]
    assert "allocate memory" in reason
    assert "\n" not in reason
    assert f"- 7B-bf16 FAILED: {reason}" in capsys.readouterr().out
    assert "Traceback" in (out / "log.txt").read_text()
    # Both are tried again, after the one that was not tried at all.
    assert run("1.3B-bf16,7B-bf16,130M-bf16") == 0
    shown = capsys.readouterr()
    assert re.findall(r"\] (\S+)", shown.err) == ["130M-bf16", "1.3B-bf16", "7B-bf16"]
    assert "FAILED" not in shown.out
    # What is there is not measured again.
    assert run("1.3B-bf16,7B-bf16,130M-bf16", by=measure_and_print) == 0
    # With other settings it is not what was asked for.
    before = rows(out)
    assert run("130M-bf16", "--peak-tflops", "1", by=measure_and_print) == 1
    assert "called for nothing" in capsys.readouterr().out
    assert {name: rows(out)[name] for name in ("1.3B-bf16", "7B-bf16")} == {
        name: before[name] for name in ("1.3B-bf16", "7B-bf16")
    }


@pytest.mark.parametrize(
    ("measure", "reason"),
    [
        (measure_fp8_in_bf16, "FP8 was not used, its loss is that of bf16"),
        (measure_with_warmup_for_open, "is not the model that it is compared with"),
    ],
)
def test_models_that_are_not_what_they_should_be_are_no_measurement(
    measure: Callable[..., Any], reason: str, run: Run, tmp_path: Path
) -> None:
    assert run("1.3B-bf16", by=measure) == 1
    assert reason in rows(tmp_path / "out")["1.3B-bf16"]["failed"]


def test_flags_that_megatron_refuses_end_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(main, "CONTEXT", launch._context)
    argv = ["--device", "cpu", "--output", str(tmp_path / "out"), "--", *TINY]
    with pytest.raises(UserError, match="FP8 needs Transformer Engine"):
        main.main([*argv, "--fp8-format", "hybrid"])
    with pytest.raises(UserError, match="Megatron refuses these flags"):
        main.main([*argv, "--num-attention-heads", "5"])
    assert not (tmp_path / "out").exists()


def wait(seconds: float) -> None:
    time.sleep(seconds)


def test_the_time_budget_is_kept(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("1.3B-bf16,7B-bf16", "--time-budget-minutes", "0.7", by=measure_and_print) == 0
    assert "Not measured yet: 1.3B-bf16, 7B-bf16." in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    # A case that is still running by then is ended.
    start = time.monotonic()
    assert main.run_apart(wait, (60.0,), seconds=1.0)[0].keys() == {"no time"}
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--device tpu", "--device tpu: choose one of cuda, cpu"),
        ("--cases 1.3B-bf16,13B-bf16", "--cases 13B-bf16: choose some of 1.3B-bf16"),
        ("--cases=", "--cases '': choose some of"),
        ("--device cpu --cases 7B-fp8", "--cases 7B-fp8: needs --device cuda"),
        ("--cases laptop-attention", "--cases laptop-attention: needs --device cpu"),
        ("--rounds 0", "--rounds 0: must be at least 1"),
        ("--time-budget-minutes 0", "--time-budget-minutes 0.0: must be a number above 0"),
        ("--peak-tflops nan", "--peak-tflops nan: must be a number above 0"),
        (f"--output {__file__}", "not a directory"),
        ("--colour", "unrecognized arguments: --colour"),
    ],
)
def test_wrong_flags_are_refused(flags: str, complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)):
        main.read_options(flags.split())


@pytest.mark.parametrize("content", ["[]", "nothing", '{"case": "1.3B-bf16"}'])
def test_a_file_that_is_none_of_ours_is_left_alone(run: Run, tmp_path: Path, content: str) -> None:
    path = tmp_path / "out/results.jsonl"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=r"results\.jsonl: not results of this benchmark"):
        run("1.3B-bf16", by=measure_and_print)
    assert path.read_text() == content


def test_the_median_of_ratios_within_rounds_and_its_interval() -> None:
    base = [1.0, 10.0, 2.0, 4.0, 1.0]
    result = ratio([1.1, 12.0, 2.6, 4.4, 1.1], base)
    assert result.median == pytest.approx(1.1)
    assert result.low == pytest.approx(1.1)
    assert 1.1 < result.high <= 1.3 + 1e-9
    assert ratio(base, base).median == 1.0


def test_sides_take_turns_in_changing_order() -> None:
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    names = ["a", "b", "c"]
    seconds = interleave({name: lambda name=name: side(name) for name in names}, 20)  # type: ignore[misc]
    rounds = [calls[start : start + 3] for start in range(0, 60, 3)]
    assert all(sorted(one) == names for one in rounds)
    assert {one[0] for one in rounds} == set(names)
    assert [len(seconds[name]) for name in names] == [20, 20, 20]


@pytest.mark.parametrize(
    ("gpu", "bf16"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA RTX A1000", None),
        ("AMD EPYC, 2 threads", None),
    ],
)
def test_peaks_are_of_the_gpu_that_is_there(gpu: str, bf16: float | None) -> None:
    assert peak_tflops(gpu) == bf16
    assert peak_tflops(gpu, fp8=True) == (None if bf16 is None else 2 * bf16)
    assert peak_tflops(gpu, given=100.0) == 100.0


def made_up_row(name: str, machine: str = "NVIDIA H200", **settings: Any) -> dict[str, Any]:
    """A row with round figures: 32768 tokens and 100 TFLOP a step; FP8 is twice as fast."""
    case = CASES[name]
    speed = 2.0 if case.precision == "fp8" else 1.0
    base = [0.2 / speed, 0.25 / speed, 0.2 / speed]
    slower = {WARMUP.name: 1.02, AFTER.name: 1.004, "stock Megatron in bf16": speed}
    seconds = {
        side.name: [slower.get(side.name, 1.0) * second for second in base] for side in case.sides
    }
    return {
        "case": name,
        "settings": {"machine": machine, "peak_tflops": None, "megatron_flags": []} | settings,
        "date": "2026-01-01",
        "commit": "abc",
        "command": "python -m studies.benchmark",
        "measured": {
            "seconds": seconds,
            "bytes": dict.fromkeys(seconds, 2**35) | {AFTER.name: 2**35 + 2**30},
            "flops_per_step": 1e14,
            "global_batch_size": 32,
            "seq_length": 1024,
            "micro_batch_size": 8,
            "num_layers": case.layers or 24,
            "steps_per_block": 3,
            "parameters": 1300000000,
            "transformer_impl": "transformer_engine",
            "attention": "auto",
            "gradient_accumulation_fusion": False,
        },
    }


def cells(text: str, *start: str) -> list[str]:
    """The cells of the one row of the table that begins with these words."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:2] == "| "]
    (found,) = [line for line in lines if line[0] == start[0] and line[2] == start[1]]
    return found


def test_the_report_says_what_was_measured() -> None:
    found = {name: made_up_row(name) for name in ("7B-fp8", "1.3B-bf16", "7B-bf16")}
    found["130M-bf16"] = made_up_row("130M-bf16")
    del found["130M-bf16"]["measured"]
    found["130M-bf16"]["failed"] = "OutOfMemoryError: too small"
    settings = found["7B-fp8"]["settings"]
    text = report.as_text(found, ["1.3B-bf16", "350M-bf16"], settings)
    # 32768 tokens in 0.2 s; 100 TFLOP in 0.2 s of 989.4 TFLOP/s.
    assert cells(text, "1.3B-bf16", "stock Megatron") == [
        *("1.3B-bf16", "24", "stock Megatron", "163,840", "50.5 %", "200.0"),
        *("1.000 [1.000, 1.000]", "32,768.0", "1.0000"),
    ]
    assert cells(text, "1.3B-bf16", WARMUP.name)[3:7] == [
        *("160,627", "49.5 %", "204.0", "1.020 [1.020, 1.020]"),
    ]
    assert cells(text, "1.3B-bf16", AFTER.name)[-2:] == ["33,792.0", "1.0312"]
    # FP8 is quoted against FP8's peak, and the models in bf16 beside it against bf16's.
    assert cells(text, "7B-fp8", "stock Megatron")[4] == "50.5 %"
    in_bf16 = cells(text, "7B-fp8", "stock Megatron in bf16")
    assert in_bf16[4:7:2] == ["50.5 %", "2.000 [2.000, 2.000]"]
    assert cells(text, "7B-bf16", "stock Megatron")[1] == "14 of 32"
    for line in (
        "- date: 2026-01-01",
        "- commit: abc",
        "- command: python -m studies.benchmark",
        "- 130M-bf16 FAILED: OutOfMemoryError: too small",
        "Not measured yet: 350M-bf16. The same command goes on with them.",
        "- 7B-fp8 ProRes after warmup, peak memory: 1.031 (target 1.00): MISSED",
    ):
        assert line in text.splitlines()


def test_verdicts_are_computed() -> None:
    assert list(report.verdicts(made_up_row("1.3B-bf16"))) == [
        "1.3B-bf16 ProRes during warmup, step time: 1.020 (target 1.01): MISSED",
        "1.3B-bf16 ProRes during warmup, peak memory: 1.000 (target 1.00): reached",
        "1.3B-bf16 ProRes after warmup, step time: 1.004 (target 1.00): reached",
        "1.3B-bf16 ProRes after warmup, peak memory: 1.031 (target 1.00): MISSED",
        # The slower side of ProRes: 50.5 % / 1.02.
        "1.3B-bf16 (24 layers), MFU in percent: 49.54 (target 45): reached",
    ]
    assert (
        "7B-bf16 (14 of 32 layers), MFU in percent: 49.54 (target 50): MISSED"
        in report.verdicts(made_up_row("7B-bf16"))
    )
    assert (
        "7B-fp8 (8 of 32 layers), speed against bf16: 1.961 (target 1.3): reached"
        in report.verdicts(made_up_row("7B-fp8"))
    )
    # A GPU that is not known has no MFU; the user's own model is not what the target is for.
    unknown = list(report.verdicts(made_up_row("1.3B-bf16", machine="NVIDIA X1")))
    assert "MFU in percent: n/a, the GPU's peak is not known (target 45)" in unknown[-1]
    own = report.verdicts(made_up_row("1.3B-bf16", megatron_flags=["--num-layers", "1"]))
    assert not any("MFU" in verdict for verdict in own)
    # Slower by no more than the noise.
    row = made_up_row("1.3B-bf16")
    row["measured"]["seconds"] |= {WARMUP.name: [0.2, 0.2575, 0.22]}
    assert "step time: 1.030 (target 1.01): undecided" in next(report.verdicts(row))


def documented(device: str) -> str:
    """The one command of docs/benchmarks/README.md for a device."""
    text = (REPOSITORY / "docs/benchmarks/README.md").read_text()
    commands = re.findall(r"^(.*\$PYTHON -m studies\.benchmark.*)$", text, re.MULTILINE)
    assert len(commands) == 2
    (command,) = [command for command in commands if f"--device {device}" in command]
    return command


def test_the_documented_command_for_a_gpu(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, flags = documented("cuda").partition("studies.benchmark ")
    shrunk = [*shlex.split(flags), "--device", "cpu", "--rounds", "2", "--peak-tflops", "0.001"]
    assert run("130M-bf16", *shrunk) == 0
    shown = capsys.readouterr().out
    shares = re.findall(r" ([\d.]+) % ", shown.partition("Ratios:")[0])
    assert len(shares) == 4
    assert all(0 < float(share) < math.inf for share in shares)


def test_the_documented_command_for_a_cpu(tmp_path: Path) -> None:
    command = f"{documented('cpu')} --cases laptop-post --rounds 2 -- {' '.join(TINY)}"
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    out = tmp_path / "benchmark-results"
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "report.md", "log.txt"}
    assert result.stdout == (out / "report.md").read_text()
    assert result.stdout.count("\n| laptop-post | 2 of 4 |") == 4
    for word in ("date: ", "commit: ", "torch: ", "command: python -m studies.benchmark "):
        assert f"\n- {word}" in result.stdout
    assert ", 1 thread\n" in result.stdout
    assert "iteration" not in result.stdout
