"""Checks of what is installed: Python, torch, Megatron Core, and the packages around them."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_prores.doctor.finding import (
    MISSING,
    NOTE,
    OK,
    Check,
    Finding,
    Where,
    one_line,
    silence,
)
from megatron_prores.doctor.probe import Optional
from megatron_prores.environment import is_installed
from megatron_prores.upstream.registry import WRITTEN_AGAINST

UPSTREAM = WRITTEN_AGAINST
"""The version of megatron-core that the run-time replacements were written against."""

NEEDED_TORCH = (2, 11)


def version_of(distribution: str) -> str | None:
    """Return the version of an installed distribution, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: 2.11.0a0+1a2b.nv26.2 is (2, 11, 0)."""
    found: list[int] = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
    return tuple(found)


def python(where: Where) -> Finding:
    """Python itself; pyproject.toml asks for 3.12."""
    value = f"{sys.version.split()[0]}, {sys.executable}"
    if sys.version_info < (3, 12):  # noqa: UP036, here it has to be told
        return Finding(MISSING, value, "3.12 or newer is needed")
    return Finding(OK, value)


@functools.cache
def load_torch() -> Any:
    """Import torch once; gives the exception where it cannot be imported."""
    try:
        with silence():
            import torch

            torch.__version__, torch.version.cuda, torch.cuda.is_available  # noqa: B018, a torso fails
        return torch
    except Exception as error:
        return error


def torch(where: Where) -> Finding:
    """Torch, imported."""
    module = load_torch()
    if isinstance(module, Exception):
        version = version_of("torch")
        if version is None:
            return Finding(MISSING, "not installed", "nothing runs without it")
        cost = f"cannot be imported, nothing runs: {one_line(module)}"
        return Finding(MISSING, version, cost)
    version = str(module.__version__)
    value = (
        f"{version}, {'CUDA ' + module.version.cuda if module.version.cuda else 'for CPUs only'}"
    )
    if numbers(version)[:2] < NEEDED_TORCH:
        return Finding(MISSING, value, f"{'.'.join(map(str, NEEDED_TORCH))} or newer is needed")
    return Finding(OK, value)


def megatron_core(where: Where) -> Finding:
    """Megatron Core, and whether the run-time replacements were written against it."""
    version = version_of("megatron-core")
    if version is None:
        return Finding(
            MISSING, "not installed", f"nothing runs: pip install megatron-core=={UPSTREAM}"
        )
    if _folder_of_megatron() is None:
        return Finding(MISSING, version, "its files are gone: install it again")
    if numbers(version)[:2] != numbers(UPSTREAM)[:2]:
        return Finding(MISSING, version, f"not supported: pip install megatron-core=={UPSTREAM}")
    if version != UPSTREAM:
        return Finding(
            NOTE,
            version,
            f"written and tested against {UPSTREAM}; a run says if it has moved",
        )
    return Finding(OK, f"{version}, the version that this was written against")


def _folder_of_megatron() -> Path | None:
    """Find megatron/core without importing it, which takes seconds."""
    spec = importlib.util.find_spec("megatron")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "core" / "__init__.py").is_file():
            return Path(place)
    return None


def dataset_helper(where: Where) -> Finding:
    """Megatron's compiled index builder, which its wheel brings."""
    folder = _folder_of_megatron()
    if folder is None:
        return Finding(MISSING, "no megatron-core", "no dataset can be read")
    datasets = folder / "core" / "datasets"
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (datasets / f"helpers_cpp{suffix}").is_file():
            return Finding(OK, "compiled for this Python")
    others = [path.name for path in datasets.glob("helpers_cpp*")]
    value = f"compiled for another Python: {', '.join(others)}" if others else "not compiled"
    cost = "no dataset can be read: install the wheel of megatron-core for this Python"
    if (datasets / "Makefile").is_file():
        return Finding(NOTE, value, "a run compiles it first; needs make and a C++ compiler")
    return Finding(MISSING, value, cost)


