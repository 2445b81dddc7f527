"""The doctor, on this machine and on machines that are made up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_prores.doctor import fabric, gpus, machine, main, packages, probe
from megatron_prores.doctor.finding import MISSING, NOTE, OK, Finding, Where, examine
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


@pytest.fixture
def where(tmp_path: Path) -> Where:
    """A machine on which there is nothing."""
    return Where(environ={"PATH": str(tmp_path / "bin")}, root=tmp_path)


def put(where: Where, path: str, text: str = "") -> None:
    (where.root / path).parent.mkdir(parents=True, exist_ok=True)
    (where.root / path).write_text(text + "\n")


def test_it_tells_everything_and_no_secret() -> None:
    result = doctor(
        "--need", "cpu", WANDB_API_KEY="s3cret-1", NCCL_FAKE_TOKEN="s3cret-2", NCCL_DEBUG="INFO"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("Ready for cpu.\n")
    for checks in SECTIONS.values():
        for name in checks:
            assert re.search(rf"^  (ok|note|missing) +{re.escape(name)} ", result.stdout, re.M), (
                name
            )
    assert "WANDB_API_KEY set" in result.stdout
    assert "NCCL_FAKE_TOKEN=(set)" in result.stdout
    assert "NCCL_DEBUG=INFO" in result.stdout
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
    result = doctor("--need", "te", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "cannot be imported, nothing runs: OSError: libcudart.so.13" in result.stdout
    assert "MISSING for te: Transformer Engine: broken: OSError: libcudart.so.13" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("code", "version", "words"),
    [
        ("print('noise\\n1.2')", "1.2", ""),
        ("raise ImportError('undefined symbol: _ZN3c10')", None, "undefined symbol: _ZN3c10"),
        ("import os; os.abort()", None, "killed by signal 6"),
        ("raise SystemExit(3)", None, "the import failed"),
    ],
)
def test_an_import_may_fail_in_any_way(code: str, version: str | None, words: str) -> None:
    answer = probe.Probe(code).answer()
    assert answer[0] == version
    assert words in answer[1]


def test_a_check_that_fails_is_a_finding() -> None:
    def check(where: Where) -> Finding:
        raise ValueError("of\nall things")

    assert examine(check, Where()) == Finding(
        MISSING, "the check failed: ValueError: of all things"
    )


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
    assert f"megatron-core=={packages.UPSTREAM}\n" in (REPOSITORY / "constraints.txt").read_text()


@pytest.mark.parametrize(
    ("version", "status"),
    [("0.19.2", OK), ("0.19.5", NOTE), ("0.20.0", MISSING), ("0.18.1", MISSING), (None, MISSING)],
)
def test_another_megatron(
    version: str | None, status: str, where: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "version_of", lambda name: version)
    assert packages.megatron_core(where).status == status


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.11.0a0+1a2b3c4.nv26.2", OK), ("2.15.0+cu132", OK), ("2.9.1", MISSING)],
)
def test_another_torch(
    version: str, status: str, where: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(__version__=version, version=SimpleNamespace(cuda="13.0"))
    monkeypatch.setattr(packages, "load_torch", lambda: module)
    assert packages.torch(where).status == status


def with_gpus(
    where: Where,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    seen: int = 2,
    built_for: str | None = "13.0",
) -> None:
    """A machine with two GPUs, of which torch sees some, and a Transformer Engine."""
    line = f"NVIDIA H200, 143771, 580.95.05, {capability[0]}.{capability[1]}"
    smi = where.root / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\nprintf '{line}\\n{line}\\n'\n")
    smi.chmod(0o755)

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    cuda = SimpleNamespace(
        is_available=lambda: seen > 0,
        device_count=lambda: seen,
        get_device_capability=lambda n: capability,
        get_device_name=lambda n: "NVIDIA H200",
        init=init,
    )
    torch = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda=built_for))
    monkeypatch.setattr(gpus, "load_torch", lambda: torch)
    monkeypatch.setattr(gpus, "TRANSFORMER_ENGINE", lambda where: Finding(OK, "2.20.2"))


@pytest.mark.parametrize(
    ("capability", "fp8", "mxfp8"),
    [
        ((8, 0), MISSING, MISSING),
        ((8, 9), OK, MISSING),
        ((9, 0), OK, MISSING),
        ((10, 0), OK, OK),
        ((12, 0), OK, MISSING),
    ],
)
def test_which_gpus_can_do_fp8(
    capability: tuple[int, int], fp8: str, mxfp8: str, where: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(where, monkeypatch, capability)
    found = gpus.gpu(where)
    numbers = f"{capability[0]}.{capability[1]}"
    assert found == Finding(OK, f"2 x NVIDIA H200, 140 GiB, compute capability {numbers}")
    assert gpus.driver(where) == Finding(OK, "580.95.05")
    assert (gpus.fp8(where).status, gpus.mxfp8(where).status) == (fp8, mxfp8)
    monkeypatch.setattr(gpus, "TRANSFORMER_ENGINE", lambda where: Finding(MISSING, "not installed"))
    assert gpus.fp8(where).status == MISSING


def test_gpus_that_torch_cannot_use(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus.gpus(where) == []
    other = Where(environ={"PATH": f"{where.root}/bin:/bin"}, root=where.root)
    with_gpus(other, monkeypatch, (9, 0), seen=0)
    found = gpus.gpu(other)
    assert found.status == MISSING
    assert "too old" in found.cost
    monkeypatch.undo()


@pytest.mark.parametrize(("visible", "status"), [("0", NOTE), ("", MISSING)])
def test_gpus_that_are_hidden(
    visible: str, status: str, where: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    where.environ = {"PATH": f"{where.root}/bin:/bin", "CUDA_VISIBLE_DEVICES": visible}
    with_gpus(where, monkeypatch, (9, 0), seen=len(visible))
    found = gpus.gpu(where)
    assert found.status == status
    assert f"CUDA_VISIBLE_DEVICES={visible}" in found.cost


def test_infiniband(where: Where) -> None:
    assert fabric.rdma(where).status == MISSING
    port = "sys/class/infiniband/mlx5_0/ports/1"
    put(where, f"{port}/state", "1: DOWN")
    assert "no port is up" in fabric.rdma(where).value
    put(where, f"{port}/state", "4: ACTIVE")
    put(where, f"{port}/rate", "400 Gb/sec (4X NDR)")
    put(where, f"{port}/link_layer", "InfiniBand")
    found = fabric.rdma(where)
    assert (found.status, "/dev/infiniband" in found.cost) == (MISSING, True)
    put(where, "dev/infiniband/uverbs0")
    assert fabric.rdma(where) == Finding(OK, "mlx5_0:1 InfiniBand 400 Gb/sec")


def test_interfaces_that_variables_name(where: Where) -> None:
    put(where, "sys/class/net/eth0/mtu")
    for name, status in (("eth", OK), ("^docker", OK), ("=eth0", OK), ("ib0", MISSING)):
        where.environ = {"NCCL_SOCKET_IFNAME": name}
        assert fabric.interfaces(where).status == status, name


def test_the_address_of_the_first_node(where: Where) -> None:
    for environ, status in (
        ({}, OK),
        ({"MASTER_ADDR": "127.0.0.1"}, OK),
        ({"MASTER_ADDR": "127.0.0.1", "NNODES": "2"}, MISSING),
        ({"MASTER_ADDR": "192.0.2.7", "NNODES": "2"}, OK),
        ({"MASTER_ADDR": "no-such-host.invalid"}, MISSING),
    ):
        where.environ = environ
        assert fabric.master(where).status == status, environ


def test_slow_variables_are_told(where: Where) -> None:
    where.environ = {"NCCL_IB_DISABLE": "1", "HOME": "/root"}
    found = fabric.variables(where)
    assert (found.status, found.value) == (NOTE, "NCCL_IB_DISABLE=1")
    assert "InfiniBand" in found.cost


def test_the_limits_of_a_container(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    put(where, "proc/meminfo", "MemTotal: 1048576 kB\nMemAvailable: 524288 kB")
    assert machine.memory(where) == Finding(OK, "1.0 GiB, 512 MiB available")
    put(where, "sys/fs/cgroup/memory.max", str(2**29))
    assert machine.memory(where).status == NOTE
    put(where, "sys/fs/cgroup/cpu.max", "50000 100000")
    assert "limit is 0.5" in machine.cpus(where).cost
    assert machine.shared_memory(where).status == MISSING
    (where.root / "dev/shm").mkdir(parents=True)
    monkeypatch.setattr(machine, "ENOUGH_SHARED", 0)
    assert machine.shared_memory(where).status == OK
    monkeypatch.setattr(machine, "ENOUGH_SHARED", 2**60)
    assert "--shm-size" in machine.shared_memory(where).cost


def test_the_disk_of_a_folder_that_is_yet_to_be_made(
    where: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    where.save = where.root / "to" / "be" / "made"
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
