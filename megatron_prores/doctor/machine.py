"""Checks of the machine: GPUs, what connects the nodes, shared memory, disk."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from functools import partial

from megatron_prores.doctor.facts import MISSING, NOTE, OK, Check, Facts, Finding
from megatron_prores.doctor.packages import read_torch

GIB = 2**30

ENOUGH_SHARED = GIB
"""What NVIDIA's NCCL guide gives a container; Docker's default of 64 MiB is too small."""

ENOUGH_DISK = 20 * GIB
"""Ten checkpoints of the 130M model, at 14 bytes a parameter."""


def gib(size: float) -> str:
    """Return a number of bytes in GiB, or in MiB below one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def gpus(facts: Facts) -> list[str]:
    """Return a line for each GPU: name, memory, driver, compute capability."""
    return facts.answers["nvidia-smi"][0].splitlines()


def gpu(facts: Facts) -> Finding:
    """Check whether there are GPUs, and whether torch can use them."""
    found, torch = gpus(facts), read_torch(facts)
    value = "; ".join(f"{count} x {line}" for line, count in Counter(found).items()) or "none"
    hidden = f"CUDA_VISIBLE_DEVICES={facts.environ.get('CUDA_VISIBLE_DEVICES')}"
    if not torch["version"]:
        return Finding(MISSING, value, "torch cannot be imported")
    if torch["gpus"] and len(found) <= torch["gpus"]:
        return Finding(OK, value if found else f"{torch['gpus']}, nvidia-smi shows none")
    if torch["gpus"]:
        return Finding(NOTE, f"{value}; torch uses {torch['gpus']}", hidden)
    if torch["cuda"] is None:
        return Finding(MISSING, value, "this torch is for CPUs only; --device cpu is what is left")
    if not found:
        return Finding(MISSING, value, "no NVIDIA driver, or no GPU; --device cpu is what is left")
    return Finding(MISSING, value, f"torch cannot use them: {torch['error']} ({hidden})")


def low_precision(lowest: float, below: float, facts: Facts) -> Finding:
    """Check compute capabilities, as pytorch/quantization.py of Transformer Engine 2.20 does."""
    capabilities = {float(line.rpartition(",")[2]) for line in gpus(facts)}
    value = f"compute capability {', '.join(map(str, sorted(capabilities)))}"
    if not capabilities:
        return Finding(MISSING, "no GPU", "train in bf16")
    if not all(lowest <= each < below for each in capabilities):
        needed = f"from {lowest}" + ("" if below == NO_LIMIT else f" to below {below}")
        return Finding(MISSING, value, f"{needed} is needed: train in bf16")
    return Finding(OK, value)


NO_LIMIT = float("inf")


def rdma(facts: Facts) -> Finding:
    """Check for an InfiniBand or RoCE port that is up and that NCCL may open."""
    cost = "NCCL takes TCP between nodes, slow; one node needs none"
    states = sorted(facts.root.glob("sys/class/infiniband/*/ports/*/state"))
    up = [f"{path.parts[-4]}:{path.parts[-2]}" for path in states if "ACTIVE" in path.read_text()]
    if not up:
        return Finding(MISSING, "no port is up" if states else "no InfiniBand or RoCE", cost)
    if not any(facts.root.glob("dev/infiniband/uverbs*")):
        cost = f"a container needs --device /dev/infiniband, the host its driver; {cost}"
        return Finding(MISSING, f"{', '.join(up)}, but no /dev/infiniband/uverbs*", cost)
    return Finding(OK, f"{', '.join(up)} up")


def shared_memory(facts: Facts) -> Finding:
    """Check /dev/shm: the ranks of a node and the data loader's workers talk through it."""
    try:
        usage = shutil.disk_usage(facts.root / "dev/shm")
    except OSError:
        return Finding(MISSING, "no /dev/shm", "no data loader workers, no NCCL on one node")
    value = f"{gib(usage.total)}, {gib(usage.free)} free"
    if usage.free < ENOUGH_SHARED:
        cost = "too small: workers die of a bus error, NCCL of a system error"
        return Finding(MISSING, value, f"{cost}; --ipc=host or --shm-size=8g (docker)")
    return Finding(OK, value)


def disk(facts: Facts) -> Finding:
    """Check where checkpoints go: whether it can be written, and how much is free."""
    place = facts.save.absolute()
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


GPUS: dict[str, Check] = {
    "GPU": gpu,
    "FP8": partial(low_precision, 8.9, NO_LIMIT),
    "MXFP8": partial(low_precision, 10.0, 12.0),
}
MACHINE: dict[str, Check] = {"RDMA": rdma, "shared memory": shared_memory, "disk": disk}
