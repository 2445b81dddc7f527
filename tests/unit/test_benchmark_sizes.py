"""The benchmark of the published sizes, on tiny models; its speed is not judged here.

Rows are the real ones, measured in a process of a fork server that has Megatron imported already;
the command of docs/benchmarks/README.md is run as a user runs it.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import Any

import pytest

from megatron_prores.errors import UserError
from studies.benchmark.model import PUBLISHED, Size
from studies.benchmark.sizes import main as sizes
from studies.benchmark.sizes import report, row
from studies.benchmark.sizes.flops import flops_per_token, peak_tflops
from studies.benchmark.sizes.options import read_options
from studies.benchmark.sizes.plan import (
    expected_seconds,
    layers_that_fit,
    memory_needed,
    plan,
)
from studies.benchmark.sizes.results import Results
from tests.distributed.launch import REPOSITORY, run_ranks

TINY = """
    --suite sizes --device cpu --num-layers 2 --hidden-size 32 --ffn-hidden-size 64
    --num-attention-heads 4 --seq-length 16 --micro-batch-size 2 --sequences 4 --vocab-size 64
    --rounds 2 --block-seconds 0.02 --threads 1
""".split()
SIDES = {"stock Megatron", "stock Megatron again", "ProRes during warmup", "ProRes after warmup"}
H200 = int(139.8 * 2**30)


class Rows:
    """Runs rows in the fork server, and remembers which."""

    def __init__(self, directory: Path, function: Callable[..., None] = row.main) -> None:
        self.directory = directory
        self.function = function
        self.requests: list[dict[str, Any]] = []

    def __call__(
        self, request: dict[str, Any], seconds: float | None
    ) -> tuple[dict[str, Any], str]:
        directory = self.directory / str(len(self.requests))
        self.requests.append(request)
        answer = directory / "answer.json"
        job = run_ranks(directory, self.function, (json.dumps(request), str(answer)))
        return sizes.read_outcome(answer, job.exit_codes[0]), job.output


def row_without_memory(request: str, answer: str) -> None:
    """Measures a row that wants 5 GB for a matrix, where there are 3 GB."""
    wish = json.loads(request)
    wish["argv"] += ["--ffn-hidden-size", "40000000"]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 3 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    row.main(json.dumps(wish), answer)


def row_that_dies(request: str, answer: str) -> None:
    os.abort()


def test_rows_are_measured_fail_alone_and_are_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    argv = [*TINY, "--output", str(out)]
    assert sizes.main([*argv, "--sizes", "1.3B"], Rows(tmp_path / "first")) == 0
    document = json.loads((out / "results.json").read_text())
    measured = document["rows"]["1.3B bf16"]["measured"]
    assert measured["seconds"].keys() == measured["bytes"].keys() == SIDES
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in measured["seconds"].values())
    assert measured["alphas"]["ProRes during warmup"] == pytest.approx([0.502, 0.251], abs=0.01)
    assert measured["alphas"]["ProRes after warmup"] == [1.0, 1.0]
    assert measured["losses"]["ProRes after warmup"] == measured["losses"]["stock Megatron"]
    assert measured["parameters"] == 2 * (4 * 32**2 + 3 * 32 * 64 + 2 * 32) + 2 * 128 * 32 + 32
    # The figure is Megatron's; ours is the closed formula.
    size = Size(**document["rows"]["1.3B bf16"]["plan"]["size"])
    assert measured["flops_per_step"] == 4 * 16 * flops_per_token(size, measured["vocabulary"])
    # Weights in bf16, gradients, master weights and Adam's moments in float32.
    assert min(measured["bytes"].values()) > 18 * measured["parameters"]
    assert max(measured["bytes"].values()) < 1.01 * min(measured["bytes"].values())

    # One row more, which fails; the one that is there is not measured again.
    both = [*argv, "--sizes", "1.3B,7B"]
    poor = Rows(tmp_path / "poor", row_without_memory)
    assert sizes.main(both, poor) == 1
    assert len(poor.requests) == 1
    document = json.loads((out / "results.json").read_text())
    failed = document["rows"]["7B bf16"]
    assert failed["status"] == "failed"
    assert "allocate memory" in failed["reason"]
    assert "\n" not in failed["reason"]
    assert f"7B bf16 FAILED: {failed['reason']}" in capsys.readouterr().out
    assert "Traceback" in (out / "log.txt").read_text()

    # A process that says nothing more is a failed row as well.
    assert sizes.main(both, Rows(tmp_path / "dead", row_that_dies)) == 1
    assert "SIGABRT" in json.loads((out / "results.json").read_text())["rows"]["7B bf16"]["reason"]

    # The failed row is tried again, and it alone.
    again = Rows(tmp_path / "again")
    assert sizes.main(both, again) == 0
    assert len(again.requests) == 1
    assert set(json.loads((out / "results.json").read_text())["rows"]) == {"1.3B bf16", "7B bf16"}
    assert (out / "table.md").read_text().count("\n| ") == 1 + 2 * len(SIDES)

    nothing = Rows(tmp_path / "nothing")
    assert sizes.main(both, nothing) == 0
    assert nothing.requests == []

    # Other settings are another benchmark.
    before = (out / "results.json").read_bytes()
    with pytest.raises(UserError, match="rounds 2 there, 3 here"):
        sizes.main([*both, "--rounds", "3"], nothing)
    with pytest.raises(UserError, match=r"hidden-size 32 .* there, .*hidden-size 64 .* here"):
        sizes.main([*both, "--hidden-size", "64"], nothing)
    assert (out / "results.json").read_bytes() == before
    assert nothing.requests == []
    assert sizes.main([*both, "--fresh", "--time-budget-minutes", "0.01"], nothing) == 0
    assert nothing.requests == []


def test_flags_that_megatron_refuses_end_it_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "results"
    argv = [*TINY, "--sizes", "130M", "--output", str(out), "--", "--fp8-format", "hybrid"]
    with pytest.raises(UserError, match="FP8 needs Transformer Engine"):
        sizes.main(argv, Rows(tmp_path / "rows"))
    assert not out.exists()


def test_an_fp8_row_that_computes_in_bf16_is_no_measurement(tmp_path: Path) -> None:
    # All three models of such a row, on a machine that has no FP8.
    options = read_options([*TINY, "--sizes", "7B"])
    (planned,) = plan(options, H200, ("bf16",))
    request = sizes._request(planned, options, deadline=None) | {"precision": "fp8"}
    outcome, _ = Rows(tmp_path)(request, None)
    assert outcome["status"] == "failed"
    assert "FP8 was not used" in outcome["reason"]
    assert "stock Megatron in bf16" in outcome["reason"]


def test_a_row_ends_by_its_deadline_and_is_left_for_the_next_start(tmp_path: Path) -> None:
    out = tmp_path / "results"
    argv = [*TINY, "--sizes", "130M", "--output", str(out)]
    options = read_options(argv)
    (planned,) = plan(options, H200, ("bf16",))
    request = sizes._request(planned, options, deadline=time.time())
    outcome, _ = Rows(tmp_path / "late")(request, None)
    assert outcome["status"] == "no time"
    # The same by force: this one has not even imported Megatron by then.
    start = time.monotonic()
    outcome, _ = sizes.run_in_process(request | {"deadline": None}, seconds=0.5)
    assert outcome["status"] == "no time"
    assert time.monotonic() - start < 20


def test_no_row_is_started_that_the_budget_has_no_time_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    rows = Rows(tmp_path / "rows")
    argv = [*TINY, "--output", str(out), "--time-budget-minutes", "0.1"]
    assert sizes.main(argv, rows) == 0
    assert rows.requests == []
    assert not out.exists()
    shown = capsys.readouterr().out
    assert "Not measured yet: 1.3B bf16, 7B bf16, 130M bf16, 3B bf16, 350M bf16." in shown
    assert "1.3B bf16 MFU: not measured (target 45 %)" in shown


def check_flops(expected: dict[str, float]) -> None:
    from megatron.training.training import num_floating_point_operations

    for name, figure in expected.items():
        size = PUBLISHED[name]
        args = argparse.Namespace(
            num_layers=size.num_layers, hidden_size=size.hidden_size, seq_length=1024,
            ffn_hidden_size=size.ffn_hidden_size, num_attention_heads=size.num_attention_heads,
            kv_channels=size.hidden_size // size.num_attention_heads, padded_vocab_size=32000,
            swiglu=True, group_query_attention=False, num_experts=None, mtp_num_layers=None,
            moe_ffn_hidden_size=None, moe_latent_size=None, multi_latent_attention=False,
            moe_shared_expert_intermediate_size=None, attention_output_gate=False,
            experimental_attention_variant=None, hybrid_layer_pattern=None,
        )  # fmt: skip
        assert num_floating_point_operations(args, 32) == 32 * 1024 * figure, name


def test_flops_are_megatrons(tmp_path: Path) -> None:
    figures = {name: flops_per_token(size, 32000) for name, size in PUBLISHED.items()}
    job = run_ranks(tmp_path, check_flops, (figures,))
    assert job.succeeded, job.output[-2000:]


def test_the_published_sizes_are_as_large_as_their_names() -> None:
    billions = {name: size.parameters / 1e9 for name, size in PUBLISHED.items()}
    assert billions == pytest.approx(
        {"130M": 0.134, "350M": 0.37, "1.3B": 1.36, "3B": 2.69, "7B": 6.74}, rel=0.01
    )


def test_the_rows_with_targets_come_first_and_the_short_run_has_time_for_them() -> None:
    options = read_options(["--quick"])
    rows = plan(options, H200, options.precisions)
    names = [row.name for row in rows]
    assert names[:4] == ["1.3B bf16", "7B bf16", "7B fp8", "130M bf16"]
    assert len(set(names)) == 10
    assert options.budget_seconds is not None
    assert options.budget_seconds < 8 * 60
    assert sum(expected_seconds(row, options, 989.4) for row in rows[:4]) < options.budget_seconds


def test_layers_that_do_not_fit_are_left_out() -> None:
    for name, size in PUBLISHED.items():
        for precision in ("bf16", "fp8"):
            layers = layers_that_fit(size, precision, H200)
            assert layers >= 8
            assert (layers < size.num_layers) == ((name, precision) in SHORTER)
    assert layers_that_fit(PUBLISHED["7B"], "bf16", 10 * 2**30) == 0
    # The state alone of two models: 18 bytes a parameter.
    assert memory_needed(PUBLISHED["1.3B"], "bf16") > 2 * 18 * PUBLISHED["1.3B"].parameters


SHORTER = {("7B", "bf16"), ("7B", "fp8"), ("3B", "fp8")}
"""On an H200."""


@pytest.mark.parametrize(
    ("gpu", "bf16", "fp8"),
    [
        ("NVIDIA H200", 989.4, 1978.9),
        ("NVIDIA H100 80GB HBM3", 989.4, 1978.9),
        ("NVIDIA H100 PCIe", None, None),
        ("NVIDIA H200 NVL", None, None),
        ("NVIDIA B200", 2250.0, 4500.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, None),
        ("NVIDIA RTX A1000", None, None),
        ("AMD EPYC, 2 threads", None, None),
    ],
)
def test_peaks(gpu: str, bf16: float | None, fp8: float | None) -> None:
    assert peak_tflops(gpu, "bf16") == bf16
    assert peak_tflops(gpu, "fp8") == fp8
    assert peak_tflops(gpu, "bf16", 100.0) == 100.0
    assert peak_tflops(gpu, "fp8", 100.0) == 200.0


def made_up_document() -> dict[str, Any]:
    """A file of results with round figures: 32768 tokens and 100 TFLOP a step, on an H200."""
    options = read_options([])
    rows = {}
    for planned in plan(options, H200, options.precisions):
        if planned.size_name not in ("1.3B", "7B"):
            continue
        # Seconds of stock, ProRes during and after the warmup, by round; FP8 is twice as fast.
        speed = 2.0 if planned.precision == "fp8" else 1.0
        base = [0.2 / speed, 0.25 / speed, 0.2 / speed]
        seconds = {
            "stock Megatron": base,
            "stock Megatron again": base,
            "ProRes during warmup": [1.02 * second for second in base],
            "ProRes after warmup": [1.004 * second for second in base],
        }
        if planned.precision == "fp8":
            seconds["stock Megatron in bf16"] = [speed * second for second in base]
        rows[planned.name] = {
            "status": "done",
            "plan": planned.as_json(),
            "environment": {"date": "2026-01-01", "commit": "abc", "driver": "1.2"},
            "measured": {
                "seconds": seconds,
                "bytes": dict.fromkeys(seconds, 2**35) | {"ProRes after warmup": 2**35 + 2**30},
                "flops_per_step": 1e14,
                "sequences": 32,
                "sequence_length": 1024,
                "steps_per_block": 3,
                "parameters": 1.3e9,
                "implementation": "transformer_engine",
                "attention": "Transformer Engine fused",
                "gradient_accumulation_fusion": False,
                "cross_entropy_fusion": False,
            },
        }
    identity = {"machine": "NVIDIA H200", "torch": "2.11", **options.measured}
    return json.loads(json.dumps({"format": 1, "identity": identity, "rows": rows}))


def cells(text: str, *start: str) -> list[str]:
    """The cells of the one row of the table that has these words."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:2] == "| "]
    (found,) = [line for line in lines if set(start) <= set(line)]
    return found


