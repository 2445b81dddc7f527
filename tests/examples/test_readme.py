"""Every command of README runs: the blocks of shell, in their order, in a clean clone."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_prores.command_line.arguments import add_prores_args
from megatron_prores.schedule.formulas import SCHEDULES
from tests.examples.clone import REPOSITORY, make_clone, run
from tests.unit.test_evaluation import write_tasks
from tests.wrong_invocations import ROWS

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)

# What makes the commands small enough for two cores, and nothing else. The last flag counts.
SHRUNK = """
  --device cpu --num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4
  --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 2
  --train-iters 4 --lr-warmup-iters 1 --lr-wsd-decay-iters 1 --prores-warmup-iters 3
  --eval-iters 1 --eval-interval 2 --log-interval 1 --save-interval 2
""".replace("\n", " ")


def test_readme_begins_with_the_two_commands() -> None:
    commands = [line.split("#")[0].strip() for line in BLOCKS[0].splitlines()]
    assert commands == ["bash examples/quickstart.sh", "bash tests/run.sh"]
    assert README.index("```bash") < 30
    # The first one runs in test_quickstart.py; the second one is running this.
    assert all((REPOSITORY / command.split()[1]).is_file() for command in commands)


def test_every_other_command_runs_in_order(tmp_path: Path) -> None:
    text, train, scores, published = BLOCKS[1:]
    text = text.replace("--output-dir data", "--output-dir data --max-megabytes 10")
    text = text.replace("--vocab-size 8192", "--vocab-size 512")
    train = train.replace("--nproc-per-node 8", "--standalone --nproc-per-node 2").rstrip()
    script = "\n".join(["set -euo pipefail", text, f"{train} {SHRUNK}"])
    result = run(["bash", "-c", script], make_clone(tmp_path))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "validation loss at iteration 4 on validation set" in result.stdout
    assert (tmp_path / "checkpoints/iter_0000004").is_dir()
    # The paper's tasks need a network; a task of four lines does not.
    write_tasks(tmp_path / "tasks")
    assert "--tasks prores_paper" in scores
    scores = scores.replace("--tasks prores_paper", "--tasks colors --include-path tasks")
    page = (REPOSITORY / "docs" / "export.md").read_text()
    same, back = re.findall(r"^```bash\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert same == BLOCKS[3]
    script = f"export PYTHON=$(bash scripts/setup.sh)\n{scores}\n{back}"
    result = run(["bash", "-e", "-c", script], tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "\ndef main(" in result.stdout
    assert (tmp_path / "imported" / "release" / "metadata.json").is_file()
    assert re.search(r"^ +colors +acc +\d+\.\d\d$", result.stdout, flags=re.MULTILINE)
    result = run(["bash", "-e", "-c", published], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    words = result.stdout.replace("\\\n", " ").split()
    for flag, value in (
        *(("--norm-placement", "post"), ("--prores-schedule", "none")),
        *(("--norm-placement", "deepnorm"), ("--prores-schedule", "linear_sqrt")),
        *(("--node-rank", "0"), ("--nnodes", "4")),
    ):
        assert (flag, value) in pairwise(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_tests_without_a_gpu_are_no_success() -> None:
    result = run(["bash", "tests/run.sh", "--gpu"], REPOSITORY)
    assert result.returncode == 2
    assert "no GPU" in result.stderr


def test_the_table_of_flags_is_the_programs(capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    parser = add_prores_args(argparse.ArgumentParser(add_help=False))
    flags = {option for action in parser._actions for option in action.option_strings}
    documented = set(re.findall(r"^\| `(--[a-z-]+)", README, flags=re.MULTILINE))
    assert documented == flags
    (row,) = [line for line in README.splitlines() if line.startswith("| `--prores-schedule")]
    assert set(re.findall(r"`(\w+)`", row)) == {*SCHEDULES, "none"}


def test_wrong_invocations_are_counted_right() -> None:
    assert f"| Wrong input | {len(ROWS)} wrong command lines" in README


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("https://"):
            assert (REPOSITORY / target.partition("#")[0]).exists(), target
