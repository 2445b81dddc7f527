"""Points of a run at which a test stops it, to kill something while it is there.

As a program it is the main program with such a point, for ranks that a launcher starts.
"""

from __future__ import annotations

import functools
import importlib
import os
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAVING = "megatron.core.dist_checkpointing.strategies.filesystem_async"

POINTS = {
    "start-up": ("megatron.training.training", "setup_model_and_optimizer"),
    "before the first step": ("megatron.training.training", "train"),
    "in a step": ("megatron.core.models.gpt", "GPTModel.forward"),
    "in an evaluation": ("megatron.training.training", "evaluate"),
    "writing files": (SAVING, "_write_item"),
    "before the index": (SAVING, "FileSystemWriterAsync.finish"),
    "before the manifest": ("megatron_prores.checkpoint.saving", "write_together"),
    "before the tracker file": ("megatron_prores.upstream.tracker_file", "atomic_write"),
    "after the tracker file": ("megatron.training.wandb_utils", "on_save_checkpoint_success"),
    "the end": ("megatron_prores.training.save_lock", "SaveLock.release"),
}
"""Name -> the function before whose call the run stops."""

PATIENCE = 300.0
"""Seconds that a process waits at its point before it goes on by itself."""


def _replace(module: str, name: str, make: Callable[[Callable[..., Any]], Any]) -> None:
    owner = importlib.import_module(module)
    *inner, last = name.split(".")
    for each in inner:
        owner = getattr(owner, each)
    setattr(owner, last, make(getattr(owner, last)))


@dataclass(frozen=True)
class StopAt:
    """Called in each rank before its program: it waits at a point, and notes who its helpers are.

    A process that has come to the point makes the file ``at.<pid>``, and waits for the file ``go``.
    Writers of checkpoints make ``writer.<pid>``, loaders of data ``loader.<pid>``.
    """

    directory: str
    point: str | None
    turn: int
    """Which call of a process counts, from 1."""

    def __call__(self) -> None:
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        if self.point is not None:
            _replace(*POINTS[self.point], self._waiting)
        upstream = "megatron_prores.upstream.async_writer"
        _replace(upstream, "writer_loop", functools.partial(self._noted, "writer"))
        _replace("torch.utils.data._utils.worker", "_worker_loop", self._loader)

    def _waiting(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        @functools.wraps(stock)
        def waiting(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.turn:
                Path(self.directory, f"at.{os.getpid()}").touch()
                deadline = time.monotonic() + PATIENCE
                while not Path(self.directory, "go").exists() and time.monotonic() < deadline:
                    time.sleep(0.005)
            return stock(*args, **kwargs)

        return waiting

    def _noted(self, kind: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def noted(*args: Any, **kwargs: Any) -> Any:
            Path(self.directory, f"{kind}.{os.getpid()}").touch()
            return stock(*args, **kwargs)

        return noted

    def _loader(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        return self._noted("loader", stock)


def pids(directory: Path, kind: str) -> list[int]:
    """List the processes of a kind that are noted in a directory: at, writer, loader."""
    return sorted(int(path.suffix[1:]) for path in directory.glob(f"{kind}.*"))


def main() -> None:
    """Run the main program with the point that the first three arguments name."""
    directory, point, turn, losses, program = sys.argv[1:6]
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.distributed import preload  # noqa: F401, the device and Megatron
    from tests.distributed.recorder import RECORD, record_losses

    os.environ[RECORD] = losses
    record_losses()
    StopAt(directory, point, int(turn))()
    sys.argv = [program, *sys.argv[6:]]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
