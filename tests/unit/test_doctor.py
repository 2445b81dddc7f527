"""The doctor, on this machine and on machines that are made up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_prores.doctor import facts, machine, main, packages
from megatron_prores.doctor.facts import MISSING, NOTE, OK, Facts, Finding
from megatron_prores.doctor.main import NEEDS, SECTIONS, lacking

REPOSITORY = Path(__file__).resolve().parents[2]


def doctor(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    path = f"{settings.pop('PYTHONPATH', '')}:{REPOSITORY}".lstrip(":")
    return subprocess.run(
        [sys.executable, "-B", "-m", "megatron_prores.doctor", *words],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **settings, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def machine_with(
    torch: dict[str, Any] | None = None, gpus: tuple[str, ...] = (), **environ: str
) -> Facts:
    """A machine whose torch and nvidia-smi say what is given."""
    said = {"version": "2.15.0", "cuda": "13.0", "gpus": len(gpus), "error": ""} | (torch or {})
    answers = {"torch": (json.dumps(said), ""), "nvidia-smi": ("\n".join(gpus), "")}
    return Facts(environ=environ, answers=answers)


def put(root: Path, path: str, text: str = "") -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def test_it_tells_everything_and_no_key() -> None:
    result = doctor("--need", "cpu", WANDB_API_KEY="s3cret")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("Ready for cpu.\n")
    for checks in SECTIONS.values():
        for name in checks:
            line = rf"^  (ok|note|missing) +{re.escape(name)} "
            assert re.search(line, result.stdout, re.M), name
    assert "WANDB_API_KEY set" in result.stdout
    assert "s3cret" not in result.stdout + result.stderr


def test_what_is_needed_and_missing_is_exit_code_1_also_in_json() -> None:
    result = doctor("--need", "gpu,cpu", "--json")
    assert result.returncode == 1
    answer = json.loads(result.stdout)
    assert answer["needs"] == ["gpu", "cpu"]
    assert answer["ready"] is False
    assert any(line.startswith("gpu: GPU: ") for line in answer["lacking"])
    assert answer["findings"]["GPUs"]["GPU"]["status"] == MISSING
    assert answer["findings"]["Python and packages"]["torch"]["status"] == OK


def test_a_broken_torch_and_a_broken_transformer_engine_are_told_without_a_traceback(
    tmp_path: Path,
) -> None:
    (tmp_path / "torch.py").write_text(
        "raise OSError('libcudart.so.13: cannot open shared object')"
    )
    (tmp_path / "transformer_engine.py").write_text("")
    result = doctor("--need", "te", "--quiet", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    (line,) = result.stdout.splitlines()
    broken = "OSError: libcudart.so.13"
    assert line.startswith(f"MISSING for te: Transformer Engine: broken: {broken}")
    assert result.stderr == ""
    result = doctor("--need", "cpu", PYTHONPATH=str(tmp_path))
    assert f"cannot be imported, nothing runs: {broken}" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("code", "text", "error"),
    [
        ("print('noise\\n1.2')", "noise\n1.2", ""),
        ("raise ImportError('undefined symbol: _ZN3c10')", "", "undefined symbol: _ZN3c10"),
        ("import os; os.abort()", "", "killed by signal 6"),
        ("raise SystemExit(3)", "", "exit code 3"),
        ("import signal; signal.pause()", "", "took more than 2 s"),
    ],
)
def test_an_import_may_fail_in_any_way(code: str, text: str, error: str) -> None:
    answer = facts.run([sys.executable, "-c", code], 2 if "pause" in code else 60)
    assert answer[0] == text
    assert error in answer[1]


def test_a_package_is_ready_only_where_it_could_be_imported() -> None:
    check = packages.ACCELERATORS["Transformer Engine"]
    for answers, status, value in (
        ({}, MISSING, "not installed"),
        ({"transformer_engine": ("noise\n2.20.2", "")}, OK, "2.20.2"),
        ({"transformer_engine": ("", "killed by signal 6")}, MISSING, "broken: killed by signal 6"),
    ):
        found = check(Facts(answers=answers))
        assert (found.status, found.value) == (status, value)


def test_a_check_that_fails_is_a_finding() -> None:
    def check(facts: Facts) -> Finding:
        raise ValueError("of\nall things")

    found = main.run_check(check, Facts())
    assert found == Finding(MISSING, "the check failed: ValueError: of all things")


def test_every_need_is_made_of_checks() -> None:
    names = {name for checks in SECTIONS.values() for name in checks}
    assert {name for need in NEEDS.values() for name in need} <= names
    assert sum(map(len, SECTIONS.values())) == len(names)
    bad = {"all": {name: Finding(MISSING, "gone", "a cost") for name in names}}
    for need, wanted in NEEDS.items():
        assert lacking(bad, [need]) == [f"{need}: {name}: gone (a cost)" for name in wanted]
    good = {"all": {name: Finding(NOTE, "there") for name in names}}
    assert lacking(good, list(NEEDS)) == []


def test_the_version_that_replacements_are_written_against_is_the_one_that_is_installed() -> None:
    pinned = f"megatron-core=={packages.WRITTEN_AGAINST}\n"
    assert pinned in (REPOSITORY / "constraints.txt").read_text()


@pytest.mark.parametrize(
    ("version", "status"),
    [("0.19.2", OK), ("0.19.5", NOTE), ("0.20.0", MISSING), ("0.18.1", MISSING), (None, MISSING)],
)
def test_another_megatron(
    version: str | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "version_of", lambda name: version)
    assert packages.megatron_core(Facts()).status == status


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.11.0a0+1a2b3c4.nv26.2", OK), ("2.15.0+cu132", OK), ("2.9.1", MISSING)],
)
def test_another_torch(version: str, status: str) -> None:
    assert packages.torch(machine_with({"version": version})).status == status


def test_a_dataset_helper_for_another_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packages.dataset_helper(Facts()).status == OK
    put(tmp_path, "megatron/__init__.py")
    put(tmp_path, "megatron/core/datasets/helpers_cpp.cpython-39-x86_64-linux-gnu.so")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "megatron", raising=False)
    assert packages.dataset_helper(Facts()).status == MISSING
    put(tmp_path, "megatron/core/datasets/Makefile")
    assert packages.dataset_helper(Facts()).status == NOTE


def test_a_key_of_wandb_login_is_enough(tmp_path: Path) -> None:
    where = Facts(environ={"HOME": str(tmp_path)})
    assert packages.wandb(where).status == NOTE
    put(tmp_path, ".netrc", "machine api.wandb.ai login user password s3cret")
    found = packages.wandb(where)
    assert found.status == OK
    assert "s3cret" not in found.value


def h200(capability: str) -> str:
    return f"NVIDIA H200, 143771 MiB, 580.95.05, {capability}"


@pytest.mark.parametrize(
    ("capabilities", "fp8", "mxfp8"),
    [
        (("8.0",), MISSING, MISSING),
        (("8.9",), OK, MISSING),
        (("9.0", "9.0"), OK, MISSING),
        (("10.0",), OK, OK),
        (("10.0", "9.0"), OK, MISSING),
        (("12.0",), OK, MISSING),
        ((), MISSING, MISSING),
    ],
)
def test_which_gpus_can_do_fp8(capabilities: tuple[str, ...], fp8: str, mxfp8: str) -> None:
    where = machine_with(gpus=tuple(map(h200, capabilities)))
    statuses = [machine.GPUS[name](where).status for name in ("FP8", "MXFP8")]
    assert statuses == [fp8, mxfp8]


@pytest.mark.parametrize(
    ("torch", "environ", "status", "words"),
    [
        ({}, {}, OK, f"2 x {h200('9.0')}"),
        ({"gpus": 1}, {"CUDA_VISIBLE_DEVICES": "0"}, NOTE, "CUDA_VISIBLE_DEVICES=0"),
        ({"gpus": 0}, {"CUDA_VISIBLE_DEVICES": ""}, MISSING, "(CUDA_VISIBLE_DEVICES=)"),
        ({"gpus": 0, "error": "driver too old"}, {}, MISSING, "cannot use them: driver too old"),
        ({"gpus": 0, "cuda": None}, {}, MISSING, "for CPUs only"),
        ({"version": ""}, {}, MISSING, "torch cannot be imported"),
    ],
)
def test_whether_torch_can_use_the_gpus(
    torch: dict[str, Any], environ: dict[str, str], status: str, words: str
) -> None:
    found = machine.gpu(machine_with(torch, (h200("9.0"),) * 2, **environ))
    assert found.status == status
    assert words in found.value + found.cost


def test_infiniband(tmp_path: Path) -> None:
    where = Facts(root=tmp_path)
    assert machine.rdma(where).value == "no InfiniBand or RoCE"
    port = "sys/class/infiniband/mlx5_0/ports/1/state"
    put(tmp_path, port, "1: DOWN")
    assert machine.rdma(where).value == "no port is up"
    put(tmp_path, port, "4: ACTIVE")
    found = machine.rdma(where)
    assert (found.status, "/dev/infiniband" in found.cost) == (MISSING, True)
    put(tmp_path, "dev/infiniband/uverbs0")
    assert machine.rdma(where) == Finding(OK, "mlx5_0:1 up")


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = Facts(root=tmp_path)
    assert machine.shared_memory(where).status == MISSING
    (tmp_path / "dev/shm").mkdir(parents=True)
    monkeypatch.setattr(machine, "ENOUGH_SHARED", 0)
    assert machine.shared_memory(where).status == OK
    monkeypatch.setattr(machine, "ENOUGH_SHARED", 2**60)
    assert "--shm-size" in machine.shared_memory(where).cost


def test_the_disk_of_a_folder_that_is_yet_to_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = Facts(save=tmp_path / "to" / "be" / "made")
    monkeypatch.setattr(machine, "ENOUGH_DISK", 0)
    found = machine.disk(where)
    assert found.status == OK, found
    assert str(where.save) in found.value
    assert not where.save.exists()
    monkeypatch.setattr(machine, "ENOUGH_DISK", 2**60)
    assert machine.disk(where).status in (NOTE, MISSING)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written" in machine.disk(where).value


def test_the_table_of_needs_in_the_documentation() -> None:
    text = (REPOSITORY / "docs" / "docker.md").read_text()
    rows = re.findall(r"^\| (`[a-z].*?) \|", text, flags=re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([a-z0-9-]+)`", row)} == set(NEEDS)
    help_text = " ".join(main._parser().format_help().split())
    assert all(need in help_text for need in NEEDS)