def test_the_table_says_what_was_measured() -> None:
    text = report.as_text(made_up_document(), ["1.3B bf16", "130M bf16"])
    stock = cells(text, "1.3B", "bf16", "stock Megatron")
    # 32768 tokens in 0.2 s; 100 TFLOP in 0.2 s of 989.4 TFLOP/s.
    assert stock == [
        *("1.3B", "24", "bf16", "8 x 1024", "stock Megatron", "163,840", "50.5 %", "200.0"),
        *("1.000 [1.000, 1.000]", "32", "1.0000"),
    ]
    warmup = cells(text, "1.3B", "bf16", "ProRes during warmup")
    assert warmup[5:] == ["160,627", "49.5 %", "204.0", "1.020 [1.020, 1.020]", "32", "1.0000"]
    after = cells(text, "1.3B", "bf16", "ProRes after warmup")
    assert after[-2:] == ["33", "1.0312"]
    # FP8 is quoted against FP8's peak, and the models in bf16 beside it against bf16's.
    assert cells(text, "7B", "fp8", "stock Megatron")[6] == "50.5 %"
    assert cells(text, "7B", "fp8", "stock Megatron in bf16")[6:9:2] == [
        "50.5 %",
        "2.000 [2.000, 2.000]",
    ]
    # Fewer layers are said, in the row and below the table.
    assert cells(text, "7B", "bf16", "stock Megatron")[1] == "14 of 32"
    assert "Fewer layers than the published model: 7B bf16, 7B fp8." in text
    assert "Not measured yet: 130M bf16." in text
    for words in ("6 N + 6 L h s", "bf16 989.4, fp8 1978.9", "- driver: 1.2", "fused, gradient"):
        assert words in text


