"""Every command of docs/launch.md runs: shrunk, or, where it needs GPUs, as a dry run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prores.launch.gpu_flags import CHOICES
from tests.examples.clone import REPOSITORY, make_clone
from tests.examples.test_published_runs import SHRUNK, user_environment
from tests.unit.event_files import write_start

PAGE = (REPOSITORY / "docs/launch.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clone(tmp_path_factory.mktemp("clone"))


def run_block(script: str, clone: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=clone,
        env=user_environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def test_the_first_try_trains(clone: Path) -> None:
    result = run_block(BLOCKS[0].replace("TRAIN_ITERS=20", "TRAIN_ITERS=4"), clone)
    assert "iteration        4/       4" in result.stdout
    assert "leaked" not in result.stdout + result.stderr  # what the bindings of Triton would tell
    assert (clone / "runs/130m/post-prores-linear/checkpoints/iter_0000004").is_dir()


def test_commands_for_gpus_are_understood(clone: Path) -> None:
    commands = [line.split("#")[0].rstrip() for line in BLOCKS[1].splitlines()]
    assert len(commands) == 8
    dry = "\n".join(f"{command} --dry-run" for command in commands)
    assert run_block(dry, clone).stdout.count("-m megatron_prores.launch") == 8
    assert run_block(BLOCKS[2], clone).stdout.count("-m megatron_prores.launch") == 2


def test_two_launchers_are_one_run(clone: Path) -> None:
    # Both on this host: the address is the loopback's.
    lines = BLOCKS[3].replace("10.0.0.1 ", "127.0.0.1 ").splitlines()
    both = f"{lines[0].split('#')[0]} & first=$!\n{lines[1]}\nwait $first"
    variables = {**SHRUNK, "GPUS_PER_NODE": "1", "LOG_ID": "a"}
    result = run_block(both, clone, **variables)
    assert "3b pre-prores-linear: node 0 of 2" in result.stdout
    assert "3b pre-prores-linear: node 1 of 2" in result.stdout
    logs = clone / "runs/3b/pre-prores-linear/logs/a"
    assert "iteration        4/       4" in (logs / "rank1.log").read_text()
    assert (logs / "rank0.log").is_file()


def test_runs_are_compared(clone: Path) -> None:
    for name, loss in (("pre-plain", 3.0), ("pre-prores-linear", 2.75)):
        logs = clone / "runs/130m" / name / "tensorboard"
        write_start(logs, dict.fromkeys(range(1, 5), loss), settings={"prores_schedule": name})
    printed = run_block(BLOCKS[4], clone, PYTHON=sys.executable).stdout
    assert re.search(r"^training loss minus the first's +- +-0\.2500$", printed, re.MULTILINE)
    assert re.search(r"^prores_schedule +pre-plain +pre-prores-linear$", printed, re.MULTILINE)
    assert (clone / "compared.png").is_file()
    assert (clone / "compared.json").is_file()


def test_all_blocks_are_known() -> None:
    assert len(BLOCKS) == 5


# A value for each that is seen in the command.
VARIABLES = {
    **{name: str(7000 + number) for number, name in enumerate("""
        MASTER_PORT NODE_WAIT_SECONDS SILENT_NODE_SECONDS DISTRIBUTED_TIMEOUT_MINUTES
        MICRO_BATCH_SIZE SAVE_INTERVAL SAVE_RETAIN_INTERVAL EVAL_INTERVAL EVAL_ITERS LOG_INTERVAL
        LAYERS HIDDEN_SIZE FFN_HIDDEN_SIZE HEADS WARMUP_ITERS SEQ_LENGTH
        LR_WARMUP_ITERS LR_DECAY_ITERS
        GLOBAL_BATCH_SIZE TRAIN_ITERS NNODES NODE_RANK GPUS_PER_NODE TP PP CP VPP
        OMP_NUM_THREADS PYTHONUNBUFFERED CUDA_DEVICE_MAX_CONNECTIONS
    """.split())},
    **{name: f"the-{name.lower()}" for name in """
        MASTER_ADDR TRANSFORMER_IMPL DATA_DIR TRAIN_DATA VALID_DATA TOKENIZER_MODEL LOG_ID
        WANDB_PROJECT WANDB_NAME WANDB_MODE PYTHON LEARNING_RATE
    """.split()},
    "RUN_DIR": "/the-run-dir", "DEVICE": "cuda", "PRECISION": "fp8", "DATA": "files",
    "MODEL_KIND": "gpt", "NODE_RANK": "5001", "GPU_FLAGS": "--the-gpu-flags",
}  # fmt: skip


def test_every_variable_of_the_page_gets_into_the_command(clone: Path) -> None:
    documented = {
        name
        for line in PAGE.partition("## Variables")[2].partition("## Layouts")[0].splitlines()
        for name in re.findall(r"`([A-Z_]+)(?:=1)?`", line)
    }
    assert documented == {*VARIABLES, "WARMUP_ITERS_PER_LAYER"}
    documented.remove("WARMUP_ITERS_PER_LAYER")  # excludes WARMUP_ITERS
    command = "bash examples/pretrain_130m.sh --dry-run"
    words = run_block(command, clone, **VARIABLES).stdout
    hidden = {"DATA", "DATA_DIR"}  # their parts are set one by one
    assert [name for name in documented - hidden if VARIABLES[name] not in words] == []
    parts = {"TRAIN_DATA": "", "VALID_DATA": "", "TOKENIZER_MODEL": ""}
    words = run_block(command, clone, **{**VARIABLES, **parts}).stdout
    assert words.count("the-data_dir/") == 3
    assert "--mock-data" in run_block(command, clone, **{**VARIABLES, "DATA": "mock"}).stdout


def test_the_page_has_a_row_for_each_of_the_flags_for_speed() -> None:
    section = PAGE.partition("## Flags for speed")[2].partition("## Layouts")[0]
    rows = re.findall(r"^\| `(--.+?)` \|", section, re.MULTILINE)
    assert rows == [choice.flags for choice in CHOICES]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (REPOSITORY / "docs" / target).exists(), target
