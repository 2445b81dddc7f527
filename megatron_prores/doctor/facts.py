"""What is asked of other programs, and how a check says what it found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megatron_prores.system.environment import is_installed

OK = "ok"
NOTE = "note"
"""Works, but the user should know."""
MISSING = "missing"
"""Is absent, or cannot be used."""

_NVIDIA_SMI = (
    "nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader"
)
_NVIDIA_SMI_SECONDS = 20
"""It can hang where a GPU has fallen off the bus."""

_IMPORTS = {
    "torch": """
import json, torch
gpus, error = 0, ""
if torch.cuda.is_available():
    gpus = torch.cuda.device_count()
elif torch.version.cuda:
    try:
        torch.cuda.init()
    except Exception as reason:
        error = str(reason)
print(json.dumps(dict(version=torch.__version__, cuda=torch.version.cuda, gpus=gpus, error=error)))
""",
    # torch first: it brings the CUDA libraries that Transformer Engine looks for.
    "transformer_engine": "import torch, transformer_engine, transformer_engine.pytorch as te; "
    "te.Linear; print(transformer_engine.__version__)",
    "apex": "import torch, apex, amp_C, fused_weight_gradient_mlp_cuda; "
    "from importlib.metadata import version; print(version('apex'))",
    "flash_attn": "import torch, flash_attn; print(flash_attn.__version__)",
}
"""A package that was built for another torch can take its process down: each has one of its own."""

_IMPORT_SECONDS = 300
"""A cold import from a slow file system takes minutes."""

Answer = tuple[str, str]
"""What a program printed; or an empty text, and why it failed."""


@dataclass
class Facts:
    """The machine that the checks judge: this one, or a made-up one in the tests."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    root: Path = Path("/")
    """Where /sys and /dev are looked for."""
    save: Path = Path()
    """Where checkpoints are to go."""
    answers: dict[str, Answer] = field(default_factory=dict)
    """Of nvidia-smi, and of the packages that are installed, by name."""


@dataclass(frozen=True)
class Finding:
    """The result of a check; the table that holds the check names it."""

    status: str
    """OK, NOTE or MISSING."""
    value: str
    """What was found: a version, a number."""
    cost: str = ""
    """What it means for a run, and what to do; empty where all is well."""


Check = Callable[[Facts], Finding]


def gather(save: Path) -> Facts:
    """Ask this machine, all programs side by side."""
    with ThreadPoolExecutor() as pool:
        running = {"nvidia-smi": pool.submit(run, _NVIDIA_SMI.split(), _NVIDIA_SMI_SECONDS)}
        for module, code in _IMPORTS.items():
            # A run on this machine may need the GPU memory that the import would take.
            hidden = {} if module == "torch" else {"CUDA_VISIBLE_DEVICES": ""}
            if is_installed(module):
                command = [sys.executable, "-W", "ignore", "-c", code]
                running[module] = pool.submit(run, command, _IMPORT_SECONDS, **hidden)
    return Facts(save=save, answers={name: each.result() for name, each in running.items()})


def run(command: list[str], seconds: float, **variables: str) -> Answer:
    """Run a program, which may fail in any way it likes."""
    environ = {**os.environ, **variables}
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, env=environ
        )
    except subprocess.TimeoutExpired:
        return "", f"took more than {seconds:g} s"
    except OSError as error:
        return "", str(error)
    if result.returncode < 0:
        return "", f"killed by signal {-result.returncode}"
    if result.returncode > 0:
        last_lines = result.stderr.strip().splitlines()[-1:]
        return "", last_lines[0] if last_lines else f"exit code {result.returncode}"
    return result.stdout.strip(), ""