def test_verdicts_are_computed() -> None:
    document = made_up_document()
    found = report.verdicts(document)
    assert "1.3B bf16 ProRes during warmup, step time: 1.020 (target 1.01): MISSED" in found
    assert "1.3B bf16 ProRes after warmup, step time: 1.004 (target 1.00): reached" in found
    assert "1.3B bf16 ProRes, peak memory: 1.031 (target 1.00): MISSED" in found
    # The slower side of ProRes: 50.5 % / 1.02.
    assert "1.3B bf16 MFU: 49.5 % (target 45 %): reached" in found
    assert "7B bf16 (14 of 32 layers) MFU: 49.5 % (target 50 %): MISSED" in found
    assert "7B fp8 (8 of 32 layers) tokens/s against bf16: 1.961 (target 1.30): reached" in found
    # A GPU that is not known has no MFU, and a failed row no figures.
    document["identity"]["machine"] = "NVIDIA X1"
    document["rows"]["7B fp8"] |= {"status": "failed", "reason": "OutOfMemoryError: too small"}
    found = report.verdicts(document)
    assert "1.3B bf16 MFU: not measured (target 45 %)" in found
    assert "7B fp8 (8 of 32 layers) tokens/s against bf16: not measured (target 1.30)" in found
    assert "- 7B fp8 FAILED: OutOfMemoryError: too small" in report.as_text(document)
    # The user's own model is not the one that the target is for.
    document = made_up_document()
    document["identity"]["changed_sizes"] = ["--num-layers 1"]
    assert "1.3B bf16 MFU: not measured (target 45 %)" in report.verdicts(document)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 9}', '{"format": 1, "identity": {}, "rows": 3}']
)
def test_a_file_that_is_none_of_ours_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(UserError, match="cannot be read as results of this benchmark"):
        Results(path, {})
    assert path.read_text() == content
    Results(path, {}, fresh=True).add("a row", {"status": "done"})
    assert Results(path, {}).rows == {"a row": {"status": "done"}}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_the_command_of_the_documentation(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs/benchmarks/README.md").read_text()
    (command,) = re.findall(r"^```bash\n(.*?)\n```", text, flags=re.MULTILINE | re.DOTALL)
    shrunk = f"--device cpu --sizes 130M {' '.join(TINY)} --peak-tflops 0.001"
    command = f"{command.replace('--device cuda', '')} {shrunk}".replace("$PYTHON", sys.executable)
    command = command.replace("tools/", f"{shlex.quote(str(REPOSITORY))}/tools/")
    result = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    out = tmp_path / "benchmark-results"
    assert {path.name for path in out.iterdir()} == {"results.json", "table.md", "log.txt"}
    assert result.stdout == (out / "table.md").read_text()
    shares = re.findall(r"([\d.]+) %", result.stdout.partition("MFU =")[0])
    assert len(shares) == 4
    assert all(0 < float(share) < math.inf for share in shares)
    for word in ("commit: ", "torch: ", "megatron-core: ", "command: python tools/benchmark.py"):
        assert f"- {word}" in result.stdout
