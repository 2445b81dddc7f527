"""The study of the paper's claims, shortened: real runs, stopped and gone on with, one report."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from studies.paper import cluster
from studies.paper.report import (
    NO_VERDICT,
    NOT_SHOWN,
    SHOWN,
    gains,
    show,
    verdict,
    write_report,
)
from studies.paper.results import Results
from studies.paper.scales import LAPTOP, PLAIN, PRORES, Run, flags, runs_of
from tests.examples.clone import REPOSITORY, environment

ITERATIONS = 40
RUNS = ["post-24-plain-seed1", "post-24-prores-seed1"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "studies.paper", *words, "--iterations", str(ITERATIONS)]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The first look, stopped in the middle and gone on with; where its runs are, what it said."""
    root = tmp_path_factory.mktemp("study")
    look = command("see", "--scale", "minutes", "--output", str(root))
    with subprocess.Popen(
        look, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True
    ) as first:
        tracker = root / RUNS[0] / "checkpoints" / "latest_checkpointed_iteration.txt"
        while not tracker.exists() and first.poll() is None:
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        output = first.communicate(timeout=600)[0]
    assert first.returncode == 75, output
    assert "the same command goes on" in output
    again = subprocess.run(
        look, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert again.returncode == 0, again.stderr
    return root, again.stdout


def logged(root: Path, run: str) -> tuple[dict[int, float], float]:
    """The losses of a run, and its last validation loss, from its log."""
    text = (root / run / "log.txt").read_text()
    found = re.findall(r"iteration +(\d+)/ +\d+ .*?lm loss: ([0-9.E+-]+)", text)
    # Of the evaluation within the training: there is another one behind its end.
    validation = re.findall(r"validation loss at iteration \d+ \|.*?value: ([0-9.E+-]+)", text)
    return {int(step): float(loss) for step, loss in found}, float(validation[-1])


def test_a_stopped_study_goes_on(study: tuple[Path, str]) -> None:
    root, _ = study
    for run in RUNS:
        losses, _ = logged(root, run)
        assert sorted(losses) == list(range(1, ITERATIONS + 1))
        assert len((root / run / "seconds.txt").read_text().split()) == 2
    text = (root / RUNS[0] / "log.txt").read_text()
    assert "successfully loaded checkpoint" in text


def test_results_are_those_of_the_logs(study: tuple[Path, str]) -> None:
    root, _ = study
    for run in RUNS:
        losses, validation = logged(root, run)
        result = json.loads((root / run / "result.json").read_text())
        assert result["validation_loss"] == pytest.approx(validation, rel=1e-5)
        steps, values = result["curves"]["training loss"]
        assert steps == list(range(1, ITERATIONS + 1))
        assert dict(zip(steps, values, strict=True)) == pytest.approx(losses, rel=1e-4)


def test_the_first_look_ends_in_a_sentence_and_a_picture(study: tuple[Path, str]) -> None:
    root, output = study
    for run in RUNS:
        assert f"{logged(root, run)[1]:.3f}" in output.splitlines()[-1]
    assert (root / "see.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_has_the_results(study: tuple[Path, str], tmp_path: Path) -> None:
    root, _ = study
    words = ("--scale", "minutes", "--output", str(root), "--report-dir", str(tmp_path))
    made = subprocess.run(
        [*command("main", *words), "--report-only"],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    text = (tmp_path / "report.md").read_text()
    (row,) = re.findall(r"^\| post \| 24 \| 130m.*no verdict.*$", text, re.MULTILINE)
    plain, ours = (logged(root, run)[1] for run in RUNS)
    cells = [cell.strip() for cell in row.split("|")]
    assert f"{plain:.4f}" in cells
    assert f"{ours:.4f}" in cells
    assert f"{plain - ours:+.4f}" in cells
    html = (tmp_path / "report.html").read_text()
    assert html.count("data:image/png;base64,") == text.count(".png)") > 0
    # The one file that is committed is enough to write the report again.
    before = text
    again = subprocess.run(
        [*command("main", "--scale", "minutes", "--output", str(tmp_path)), "--report-only"],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "report.md").read_text() == before


def test_a_gain_within_its_spread_over_the_seeds_is_none() -> None:
    plain = {1: 1.60, 2: 1.70, 3: 1.65}
    assert gains(plain, {3: 1.60, 1: 1.56, 2: 1.65, 4: 0.0}) == pytest.approx([0.04, 0.05, 0.05])
    assert verdict([0.04, 0.05, 0.05]) == SHOWN
    assert verdict([0.00, 0.05, 0.05]) == NOT_SHOWN
    assert verdict([-0.04, -0.04, -0.05]) == NOT_SHOWN
    assert verdict([0.5, 0.5]) == NO_VERDICT
    infinite = float("inf")
    assert verdict([infinite] * 3) == SHOWN  # plain diverged with every seed
    assert verdict([infinite, 0.1, 0.1]) == NOT_SHOWN
    assert verdict([-infinite] * 3) == NOT_SHOWN
    assert show([1.0, 2.0]) == "1.5000 ± 0.5000"
    assert show([0.25], "+") == "+0.2500"
    assert show([1.0, infinite]) == "diverged"


def test_the_committed_report_is_that_of_its_runs(tmp_path: Path) -> None:
    committed = REPOSITORY / "docs/paper/laptop"
    write_report(committed, LAPTOP, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (committed / "report.md").read_text() == text
    runs = {r["name"]: r for r in json.loads((committed / "runs.json").read_text())["runs"]}
    assert set(runs) <= {run.name for run in runs_of("all", LAPTOP)}
    # Table 2 and the verdicts on it, by other means.
    (section,) = re.findall(r"\(Table 2\)(.*?)\n## ", text, re.DOTALL)
    rows = [[cell.strip() for cell in row.split("|")[:-1]] for row in section.split("\n| ")[3:]]
    assert len(rows) == 11
    for placement, layers, _, _, _, _, seeds, gain, verdict_, *_ in rows:
        name = f"{placement}-{layers}-{{}}-seed{{}}"
        falls = [
            runs[name.format(PLAIN, seed)]["validation_loss"]
            - runs[name.format(PRORES, seed)]["validation_loss"]
            for seed in (1, 2, 3)
            if name.format(PRORES, seed) in runs
        ]
        low, *_, high = sorted(falls)
        assert seeds == str(len(falls))
        assert gain == f"{sum(falls) / len(falls):+.4f} ± {(high - low) / 2:.4f}"
        clear = SHOWN if sum(falls) / len(falls) > high - low else NOT_SHOWN
        assert verdict_ == (clear if len(falls) == 3 else NO_VERDICT)
    assert f"Not made, {len(runs_of('all', LAPTOP)) - len(runs)} of" in text


def test_arms_differ_in_what_they_are_named_for() -> None:
    plain, long, prores = (
        flags(Run("post", arm, 24), LAPTOP, Path("d"), Path("r"))
        for arm in ("plain", "long", PRORES)
    )
    at = plain.index("--lr-warmup-iters") + 1
    assert (plain[at], long[at], prores[at]) == ("100", "240", "100")  # 10%; as long as W; 10%
    assert [a for a, b in zip(plain, long, strict=True) if a != b] == ["100"]
    assert prores[prores.index("--prores-warmup-iters") + 1] == "240"
    assert "--prores-warmup-iters" not in plain
    pre = flags(Run("pre", PLAIN, 12), LAPTOP, Path("d"), Path("r"))
    assert pre[at] == "20"  # 2%


def test_seeds_come_one_after_the_other() -> None:
    runs = runs_of("main", LAPTOP)
    assert [run.seed for run in runs] == [1] * 12 + [2] * 12 + [3] * 12
    assert len(runs_of("all", LAPTOP)) == len(set(runs_of("all", LAPTOP))) > len(runs)
    assert Results([]).cases() == []


def test_the_papers_runs_are_job_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[list[str]] = []

    def plan(script: str, words: Sequence[str], nodes: int) -> str:
        planned.append([script, *words, str(nodes)])
        return ""

    monkeypatch.setattr(cluster, "_plan", plan)
    shown = "\n".join(cluster.show("all"))
    arrays = re.findall(r"^sbatch --array=0-(\d+) examples/slurm/sweep.sbatch (\S+)", shown, re.M)
    # 7 kinds of 3 sizes, twice; 20 rows of 3 placements and 5 without ProRes; 8 methods, 6 depths.
    assert [(int(last) + 1, Path(script).stem) for last, script in arrays] == [
        (42, "norm_placements"),
        (65, "schedule_ablation"),
        (48, "depth_study"),
    ]
    for _, script in arrays:
        listed = subprocess.run(
            ["bash", script, "--list"],
            cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        for line in listed.stdout.splitlines():
            assert line.split(" ", 1)[1] in shown
    # The first run of every size: three, one, six depths; and the 7B model twice.
    assert [Path(words[0]).stem for words in planned] == [
        *["norm_placements"] * 3,
        "schedule_ablation",
        *["depth_study"] * 6,
        *["pretrain_7b"] * 2,
    ]
    assert planned[3][1:] == ["plain", "pre", "1"]


def test_the_papers_runs_are_planned() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "studies.paper", "figure5", "--scale", "cluster", "--dry-run"],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[::2] == [
        f"sbatch --nodes=4 examples/slurm/pretrain.sbatch examples/pretrain_7b.sh pre {arm}"
        for arm in (PLAIN, PRORES)
    ]
    hidden, ffn, layers, vocabulary = 4096, 11008, 32, 32_000
    layer = 4 * hidden**2 + 3 * hidden * ffn + 2 * hidden
    parameters = 2 * vocabulary * hidden + layers * layer + hidden
    tokens = 512 * 1024 * 100_000
    for line in lines[1::2]:
        assert f"planned: {parameters:,} parameters, 32 GPUs, {tokens / 1e9:.2f}B tokens" in line
        (memory,) = re.findall(r"([0-9.]+) GiB on the fullest GPU", line)
        # bf16 weights and float32 gradients at least; less than a GPU has.
        assert parameters * 6 / 2**30 < float(memory) < 80 * 1e9 / 2**30
        assert "warning" not in line
