"""Megatron's tracker file, which names the newest checkpoint, as an atomic write.

Megatron empties the file and then fills it: a run that is killed in between cannot be resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_prores.system.files import atomic_write
from megatron_prores.upstream.registry import replace, stock

_NAME = "latest_checkpointed_iteration.txt"
_REMOTE = "msc://"


class FilesWithAtomicTracker:
    """Megatron's file functions, which write the tracker file whole or not at all."""

    def __init__(self, files: Any) -> None:
        """Take Megatron's own."""
        self._files = files

    def __getattr__(self, name: str) -> Any:
        stock_function = getattr(self._files, name)
        return partial(self._open, stock_function) if name == "open" else stock_function

    @staticmethod
    def _open(stock_open: Callable[..., Any], path: Any, mode: str = "r", **kwargs: Any) -> Any:
        is_tracker = Path(str(path)).name == _NAME and not str(path).startswith(_REMOTE)
        if mode == "w" and is_tracker:
            return atomic_write(Path(path))
        return stock_open(path, mode, **kwargs)


def write_tracker_atomically() -> None:
    """Write the tracker file whole or not at all."""
    from megatron.training import checkpointing

    files = FilesWithAtomicTracker(stock(checkpointing, "maybe_msc"))
    replace(checkpointing, write_tracker_atomically, maybe_msc=files)
