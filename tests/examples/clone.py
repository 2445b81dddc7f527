"""A clean clone to run the examples in, as a new user would have it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def make_clone(directory: Path) -> Path:
    """Copies what git would give a new user: no build, no cache, nothing that is ignored."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, directory / name)
    return directory


def environment(**settings: str) -> dict[str, str]:
    """The environment of a user whose Python is the one that runs the tests."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PRORES_", "WANDB_")) and name != "PYTHONPATH"
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": path, "CUDA_VISIBLE_DEVICES": "", **settings}


def run(
    command: list[str], clone: Path, timeout: float = 900, **settings: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=clone,
        env=environment(**settings),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
    )
