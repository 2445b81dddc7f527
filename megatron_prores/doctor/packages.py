"""Checks of what is installed: Python, torch, Megatron Core, and the packages around them."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import re
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_prores.doctor.facts import MISSING, NOTE, OK, Check, Facts, Finding
from megatron_prores.system.environment import is_installed
from megatron_prores.upstream.registry import WRITTEN_AGAINST

NEEDED_TORCH = (2, 11)


def version_of(distribution: str) -> str | None:
    """Return the version of an installed distribution, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def series(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version: 2.11.0a0+1a2b.nv26.2 is of the series (2, 11)."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def python(facts: Facts) -> Finding:
    """Check Python itself; pyproject.toml asks for 3.12."""
    value = f"{sys.version.split()[0]}, {sys.executable}"
    if sys.version_info < (3, 12):  # noqa: UP036, an older one may run the doctor
        return Finding(MISSING, value, "3.12 or newer is needed")
    return Finding(OK, value)


def read_torch(facts: Facts) -> dict[str, Any]:
    """Return torch's version, the CUDA that it is for, how many GPUs it can use, and its error."""
    text, error = facts.answers.get("torch", ("", "not installed"))
    lines = text.splitlines() or [json.dumps({"version": "", "error": error})]
    return dict(json.loads(lines[-1]))


def torch(facts: Facts) -> Finding:
    """Check that torch can be imported and is new enough."""
    found = read_torch(facts)
    if not found["version"]:
        cost = f"cannot be imported, nothing runs: {found['error']}"
        return Finding(MISSING, version_of("torch") or "none", cost)
    value = found["version"] + (f", CUDA {found['cuda']}" if found["cuda"] else ", for CPUs only")
    if series(found["version"]) < NEEDED_TORCH:
        return Finding(MISSING, value, f"{'.'.join(map(str, NEEDED_TORCH))} or newer is needed")
    return Finding(OK, value)


def megatron_core(facts: Facts) -> Finding:
    """Check whether Megatron Core is the one that the run-time replacements were written for."""
    version = version_of("megatron-core")
    install = f"pip install megatron-core=={WRITTEN_AGAINST}"
    if version is None:
        return Finding(MISSING, "not installed", f"nothing runs: {install}")
    if series(version) != series(WRITTEN_AGAINST):
        return Finding(MISSING, version, f"not supported: {install}")
    if version != WRITTEN_AGAINST:
        cost = f"written and tested against {WRITTEN_AGAINST}; a run says if it has moved"
        return Finding(NOTE, version, cost)
    return Finding(OK, f"{version}, the version that this was written against")


def dataset_helper(facts: Facts) -> Finding:
    """Check Megatron's compiled index builder, which its wheel brings."""
    # Found without importing megatron.core, which takes seconds.
    spec = importlib.util.find_spec("megatron")
    places = (spec.submodule_search_locations or ()) if spec else ()
    folders = [Path(place) / "core/datasets" for place in places]
    names = [f"helpers_cpp{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    if any((folder / name).is_file() for folder in folders for name in names):
        return Finding(OK, "compiled for this Python")
    if any((folder / "Makefile").is_file() for folder in folders):
        return Finding(NOTE, "not compiled", "a run compiles it: needs make and a C++ compiler")
    cost = "no dataset can be read: install the wheel of megatron-core for this Python"
    return Finding(MISSING, "not compiled for this Python", cost)


def package(name: str, cost: str, facts: Facts) -> Finding:
    """Check that a package is installed; ``cost`` is that of not having it."""
    version = version_of(name)
    if version is None or not is_installed(name):
        return Finding(MISSING, "not installed", cost)
    return Finding(OK, version)


def wandb(facts: Facts) -> Finding:
    """Check Weights & Biases, and whether it has a key; never which."""
    version = version_of("wandb")
    if version is None:
        return Finding(MISSING, "not installed", "no W&B logs; TensorBoard's are written")
    mode = facts.environ.get("WANDB_MODE")
    has_key = bool(facts.environ.get("WANDB_API_KEY"))
    value = f"{version}, WANDB_API_KEY {'set' if has_key else 'not set'}"
    value += f", WANDB_MODE={mode}" if mode else ""
    netrc = Path(facts.environ.get("HOME", "/nonexistent"), ".netrc")  # where wandb login writes
    if not has_key and os.access(netrc, os.R_OK):
        has_key = "api.wandb.ai" in netrc.read_text(errors="replace")
    if has_key or mode in ("offline", "disabled"):
        return Finding(OK, value)
    return Finding(NOTE, value, "runs are logged offline; `wandb sync` sends them later")


def accelerator(module: str, cost: str, facts: Facts) -> Finding:
    """Check that a package with compiled parts could be imported, where it is installed."""
    if module not in facts.answers:
        return Finding(MISSING, "not installed", cost)
    text, error = facts.answers[module]
    if text:
        return Finding(OK, text.splitlines()[-1])
    if "shared object not found" in error:
        # Transformer Engine looks for NVIDIA's libraries beside itself alone.
        error += " LD_LIBRARY_PATH over the nvidia/*/lib of torch's site-packages helps"
    return Finding(MISSING, f"broken: {error}", cost)


_NEEDED = {
    "numpy": "nothing runs without it",
    "sentencepiece": "no SentencePiece tokenizer",
    "tensorboard": "no TensorBoard logs: leave --tensorboard-dir out",
    "psutil": "Megatron's checkpoint writer wants it: nothing can be saved",
}
CHECKS: dict[str, Check] = {
    "Python": python,
    "torch": torch,
    "megatron-core": megatron_core,
    "dataset helper": dataset_helper,
    **{name: partial(package, name, cost) for name, cost in _NEEDED.items()},
    "wandb": wandb,
}

_NO_TE = "no FP8, no context parallelism; --transformer-impl local --no-persist-layer-norm, slower"
_NO_APEX = "--no-gradient-accumulation-fusion, a little slower; another optimizer is taken"
_NO_FLASH = "Transformer Engine takes cuDNN's fused attention instead"
ACCELERATORS: dict[str, Check] = {
    "Transformer Engine": partial(accelerator, "transformer_engine", _NO_TE),
    "Apex": partial(accelerator, "apex", _NO_APEX),
    "flash-attn": partial(accelerator, "flash_attn", _NO_FLASH),
}
