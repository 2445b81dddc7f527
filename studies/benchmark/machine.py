"""On what, and with which versions, something was measured."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from megatron_prores.environment import is_installed

REPOSITORY = Path(__file__).resolve().parents[2]


def commit() -> str:
    """Return the commit of this clone, and whether something in it was changed since."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git clone"


def source_digest() -> str:
    """Return a digest of this package's source: it names the code where there is no git clone."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def processor(device: str) -> str:
    """Name the GPU, or the processor with the number of torch's threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    threads = torch.get_num_threads()
    return f"{name}, {threads} {'thread' if threads == 1 else 'threads'}"


def memory_bytes(device: str) -> int:
    """Return the memory of the GPU, or of the machine."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def capability(device: str) -> tuple[int, int] | None:
    """Return the GPU's compute capability, None on the CPU."""
    return torch.cuda.get_device_capability() if device == "cuda" else None


def driver() -> str:
    """Return the version of the GPU's driver, or "unknown"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = result.stdout.split()
    return lines[0] if result.returncode == 0 and lines else "unknown"


def versions(device: str) -> dict[str, str]:
    """Return the versions that a figure depends on: name -> version, or "not installed"."""
    found = {"torch": torch.__version__, "megatron-core": _version("megatron-core")}
    if device == "cuda":
        found["CUDA of torch"] = str(torch.version.cuda)
        found["transformer-engine"] = _version("transformer-engine", "transformer_engine")
        found["apex"] = "installed" if is_installed("apex") else "not installed"
        found["flash-attn"] = _version("flash-attn")
    return found


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def environment(device: str) -> dict[str, str]:
    """Say when, with which code and with which driver something was measured."""
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "source": source_digest(),
        "python": platform.python_version(),
    }
    if device == "cuda":
        found["driver"] = driver()
    return found
