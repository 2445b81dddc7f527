"""On what, and with which versions, something was measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch
from torch.utils import collect_env

_PACKAGES = ("megatron-core", "transformer-engine", "apex", "flash-attn")


def commit() -> str:
    """Return the commit of this clone, with "-dirty" where a file of it was changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = ""
    with contextlib.suppress(OSError):
        command += ["--exclude=*", "--abbrev=12"]
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found or "unknown: not a git clone"


def describe(device: str) -> dict[str, str]:
    """Name the GPU, or the processor with the number of torch's threads, and the versions."""
    found = {"machine": _processor(), "python": platform.python_version()}
    found["torch"] = torch.__version__
    if device == "cuda":
        found["machine"] = torch.cuda.get_device_name()
        found["driver"] = str(collect_env.get_nvidia_driver_version(collect_env.run))
    installed = {
        each.name.lower().replace("_", "-"): each.version
        for each in importlib.metadata.distributions()
    }
    return found | {name: installed.get(name, "not installed") for name in _PACKAGES}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", path.read_text(), re.M) if path.exists() else None
    threads = torch.get_num_threads()
    return f"{named[1] if named else platform.machine()}, {threads} thread{'s' * (threads > 1)}"
