"""The planner's own options, its command from the start, its arithmetic of steps and tokens."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.errors import UserError
from megatron_prores.plan.main import read_options
from megatron_prores.plan.target import PlannedMachine
from megatron_prores.schedule.timeline import Phase, Timeline
from megatron_prores.system.environment import THIS_MACHINE, TargetEnvironment
from megatron_prores.upstream.registry import listed
from tests.refusals import REPOSITORY, clean_environment

DOC = REPOSITORY / "docs" / "plan.md"
PNG = b"\x89PNG\r\n\x1a\n"

# ---- Options -------------------------------------------------------------------------------------


def test_options_end_at_the_two_dashes_and_the_flags_begin_behind_them() -> None:
    argv = ["--world-size", "16", "--json", "--", "--num-layers", "4", "--json", "--"]
    options = read_options(argv, {})
    assert options.argv == ["--num-layers", "4", "--json", "--"]
    assert (options.world_size, options.gpus_per_node, options.json) == (16, 8, True)


def test_of_a_whole_command_the_flags_are_kept() -> None:
    command = "torchrun --nproc-per-node 8 /there/pretrain_gpt_prores.py --num-layers 4"
    assert read_options(["--world-size", "8", "--", *command.split()], {}).argv == [
        *("--num-layers", "4")
    ]


def test_the_launchers_variables_stand_in_for_options() -> None:
    variables = {"WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "4"}
    options = read_options(["--", "--num-layers", "4"], variables)
    assert (options.world_size, options.gpus_per_node) == (32, 4)
    given = ["--world-size", "8", "--gpus-per-node", "2", "--", "--num-layers", "4"]
    options = read_options(given, variables)
    assert (options.world_size, options.gpus_per_node) == (8, 2)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("1-00:30", 88200),
        ("1-01:02:03", 90123),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    argv = ["--world-size", "8", "--time-limit", text, "--", "--num-layers", "4"]
    assert read_options(argv, {}).time_limit == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1", "1:2:3:4", "0", "1.5"])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--time-limit"):
        read_options(["--world-size", "8", f"--time-limit={text}", "--", "--num-layers", "4"], {})


# ---- The machine of the run ----------------------------------------------------------------------


def test_absent_paths_may_be_on_the_machine_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    machine = PlannedMachine()
    assert machine.is_elsewhere("/nowhere/a", str(tmp_path / "b"))
    for here in (str(tmp_path), str(tmp_path / "file"), str(tmp_path / "file" / "below"), "s3://a"):
        assert not machine.is_elsewhere(here)
        assert not machine.is_elsewhere("/nowhere/a", here)
    assert not THIS_MACHINE.is_elsewhere("/nowhere/a")


def test_a_directory_that_cannot_be_made_here_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write everywhere, whatever the permissions.
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path))
    (tmp_path / "closed").mkdir()
    (tmp_path / "file").touch()
    new, closed, below = (str(tmp_path / name) for name in ("new", "closed/new", "file/below"))
    machine = PlannedMachine()
    for _ in range(2):
        machine.check_writable("--save", new)
        machine.check_writable("--save", closed)
    assert machine.notes == [f"--save {closed}: cannot be made here; not tried"]
    for path, each in ((below, machine), (below, THIS_MACHINE), (closed, THIS_MACHINE)):
        with pytest.raises(UserError, match=f"--save {path}: "):
            each.check_writable("--save", path)


def test_packages_are_taken_as_installed_and_told() -> None:
    machine = PlannedMachine()
    assert machine.is_installed("numpy")
    assert machine.is_installed("no_such_module")
    assert not TargetEnvironment().is_installed("no_such_module")
    machine.note_assumptions(SimpleNamespace(device="cpu"))
    assert machine.notes == [
        "packages that must be installed there, and are not here: no_such_module"
    ]


def test_megatron_is_answered_for_the_machine_of_the_run_and_nothing_of_ours_is_replaced() -> None:
    import torch
    from megatron.core import utils

    before = utils.get_te_version()
    with PlannedMachine().known_to_megatron():
        assert str(utils.get_te_version()) == "2.20"
        assert torch.cuda.get_device_capability() == (9, 0)
        names = [*listed()]
        assert "megatron.core.utils._te_version" in names
        assert all(name.startswith(("megatron.", "torch.")) for name in names), names
    assert utils.get_te_version() == before
    assert not {"megatron.core.utils._te_version", "torch.cuda.get_device_capability"} & {*listed()}


# ---- Steps, samples, tokens ----------------------------------------------------------------------

GROWING = Timeline((Phase(0, 0, 10), Phase(3, 30, 50), Phase(5, 130, 100)), steps=9, seq_length=8)


def test_samples_and_steps_are_each_others_inverse_while_the_batch_grows() -> None:
    consumed = [0, 10, 20, 30, 80, 130, 230, 330, 430, 530]
    assert [GROWING.samples_at(step) for step in range(10)] == consumed
    assert [GROWING.step_at(samples) for samples in consumed] == list(range(10))
    for samples in range(531):
        step = GROWING.step_at(samples)
        assert consumed[step] >= samples
        assert step == 0 or consumed[step - 1] < samples
    assert (GROWING.samples, GROWING.tokens) == (530, 4240)


def test_a_warmup_in_samples_opens_layers_at_the_step_that_reaches_them() -> None:
    prores = ProResConfig(warmup_samples=120)
    # 30, 60, 90, 120 samples
    assert GROWING.steps_at(prores.opening_steps(4), prores.unit) == [3, 4, 5, 5]
    assert GROWING.steps_at([2, 4, None], "iterations") == [2, 4, None]
    assert GROWING.steps_at([None, None], "samples") == [None, None]


# ---- The command, as a user starts it ------------------------------------------------------------


def documented() -> list[str]:
    """The commands of docs/plan.md."""
    return re.findall(r"^```bash\n(.*?)^```", DOC.read_text(), re.MULTILINE | re.DOTALL)


def run_block(block: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command of the docs in a directory of its own, with this Python."""
    environment = clean_environment() | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    block = block.replace("tools/plan.py", shlex.quote(str(REPOSITORY / "tools" / "plan.py")))
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_7b_model_on_1024_gpus_is_planned_within_its_limits(tmp_path: Path) -> None:
    """The first command of the docs. The limits are 60 s and 8 GB; CPU time, on any machine."""
    block = documented()[0]
    assert "--world-size 1024" in block
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    result = run_block(block, tmp_path)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - start
    assert result.returncode == 0, result.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    gigabytes = after.ru_maxrss / 1e6  # of the largest child so far
    print(f"\n7B on 1024 GPUs: {seconds:.1f} s of CPU, {wall:.1f} s, {gigabytes:.2f} GB")
    assert seconds < 60
    assert gigabytes < 8
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]
    assert (tmp_path / "plan.png").read_bytes().startswith(PNG)
    assert "1024 ranks = 8 tensor x 8 pipeline x 1 context x 16 data" in result.stdout
    assert "32 layers = 8 pipeline stages x 2 virtual stages x 2" in result.stdout
    assert "audit of all 1024 ranks in 128 pipelines" in result.stdout
    assert "6,738,415,616 without padded vocabulary" in result.stdout
    assert re.search(r"^ +7 +1 +31-32 +31,000 to 32,000 ", result.stdout, re.MULTILINE)
    assert result.stdout.count("\n") < 100
    for sentence in DOC.read_text().split("```text\n")[1].split("```")[0].splitlines():
        assert sentence in result.stdout, sentence


def test_the_documented_warnings_come(tmp_path: Path) -> None:
    result = run_block(documented()[1], tmp_path)
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    said = "\n".join(plan["warnings"])
    assert "the warmup is longer than the training" in said
    assert "--save-interval 5000 lies past the time limit" in said
    assert list(tmp_path.iterdir()) == []