@dataclass(frozen=True)
class Package:
    """A package of which only the version matters."""

    distribution: str
    module: str
    cost: str
    """Of not having it."""

    def __call__(self, where: Where) -> Finding:
        """Check it."""
        version = version_of(self.distribution)
        if version is None or not is_installed(self.module):
            return Finding(MISSING, "not installed", self.cost)
        return Finding(OK, version)


def wandb(where: Where) -> Finding:
    """Weights & Biases, and whether it has a key; never which."""
    version = version_of("wandb")
    if version is None:
        return Finding(MISSING, "not installed", "no W&B logs; TensorBoard's are written")
    mode = where.environ.get("WANDB_MODE")
    key = "set" if where.environ.get("WANDB_API_KEY") else "not set"
    value = f"{version}, WANDB_API_KEY {key}" + (f", WANDB_MODE={mode}" if mode else "")
    if key == "set" or mode in ("offline", "disabled") or _in_netrc(where):
        return Finding(OK, value)
    return Finding(NOTE, value, "runs are logged offline; `wandb sync` sends them later")


def _in_netrc(where: Where) -> bool:
    try:
        text = Path(where.environ.get("HOME", "/nonexistent"), ".netrc").read_text()
    except (OSError, UnicodeDecodeError):
        return False
    return "api.wandb.ai" in text


TRANSFORMER_ENGINE = Optional(
    "transformer_engine",
    # torch first: it brings the CUDA libraries that Transformer Engine looks for.
    "import torch, transformer_engine, transformer_engine.pytorch as te; te.Linear; "
    "print(transformer_engine.__version__)",
    "no FP8, no context parallelism; --transformer-impl local --no-persist-layer-norm, slower",
)
APEX = Optional(
    "apex",
    "import torch, apex, amp_C, fused_weight_gradient_mlp_cuda; "
    "from importlib.metadata import version; print(version('apex'))",
    "--no-gradient-accumulation-fusion, a little slower; the optimizer is Transformer Engine's, or "
    "else torch's",
)
FLASH_ATTENTION = Optional(
    "flash_attn",
    "import torch, flash_attn; print(flash_attn.__version__)",
    "Transformer Engine takes cuDNN's fused attention instead",
    missing=NOTE,
)
IMPORTED = (TRANSFORMER_ENGINE, APEX, FLASH_ATTENTION)


def nccl(where: Where) -> Finding:
    """NCCL, as torch has it."""
    module = load_torch()
    if isinstance(module, Exception) or not module.distributed.is_nccl_available():
        return Finding(MISSING, "not in this torch", "no training on more than one GPU")
    return Finding(OK, ".".join(map(str, module.cuda.nccl.version())))


def cudnn(where: Where) -> Finding:
    """CuDNN, as torch has it."""
    module = load_torch()
    version = None if isinstance(module, Exception) else module.backends.cudnn.version()
    if version is None:
        return Finding(MISSING, "not in this torch", "no fused attention on GPUs")
    major, rest = divmod(version, 10000)
    return Finding(OK, f"{major}.{rest // 100}.{rest % 100}")


CHECKS: dict[str, Check] = {
    "Python": python,
    "torch": torch,
    "megatron-core": megatron_core,
    "dataset helper": dataset_helper,
    "numpy": Package("numpy", "numpy", "nothing runs without it"),
    "sentencepiece": Package("sentencepiece", "sentencepiece", "no SentencePiece tokenizer"),
    "tensorboard": Package(
        "tensorboard", "tensorboard", "no TensorBoard logs: leave --tensorboard-dir out"
    ),
    "wandb": wandb,
    "psutil": Package(
        "psutil", "psutil", "Megatron's checkpoint writer wants it: nothing can be saved"
    ),
}
ACCELERATORS: dict[str, Check] = {
    "Transformer Engine": TRANSFORMER_ENGINE,
    "Apex": APEX,
    "flash-attn": FLASH_ATTENTION,
    "NCCL": nccl,
    "cuDNN": cudnn,
}
