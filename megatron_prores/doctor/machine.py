"""Checks of the machine: processors, memory, shared memory, disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_prores.doctor.finding import GIB, MISSING, NOTE, OK, Check, Finding, Where, gib

ENOUGH_SHARED = GIB
"""What NVIDIA's NCCL guide gives a container; Docker's default of 64 MiB is too small."""

ENOUGH_DISK = 20 * GIB
"""Ten checkpoints of the 130M model, at 14 bytes a parameter."""


def cpus(where: Where) -> Finding:
    """The processors that this process may use."""
    count = len(os.sched_getaffinity(0))
    value = f"{count} of {os.cpu_count()}"
    threads = where.environ.get("OMP_NUM_THREADS")
    value += f", OMP_NUM_THREADS={threads}" if threads else ""
    quota, _, period = (where.read("sys/fs/cgroup/cpu.max") or "max").partition(" ")
    if quota.isdigit() and period.isdigit() and int(quota) < count * int(period):
        limit = int(quota) / int(period)
        return Finding(NOTE, value, f"the container's limit is {limit:g} of them")
    return Finding(OK, value)


def memory(where: Where) -> Finding:
    """The main memory, and the container's limit."""
    fields = dict(
        line.split(":", 1)
        for line in (where.read("proc/meminfo") or "").splitlines()
        if ":" in line
    )
    sizes = {name: int(text.split()[0]) * 1024 for name, text in fields.items() if text.split()}
    total, free = sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0)
    if not total:
        return Finding(NOTE, "unknown")
    value = f"{gib(total)}, {gib(free)} available"
    for path in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = where.read(path) or ""
        if limit.isdigit() and int(limit) < total:
            cost = f"the container's limit is {gib(int(limit))}: beyond it ranks are killed"
            return Finding(NOTE, value, cost)
    return Finding(OK, value)


def shared_memory(where: Where) -> Finding:
    """/dev/shm: the ranks of a node and the workers that load data talk through it."""
    try:
        usage = shutil.disk_usage(where.root / "dev/shm")
    except OSError:
        return Finding(MISSING, "no /dev/shm", "no data loader workers, no NCCL on one node")
    value = f"{gib(usage.total)}, {gib(usage.free)} free"
    if usage.free < ENOUGH_SHARED:
        return Finding(
            MISSING,
            value,
            "too small: workers die of a bus error, NCCL of a system error; --ipc=host or "
            "--shm-size=8g (docker)",
        )
    return Finding(OK, value)


def disk(where: Where) -> Finding:
    """Where checkpoints go: whether it can be written, and how much is free."""
    place = where.save.absolute()
    # --save need not exist yet; what it will be made in must.
    existing = next(each for each in (place, *place.parents) if each.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding(MISSING, f"{existing} cannot be written", "nothing can be saved there")
    free = shutil.disk_usage(existing).free
    value = f"{gib(free)} free at {place}"
    if free < ENOUGH_DISK:
        cost = "a checkpoint takes 14 bytes a parameter: 1.9 GB at 130M, 98 GB at 7B"
        return Finding(MISSING if free < GIB else NOTE, value, cost)
    return Finding(OK, value)


def _writable(path: Path) -> bool:
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def home(where: Where) -> Finding:
    """The home directory, which caches of compiled kernels go to."""
    path = Path(where.environ.get("HOME") or "/nonexistent")
    if _writable(path):
        return Finding(OK, str(path))
    cost = "kernels are compiled anew in every run: set HOME, or TRITON_CACHE_DIR"
    return Finding(NOTE, f"{path} cannot be written", cost)


CHECKS: dict[str, Check] = {
    "CPUs": cpus,
    "memory": memory,
    "shared memory": shared_memory,
    "disk": disk,
    "home": home,
}
